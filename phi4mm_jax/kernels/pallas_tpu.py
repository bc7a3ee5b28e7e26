"""Flash attention on TPUs, forwards and backwards (Dao et al., arXiv:2205.14135).

A step of the grid is one block of queries of one group: the heads that share a key head are laid one below the other.
It streams the tiles of keys and values that the block may attend to, and no others, by its own double-buffered
transfers; the last tile of a step starts the first one of the next.

The first tile, and every tile in which some pair is masked, is done by the usual online softmax. All the others take
the maximum as they find it: weights then may exceed 1, which float32 and bfloat16 hold as exactly, and neither the
maximum of the scores nor rescaling stands between the two products. Should the sum leave the range in which that is
safe, the step is done again with exact maxima. See docs/kernels.md.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from phi4mm_jax.kernels.limits import Limits
from phi4mm_jax.kernels.tpu import LANES, LOG2_E, MASKED, Target, block, padded, stream
from phi4mm_jax.precision import precision_of

_MASKED_CHUNK = 256  # keys at a time where there is a mask: small, to stop close to the diagonal
_SAFE_SUM = 2.0**100  # of weights: far from overflow, also after the product with the values
_NT = (((1,), (1,)), ((), ()))  # a @ b.T
_NN = (((1,), (0,)), ((), ()))


class _Call(NamedTuple):
    """Static facts of one call."""

    causal: bool
    scale: float
    out_dtype: Any
    target: Target


def unsupported(q) -> str | None:
    """Why this kernel cannot take such queries, if so."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q has dtype {q.dtype}; implementation 'pallas_tpu' takes bfloat16 and float32"
    if q.shape[3] > LANES and q.shape[3] % LANES:
        return f"q has head size {q.shape[3]}; implementation 'pallas_tpu' takes up to 128, or a multiple of it"
    return None


def flash_attention(q, k, v, limits: Limits, *, causal: bool, scale: float, out_dtype, target: Target):
    """See `phi4mm_jax.kernels.flash_attention`; returns the output and the log-sum-exp (B, T, N)."""
    batch, q_len, heads, size = q.shape
    _, kv_len, kv_heads, _ = k.shape
    rows, keys = padded(q_len), padded(kv_len)
    if limits.segments is not None:
        limits = limits._replace(segments=(_pad(limits.segments[0], 1, rows), _pad(limits.segments[1], 1, keys)))
    q, k, v = (_heads_first(x, target) for x in (q, k, v))
    groups = _pad(q.transpose(0, 2, 1, 3), 2, rows).reshape(batch, kv_heads, heads // kv_heads, rows, size)
    k, v = (_pad(x.transpose(0, 2, 1, 3), 2, keys) for x in (k, v))
    results: Any = _attend(groups, k, v, limits, _Call(causal, scale, out_dtype, target))
    out, log_sum = results[0].reshape(batch, heads, rows, size), results[1].reshape(batch, heads, rows)
    return _heads_first(out[:, :, :q_len].transpose(0, 2, 1, 3), target), log_sum[:, :, :q_len].transpose(0, 2, 1)


def _heads_first(x: Float[Array, "B T N H"], target: Target) -> Float[Array, "B T N H"]:
    """Nothing but a hint to XLA to hold x, and its gradient, as (B, N, T, H): what is made so needs no copy later."""
    return x if target.interpret else with_layout_constraint(x, Layout((0, 2, 1, 3)))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, limits: Limits, call: _Call):
    return _forward(q, k, v, limits, call)


def _attend_forward(q, k, v, limits: Limits, call: _Call):
    q, k, v = (checkpoint_name(x, "attention") for x in (q, k, v))
    out, log_sum = (checkpoint_name(x, "attention") for x in _forward(q, k, v, limits, call))
    return (out, log_sum), (q, k, v, limits, out, log_sum)


# --- which tiles a step visits ---


