"""Paged KV cache: allocate, write, copy pages, quantise.

Pages are written and copied one by one, in the cache's own memory layout: a scatter or gather would make XLA for TPUs
transpose (relayout) the whole cache, and back (docs/kernels.md). On GPUs each of these would be a launch, and a scatter
along one axis of all tokens and heads is in place.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from phi4mm_jax.config import DecoderConfig
from phi4mm_jax.kernels import append_tokens, gpu
from phi4mm_jax.kernels.cached import row_major
from phi4mm_jax.kernels.pages import as_cached
from phi4mm_jax.kernels.pallas_gpu import scatter
from phi4mm_jax.mesh import Axes, over_mesh


class KVCache(NamedTuple):
    """Keys and values of all layers in P pages of S tokens each; in int8 with one scale per token and head.

    The last one is the scratch page: idle rows and padding are written there.
    """

    k: Array  # (L, P, K, S, H)
    v: Array
    k_scales: Float[Array, "L P K S"] | None = None
    v_scales: Float[Array, "L P K S"] | None = None

    @classmethod
    def allocate(cls, config: DecoderConfig, num_pages: int, page_size: int, dtype: Any) -> "KVCache":
        """Return zeros: `num_pages` pages, shared by all sequences, and the scratch page.

        With dtype int8, keys and values are quantised by token and head.
        """
        shape = (config.num_layers, num_pages + 1, config.num_kv_heads, page_size, config.head_size)
        pages = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        if jnp.dtype(dtype) != jnp.int8:
            return cls(*pages)
        return cls(*pages, jnp.zeros(shape[:-1], jnp.float32), jnp.zeros(shape[:-1], jnp.float32))

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Keys and values, and their scales where they are int8."""
        return tuple(x for x in self if x is not None)

    @property
    def num_pages(self) -> int:
        """Number of pages without the scratch page, which is also that page's index."""
        return self.k.shape[1] - 1

    @property
    def page_size(self) -> int:
        """Tokens of a page, or of a device's part of one."""
        return self.k.shape[3]


class CachedInputs(NamedTuple):
    """Places of a call's rows in the cache; see `cached_inputs`."""

    starts: Int[Array, " B"]  # tokens of each row in the cache before this call
    lengths: Int[Array, " B"]  # and after it
    tables: Int[Array, "B M"]  # page table: the i-th page of each row's tokens
    pages: Int[Array, "B n"]  # that the new tokens are written to: whole ones, or one of each token
    slots: Int[Array, "B n"]  # from which one on, in each of them


def cached_inputs(
    cache: KVCache, starts: Int[Array, " B"], lengths: Int[Array, " B"], tables: Int[Array, "B M"], new: int
) -> CachedInputs:
    """Find where `new` tokens of each row go, once for all layers: whole pages, or less than one token by token.

    Those that are not written, of rows that rest and after a row's last token, go to the scratch page.
    """
    size = cache.page_size
    step = 1 if new % size else size
    first = jnp.maximum(lengths - 1, 0) if new == 1 else starts
    places = first[:, None] + step * jnp.arange(new // step)  # (B, n)
    index = places // size
    pages = jnp.take_along_axis(tables, jnp.minimum(index, tables.shape[1] - 1), 1)
    pages = jnp.where(places < lengths[:, None], pages, cache.num_pages)
    return CachedInputs(starts, lengths, tables, pages, places % size if step == 1 else jnp.zeros_like(pages))


def cache_axes(cache: KVCache) -> KVCache:
    """Axes of the cache's arrays, for `over_mesh`."""
    return jax.tree.map(lambda x: Axes(None, None, "heads", "length", *[None] * (x.ndim - 4)), cache)


def inputs_of_part(
    rows: CachedInputs, cache: KVCache, new: int, part: Int[Array, ""] | int, parts: int
) -> CachedInputs:
    """Return the inputs of a device that has one of several parts of every page: the places of what it writes.

    New tokens that each have a place are in one part: the other devices write them into the scratch page. Of whole
    pages every device writes its part, to the same places.
    """
    if parts == 1 or rows.pages.shape[1] < new:
        return rows
    owner, slots = rows.slots // cache.page_size, rows.slots % cache.page_size
    return rows._replace(pages=jnp.where(owner == part, rows.pages, cache.num_pages), slots=slots)


def tokens_of_part(
    x: Float[Array, "B T K H"], size: int, part: Int[Array, ""] | int, parts: int
) -> Float[Array, "B X K H"]:
    """Take the tokens of whole pages that are in one of their parts, of `size` tokens each."""
    if parts == 1:
        return x
    pieces = x.reshape(len(x), -1, parts, size, *x.shape[2:])
    return jax.lax.dynamic_index_in_dim(pieces, part, 2, keepdims=False).reshape(len(x), -1, *x.shape[2:])


@jax.named_scope("cache_write")
def append(
    cache: KVCache, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], layer: Int[Array, ""], rows: CachedInputs
) -> KVCache:
    """Write a few tokens a row, each into its place: the first of all rows, then the second."""
    if gpu.target() and k.shape[1] > 1:
        return fill(cache, k, v, layer, rows)
    written: Any = cache.arrays
    for t in range(k.shape[1]):  # two tokens of a row may share a page
        new = k[:, t], v[:, t]
        written = append_tokens(written, new, layer=layer, pages=rows.pages[:, t], slots=rows.slots[:, t])
        if written is None:
            return fill(cache, k, v, layer, rows)
    return KVCache(*written)


@jax.named_scope("cache_write")
def fill(
    cache: KVCache, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], layer: Int[Array, ""], rows: CachedInputs
) -> KVCache:
    """Cut each row into pieces, as many as it has pages, and put each into its page, one after the other."""
    batch, count = rows.pages.shape
    size = k.shape[1] // count

    def put(old, new):
        if gpu.target():
            pieces = new.reshape(*new.shape[:2], count, size, *new.shape[3:]).swapaxes(1, 2)
            return scatter(old, pieces, layer, rows.pages, rows.slots)

        def one(i, x):
            b, n = i // count, i % count
            piece = jax.lax.dynamic_slice_in_dim(new[b], n * size, size, 1)  # (K, T / n, ...)
            place = layer, rows.pages[b, n], 0, rows.slots[b, n], *[0] * (x.ndim - 4)
            return row_major(jax.lax.dynamic_update_slice(row_major(x), piece[None, None], place))

        return jax.lax.fori_loop(0, batch * count, one, old)

    in_layout = [row_major(x.swapaxes(1, 2)) for x in (k, v)]  # (B, K, T, H), materialised so, not transposed later
    return KVCache(*map(put, cache.arrays, as_cached(in_layout, cache.k.dtype)))


@jax.named_scope("copy_on_write")
def copy_pages(cache: KVCache, sources: Int[Array, " C"], targets: Int[Array, " C"], count: Int[Array, ""]) -> KVCache:
    """Copy the first `count` pages of `sources` to `targets`, of all layers; no target may be a source.

    On a mesh each device copies its heads.
    """

    def copy(cache, sources, targets, count):
        def one(i, x):
            x = row_major(x)
            page = jax.lax.dynamic_slice_in_dim(x, sources[i], 1, 1)
            return row_major(jax.lax.dynamic_update_slice_in_dim(x, page, targets[i], 1))

        return jax.tree.map(lambda x: jax.lax.fori_loop(0, count, one, x), cache)

    pages = cache_axes(cache)
    inputs = pages, Axes(None), Axes(None), Axes()
    return over_mesh(copy, (cache, sources, targets, count), inputs, pages, rows=1, heads=cache.k.shape[2])
