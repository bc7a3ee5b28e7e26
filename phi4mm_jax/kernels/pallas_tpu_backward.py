"""Gradients of flash attention on TPUs.

With P = exp(S - log_sum) and D the product of the output and its gradient, summed over a row (less the gradient of
log_sum): dV = P^T dO, dS = P (dO V^T - D), dQ = dS K, dK = dS^T Q. Two kernels, since one sums over keys and the
other over queries; each recomputes P.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phi4mm_jax.kernels.limits import LOG2_E, Limits
from phi4mm_jax.kernels.pallas_tpu_tiles import (
    MASKED_CHUNK,
    NN,
    NT,
    Call,
    Grid,
    cleared,
    columns,
    compiler_params,
    dot,
    estimate_cost,
    make_grid,
    plan_over_keys,
    plan_over_queries,
    positions,
    stream_tiles,
    wide,
)
from phi4mm_jax.kernels.tpu import LANES, block

_ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)


def backward(call: Call, residuals, cotangents):
    """Compute the gradients of q (B, K, G, T, H), k and v (B, K, S, H), all padded; those of limits are none."""
    q, k, v, limits, out, log_sum = residuals
    d_out, d_log_sum = cotangents
    row_sum = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1) - d_log_sum
    d_out = d_out.astype(q.dtype)
    stats = jnp.concatenate([log_sum * LOG2_E, row_sum], 2)  # (B, K, 2 G, T)
    segments: Any = limits.segments and tuple(ids[:, None] for ids in limits.segments)
    operands = q, k, v, d_out, stats, segments
    dq, (dk, dv) = _queries_gradient(call, limits, *operands), _keys_gradients(call, limits, *operands)
    return dq, dk, dv, jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), limits)


def _queries_gradient(call: Call, limits: Limits, q, k, v, d_out, stats, segments):
    """Run the kernel whose steps each stay with a block of queries, and sum over keys."""
    batch, kv_heads, group, q_len, size = q.shape
    bq, bk = _block_sizes(call, q, k)
    grid = make_grid(batch, kv_heads, q_len // bq, k.shape[2] // bk, call.target)
    q_spec = grid.spec((None, None, group, bq, size), lambda row, head, i: (row, head, 0, i, 0))
    column_scratch = pltpu.VMEM((group * bq, LANES), jnp.float32)
    (dq,) = pl.pallas_call(
        partial(_dq_kernel, call=call, grid=grid, chunk=block(bk, call.target.blocks.backward_chunk)),
        name="phi4mm_flash_bwd_dq",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(grid.cores, grid.steps),
            in_specs=[
                q_spec,
                _ANYWHERE,
                _ANYWHERE,
                q_spec,
                grid.spec((None, None, 2 * group, bq), lambda row, head, i: (row, head, 0, i)),
                segments and (grid.spec((None, 1, bq), lambda row, head, i: (row, 0, i)), _ANYWHERE),
            ],
            out_specs=[q_spec],
            scratch_shapes=[
                pltpu.VMEM((2, bk, size), k.dtype),
                pltpu.VMEM((2, bk, size), v.dtype),
                segments and (pltpu.VMEM((2, 1, bk), jnp.int32), pltpu.VMEM((group * bq, LANES), jnp.int32)),
                pltpu.SemaphoreType.DMA((2, 3)),
                pltpu.SMEM((1,), jnp.int32),
                column_scratch,
                column_scratch,
                pltpu.VMEM((group * bq, size), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        compiler_params=compiler_params(call),
        cost_estimate=estimate_cost(call, q, k, products=3),
        interpret=call.target.interpret,
    )(plan_over_keys(limits, call.causal, q_len, bq, bk), q, k, v, d_out, stats, segments)
    return dq


def _keys_gradients(call: Call, limits: Limits, q, k, v, d_out, stats, segments):
    """Run the kernel whose steps each stay with a block of keys, and sum over queries; return dK and dV."""
    batch, kv_heads, group, q_len, size = q.shape
    kv_len, (bq, bk) = k.shape[2], _block_sizes(call, q, k)
    grid = make_grid(batch, kv_heads, kv_len // bk, q_len // bq, call.target)
    k_spec = grid.spec((None, None, bk, size), lambda row, head, i: (row, head, i, 0))
    return pl.pallas_call(
        partial(_dkv_kernel, call=call, grid=grid),
        name="phi4mm_flash_bwd_dkv",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(grid.cores, grid.steps),
            in_specs=[
                _ANYWHERE,
                k_spec,
                k_spec,
                _ANYWHERE,
                _ANYWHERE,
                segments and (_ANYWHERE, grid.spec((None, 1, bk), lambda row, head, i: (row, 0, i))),
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
        compiler_params=compiler_params(call),
        cost_estimate=estimate_cost(call, q, k, products=4),
        interpret=call.target.interpret,
    )(plan_over_queries(limits, call.causal, q_len, kv_len, bq, bk), q, k, v, d_out, stats, segments)


def _block_sizes(call: Call, q, k) -> tuple[int, int]:
    """Return how many queries of each head, and how many keys, are a block."""
    blocks = call.target.blocks
    return block(q.shape[3], blocks.backward_rows // q.shape[2]), block(k.shape[2], blocks.backward_keys)


def _dq_kernel(
    plan, q_ref, k_any, v_any, d_out_ref, stats_ref, segments, dq_ref, k_ref, v_ref, segment_scratch, sems, free_slot,
    log_sum_ref, row_sum_ref, acc_ref, *, call: Call, grid: Grid, chunk: int,
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
        scores = dot(q_ref[...].reshape(group * bq, size), k, NT) * (call.scale * LOG2_E)
        weights = jnp.exp2(scores - wide(log_sum_ref[...], chunk))
        if masked:
            key = tile * bk + c * chunk + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            allowed = key < length
            if call.causal:
                allowed &= key <= start + positions(group, bq, chunk)
            if segments is not None:
                allowed &= wide(segment_scratch[1][...], chunk) == segment_scratch[0][slot, :, keys]
            v, k = (cleared(x, length - tile * bk - c * chunk) for x in (v, k))
            weights = jnp.where(allowed, weights, 0.0)
        d_weights = dot(d_out_ref[...].reshape(group * bq, size), v, NT)
        d_scores = weights * (d_weights - wide(row_sum_ref[...], chunk))
        acc_ref[...] += dot(d_scores.astype(k.dtype), k, NN)

    def visit(tile, slot, is_clear):
        @pl.when(is_clear)
        def _():
            for c in range(bk // chunk):
                one_chunk(tile, slot, c, chunk, masked=False)

        @pl.when(~is_clear)
        def _():
            last = jnp.minimum(length, start + bq) if call.causal else length
            small = block(bk, MASKED_CHUNK)
            needed = lax.div(jnp.minimum(last - tile * bk, bk) + small - 1, small)
            lax.fori_loop(0, needed, lambda c, _: one_chunk(tile, slot, c, small, masked=True), None)

    for g in range(group):
        log_sum_ref[g * bq : (g + 1) * bq] = columns(stats_ref[g : g + 1])
        row_sum_ref[g * bq : (g + 1) * bq] = columns(stats_ref[group + g : group + g + 1])
    if segments is not None:
        segment_scratch[1][...] = jnp.concatenate([columns(segments[0][...])] * group)
    acc_ref[...] = jnp.zeros_like(acc_ref)
    stream_tiles(grid, plan, free_slot, copies, visit)
    dq_ref[...] = (acc_ref[...] * call.scale).reshape(group, bq, size).astype(dq_ref.dtype)


def _dkv_kernel(
    plan, q_any, k_ref, v_ref, d_out_any, stats_any, segments, dk_ref, dv_ref, q_ref, d_out_ref, stats_ref,
    segment_scratch, sems, free_slot, dk_acc, dv_acc, *, call: Call, grid: Grid,
):  # fmt: skip
    """Sum over queries, with keys along the rows, so that no operand of a matmul is transposed."""
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
        scores = dot(k_ref[...], q, NT) * (call.scale * LOG2_E)  # (bk, bq)
        weights = jnp.exp2(scores - stats_ref[slot, pl.ds(g, 1)])
        if masked:
            key = i * bk + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
            allowed = key < length
            if call.causal:
                allowed &= key <= tile * bq + offset + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            if segments is not None:
                allowed &= wide(segment_scratch[1][...], bq) == segment_scratch[0][slot]
            weights = jnp.where(allowed, weights, 0.0)
        dv_acc[...] += dot(weights.astype(d_out.dtype), d_out, NN)
        d_weights = dot(v_ref[...], d_out, NT)
        d_scores = weights * (d_weights - stats_ref[slot, pl.ds(group + g, 1)])
        dk_acc[...] += dot(d_scores.astype(q.dtype), q, NN)

    def visit(tile, slot, is_clear):
        @pl.when(is_clear)
        def _():
            for g in range(group):
                one_head(tile, slot, g, masked=False)

        @pl.when(~is_clear)
        def _():
            lax.fori_loop(0, group, lambda g, _: one_head(tile, slot, g, masked=True), None)

    if segments is not None:
        segment_scratch[1][...] = columns(segments[1][...])
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)
    stream_tiles(grid, plan, free_slot, copies, visit)
    # A key that nobody attends to is met with weights of 0; its value may be NaN, and its own gradient with it.
    dk = jnp.where(i * bk + lax.broadcasted_iota(jnp.int32, dk_acc.shape, 0) < length, dk_acc[...], 0.0)
    dk_ref[...] = (dk * call.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)
