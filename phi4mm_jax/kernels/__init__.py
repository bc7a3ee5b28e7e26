"""Attention and linear maps: one API each, one file per implementation."""

from phi4mm_jax.kernels.api import append_tokens, decode_attention, flash_attention
from phi4mm_jax.kernels.cached import cached_attention
from phi4mm_jax.kernels.linear import linear
from phi4mm_jax.kernels.partials import merge_partials

__all__ = ["append_tokens", "cached_attention", "decode_attention", "flash_attention", "linear", "merge_partials"]
