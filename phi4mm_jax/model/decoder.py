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

_CACHED_KEYS = 2048  # of earlier tokens, that a chunk attends to at once


class Cache(NamedTuple):
    """Keys and values of all layers in P pages of S tokens each; in int8 with a scale for each token and head."""

    k: Array  # (L, P, K, S, H)
    v: Array
    k_scales: Float[Array, "L P K S"] | None = None
    v_scales: Float[Array, "L P K S"] | None = None

    @property
    def num_pages(self) -> int:
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        return self.k.shape[3]


class Rows(NamedTuple):
    """What every layer knows of the batch."""

    starts: Int[Array, " B"] | None  # tokens of each row in the cache before this call; None without a cache
    lengths: Int[Array, " B"]  # valid tokens of each row, those of this call included
    tables: Int[Array, "B M"] | None  # the i-th page of each row's tokens
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
        out, cache = attend(q, k, v, layer, rows, cache)
        (out,) = Projection("NH", {"out": "D"}, sizes, ranks, name="out")(out, rows.scales)
        return out, cache


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layer: Int[Array, ""],
    rows: Rows,
    cache: Cache | None,
) -> tuple[Float[Array, "B T N H"], Cache | None]:
    """Causal attention of new tokens, and the cache with their keys and values in it.

    With a cache, the new tokens come after `rows.starts` tokens that it has. One token (T = 1) goes anywhere; more must
    begin, and be padded, at a page's border.
    """
    if cache is None:
        return flash_attention(q, k, v, causal=True, kv_lengths=rows.lengths), None
    if q.shape[1] == 1:
        cache = _append(cache, k[:, 0], v[:, 0], layer, rows)
        out = decode_attention(
            q[:, 0], cache.k, cache.v, layer=layer, lengths=rows.lengths, tables=rows.tables,
            k_scales=cache.k_scales, v_scales=cache.v_scales,
        )  # fmt: skip
        return out[:, None], cache
    own, log_sum = flash_attention(q, k, v, causal=True, kv_lengths=rows.lengths - rows.starts, return_lse=True)
    out = _attend_to_cached(q, own, log_sum, layer, rows, cache)
    return out, _fill(cache, k, v, layer, rows)


def _attend_to_cached(q, own, log_sum, layer, rows: Rows, cache: Cache) -> Float[Array, "B T N H"]:
    """The attention to a chunk's own tokens, joined with that to the tokens before it, some pages at a time."""
    pages = max(_CACHED_KEYS // cache.page_size, 1)
    keys = pages * cache.page_size
    tables = jnp.pad(rows.tables, ((0, 0), (0, -rows.tables.shape[1] % pages)))

    def block(i, carry):
        out, log_sum = carry
        table = jax.lax.dynamic_slice_in_dim(tables, i * pages, pages, 1)
        k, v = (_gather(x, scales, layer, table, q.dtype) for x, scales in _pairs(cache))
        lengths = jnp.clip(rows.starts - i * keys, 0, keys)
        theirs, their_log_sum = flash_attention(q, k, v, causal=False, kv_lengths=lengths, return_lse=True)
        both = jnp.logaddexp(log_sum, their_log_sum)
        weight, their_weight = (
            jnp.where(jnp.isfinite(x), jnp.exp(x - both), 0.0)[..., None] for x in (log_sum, their_log_sum)
        )
        return out * weight + theirs * their_weight, both

    blocks = jax.lax.div(rows.starts.max() + keys - 1, keys)
    out, _ = jax.lax.fori_loop(0, blocks, block, (own.astype(jnp.float32), log_sum))
    return out.astype(q.dtype)


def _pairs(cache: Cache):
    return (cache.k, cache.k_scales), (cache.v, cache.v_scales)


def _gather(x, scales, layer, table: Int[Array, "B M"], dtype) -> Float[Array, "B S K H"]:
    """The tokens of some pages of each row, one after the other."""
    taken = x[layer, table]  # (B, M, K, S, H)
    if scales is not None:
        taken = taken * scales[layer, table][..., None]
    taken = taken.astype(dtype).swapaxes(2, 3)
    return taken.reshape(taken.shape[0], -1, *taken.shape[3:])


def _append(cache: Cache, k: Float[Array, "B K H"], v: Float[Array, "B K H"], layer, rows: Rows) -> Cache:
    """One token a row, after its last; rows without tokens write nothing."""
    position = rows.lengths - 1
    page = jnp.take_along_axis(rows.tables, jnp.maximum(position, 0)[:, None] // cache.page_size, 1)[:, 0]
    page = jnp.where(rows.lengths > 0, page, cache.num_pages)  # out of range: dropped
    slot = position % cache.page_size

    def put(old, new):
        return old.at[layer, page, :, slot].set(new, mode="drop")

    return _put(cache, put, k, v)


def _fill(cache: Cache, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], layer, rows: Rows) -> Cache:
    """Whole pages, those after a row's last token excepted."""
    size = cache.page_size
    count = k.shape[1] // size
    index = rows.starts[:, None] // size + jnp.arange(count)  # (B, pages)
    page = jnp.take_along_axis(rows.tables, jnp.minimum(index, rows.tables.shape[1] - 1), 1)
    page = jnp.where(index * size < rows.lengths[:, None], page, cache.num_pages)

    def put(old, new):
        paged = new.reshape(new.shape[0], count, size, *new.shape[2:]).swapaxes(2, 3)  # (B, pages, K, S, ...)
        return old.at[layer, page].set(paged, mode="drop")

    return _put(cache, put, k, v)


def _put(cache: Cache, put, k, v) -> Cache:
    if cache.k_scales is None:
        return Cache(put(cache.k, k.astype(cache.k.dtype)), put(cache.v, v.astype(cache.v.dtype)))
    (k, k_scales), (v, v_scales) = quantize(k), quantize(v)
    return Cache(put(cache.k, k), put(cache.v, v), put(cache.k_scales, k_scales), put(cache.v_scales, v_scales))


def quantize(x: Float[Array, "... H"]) -> tuple[Array, Float[Array, "..."]]:
    """As int8, and the scale of each vector: its largest value over 127."""
    scale = jnp.abs(x.astype(jnp.float32)).max(-1) / 127.0
    scaled = x.astype(jnp.float32) / jnp.where(scale > 0, scale, 1.0)[..., None]
    return jnp.round(scaled).astype(jnp.int8), scale


class MLP(nn.Module):
    config: BlockConfig

    @nn.compact
    def __call__(self, x, rows: Rows):
        sizes, ranks = self.config.sizes, dict(self.config.ranks)
        gate, up = Projection("D", {"gate": "F", "up": "F"}, sizes, ranks, name="gate_up")(x, rows.scales)
        return Projection("F", {"down": "D"}, sizes, ranks, name="down")(gated(up, gate), rows.scales)[0]
