"""Flash attention on TPUs (Dao et al., arXiv:2205.14135).

A step of the grid is one block of queries of one group: the query heads of a KV head, stacked.
It streams the tiles of keys and values that the block may attend to, and no others, by its own double-buffered
transfers; the last tile of a step starts the first one of the next.

The first tile, and every tile in which some pair is masked, is done by the usual online softmax. All the others keep
the maximum unchanged: weights then may exceed 1, which float32 and bfloat16 hold as exactly, and neither the
maximum of the scores nor rescaling stands between the two matmuls. Should the sum leave the range in which that is
safe, the step is repeated with exact maxima. See docs/kernels.md.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from phi4mm_jax.kernels.limits import LOG2_E, MASKED, Limits
from phi4mm_jax.kernels.pallas_tpu_backward import backward
from phi4mm_jax.kernels.pallas_tpu_tiles import (
    MASKED_CHUNK,
    NT,
    Call,
    Grid,
    Softmax,
    cleared,
    columns,
    compiler_params,
    dot,
    estimate_cost,
    make_grid,
    pad_to,
    plan_over_keys,
    positions,
    stream_tiles,
    wide,
)
from phi4mm_jax.kernels.tpu import LANES, Target, block, padded


def unsupported(q) -> str | None:
    """Return why this kernel cannot take such queries, if so."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q has dtype {q.dtype}; implementation 'pallas_tpu' takes bfloat16 and float32"
    if q.shape[3] > LANES and q.shape[3] % LANES:
        return f"q has head size {q.shape[3]}; implementation 'pallas_tpu' takes up to 128, or a multiple of it"
    return None


def flash_attention(q, k, v, limits: Limits, *, causal: bool, scale: float, out_dtype, target: Target):
    """Compute the output and the log-sum-exp (B, T, N) of `phi4mm_jax.kernels.flash_attention`."""
    batch, q_len, heads, size = q.shape
    _, kv_len, kv_heads, _ = k.shape
    rows, keys = padded(q_len), padded(kv_len)
    if limits.segments is not None:
        limits = limits._replace(segments=(pad_to(limits.segments[0], 1, rows), pad_to(limits.segments[1], 1, keys)))
    q, k, v = (_heads_first(x, target) for x in (q, k, v))
    groups = pad_to(q.transpose(0, 2, 1, 3), 2, rows).reshape(batch, kv_heads, heads // kv_heads, rows, size)
    k, v = (pad_to(x.transpose(0, 2, 1, 3), 2, keys) for x in (k, v))
    results: Any = _attend(groups, k, v, limits, Call(causal, scale, out_dtype, target))
    out, log_sum = results[0].reshape(batch, heads, rows, size), results[1].reshape(batch, heads, rows)
    return _heads_first(out[:, :, :q_len].transpose(0, 2, 1, 3), target), log_sum[:, :, :q_len].transpose(0, 2, 1)


def _heads_first(x: Float[Array, "B T N H"], target: Target) -> Float[Array, "B T N H"]:
    """Hint to XLA to hold x, and its gradient, as (B, N, T, H): an array made so needs no copy later."""
    return x if target.interpret else with_layout_constraint(x, Layout((0, 2, 1, 3)))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, limits: Limits, call: Call):
    return _forward(q, k, v, limits, call)


def _attend_forward(q, k, v, limits: Limits, call: Call):
    q, k, v = (checkpoint_name(x, "attention") for x in (q, k, v))
    out, log_sum = (checkpoint_name(x, "attention") for x in _forward(q, k, v, limits, call))
    return (out, log_sum), (q, k, v, limits, out, log_sum)


def _forward(q, k, v, limits: Limits, call: Call):
    """Run the kernel, q (B, K, G, T, H), k and v (B, K, S, H), padded; return output and log-sum-exp (B, K, G, T)."""
    batch, kv_heads, group, q_len, size = q.shape
    kv_len, blocks = k.shape[2], call.target.blocks
    bq, bk = block(q_len, blocks.rows // group), block(kv_len, blocks.keys)
    grid = make_grid(batch, kv_heads, q_len // bq, kv_len // bk, call.target)
    plan = plan_over_keys(limits, call.causal, q_len, bq, bk)
    segments: Any = limits.segments and tuple(ids[:, None] for ids in limits.segments)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
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
                Softmax.scratch(group * bq, size),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, call.out_dtype),
            jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
        ],
        compiler_params=compiler_params(call),
        cost_estimate=estimate_cost(call, q, k, products=2),
        interpret=call.target.interpret,
    )(plan, q, k, v, segments)


def _forward_kernel(
    plan, q_ref, k_any, v_any, segments, out_ref, log_sum_ref, k_ref, v_ref, segment_scratch, sems, free_slot,
    softmax: Softmax, *, call: Call, grid: Grid, chunk: int,
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

    def queries():
        return q_ref[...].reshape(group * bq, size)

    def exact(tile, slot):
        """Take a tile with masks and the running maximum, only chunks that some query may attend to."""
        last = jnp.minimum(length, start + bq) if call.causal else length
        chunk = block(bk, MASKED_CHUNK)

        def one_chunk(c, _):
            keys = pl.ds(pl.multiple_of(c * chunk, chunk), chunk)
            scores = dot(queries(), k_ref[slot, keys], NT) * factor
            key = tile * bk + c * chunk + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            allowed = key < length
            if call.causal:
                allowed &= key <= start + positions(group, bq, chunk)
            if segments is not None:
                allowed &= wide(segment_scratch[1][...], chunk) == segment_scratch[0][slot, :, keys]
            values = cleared(v_ref[slot, keys], length - tile * bk - c * chunk)
            softmax.add_exact(jnp.where(allowed, scores, MASKED), values)

        needed = lax.div(jnp.minimum(last - tile * bk, bk) + chunk - 1, chunk)
        lax.fori_loop(0, needed, one_chunk, None)

    def clear(slot):
        """Take a tile of which nothing is masked, with the maximum as it is."""
        for c in range(bk // chunk):
            keys = pl.ds(c * chunk, chunk)
            softmax.add_clear(dot(queries(), k_ref[slot, keys], NT) * factor, v_ref[slot, keys])

    softmax.begin()
    if segments is not None:
        segment_scratch[1][...] = jnp.concatenate([columns(segments[0][...])] * group)

    def visit(tile, slot, is_clear):
        is_clear &= tile < plan.stop[table] - 1
        pl.when(is_clear)(lambda: clear(slot))
        pl.when(~is_clear)(lambda: exact(tile, slot))

    stream_tiles(grid, plan, free_slot, copies, visit)

    @pl.when(~softmax.is_safe)
    def _():
        softmax.begin()
        slot = 1 - free_slot[0]

        def one_tile(n, _):
            tile = plan.stop[table] - 1 - n
            for copy in copies(row, head, tile, slot):
                copy.start()
            for copy in copies(row, head, tile, slot):
                copy.wait()
            exact(tile, slot)

        lax.fori_loop(0, plan.stop[table] - plan.first[table], one_tile, None)

    out, log_sum = softmax.result()
    out_ref[...] = out.reshape(group, bq, size).astype(out_ref.dtype)
    for g in range(group):
        log_sum_ref[g : g + 1] = log_sum[:, g * bq : (g + 1) * bq]


_attend.defvjp(_attend_forward, backward)
