"""Prefill on TPUs: causal attention of new tokens to a paged cache that holds them and all before them.

Pages are read where they lie: as in `pallas_tpu_flash` a step is a block of queries of one key head, which streams its
tiles of keys; each tile is brought page by page. A block of queries never crosses a page's border, and pages lie at
multiples of their size, so that how a token's attention is rounded depends on its position alone.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from phi4mm_jax.kernels.limits import LOG2_E, MASKED
from phi4mm_jax.kernels.pallas_tpu_tiles import (
    MASKED_CHUNK,
    NT,
    SAFE_SUM,
    Call,
    Grid,
    Softmax,
    cleared,
    compiler_params,
    dot,
    make_grid,
    positions,
)
from phi4mm_jax.kernels.tpu import LANES, Target, block, stream


class _Scalars(NamedTuple):
    """Prefetched scalars; the first two of every block of queries, flattened over (B, blocks)."""

    clear_stop: Int[Array, " X"]  # in the tiles before it no pair is masked
    pages: Int[Array, " X"]  # that some query of the block may attend to
    starts: Int[Array, " B"]
    lengths: Int[Array, " B"]
    tables: Int[Array, " Y"]  # (B, M)
    layer: Int[Array, " 1"]
    part: Int[Array, " 1"]


def unsupported(q, k) -> str | None:
    """Return why this kernel cannot take such queries (B, T, N, H) and pages (L, P, K, S, H), if so."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q has dtype {q.dtype}; implementation 'pallas_tpu' takes bfloat16 and float32"
    if k.shape[3] % LANES or k.shape[4] % LANES:
        return f"k {k.shape}: implementation 'pallas_tpu' takes pages and head sizes that are multiples of {LANES}"
    if q.shape[1] % k.shape[3]:
        return f"q {q.shape}: implementation 'pallas_tpu' takes whole pages of queries, here of {k.shape[3]}"
    return None


