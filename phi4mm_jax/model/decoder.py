"""The decoder: Phi-4-mini with a mixture of LoRAs.

Pre-norm blocks of grouped-query attention with partial LongRoPE and of SwiGLU; embedding and LM head are tied.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from phi4mm_jax.config import DecoderConfig, LoraConfig
from phi4mm_jax.kernels import cached_attention, decode_attention, flash_attention, linear, merge_partials
from phi4mm_jax.kernels.cached import count_in_part
from phi4mm_jax.kernels.linear import lookup
from phi4mm_jax.kernels.partials import merge_devices
from phi4mm_jax.kernels.ring import ring_attention
from phi4mm_jax.mesh import LENGTH, Axes, constrain, context_part, context_size, over_mesh
from phi4mm_jax.model.kv_cache import CachedInputs, KVCache, append, cache_axes, fill, inputs_of_part, tokens_of_part
from phi4mm_jax.model.layers import Remat, RMSNorm, Sizes, declare, run_layers
from phi4mm_jax.model.lora import DOWN, GATE_UP, OUT, QKV, Projection, RowScales
from phi4mm_jax.model.rope import rotate
from phi4mm_jax.precision import gated


class AttentionInputs(NamedTuple):
    """Lengths, rotations and adapters of a batch, for every layer."""

    lengths: Int[Array, " B"]  # valid tokens of each row, those of this call and those in the cache
    cos: Float[Array, "B T H"]
    sin: Float[Array, "B T H"]
    scales: RowScales
    cached: CachedInputs | None = None
    segments: Int[Array, "B T"] | None = None  # packed samples: no attention across them


@dataclass(frozen=True)
class BlockConfig:
    """Sizes of the decoder and its adapters; hashable, as Flax requires of module fields."""

    decoder: DecoderConfig
    loras: tuple[tuple[str, LoraConfig], ...]  # by collection

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.decoder.num_layers

    @property
    def sizes(self) -> Sizes:
        """Sizes of axes, by letter."""
        d = self.decoder
        return {
            "D": d.embed_dim, "N": d.num_heads, "K": d.num_kv_heads, "H": d.head_size, "F": d.mlp_dim,
            "V": d.vocab_size,
        }  # fmt: skip


class Decoder(nn.Module):
    """Layers and the final norm; the embedding, which is also the head."""

    config: BlockConfig
    scan: bool
    remat: Remat

    def setup(self):
        self.embedding = declare(self, "embedding", "VD", self.config.sizes)

    def embed(self, tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
        """Return the embeddings of tokens, in a dtype."""
        return lookup(self.embedding, tokens, dtype)

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Return the logits in float32, by the tied embedding."""
        return linear("...D,VD->...V", x, self.embedding, result=jnp.float32)

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], rows: AttentionInputs, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        x, cache = run_layers(Block, self.config, (x, cache), rows, scan=self.scan, remat=self.remat)
        return RMSNorm(self.config.sizes, self.config.decoder.norm_eps, name="norm")(x), cache


class Block(nn.Module):
    """One layer: attention, then an MLP, each behind a norm and added to its input."""

    config: BlockConfig

    @nn.compact
    def __call__(
        self, carry: tuple[Float[Array, "B T D"], KVCache | None], layer: Int[Array, ""], rows: AttentionInputs
    ) -> tuple[tuple[Float[Array, "B T D"], KVCache | None], None]:
        x, cache = carry
        x = constrain(x, "batch", "length")
        sizes, eps = self.config.sizes, self.config.decoder.norm_eps
        attended, cache = Attention(self.config, name="attention")(
            RMSNorm(sizes, eps, name="attention_norm")(x), layer, rows, cache
        )
        x = checkpoint_name(x + attended, "residual")
        x = x + MLP(self.config, name="mlp")(RMSNorm(sizes, eps, name="mlp_norm")(x), rows)
        return (x, cache), None


