"""Decode kernel for TPUs: one query per row, or a few, against a paged cache.

Bound by the transfer of keys and values: only valid pages are read, in large pieces, and the next piece, even the next
row's, is prefetched while one is computed. A page holds all heads of its tokens contiguously: one transfer reads them.
Where two cores are one device, each takes half of every row's keys.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from phi4mm_jax.kernels.limits import LOG2_E, MASKED
from phi4mm_jax.kernels.partials import merge_partials
from phi4mm_jax.kernels.tpu import LANES, Target, stream
from phi4mm_jax.precision import precision_of

_SUBLANES = 8  # the queries of a group are padded to these


def unsupported(q, k, tables) -> str | None:
    """Return why this kernel cannot take these arguments, if so."""
    if tables is None:
        return "tables is None; implementation 'pallas_tpu' reads a paged cache only"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q has dtype {q.dtype}; implementation 'pallas_tpu' takes bfloat16 and float32"
    if k.shape[3] % LANES or k.shape[4] % LANES:
        return f"k {k.shape}: implementation 'pallas_tpu' takes pages and head sizes that are multiples of {LANES}"
    return None


def decode_attention(q, k, v, layer, lengths, tables, scales, *, scale: float, target: Target):
    """Compute (o, m, l) of `phi4mm_jax.kernels.decode_attention`: the attention, its log-sum-exp and 1."""
    batch, heads, size = q.shape
    _, _, kv_heads, page, _ = k.shape
    group = heads // kv_heads
    rows = -(-group // _SUBLANES) * _SUBLANES
    groups = q.reshape(batch, kv_heads, group, size)
    pages = min(max(target.blocks.decode_bytes // (kv_heads * page * size * k.dtype.itemsize), 1), tables.shape[1])
    cores = target.cores
    main_memory = pl.BlockSpec(memory_space=pltpu.HBM)
    scratch = pltpu.VMEM((2, pages, kv_heads, page, size), k.dtype)
    stats = pltpu.VMEM((kv_heads * rows, LANES), jnp.float32)
    out, lse = pl.pallas_call(
        partial(_kernel, scale=scale, pages=pages, batch=batch, queries=lengths.shape[1], cores=cores),
        name="phi4mm_decode",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, batch),
            in_specs=[
                pl.BlockSpec((None, kv_heads, group, size), lambda core, b, *_: (b, 0, 0, 0)),
                main_memory,
                main_memory,
                scales and (main_memory, main_memory),
            ],
            out_specs=[
                pl.BlockSpec((None, None, heads, n), lambda core, b, *_: (core, b, 0, 0)) for n in (size, LANES)
            ],
            scratch_shapes=[
                scratch,
                scratch,
                scales and (pltpu.VMEM((2, pages, kv_heads, page), jnp.float32),) * 2,
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                stats,
                stats,
                pltpu.VMEM((kv_heads * rows, size), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((cores, batch, heads, n), jnp.float32) for n in (size, LANES)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=target.blocks.vmem
        ),
        interpret=target.interpret,
    )(layer.reshape(1), lengths.reshape(-1), tables.reshape(-1).astype(jnp.int32), groups, k, v, scales)

    lse = lse[..., 0]
    ones = jnp.ones_like(lse)
    return merge_partials(out, lse, ones) if cores > 1 else (out[0], lse[0], ones[0])


def _kernel(
    layer_ref, lengths_ref, tables_ref, q_ref, k_any, v_any, scales, out_ref, lse_ref, k_ref, v_ref, scales_ref,
    sems, free_slot, max_ref, sum_ref, acc_ref, *, scale: float, pages: int, batch: int, queries: int, cores: int,
):  # fmt: skip
    """Attend with each row's `queries`; `lengths_ref` holds the keys of each, the last of a row's having the most."""
    kv_heads, group, size = q_ref.shape
    rows = acc_ref.shape[0] // kv_heads
    page = k_ref.shape[3]
    keys = pages * page
    core, layer = pl.program_id(0), layer_ref[0]
    width = tables_ref.shape[0] // batch  # pages of a row

    def length_of(b):
        return lengths_ref[b * queries + queries - 1]

    def lengths_of_rows(b, shape):
        """Keys that each row of scores may attend to, as the rows of heads, queries and their groups lie."""
        row = lax.rem(lax.broadcasted_iota(jnp.int32, shape, 0), rows)
        lengths = jnp.full(shape, length_of(b))
        for t in reversed(range(queries - 1)):
            lengths = jnp.where(row < (t + 1) * (group // queries), lengths_ref[b * queries + t], lengths)
        return lengths

    def extent(b):
        """Return the row, and the range of blocks of keys that this core visits."""
        blocks = lax.div(length_of(b) + keys - 1, keys)
        share = lax.div(blocks + cores - 1, cores)
        first = lax.min(core * share, blocks)
        return b, first, lax.min(first + share, blocks)

    def for_pages(b, block, act):
        """Call act(page in the block, page in the cache) for the valid pages."""
        valid = lax.div(length_of(b) + page - 1, page) - block * pages
        table = b * width + block * pages
        lax.fori_loop(0, lax.min(valid, pages), lambda n, _: act(n, tables_ref[table + n]), None)

    def copies(n, at, slot):
        pairs = [(k_any, k_ref), (v_any, v_ref), *(zip(scales, scales_ref, strict=True) if scales else ())]
        for source, to in pairs:
            yield pltpu.make_async_copy(source.at[layer, at], to.at[slot, n], sems.at[slot])

    def start(b, block, slot):
        def act(n, at):
            for copy in copies(n, at, slot):
                copy.start()

        for_pages(b, block, act)

    def wait(b, block, slot):
        def act(n, at):
            for copy in copies(n, at, slot):
                copy.wait()

        for_pages(b, block, act)

    def queries_of(h):
        x = q_ref[h].astype(jnp.float32)
        return jnp.concatenate([x, jnp.zeros((rows - group, size))]).astype(q_ref.dtype) if rows > group else q_ref[h]

    def of_head(ref, slot, h):
        return ref[slot, :, h].reshape(keys, size)

    def scaled(x, which, slot, h):
        """Multiply by the scales of the keys, which lie along the columns."""
        if not scales:
            return x
        scale = scales_ref[which][slot, :, h]  # (pages, page)
        return x * jnp.concatenate([scale[n : n + 1] for n in range(pages)], 1)

    def product(a, b, dimensions):
        if scales:
            b = b.astype(jnp.float32).astype(a.dtype)
        return lax.dot_general(a, b, dimensions, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)

    def visit(b, block, slot):
        length = length_of(b)

        @pl.when(length < (block + 1) * keys)
        def _():
            """Zero the values behind the length: they may be anything, and 0 * NaN is not 0."""

            def clear_page(n, _):
                token = block * keys + n * page + lax.broadcasted_iota(jnp.int32, (kv_heads, page, size), 1)
                v_ref[slot, n] = jnp.where(token < length, v_ref[slot, n].astype(jnp.float32), 0.0).astype(v_ref.dtype)
                if scales:
                    token = block * keys + n * page + lax.broadcasted_iota(jnp.int32, (kv_heads, page), 1)
                    scales_ref[1][slot, n] = jnp.where(token < length, scales_ref[1][slot, n], 0.0)

            lax.fori_loop(lax.div(length - block * keys, page), pages, clear_page, None)

        scores = jnp.concatenate([
            scaled(product(queries_of(h), of_head(k_ref, slot, h), (((1,), (1,)), ((), ()))), 0, slot, h)
            for h in range(kv_heads)
        ]) * (scale * LOG2_E)  # (kv_heads * rows, keys)  # fmt: skip
        key = block * keys + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        of_rows = length if queries == 1 else lengths_of_rows(b, scores.shape)
        scores = jnp.where(key < of_rows, scores, MASKED)
        old = max_ref[...]
        new = jnp.maximum(old, scores.max(-1, keepdims=True))
        weights = jnp.exp2(scores - jnp.tile(new, (1, keys // LANES)))
        decay = jnp.exp2(old - new)
        max_ref[...] = new
        sum_ref[...] = sum_ref[...] * decay + weights.sum(-1, keepdims=True)
        for h in range(kv_heads):
            at = slice(h * rows, (h + 1) * rows)
            weights_h = scaled(weights[at], 1, slot, h).astype(q_ref.dtype)
            added = product(weights_h, of_head(v_ref, slot, h), (((1,), (0,)), ((), ())))
            acc_ref[at] = acc_ref[at] * jnp.tile(decay[at], (1, size // LANES)) + added

    max_ref[...] = jnp.full_like(max_ref, MASKED)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)
    stream(pl.program_id(1), batch, extent, free_slot, start, wait, visit)
    found = max_ref[...] > MASKED / 2
    total = jnp.where(found, sum_ref[...], 1.0)
    lse = jnp.where(found, max_ref[...] / LOG2_E + jnp.log(total), -jnp.inf)
    share = jnp.tile(jnp.where(found, 1.0 / total, 0.0), (1, size // LANES))
    for h in range(kv_heads):  # without the rows of padding, which XLA would have to cut out
        padded, at = slice(h * rows, h * rows + group), slice(h * group, (h + 1) * group)
        out_ref[at] = acc_ref[padded] * share[padded]
        lse_ref[at] = lse[padded]
