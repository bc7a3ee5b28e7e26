"""The decoder: Phi-4-mini with a mixture of LoRAs.

Pre-norm blocks of grouped-query attention with partial LongRoPE and of SwiGLU; embedding and head share their weights.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from phi4mm_jax.config import DecoderConfig
from phi4mm_jax.kernels import decode_attention, flash_attention
from phi4mm_jax.model.layers import Remat, RMSNorm, Sizes, declare, run_layers
from phi4mm_jax.model.lora import Projection, RowScales
from phi4mm_jax.model.rope import rotate
from phi4mm_jax.precision import gated, precision_of


class Cache(NamedTuple):
    """Keys and values of all layers, heads before positions: what one head attends to lies in one piece."""

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]


class Rows(NamedTuple):
    """What every layer knows of the batch."""

    lengths: Int[Array, " B"]  # valid tokens of each row, those of this call included
    cos: Float[Array, "B T R"]
    sin: Float[Array, "B T R"]
    scales: RowScales


@dataclass(frozen=True)
class BlockConfig:
    """The decoder's sizes with the adapters' ranks; hashable, as Linen modules want their attributes."""

    decoder: DecoderConfig
    ranks: tuple[tuple[str, int], ...]

    @property
    def num_layers(self) -> int:
        return self.decoder.num_layers

    @property
    def sizes(self) -> Sizes:
        d = self.decoder
        return {
            "D": d.embed_dim, "N": d.num_heads, "K": d.num_kv_heads, "H": d.head_size, "F": d.mlp_dim,
            "V": d.vocab_size,
        }  # fmt: skip


class Decoder(nn.Module):
    config: BlockConfig
    scan: bool
    remat: Remat

    def setup(self):
        self.embedding = declare(self, "embedding", "VD", self.config.sizes)

    def embed(self, tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
        return self.embedding[tokens].astype(dtype)

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """In float32, by the transposed embedding."""
        return jnp.einsum(
            "...D,VD->...V", x, self.embedding.astype(x.dtype), preferred_element_type=jnp.float32,
            precision=precision_of(x.dtype),
        )  # fmt: skip

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], rows: Rows, cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        x, cache = run_layers(Block, self.config, (x, cache), rows, scan=self.scan, remat=self.remat)
        return RMSNorm(self.config.sizes, self.config.decoder.norm_eps, name="norm")(x), cache


class Block(nn.Module):
    config: BlockConfig

    @nn.compact
    def __call__(self, carry, layer, rows: Rows):
        x, cache = carry
        sizes, eps = self.config.sizes, self.config.decoder.norm_eps
        attended, cache = Attention(self.config, name="attention")(
            RMSNorm(sizes, eps, name="attention_norm")(x), layer, rows, cache
        )
        x = x + attended
        x = x + MLP(self.config, name="mlp")(RMSNorm(sizes, eps, name="mlp_norm")(x), rows)
        return (x, cache), None


class Attention(nn.Module):
    config: BlockConfig

    @nn.compact
    def __call__(self, x, layer, rows: Rows, cache: Cache | None):
        sizes, ranks = self.config.sizes, dict(self.config.ranks)
        q, k, v = Projection("D", {"q": "NH", "k": "KH", "v": "KH"}, sizes, ranks, name="qkv")(x, rows.scales)
        q, k = rotate(q, rows.cos, rows.sin), rotate(k, rows.cos, rows.sin)
        out, cache = attend(q, k, v, layer, rows.lengths, cache)
        (out,) = Projection("NH", {"out": "D"}, sizes, ranks, name="out")(out, rows.scales)
        return out, cache


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layer: Int[Array, ""],
    lengths: Int[Array, " B"],
    cache: Cache | None,
) -> tuple[Float[Array, "B T N H"], Cache | None]:
    """Causal attention of new tokens, and the cache with their keys and values in it.

    One token (T = 1) is each row's last and attends to the row's whole cache; more are the row from its beginning.
    """
    if cache is not None and q.shape[1] == 1:
        cache = Cache(*(_append(old, new[:, 0], layer, lengths - 1) for old, new in zip(cache, (k, v), strict=True)))
        return decode_attention(q[:, 0], cache.k, cache.v, layer=layer, lengths=lengths)[:, None], cache
    if cache is not None:
        cache = Cache(*(_fill(old, new, layer) for old, new in zip(cache, (k, v), strict=True)))
    return flash_attention(q, k, v, causal=True, kv_lengths=lengths), cache


def _append(cache: Float[Array, "L B K S H"], new: Float[Array, "B K H"], layer, positions: Int[Array, " B"]):
    return cache.at[layer, jnp.arange(new.shape[0]), :, positions].set(new.astype(cache.dtype))


def _fill(cache: Float[Array, "L B K S H"], new: Float[Array, "B T K H"], layer):
    return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype).transpose(0, 2, 1, 3)[None], (layer, 0, 0, 0, 0))


class MLP(nn.Module):
    config: BlockConfig

    @nn.compact
    def __call__(self, x, rows: Rows):
        sizes, ranks = self.config.sizes, dict(self.config.ranks)
        gate, up = Projection("D", {"gate": "F", "up": "F"}, sizes, ranks, name="gate_up")(x, rows.scales)
        return Projection("F", {"down": "D"}, sizes, ranks, name="down")(gated(up, gate), rows.scales)[0]
