"""Causal attention of several new tokens to a paged cache that holds them, too: a chunk of prefill."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from phi4mm_jax.errors import InputError
from phi4mm_jax.kernels import gpu
from phi4mm_jax.kernels.api import check_pages, check_shapes, flash_attention
from phi4mm_jax.kernels.pages import as_floats
from phi4mm_jax.kernels.partials import merge_outputs
from phi4mm_jax.kernels.registry import IMPLEMENTATIONS, choose, find_operation

KEYS_PER_BLOCK = 2048  # that are attended to at once where no kernel reads pages
KEYS_PER_BLOCK_ON_GPU = 16384  # likewise: a block costs launches, a wait of the host and a pass over the output


@jax.named_scope("cached_attention")
def cached_attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    *,
    layer: Int[Array, ""] | int,
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    tables: Int[Array, "B M"],
    k_scales: Float[Array, "L P K S"] | None = None,
    v_scales: Float[Array, "L P K S"] | None = None,
    part: tuple[Int[Array, ""] | int, int] = (0, 1),
    scale: float | None = None,
    return_lse: bool = False,
    out_dtype: Any = None,
    implementation: str | None = None,
) -> Any:
    """Attend causally with T queries a row, at tokens from `starts[b]` on, to the first `lengths[b]` keys of `layer`.

    How a token's attention is rounded depends on its position alone: neither on where its chunk began nor on which
    pages were shared. On NVIDIA GPUs it depends on where its chunk began.

    Args:
        k, v: pages (L, P, K, S, H), in q's dtype, its bits, or int8 with scales; see `decode_attention`.
        starts: multiples of the page size, as T is.
        lengths: those of the new tokens included; queries behind them give any value.
        tables: on NVIDIA GPUs with no more pages than the T tokens fill, all rows must start at 0.
        part: (i, n) where pages are cut into n parts of S tokens each, and these are the i-th; `starts` and T are then
            multiples of n * S. A query may have no key here: the results of all parts are to be merged.
        implementation: None reads pages in place where a kernel does so, and else gathers them block by block.

    Returns:
        (B, T, N, H) in `out_dtype`, q's by default; with `return_lse` also the logarithm of the sum of the
        exponentials of each query's scores, (B, T, N) in float32, -inf for a query without keys.

    Raises:
        InputError: a shape, dtype or implementation that is not supported; the message names the argument.
    """
    if q.ndim != 4 or tables is None:
        raise InputError(f"cached_attention: q {q.shape} must be (B, T, N, H), and without tables are no pages")
    scales = check_pages("cached_attention", q, k, v, tables, k_scales, v_scales)
    check_shapes("cached_attention", starts=(starts, q.shape[:1]), lengths=(lengths, q.shape[:1]))
    if q.shape[1] % (k.shape[3] * part[1]):
        raise InputError(
            f"cached_attention: {q.shape[1]} queries are not whole pages, of {k.shape[3]} tokens in {part[1]} parts"
        )
    arguments = q, k, v, jnp.asarray(layer, jnp.int32), starts, lengths, tables, scales, jnp.asarray(part[0], jnp.int32)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    out_dtype = jnp.dtype(q.dtype if out_dtype is None else out_dtype)
    if (found := _reader(implementation, arguments)) is not None:
        out, lse = found(*arguments, parts=part[1], scale=factor, out_dtype=out_dtype)
    elif gpu.target() and part[1] == 1:
        out, lse = _attend_on_gpu(*arguments[:-1], scale=factor, implementation=implementation)
    else:
        out, lse = _attend_by_blocks(*arguments, parts=part[1], scale=factor, implementation=implementation)
    out = out.astype(out_dtype)
    return (out, lse) if return_lse else out


def _reader(name: str | None, arguments: tuple) -> Any:
    """Return what reads pages in place, if any does."""
    if name is not None:
        named = IMPLEMENTATIONS.get(name)
        return choose("cached_attention", name, "cached", *arguments).cached if named is None or named.cached else None
    return find_operation("cached", *arguments)


def count_in_part(lengths: Int[Array, "..."], size: int, part: Int[Array, ""] | int, parts: int) -> Int[Array, "..."]:
    """Count those of a row's first tokens that are in one part of its pages, of `size` tokens each."""
    whole, rest = jax.lax.div(lengths, size * parts), jax.lax.rem(lengths, size * parts)
    return whole * size + jnp.clip(rest - part * size, 0, size)