class _Plan(NamedTuple):
    """Prefetched scalars. The first ten are of every block that a step stays with, flattened over (B, blocks).

    It visits the tiles first <= t < stop; in those with clear <= t < clear_stop no pair is masked, unless by segments:
    then the least and greatest id of the block (`own`) and of the tile (`streamed`) tell.
    """

    first: Int[Array, " X"]
    clear: Int[Array, " X"]
    clear_stop: Int[Array, " X"]
    stop: Int[Array, " X"]
    q_offset: Int[Array, " B"]
    kv_lengths: Int[Array, " B"]
    own: tuple[Int[Array, " X"], Int[Array, " X"]] | None
    streamed: tuple[Int[Array, " Y"], Int[Array, " Y"]] | None


def _plan_over_keys(limits: Limits, causal: bool, q_len: int, kv_len: int, rows: int, keys: int) -> _Plan:
    """Blocks of queries stay, tiles of keys are streamed."""
    start = jnp.arange(0, q_len, rows, dtype=jnp.int32) + limits.q_offset[:, None]  # (B, blocks)
    length = jnp.broadcast_to(limits.kv_lengths[:, None], start.shape)
    last = jnp.minimum(length, start + rows) if causal else length
    stop = lax.div(jnp.maximum(last, 0) + keys - 1, keys)
    # A row's own key is never in a clear tile: its maximum is known before the first of them.
    clear_stop = lax.div(jnp.maximum(jnp.minimum(length, start) if causal else length, 0), keys)
    first = jnp.zeros_like(stop)
    return _with_segments(limits, rows, keys, 2, first, first, clear_stop, stop)


def _plan_over_queries(limits: Limits, causal: bool, q_len: int, kv_len: int, rows: int, keys: int) -> _Plan:
    """Blocks of keys stay, tiles of queries are streamed."""
    start = jnp.arange(0, kv_len, keys, dtype=jnp.int32) + jnp.zeros_like(limits.q_offset)[:, None]  # (B, blocks)
    offset, length, tiles = limits.q_offset[:, None], limits.kv_lengths[:, None], q_len // rows
    first = clear = jnp.zeros_like(start)
    if causal:
        first = jnp.minimum(lax.div(jnp.maximum(start - offset, 0), rows), tiles)
        clear = lax.div(jnp.maximum(start + keys - 1 - offset, 0) + rows - 1, rows)
    clear = jnp.where(start + keys <= length, clear, tiles)
    stop = jnp.where(start < length, tiles, first)
    return _with_segments(limits, rows, keys, 1, first, clear, stop, stop)


def _with_segments(limits: Limits, rows: int, keys: int, streamed_axis: int, first, clear, clear_stop, stop) -> _Plan:
    own = streamed = None
    if limits.segments is not None:
        q_bounds, k_bounds = _bounds(limits.segments[0], rows), _bounds(limits.segments[1], keys)
        (q_min, q_max), (k_min, k_max) = q_bounds, k_bounds
        meet = (q_min[:, :, None] <= k_max[:, None]) & (k_min[:, None] <= q_max[:, :, None])  # may share an id
        index = lax.broadcasted_iota(jnp.int32, meet.shape, streamed_axis)
        stop = jnp.minimum(stop, jnp.where(meet, index + 1, 0).max(streamed_axis))
        first = jnp.minimum(jnp.maximum(first, jnp.where(meet, index, meet.size).min(streamed_axis)), stop)
        own, streamed = (q_bounds, k_bounds) if streamed_axis == 2 else (k_bounds, q_bounds)
    plan = _Plan(first, clear, clear_stop, stop, limits.q_offset, limits.kv_lengths, own, streamed)
    return jax.tree.map(lambda x: x.astype(jnp.int32).reshape(-1), plan)


def _bounds(segments: Int[Array, "B T"], size: int):
    """The least and the greatest id of each block, (B, blocks)."""
    blocks = segments.reshape(len(segments), -1, size)
    return blocks.min(-1), blocks.max(-1)


# --- the way through the tiles, common to the three kernels ---


class _Grid(NamedTuple):
    """A step is one block of one key head of one row; the cores take turns, so that each has as much to do."""

    heads: int
    blocks: int  # of the side that a step stays with
    tiles: int  # of the side that it streams
    cores: int
    steps: int  # of each core

    def place(self, step):
        """Row, key head and block of a step."""
        row, rest = lax.div(step, self.heads * self.blocks), lax.rem(step, self.heads * self.blocks)
        return row, lax.div(rest, self.blocks), lax.rem(rest, self.blocks)

    def this_step(self):
        return pl.program_id(1) * self.cores + pl.program_id(0)

    def spec(self, shape: tuple[int | None, ...], index) -> pl.BlockSpec:
        """A block of these sizes at index(row, head, block)."""
        return pl.BlockSpec(shape, lambda core, i, plan: index(*self.place(i * self.cores + core)))


