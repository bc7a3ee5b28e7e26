"""The network: Linen modules that declare parameters, and plain functions of arrays."""

from phi4mm_jax.model.kv_cache import KVCache
from phi4mm_jax.model.phi4mm import Phi4MM

__all__ = ["KVCache", "Phi4MM"]