class Attention(nn.Module):
    """Causal attention with rotated queries and keys: within a row or its segments, or to the cache."""

    config: BlockConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], layer: Int[Array, ""], rows: AttentionInputs, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        sizes, loras = self.config.sizes, dict(self.config.loras)
        q, k, v = Projection(*QKV, sizes, loras, name="qkv")(x, rows.scales)
        half = self.config.decoder.rope.rotary_size // 2
        q, k = (rotate(x, rows.cos, rows.sin, half) for x in (q, k))
        if rows.segments is not None and context_size() > 1:
            out = ring_attention(q, k, v, rows.segments)
        elif cache is None or rows.cached is None:
            out = flash_attention(
                q, k, v, causal=True, kv_lengths=rows.lengths, q_segments=rows.segments, kv_segments=rows.segments
            )
        else:
            out, cache = attend(q, k, v, layer, rows.cached, cache)
        (out,) = Projection(*OUT, sizes, loras, name="out")(out, rows.scales)
        return out, cache


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layer: Int[Array, ""],
    rows: CachedInputs,
    cache: KVCache,
) -> tuple[Float[Array, "B T N H"], KVCache]:
    """Write the new keys and values, then attend causally to the cache; return output and updated cache.

    Less than a page of tokens goes anywhere; whole pages must begin, and be padded, at a page's border. On a mesh each
    device has its heads of all rows, and along `context` its part of every page; no key or value of the cache leaves
    it.
    """
    heads, pages = Axes(None, None, "heads", None), cache_axes(cache)
    tables = CachedInputs(Axes(None), Axes(None), *[Axes(None, None)] * 3)  # type: ignore
    inputs = heads, heads, heads, Axes(), tables, pages
    out = heads if rows.pages.shape[1] == q.shape[1] else Axes(None, "length", "heads", None)
    return over_mesh(_attend, (q, k, v, layer, rows, cache), inputs, (out, pages), rows=1, heads=k.shape[2])


def _attend(q, k, v, layer, rows: CachedInputs, cache: KVCache) -> tuple[Float[Array, "B T N H"], KVCache]:
    part, parts = context_part()
    size, count = cache.page_size, q.shape[1]
    few = rows.pages.shape[1] == count  # each token has its own place
    here = inputs_of_part(rows, cache, count, part, parts)
    k, v = (x if few else tokens_of_part(x, size, part, parts) for x in (k, v))
    cache = (append if few else fill)(cache, k, v, layer, here)  # before it is read, or else XLA would copy it
    pages: Any = {"layer": layer, "tables": rows.tables, "k_scales": cache.k_scales, "v_scales": cache.v_scales}
    if not few:
        if parts == 1:
            return cached_attention(q, cache.k, cache.v, starts=rows.starts, lengths=rows.lengths, **pages), cache
        found: Any = cached_attention(
            q, cache.k, cache.v, starts=rows.starts, lengths=rows.lengths, part=(part, parts), return_lse=True,
            out_dtype=jnp.float32, **pages,
        )  # fmt: skip
        out, lse = found
        return merge_devices(out, lse, LENGTH[0]).astype(q.dtype), cache
    lengths, queries = rows.lengths, q
    if count == 1:
        queries = q[:, 0]
    else:
        lengths = jnp.minimum(rows.starts[:, None] + jnp.arange(1, count + 1), lengths[:, None])  # of each query
    if parts == 1:
        return decode_attention(queries, cache.k, cache.v, lengths=lengths, **pages).reshape(q.shape), cache
    lengths = count_in_part(lengths, size, part, parts)
    found = decode_attention(queries, cache.k, cache.v, lengths=lengths, return_partials=True, **pages)
    out, _, total = merge_partials(*(jax.lax.all_gather(x, LENGTH[0]) for x in found))
    return (out / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype).reshape(q.shape), cache


class MLP(nn.Module):
    """Gated MLP: down(up * silu(gate))."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], rows: AttentionInputs) -> Float[Array, "B T D"]:
        sizes, loras = self.config.sizes, dict(self.config.loras)
        parts = Projection(*GATE_UP, sizes, loras, name="gate_up")(x, rows.scales)
        gate, up = (checkpoint_name(part, "mlp") for part in parts)
        return Projection(*DOWN, sizes, loras, is_separate=True, name="down")(gated(up, gate), rows.scales)[0]