def _grid(batch: int, heads: int, blocks: int, tiles: int, target: Target) -> _Grid:
    steps = batch * heads * blocks
    cores = target.cores if steps % target.cores == 0 else 1
    return _Grid(heads, blocks, tiles, cores, steps // cores)


def _stream_tiles(grid: _Grid, plan: Any, free_slot, copies, visit) -> None:
    """Call visit(tile, slot, is_clear) for every tile of this step; copies(row, head, tile, slot) bring it."""
    i, core = pl.program_id(1), pl.program_id(0)

    def extent(i):
        row, head, block = grid.place(i * grid.cores + core)
        table = row * grid.blocks + block
        return (row, head, table), plan.first[table], plan.stop[table]

    def start(place, tile, slot):
        for copy in copies(*place[:2], tile, slot):
            copy.start()

    def wait(place, tile, slot):
        for copy in copies(*place[:2], tile, slot):
            copy.wait()

    def visit_tile(place, tile, slot):
        row, _, table = place
        is_clear = (plan.clear[table] <= tile) & (tile < plan.clear_stop[table])
        if plan.own is not None:
            at = row * grid.tiles + tile
            for bound in (plan.own[1][table], plan.streamed[0][at], plan.streamed[1][at]):
                is_clear &= bound == plan.own[0][table]
        visit(tile, slot, is_clear)

    stream(i, grid.steps, extent, free_slot, start, wait, visit_tile)


def _dot(a, b, dimensions):
    return lax.dot_general(a, b, dimensions, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def _folded(x, combine):
    """(rows, n * 128) -> (rows, 128)."""
    parts = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
    while len(parts) > 1:
        parts = [
            combine(*pair) if len(pair) == 2 else pair[0]
            for pair in (parts[i : i + 2] for i in range(0, len(parts), 2))
        ]
    return parts[0]


def _wide(x, width: int):
    """(rows, 128), the same in every lane -> (rows, width)."""
    return x[:, :width] if width <= LANES else jnp.tile(x, (1, width // LANES))


def _columns(row):
    """(1, n) -> (n, 128), the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _cleared(x, length):
    """Zero the rows from `length` on, which may hold any value: a weight of 0 times NaN would be NaN."""
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < length, x.astype(jnp.float32), 0.0).astype(x.dtype)  # v5e selects in float32 only


def _positions(group: int, block: int, width: int):
    """Of each row of a block the position of its query in the block, (group * block, width)."""
    return lax.broadcasted_iota(jnp.int32, (group, block, width), 1).reshape(group * block, width)


# --- forward ---


def _forward(q, k, v, limits: Limits, call: _Call):
    """q (B, K, G, T, H), k and v (B, K, S, H), padded -> the output and the log-sum-exp (B, K, G, T)."""
    batch, kv_heads, group, q_len, size = q.shape
    kv_len, blocks = k.shape[2], call.target.blocks
    bq, bk = block(q_len, blocks.rows // group), block(kv_len, blocks.keys)
    grid = _grid(batch, kv_heads, q_len // bq, kv_len // bk, call.target)
    plan = _plan_over_keys(limits, call.causal, q_len, kv_len, bq, bk)
    segments: Any = limits.segments and tuple(ids[:, None] for ids in limits.segments)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    stats = pltpu.VMEM((group * bq, LANES), jnp.float32)
    return pl.pallas_call(
        partial(_forward_kernel, call=call, grid=grid, chunk=block(bk, blocks.chunk)),
        name="phi4mm_flash_fwd",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(grid.cores, grid.steps),
            in_specs=[
                grid.spec((None, None, group, bq, size), lambda row, head, i: (row, head, 0, i, 0)),
                anywhere,
                anywhere,
                segments and (grid.spec((None, 1, bq), lambda row, head, i: (row, 0, i)), anywhere),
            ],
            out_specs=[
                grid.spec((None, None, group, bq, size), lambda row, head, i: (row, head, 0, i, 0)),
                grid.spec((None, None, group, bq), lambda row, head, i: (row, head, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((2, bk, size), k.dtype),
                pltpu.VMEM((2, bk, size), v.dtype),
                segments and (pltpu.VMEM((2, 1, bk), jnp.int32), pltpu.VMEM((group * bq, LANES), jnp.int32)),
                pltpu.SemaphoreType.DMA((2, 3)),
                pltpu.SMEM((1,), jnp.int32),
                stats,
                stats,
                pltpu.VMEM((group * bq, size), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, call.out_dtype),
            jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
        ],
        compiler_params=_compiler_params(call),
        cost_estimate=_cost(call, q, k, products=2),
        interpret=call.target.interpret,
    )(plan, q, k, v, segments)


def _forward_kernel(
    plan, q_ref, k_any, v_any, segments, out_ref, log_sum_ref, k_ref, v_ref, segment_scratch, sems, free_slot,
    max_ref, sum_ref, acc_ref, *, call: _Call, grid: _Grid, chunk: int,
):  # fmt: skip
    group, bq, size = q_ref.shape
    bk = k_ref.shape[1]
    factor = call.scale * LOG2_E
    row, head, i = grid.place(grid.this_step())
    length = plan.kv_lengths[row]
    start = i * bq + plan.q_offset[row]  # the position of the first query
    table = row * grid.blocks + i

    def copies(row, head, tile, slot):
        keys = pl.ds(tile * bk, bk)
        yield pltpu.make_async_copy(k_any.at[row, head, keys], k_ref.at[slot], sems.at[slot, 0])
        yield pltpu.make_async_copy(v_any.at[row, head, keys], v_ref.at[slot], sems.at[slot, 1])
        if segments is not None:
            yield pltpu.make_async_copy(segments[1].at[row, :, keys], segment_scratch[0].at[slot], sems.at[slot, 2])

    def begin():
        max_ref[...] = jnp.full_like(max_ref, MASKED)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def queries():
        return q_ref[...].reshape(group * bq, size)

    def exact(tile, slot):
        """With masks and the running maximum; only chunks that some query may attend to."""
        last = jnp.minimum(length, start + bq) if call.causal else length
        chunk = block(bk, _MASKED_CHUNK)

        def one_chunk(c, _):
            keys = pl.ds(pl.multiple_of(c * chunk, chunk), chunk)
            scores = _dot(queries(), k_ref[slot, keys], _NT) * factor
            key = tile * bk + c * chunk + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            allowed = key < length
            if call.causal:
                allowed &= key <= start + _positions(group, bq, chunk)
            if segments is not None:
                allowed &= _wide(segment_scratch[1][...], chunk) == segment_scratch[0][slot, :, keys]
            scores = jnp.where(allowed, scores, MASKED)
            old = max_ref[...]
            new = jnp.maximum(old, scores.max(-1, keepdims=True))
            weights = jnp.exp2(scores - _wide(new, chunk))
            decay = jnp.exp2(old - new)
            max_ref[...] = new
            sum_ref[...] = sum_ref[...] * decay + _folded(weights, jnp.add)
            values = _cleared(v_ref[slot, keys], length - tile * bk - c * chunk)
            acc_ref[...] = acc_ref[...] * _wide(decay, size) + _dot(weights.astype(v_ref.dtype), values, _NN)

        needed = lax.div(jnp.minimum(last - tile * bk, bk) + chunk - 1, chunk)
        lax.fori_loop(0, needed, one_chunk, None)

    def clear(slot):
        """Nothing is masked, and the maximum stays."""
        for c in range(bk // chunk):
            keys = pl.ds(c * chunk, chunk)
            scores = _dot(queries(), k_ref[slot, keys], _NT) * factor
            weights = jnp.exp2(scores - _wide(max_ref[...], chunk))
            sum_ref[...] += _folded(weights, jnp.add)
            acc_ref[...] += _dot(weights.astype(v_ref.dtype), v_ref[slot, keys], _NN)

    begin()
    if segments is not None:
        segment_scratch[1][...] = jnp.concatenate([_columns(segments[0][...])] * group)

    def visit(tile, slot, is_clear):
        is_clear &= tile < plan.stop[table] - 1
        pl.when(is_clear)(lambda: clear(slot))
        pl.when(~is_clear)(lambda: exact(tile, slot))

    _stream_tiles(grid, plan, free_slot, copies, visit)

    @pl.when(~(jnp.max(sum_ref[...]) < _SAFE_SUM))
    def _():
        begin()
        slot = 1 - free_slot[0]

        def one_tile(n, _):
            tile = plan.stop[table] - 1 - n
            for copy in copies(row, head, tile, slot):
                copy.start()
            for copy in copies(row, head, tile, slot):
                copy.wait()
            exact(tile, slot)

        lax.fori_loop(0, plan.stop[table] - plan.first[table], one_tile, None)

    largest, total = max_ref[...], sum_ref[...].sum(-1, keepdims=True)
    empty = largest < MASKED / 2
    out = jnp.where(_wide(empty, size), 0.0, acc_ref[...] / total)
    out_ref[...] = out.reshape(group, bq, size).astype(out_ref.dtype)
    log_sum = jnp.where(empty, -jnp.inf, largest / LOG2_E + jnp.log(total)).T[:1]  # (1, group * bq)
    for g in range(group):
        log_sum_ref[g : g + 1] = log_sum[:, g * bq : (g + 1) * bq]


# --- backward ---
# With P = exp(S - log_sum) and D the product of the output and its gradient, summed over a row (less the gradient of
# log_sum): dV = P^T dO, dS = P (dO V^T - D), dQ = dS K, dK = dS^T Q. Two kernels, since one sums over keys and the
# other over queries; each computes P again.


def _backward(call: _Call, residuals, cotangents):
    q, k, v, limits, out, log_sum = residuals
    d_out, d_log_sum = cotangents
    batch, kv_heads, group, q_len, size = q.shape
    kv_len, blocks = k.shape[2], call.target.blocks
    row_sum = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1) - d_log_sum
    d_out = d_out.astype(q.dtype)
    stats = jnp.concatenate([log_sum * LOG2_E, row_sum], 2)  # (B, K, 2 G, T)
    bq, bk = block(q_len, blocks.backward_rows // group), block(kv_len, blocks.backward_keys)
    lengths = limits, call.causal, q_len, kv_len, bq, bk
    segments: Any = limits.segments and tuple(ids[:, None] for ids in limits.segments)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    operands = q, k, v, d_out, stats, segments

    grid = _grid(batch, kv_heads, q_len // bq, kv_len // bk, call.target)
    q_spec = grid.spec((None, None, group, bq, size), lambda row, head, i: (row, head, 0, i, 0))
    columns = pltpu.VMEM((group * bq, LANES), jnp.float32)
    (dq,) = pl.pallas_call(
        partial(_dq_kernel, call=call, grid=grid, chunk=block(bk, blocks.backward_chunk)),
        name="phi4mm_flash_bwd_dq",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(grid.cores, grid.steps),
            in_specs=[
                q_spec,
                anywhere,
                anywhere,
                q_spec,
                grid.spec((None, None, 2 * group, bq), lambda row, head, i: (row, head, 0, i)),
                segments and (grid.spec((None, 1, bq), lambda row, head, i: (row, 0, i)), anywhere),
            ],
            out_specs=[q_spec],
            scratch_shapes=[
                pltpu.VMEM((2, bk, size), k.dtype),
                pltpu.VMEM((2, bk, size), v.dtype),
                segments and (pltpu.VMEM((2, 1, bk), jnp.int32), pltpu.VMEM((group * bq, LANES), jnp.int32)),
                pltpu.SemaphoreType.DMA((2, 3)),
                pltpu.SMEM((1,), jnp.int32),
                columns,
                columns,
                pltpu.VMEM((group * bq, size), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        compiler_params=_compiler_params(call),
        cost_estimate=_cost(call, q, k, products=3),
        interpret=call.target.interpret,
    )(_plan_over_keys(*lengths), *operands)

    grid = _grid(batch, kv_heads, kv_len // bk, q_len // bq, call.target)
    k_spec = grid.spec((None, None, bk, size), lambda row, head, i: (row, head, i, 0))
    dk, dv = pl.pallas_call(
        partial(_dkv_kernel, call=call, grid=grid),
        name="phi4mm_flash_bwd_dkv",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(grid.cores, grid.steps),
            in_specs=[
                anywhere,
                k_spec,
                k_spec,
                anywhere,
                anywhere,
                segments and (anywhere, grid.spec((None, 1, bk), lambda row, head, i: (row, 0, i))),
            ],
            out_specs=[k_spec, k_spec],
            scratch_shapes=[
                pltpu.VMEM((2, group, bq, size), q.dtype),
                pltpu.VMEM((2, group, bq, size), d_out.dtype),
                pltpu.VMEM((2, 2 * group, bq), jnp.float32),
                segments and (pltpu.VMEM((2, 1, bq), jnp.int32), pltpu.VMEM((bk, LANES), jnp.int32)),
                pltpu.SemaphoreType.DMA((2, 4)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((bk, size), jnp.float32),
                pltpu.VMEM((bk, size), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        compiler_params=_compiler_params(call),
        cost_estimate=_cost(call, q, k, products=4),
        interpret=call.target.interpret,
    )(_plan_over_queries(*lengths), *operands)
    return dq, dk, dv, jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), limits)


_attend.defvjp(_attend_forward, _backward)


def _dq_kernel(
    plan, q_ref, k_any, v_any, d_out_ref, stats_ref, segments, dq_ref, k_ref, v_ref, segment_scratch, sems, free_slot,
    log_sum_ref, row_sum_ref, acc_ref, *, call: _Call, grid: _Grid, chunk: int,
):  # fmt: skip
    group, bq, size = q_ref.shape
    bk = k_ref.shape[1]
    row, _, i = grid.place(grid.this_step())
    length = plan.kv_lengths[row]
    start = i * bq + plan.q_offset[row]

    def copies(row, head, tile, slot):
        keys = pl.ds(tile * bk, bk)
        yield pltpu.make_async_copy(k_any.at[row, head, keys], k_ref.at[slot], sems.at[slot, 0])
        yield pltpu.make_async_copy(v_any.at[row, head, keys], v_ref.at[slot], sems.at[slot, 1])
        if segments is not None:
            yield pltpu.make_async_copy(segments[1].at[row, :, keys], segment_scratch[0].at[slot], sems.at[slot, 2])

    def one_chunk(tile, slot, c, chunk: int, masked: bool):
        keys = pl.ds(pl.multiple_of(c * chunk, chunk), chunk)
        k, v = k_ref[slot, keys], v_ref[slot, keys]
        scores = _dot(q_ref[...].reshape(group * bq, size), k, _NT) * (call.scale * LOG2_E)
        weights = jnp.exp2(scores - _wide(log_sum_ref[...], chunk))
        if masked:
            key = tile * bk + c * chunk + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            allowed = key < length
            if call.causal:
                allowed &= key <= start + _positions(group, bq, chunk)
            if segments is not None:
                allowed &= _wide(segment_scratch[1][...], chunk) == segment_scratch[0][slot, :, keys]
            v, k = (_cleared(x, length - tile * bk - c * chunk) for x in (v, k))
            weights = jnp.where(allowed, weights, 0.0)
        d_weights = _dot(d_out_ref[...].reshape(group * bq, size), v, _NT)
        d_scores = weights * (d_weights - _wide(row_sum_ref[...], chunk))
        acc_ref[...] += _dot(d_scores.astype(k.dtype), k, _NN)

    def visit(tile, slot, is_clear):
        @pl.when(is_clear)
        def _():
            for c in range(bk // chunk):
                one_chunk(tile, slot, c, chunk, masked=False)

        @pl.when(~is_clear)
        def _():
            last = jnp.minimum(length, start + bq) if call.causal else length
            small = block(bk, _MASKED_CHUNK)
            needed = lax.div(jnp.minimum(last - tile * bk, bk) + small - 1, small)
            lax.fori_loop(0, needed, lambda c, _: one_chunk(tile, slot, c, small, masked=True), None)

    for g in range(group):
        log_sum_ref[g * bq : (g + 1) * bq] = _columns(stats_ref[g : g + 1])
        row_sum_ref[g * bq : (g + 1) * bq] = _columns(stats_ref[group + g : group + g + 1])
    if segments is not None:
        segment_scratch[1][...] = jnp.concatenate([_columns(segments[0][...])] * group)
    acc_ref[...] = jnp.zeros_like(acc_ref)
    _stream_tiles(grid, plan, free_slot, copies, visit)
    dq_ref[...] = (acc_ref[...] * call.scale).reshape(group, bq, size).astype(dq_ref.dtype)


def _dkv_kernel(
    plan, q_any, k_ref, v_ref, d_out_any, stats_any, segments, dk_ref, dv_ref, q_ref, d_out_ref, stats_ref,
    segment_scratch, sems, free_slot, dk_acc, dv_acc, *, call: _Call, grid: _Grid,
):  # fmt: skip
    """Keys lie along the rows here, so that no operand of a product is transposed."""
    _, group, bq, _ = q_ref.shape
    bk = k_ref.shape[0]
    row, _, i = grid.place(grid.this_step())
    length, offset = plan.kv_lengths[row], plan.q_offset[row]

    def copies(row, head, tile, slot):
        queries = pl.ds(tile * bq, bq)
        for n, (source, to) in enumerate(((q_any, q_ref), (d_out_any, d_out_ref), (stats_any, stats_ref))):
            yield pltpu.make_async_copy(source.at[row, head, :, queries], to.at[slot], sems.at[slot, n])
        if segments is not None:
            yield pltpu.make_async_copy(segments[0].at[row, :, queries], segment_scratch[0].at[slot], sems.at[slot, 3])

    def one_head(tile, slot, g, masked: bool):
        q, d_out = q_ref[slot, g], d_out_ref[slot, g]
        scores = _dot(k_ref[...], q, _NT) * (call.scale * LOG2_E)  # (bk, bq)
        weights = jnp.exp2(scores - stats_ref[slot, pl.ds(g, 1)])
        if masked:
            key = i * bk + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
            allowed = key < length
            if call.causal:
                allowed &= key <= tile * bq + offset + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            if segments is not None:
                allowed &= _wide(segment_scratch[1][...], bq) == segment_scratch[0][slot]
            weights = jnp.where(allowed, weights, 0.0)
        dv_acc[...] += _dot(weights.astype(d_out.dtype), d_out, _NN)
        d_weights = _dot(v_ref[...], d_out, _NT)
        d_scores = weights * (d_weights - stats_ref[slot, pl.ds(group + g, 1)])
        dk_acc[...] += _dot(d_scores.astype(q.dtype), q, _NN)

    def visit(tile, slot, is_clear):
        @pl.when(is_clear)
        def _():
            for g in range(group):
                one_head(tile, slot, g, masked=False)

        @pl.when(~is_clear)
        def _():
            lax.fori_loop(0, group, lambda g, _: one_head(tile, slot, g, masked=True), None)

    if segments is not None:
        segment_scratch[1][...] = _columns(segments[1][...])
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)
    _stream_tiles(grid, plan, free_slot, copies, visit)
    # A key that nobody attends to is met with weights of 0; its value may be NaN, and its own gradient with it.
    dk = jnp.where(i * bk + lax.broadcasted_iota(jnp.int32, dk_acc.shape, 0) < length, dk_acc[...], 0.0)
    dk_ref[...] = (dk * call.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)


def _compiler_params(call: _Call) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=call.target.blocks.vmem)


def _cost(call: _Call, q, k, products: int) -> pl.CostEstimate:
    """Of the products, for XLA's scheduler; a causal half counts as half."""
    batch, kv_heads, group, q_len, size = q.shape
    pairs = batch * kv_heads * group * q_len * k.shape[2] // (2 if call.causal else 1)
    moved = 2 * (q.size * q.dtype.itemsize + k.size * k.dtype.itemsize)
    return pl.CostEstimate(flops=2 * products * size * pairs, transcendentals=pairs, bytes_accessed=moved)


def _pad(x, axis: int, length: int):
    missing = length - x.shape[axis]
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