def _attend_on_gpu(
    q, k, v, layer, starts, lengths, tables, scales, *, scale: float, implementation: str | None
) -> tuple[Array, Array]:
    """Compute the output in float32, and the log-sum-exp (B, T, N): by calls that cuDNN has, without offsets.

    Causally to the chunk's own keys, and to those before it block by block. What is repeated or chosen as the device
    finds has the host wait for it, in each layer anew: so nothing is chosen, and a first chunk, which `tables` has no
    page before, has no loop.
    """
    size, count = k.shape[3], q.shape[1]
    k_scales, v_scales = scales or (None, None)

    def attend(table, lengths, *, causal: bool):
        keys, values = (_gather(x, s, layer, table, table.shape[1], q.dtype) for x, s in ((k, k_scales), (v, v_scales)))
        return flash_attention(
            q, keys, values, causal=causal, scale=scale, kv_lengths=lengths, return_lse=True, out_dtype=jnp.float32,
            implementation=implementation,
        )  # fmt: skip

    own = jnp.minimum(starts[:, None] // size + jnp.arange(count // size), tables.shape[1] - 1)
    found = attend(jnp.take_along_axis(tables, own, 1), jnp.clip(lengths - starts, 0, count), causal=True)
    if tables.shape[1] * size <= count:
        return found
    pages = _pages_per_block(size, tables)
    keys = pages * size
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % pages)))

    def block(i, carry):
        table = jax.lax.dynamic_slice_in_dim(tables, i * pages, pages, 1)
        before = jnp.clip(jnp.minimum(starts, lengths) - i * keys, 0, keys)
        return merge_outputs(carry, attend(table, before, causal=False))

    return jax.lax.fori_loop(0, jax.lax.div(starts.max() + keys - 1, keys), block, found)


def _attend_by_blocks(
    q, k, v, layer, starts, lengths, tables, scales, part, *, parts: int, scale: float, implementation: str | None
) -> tuple[Array, Array]:
    """Compute the output in float32, and the log-sum-exp (B, T, N).

    Blocks of keys begin at multiples of their size in the row, and their results stay in float32 until all are joined.
    """
    size = k.shape[3]
    pages = _pages_per_block(size, tables)
    keys = pages * size
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % pages)))
    k_scales, v_scales = scales or (None, None)
    offsets = starts
    if parts > 1:  # of each query: the last of its keys that are here lies before it
        new = jnp.arange(q.shape[1])
        offsets = count_in_part(starts[:, None] + new + 1, size, part, parts) - 1 - new
        lengths = count_in_part(lengths, size, part, parts)

    def block(i, carry):
        table = jax.lax.dynamic_slice_in_dim(tables, i * pages, pages, 1)
        of_block = jnp.clip(lengths - i * keys, 0, keys)
        filled = jax.lax.div(of_block.max() + size - 1, size)
        found = flash_attention(
            q, *(_gather(x, s, layer, table, filled, q.dtype) for x, s in ((k, k_scales), (v, v_scales))), causal=True,
            scale=scale, q_offset=offsets - i * keys, kv_lengths=of_block, return_lse=True, out_dtype=jnp.float32,
            implementation=implementation,
        )  # fmt: skip
        return merge_outputs(carry, found)

    start = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf)
    return jax.lax.fori_loop(0, jax.lax.div(lengths.max() + keys - 1, keys), block, start)


def _pages_per_block(size: int, tables: Int[Array, "B M"]) -> int:
    if not gpu.target():
        return max(KEYS_PER_BLOCK // size, 1)
    return min(max(KEYS_PER_BLOCK_ON_GPU // size, 1), tables.shape[1])


@jax.named_scope("cache_gather")
def _gather(
    x: Array,
    scales: Array | None,
    layer: Int[Array, ""],
    table: Int[Array, "B M"],
    filled: Int[Array, ""] | int,
    dtype: Any,
) -> Float[Array, "B S K H"]:
    """Gather keys or values of each row's first pages.

    Args:
        filled: pages of each row to take; zeros follow, or on GPUs the other pages of the table.
    """
    batch, count = table.shape

    def gathered(x):
        _, _, heads, size, *rest = x.shape
        if gpu.target():
            return x[layer, table].swapaxes(2, 3).reshape(batch, count * size, heads, *rest)

        def one(i, out):
            b, n = jax.lax.div(i, filled), jax.lax.rem(i, filled)
            page = jax.lax.dynamic_slice(x, (layer, table[b, n], *[0] * (x.ndim - 2)), (1, 1, heads, size, *rest))
            return jax.lax.dynamic_update_slice(out, page[0], (b, 0, n * size, *[0] * len(rest)))

        out = jnp.zeros((batch, heads, count * size, *rest), x.dtype)
        return row_major(jax.lax.fori_loop(0, batch * filled, one, out)).swapaxes(1, 2)

    return as_floats(gathered(x), None if scales is None else gathered(scales), dtype)


def row_major(x: Array) -> Array:
    """Constrain the layout: bytes in the order of the axes."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