def cached_attention(
    q, k, v, layer, starts, lengths, tables, scales, part, *, parts: int, scale: float, out_dtype, target: Target
) -> tuple[Array, Array]:
    """Compute the output and the log-sum-exp (B, T, N) of `phi4mm_jax.kernels.cached_attention`."""
    batch, q_len, heads, size = q.shape
    _, _, kv_heads, page, _ = k.shape
    group = heads // kv_heads
    bq = block(page, target.blocks.rows // group)
    pages = min(max(target.blocks.keys // page, 1), tables.shape[1])  # of a tile
    grid = make_grid(batch, kv_heads, q_len // bq, 1, target)
    scalars = _scalars(layer, starts, lengths, tables, part, parts, q_len, bq, page, pages)
    groups = q.transpose(0, 2, 1, 3).reshape(batch, kv_heads, group, q_len, size)
    main_memory = pl.BlockSpec(memory_space=pltpu.HBM)
    tile = pltpu.VMEM((2, pages * page, size), k.dtype)
    call = Call(True, scale, out_dtype, target)
    out, log_sum = pl.pallas_call(
        partial(_kernel, call=call, grid=grid, pages=pages, page=page, parts=parts),
        name="phi4mm_cached",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(grid.cores, grid.steps),
            in_specs=[
                grid.spec((None, None, group, bq, size), lambda row, head, i: (row, head, 0, i, 0)),
                main_memory,
                main_memory,
                scales and (main_memory, main_memory),
            ],
            out_specs=[
                grid.spec((None, None, group, bq, size), lambda row, head, i: (row, head, 0, i, 0)),
                grid.spec((None, None, group, bq), lambda row, head, i: (row, head, 0, i)),
            ],
            scratch_shapes=[
                tile,
                tile,
                scales and (pltpu.VMEM((2, pages, kv_heads, page), jnp.float32),) * 2,
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                Softmax.scratch(group * bq, size),
                Softmax.scratch(group * bq, size),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(groups.shape, out_dtype),
            jax.ShapeDtypeStruct(groups.shape[:-1], jnp.float32),
        ],
        compiler_params=compiler_params(call),
        interpret=target.interpret,
    )(scalars, groups, k, v, scales)
    out, log_sum = out.reshape(batch, heads, q_len, size), log_sum.reshape(batch, heads, q_len)
    return out.transpose(0, 2, 1, 3), log_sum.transpose(0, 2, 1)


def _scalars(layer, starts, lengths, tables, part, parts: int, q_len: int, bq: int, page: int, pages: int) -> _Scalars:
    """Plan the tiles of each block of queries. Page n of a row begins at token (n * parts + part) * page."""
    start = jnp.arange(0, q_len, bq, dtype=jnp.int32) + starts[:, None]  # (B, blocks)
    length = lengths[:, None]
    before = lax.div(jnp.minimum(start, length) + (parts - 1 - part) * page, parts * page)  # whole pages
    last = jnp.where(start < length, jnp.minimum(start + bq, length), 0)
    visited = lax.div(jnp.maximum(last - part * page, 0) + parts * page - 1, parts * page)
    scalars = _Scalars(
        lax.div(before, pages), visited, starts, lengths, tables, jnp.reshape(layer, 1), jnp.reshape(part, 1)
    )
    return jax.tree.map(lambda x: x.astype(jnp.int32).reshape(-1), scalars)


def _kernel(
    plan: Any, q_ref, k_any, v_any, scales, out_ref, log_sum_ref, k_ref, v_ref, scale_refs, sems, free_slot,
    softmax: Softmax, kept: Softmax, *, call: Call, grid: Grid, pages: int, page: int, parts: int,
):  # fmt: skip
    group, bq, size = q_ref.shape
    factor = call.scale * LOG2_E
    row, head, i = grid.place(grid.this_step())
    length = plan.lengths[row]
    start = i * bq + plan.starts[row]  # the position of the first query
    table = row * grid.blocks + i
    width = lax.div(plan.tables.shape[0], plan.lengths.shape[0])  # pages of a row

    core, step = pl.program_id(0), pl.program_id(1)

    def extent(step):
        row, head, i = grid.place(step * grid.cores + core)
        table = row * grid.blocks + i
        return (row, head, table), 0, lax.div(plan.pages[table] + pages - 1, pages)

    def transfer(place, tile, slot, act):
        """Call act(copy) for each page of a tile, of keys, values and, of all heads together, their scales."""
        row, head, table = place

        def one(n, _):
            at = plan.tables[row * width + tile * pages + n]
            keys = pl.ds(pl.multiple_of(n * page, page), page)
            for source, to in ((k_any, k_ref), (v_any, v_ref)):
                act(pltpu.make_async_copy(source.at[plan.layer[0], at, head], to.at[slot, keys], sems.at[slot]))
            for source, to in zip(scales, scale_refs, strict=True) if scales else ():
                act(pltpu.make_async_copy(source.at[plan.layer[0], at], to.at[slot, n], sems.at[slot]))

        lax.fori_loop(0, jnp.minimum(plan.pages[table] - tile * pages, pages), one, None)

    def begin_transfer(place, tile, slot):
        transfer(place, tile, slot, lambda copy: copy.start())

    def end_transfer(place, tile, slot):
        transfer(place, tile, slot, lambda copy: copy.wait())

    def queries():
        return q_ref[...].reshape(group * bq, size)

    def of_cache(ref, slot, keys):
        return ref[slot, keys] if not scales else ref[slot, keys].astype(jnp.float32).astype(q_ref.dtype)

    def factors(which, slot, n, keys):
        """Scales of some keys of a page, (1, keys): of all heads, as Mosaic loads no 128 of one from anywhere."""
        every = scale_refs[which][slot, n, :, keys]
        is_own = lax.broadcasted_iota(jnp.int32, every.shape, 0) == head
        return jnp.where(is_own, every, 0.0).sum(0, keepdims=True)

    def exact(tile, slot):
        """Take a tile with masks and the running maximum, only pages that some query may attend to."""
        chunk = block(page, MASKED_CHUNK)
        per_page = page // chunk

        def one_chunk(c, _):
            n, at = lax.div(c, per_page), pl.multiple_of(lax.rem(c, per_page) * chunk, chunk)
            keys = pl.ds(pl.multiple_of(c * chunk, chunk), chunk)
            first = ((tile * pages + n) * parts + plan.part[0]) * page + at  # the position of the first key
            scores = dot(queries(), of_cache(k_ref, slot, keys), NT) * factor
            if scales:
                scores *= factors(0, slot, n, pl.ds(at, chunk))
            key = first + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            allowed = (key < length) & (key <= start + positions(group, bq, chunk))
            values = cleared(of_cache(v_ref, slot, keys), length - first)
            of_values = None
            if scales:
                token = first + lax.broadcasted_iota(jnp.int32, (1, chunk), 1)
                of_values = jnp.where(token < length, factors(1, slot, n, pl.ds(at, chunk)), 0.0)
            softmax.add_exact(jnp.where(allowed, scores, MASKED), values, of_values)

        needed = jnp.minimum(plan.pages[table] - tile * pages, pages) * per_page
        lax.fori_loop(0, needed, one_chunk, None)

    def clear(slot):
        """Take a tile of which nothing is masked, with the maximum as it is."""
        chunk = block(pages * page, call.target.blocks.chunk)
        for c in range(0, pages * page, chunk):
            keys = pl.ds(c, chunk)
            scores = dot(queries(), of_cache(k_ref, slot, keys), NT) * factor
            of_values = None
            if scales:
                of_keys, of_values = (_along(scale_refs[n], slot, head, c, chunk, page) for n in (0, 1))
                scores *= of_keys
            softmax.add_clear(scores, of_cache(v_ref, slot, keys), of_values)

    def visit(place, tile, slot):
        is_clear = (tile < plan.clear_stop[table]) & (tile < extent_stop - 1)
        pl.when(is_clear)(lambda: clear(slot))
        pl.when(~is_clear)(lambda: exact(tile, slot))

    extent_stop = lax.div(plan.pages[table] + pages - 1, pages)
    softmax.begin()
    stream(step, grid.steps, extent, free_slot, begin_transfer, end_transfer, visit)

    @pl.when(~softmax.is_safe)
    def _():
        """Again with exact maxima, for the rows that need it alone: the others keep what they would have had."""
        for old, new in zip(softmax, kept, strict=True):
            new[...] = old[...]
        softmax.begin()
        slot = 1 - free_slot[0]

        def one_tile(n, _):
            tile = extent_stop - 1 - n
            begin_transfer((row, head, table), tile, slot)
            end_transfer((row, head, table), tile, slot)
            exact(tile, slot)

        lax.fori_loop(0, extent_stop, one_tile, None)
        safe = kept.total[...].max(-1, keepdims=True) < SAFE_SUM
        for old, new in zip(softmax, kept, strict=True):
            old[...] = jnp.where(safe, new[...], old[...])

    out, log_sum = softmax.result()
    out_ref[...] = out.reshape(group, bq, size).astype(out_ref.dtype)
    for g in range(group):
        log_sum_ref[g : g + 1] = log_sum[:, g * bq : (g + 1) * bq]


def _along(scales_ref, slot, head, first: int, count: int, page: int):
    """Scales of `count` keys of a tile from the `first` on, (1, count)."""
    parts, at, stop = [], first, first + count
    while at < stop:
        start = at % page
        size = min(page - start, stop - at)
        of_page = scales_ref[slot, at // page, pl.ds(head, 1)]  # (1, page)
        parts.append(of_page[:, start : start + size])
        at += size
    return jnp.concatenate(parts, 1)
