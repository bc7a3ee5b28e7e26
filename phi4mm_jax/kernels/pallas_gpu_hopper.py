"""Decoding on Hopper: one query a row against a paged cache, by Pallas through Mosaic GPU.

As `pallas_gpu_decode`, which other GPUs take: a block has one key head of one row and a part of its keys. Here tiles
come by TMA, several on their way, and are multiplied from shared memory by the warpgroup products of Hopper. These take
64 rows, of which a group of queries fills a few: at the bandwidth of the memory they are busy for a third of the time.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from phi4mm_jax.kernels import gpu
from phi4mm_jax.kernels.limits import LOG2_E, MASKED
from phi4mm_jax.kernels.pallas_gpu_decode import splits_of
from phi4mm_jax.kernels.partials import Partials, merge_partials

try:
    from jax.experimental.pallas import mosaic_gpu as pallas_mosaic_gpu
except ImportError:  # jax without Mosaic GPU
    pallas_mosaic_gpu = None

mosaic: Any = pallas_mosaic_gpu

_NEEDED = ("kernel", "wgmma", "copy_gmem_to_smem", "layout_cast", "LoweringSemantics")
_ROWS = 64  # of a warpgroup's product
_TILE = 64  # keys
_STAGES = 3  # tiles on their way
_BLOCKS = 2  # a multiprocessor: what their shared memory allows


def unsupported(q, k, target: gpu.Target) -> str | None:
    """Return why this kernel cannot run on these arguments, if so."""
    if target.capability[0] != gpu.HOPPER[0]:
        return "the kernel for Hopper needs a GPU of compute capability 9.0"
    if mosaic is None or not all(hasattr(mosaic, name) for name in _NEEDED):
        return f"the kernel for Hopper needs Pallas' Mosaic GPU back end, which jax {jax.__version__} is without"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q has dtype {q.dtype}; the kernel for Hopper takes bfloat16 and float16"
    if k.shape[3] % _TILE or k.shape[4] not in (64, 128):
        return f"k {k.shape}: the kernel for Hopper takes pages of {_TILE} n tokens and head sizes 64 and 128"
    if q.shape[1] // k.shape[2] > _ROWS:
        return f"q {q.shape}: the kernel for Hopper takes up to {_ROWS} heads to each key head of k {k.shape}"
    return None


def decode_attention(q, k, v, layer, lengths, tables, scales, *, scale: float, target: gpu.Target) -> Partials:
    """Compute (o, m, l) of `phi4mm_jax.kernels.decode_attention` on one device."""
    batch, heads, size = q.shape
    _, _, kv_heads, page, _ = k.shape
    group = heads // kv_heads
    if tables is None:
        tables = jnp.arange(batch)[:, None]
    splits = splits_of(batch, kv_heads, tables.shape[1] * (page // _TILE), target.cores, _BLOCKS)
    rows = -(-group // 8) * 8  # as shared memory is laid out
    groups = jnp.pad(q.reshape(batch, kv_heads, group, size), ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    body = partial(_attend, scale=scale, shape=k.shape, splits=splits, is_interpreted=target.interpret)

    def phi4mm_decode(*refs):  # the kernel's name
        body(*refs)

    parts = mosaic.kernel(
        phi4mm_decode,
        out_type=[
            jax.ShapeDtypeStruct((splits, batch, kv_heads, rows, *rest), jnp.float32) for rest in ((size,), (), ())
        ],
        grid=(splits, kv_heads, batch),
        grid_names=("splits", "heads", "rows"),
        compiler_params=mosaic.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0, lowering_semantics=mosaic.LoweringSemantics.Lane
        ),
        interpret=_interpreter() if target.interpret else None,
    )(
        layer.reshape(1), lengths, tables.astype(jnp.int32), groups, *(x.reshape(-1, size) for x in (k, v)),
        *(x.reshape(-1) for x in scales or ()),
    )  # fmt: skip
    return merge_partials(*(x[:, :, :, :group].reshape(splits, batch, heads, *x.shape[4:]) for x in parts))


def _interpreter() -> Any:
    """Return parameters of interpret mode, in which memory is not a number before it is written, and races raise."""
    kind = getattr(mosaic, "InterpretGPUParams", None)
    if kind is None:  # jax 0.10
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as kind
    return kind(detect_races=True, uninitialized_memory="nan")


def _attend(
    layer_ref, lengths_ref, tables_ref, q_ref, k_ref, v_ref, *refs,
    scale: float, shape: tuple[int, ...], splits: int, is_interpreted: bool,
):  # fmt: skip
    """Attend to one part of a row's tiles with the queries of one key head.

    Keys and values are (L * P * K * S, H), so that a tile is consecutive rows of two dimensions, at any size of cache.
    """
    *scale_refs, out_ref, largest_ref, total_ref = refs
    _, pages, kv_heads, page, size = shape
    split, h, b = (lax.axis_index(name) for name in ("splits", "heads", "rows"))
    layer, length = layer_ref[0], lengths_ref[b]
    tiles = lax.div(length + _TILE - 1, _TILE)
    share = lax.div(tiles + splits - 1, splits)
    first = lax.min(split * share, tiles)
    last = lax.min(first + share, tiles)
    dtype, rows = q_ref.dtype, q_ref.shape[2]
    of_rows, of_keys = (mosaic.Layout.WGMMA.reduce(axis) for axis in (1, 0))

    def laid_out(x, layout=mosaic.Layout.WGMMA):
        return x if is_interpreted else mosaic.layout_cast(x, layout)

    def product(a, x, *, transposed: bool = False):
        if is_interpreted:  # it knows no products whose left side is in registers
            a, x = (y[...].astype(jnp.float32) for y in (a, x))
            return lax.dot_general(a, x, (((1,), (1 if transposed else 0,)), ((), ())))
        x = x.transpose((1, 0)) if transposed else x

        def multiply(accumulator):
            mosaic.wgmma(accumulator, a, x)
            return accumulator[...]

        return pl.run_scoped(multiply, mosaic.ACC((_ROWS, x.shape[1]), jnp.float32))

    def attend(q, keys, values, arrived, q_arrived, scales, widened):
        def fetch(i):
            slot, place = lax.rem(i - first, _STAGES), i * _TILE
            row = ((layer * pages + tables_ref[b, lax.div(place, page)]) * kv_heads + h) * page + lax.rem(place, page)
            for source, target in zip((k_ref, v_ref, *scale_refs), (keys, values, *scales), strict=True):
                mosaic.copy_gmem_to_smem(source.at[pl.ds(row, _TILE)], target.at[slot], arrived.at[slot])

        mosaic.copy_gmem_to_smem(q_ref.at[b, h], q.at[pl.ds(0, rows)], q_arrived)  # the other rows may hold anything
        for ahead in range(_STAGES):
            pl.when(first + ahead < last)(partial(fetch, first + ahead))
        mosaic.barrier_wait(q_arrived)

        def one_tile(i, carry):
            largest, total, out = carry
            slot, place = lax.rem(i - first, _STAGES), i * _TILE
            valid = laid_out(lax.broadcasted_iota(jnp.int32, (_ROWS, _TILE), 1)) + place < length
            mosaic.barrier_wait(arrived.at[slot])
            if scales:
                for wide, narrow in zip(widened, (keys, values), strict=True):
                    wide[...] = laid_out(narrow[slot].astype(dtype))
                mosaic.commit_smem()
                k, v = widened
            else:
                k, v = keys.at[slot], values.at[slot]

                @pl.when(place + _TILE > length)
                def _():  # a weight of 0 times what lies behind the length may not be a number
                    x = laid_out(v[...])
                    kept = laid_out(lax.broadcasted_iota(jnp.int32, (_TILE, size), 0)) + place < length
                    v[...] = lax.select(kept, x, laid_out(jnp.zeros_like(x)))
                    mosaic.commit_smem()

            def of_key(scale):
                return lax.broadcast_in_dim(laid_out(scale[slot], of_keys), (_ROWS, _TILE), [1])

            scores = product(q, k, transposed=True) * (scale * LOG2_E)
            if scales:
                scores = scores * of_key(scales[0])
            scores = lax.select(valid, scores, laid_out(jnp.full_like(scores, MASKED)))
            new = lax.max(largest, scores.max(1))
            weights = jnp.exp2(scores - lax.broadcast_in_dim(new, scores.shape, [0]))
            decay = jnp.exp2(largest - new)
            total = total * decay + weights.sum(1)
            if scales:
                weights = lax.select(valid, weights * of_key(scales[1]), laid_out(jnp.zeros_like(weights)))
            out = out * lax.broadcast_in_dim(decay, out.shape, [0]) + product(weights.astype(dtype), v)
            pl.when(i + _STAGES < last)(lambda: fetch(i + _STAGES))
            return new, total, out

        start = (
            laid_out(jnp.full(_ROWS, MASKED, jnp.float32), of_rows),
            laid_out(jnp.zeros(_ROWS, jnp.float32), of_rows),
            laid_out(jnp.zeros((_ROWS, size), jnp.float32)),
        )
        return lax.fori_loop(first, last, one_tile, start)

    def memory(*shape, dtype=dtype):
        bits = jnp.dtype(dtype).itemsize * 8
        swizzle = min(128, shape[-1] * bits // 8)
        layout = mosaic.TilingTransform((8, swizzle * 8 // bits)), mosaic.SwizzleTransform(swizzle)
        return mosaic.SMEM(shape, dtype, transforms=layout)

    tile = memory(_STAGES, _TILE, size, dtype=k_ref.dtype)
    largest, total, out = pl.run_scoped(
        attend,
        q=memory(_ROWS, size),
        keys=tile,
        values=tile,
        arrived=mosaic.Barrier(num_arrivals=2 + len(scale_refs), num_barriers=_STAGES),
        q_arrived=mosaic.Barrier(),
        scales=[mosaic.SMEM((_STAGES, _TILE), jnp.float32)] * len(scale_refs),
        widened=[memory(_TILE, size)] * len(scale_refs),
    )

    def store(*results):
        nothing = laid_out(jnp.full(_ROWS, -jnp.inf, jnp.float32), of_rows)
        values = out, lax.select(largest > MASKED / 2, largest * (1 / LOG2_E), nothing), total
        for result, value in zip(results, values, strict=True):
            result[...] = value
        mosaic.commit_smem()
        for result, ref in zip(results, (out_ref, largest_ref, total_ref), strict=True):
            mosaic.copy_smem_to_gmem(result.at[pl.ds(0, rows)], ref.at[split, b, h])
        mosaic.wait_smem_to_gmem(0)

    of_row = mosaic.SMEM((_ROWS,), jnp.float32)
    pl.run_scoped(store, memory(_ROWS, size, dtype=jnp.float32), of_row, of_row)
