"""Decoding on GPUs: one query a row against a paged cache, by Pallas through Triton.

Bound by the transfer of keys and values. A program has one key head of one row and a part of its keys, as many parts as
keep all multiprocessors busy; each leaves (o, m, l), which a second kernel merges. A tile of keys is a page, or a part
of one, so that tables are read as they are; what lies behind a row's length is neither read nor multiplied.
"""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from phi4mm_jax.kernels import gpu
from phi4mm_jax.kernels.limits import LOG2_E, MASKED
from phi4mm_jax.precision import precision_of

try:
    from jax.experimental.pallas import triton as pallas_triton
except ImportError:  # a later jax
    pallas_triton = None

triton: Any = pallas_triton

_ROWS = 16  # the queries of a group are padded to these, the fewest that the matrix units take
_TILE = 64  # keys, at most
_WARPS, _INT8_WARPS = 4, 2  # of a program; with int8 values two are 5 % faster on an H200, for they are read bytewise
_STAGES = 4  # tiles on their way
_PROGRAMS = 8  # a multiprocessor


def unsupported(q, k, target: gpu.Target) -> str | None:
    """Return why this kernel cannot run on these arguments, if so."""
    if triton is None:
        return f"implementation 'pallas_gpu' needs Pallas' Triton back end, which jax {jax.__version__} is without"
    if target.capability < gpu.AMPERE:
        return "implementation 'pallas_gpu' needs a GPU of compute capability 8.0 or later"
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"q has dtype {q.dtype}; implementation 'pallas_gpu' takes bfloat16, float16 and float32"
    page, size = k.shape[3], k.shape[4]
    if page % 16 or size < 16 or size & (size - 1):
        return f"k {k.shape}: implementation 'pallas_gpu' takes pages of 16 n tokens and head sizes 16, 32, 64, ..."
    if q.shape[1] // k.shape[2] > _ROWS:
        return f"q {q.shape}: implementation 'pallas_gpu' takes up to {_ROWS} heads to each key head of k {k.shape}"
    if k.dtype == jnp.int8 and 2**31 <= k.size <= 2**32:
        return f"k {k.shape}: implementation 'pallas_gpu' takes int8 pages of less than 2**31 or more than 2**32 bytes"
    return None


def splits_of(batch: int, kv_heads: int, tiles: int, cores: int, programs: int = _PROGRAMS) -> int:
    """Return how many parts the keys of each row and head are split into, `tiles` at most: a power of two.

    Args:
        programs: that a multiprocessor is to have.
    """
    wanted = max(min(cores * programs // (batch * kv_heads), tiles), 1)
    return 1 << (wanted.bit_length() - 1)


def decode_attention(q, k, v, layer, lengths, tables, scales, *, scale: float, target: gpu.Target):
    """Compute (o, m, l) of `phi4mm_jax.kernels.decode_attention` on one device."""
    batch, heads, size = q.shape
    _, _, kv_heads, page, _ = k.shape
    group = heads // kv_heads
    if tables is None:
        tables = jnp.arange(batch)[:, None]
    tile = min(_TILE, page & -page)
    splits = splits_of(batch, kv_heads, tables.shape[1] * (page // tile), target.cores)
    kernel = partial(phi4mm_decode, scale=scale, group=group, tile=tile)
    groups = q.reshape(batch, kv_heads, group, size)
    warps = _INT8_WARPS if scales else _WARPS
    parts = _call(kernel, (splits, kv_heads, batch), (splits, batch, kv_heads, _ROWS), size, target, warps)(
        layer.reshape(1), lengths, tables.astype(jnp.int32), groups, k, v, scales
    )
    if splits == 1:
        return tuple(x[0, :, :, :group].reshape(batch, heads, *x.shape[4:]) for x in parts)
    return _call(partial(phi4mm_decode_merge, group=group), (batch, heads), (batch, heads), size, target)(*parts)


def _call(kernel, grid: tuple[int, ...], shape: tuple[int, ...], size: int, target: gpu.Target, warps: int = _WARPS):
    """Return a Pallas call by Triton whose results are (o, m, l) of this shape."""
    call = pl.pallas_call(
        kernel,
        name=kernel.func.__name__,
        grid=grid,
        out_shape=[jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*shape, size), shape, shape)],
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=_STAGES),
        interpret=target.interpret,
    )

    def called(*arguments):
        with warnings.catch_warnings():  # jax 0.11 announces the end of Triton
            warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
            return call(*arguments)

    return called


def phi4mm_decode(
    layer_ref, lengths_ref, tables_ref, q_ref, k_ref, v_ref, scales, out_ref, largest_ref, total_ref, *,
    scale: float, group: int, tile: int,
):  # fmt: skip
    """Attend to one part of a row's tiles with the queries of one key head. Triton takes this function's name."""
    split, h, b = (pl.program_id(i) for i in range(3))
    size, page = k_ref.shape[4], k_ref.shape[3]
    layer, length = layer_ref[0], lengths_ref[b]
    tiles = lax.div(length + tile - 1, tile)
    share = lax.div(tiles + pl.num_programs(0) - 1, pl.num_programs(0))
    first = lax.min(split * share, tiles)
    row = lax.broadcasted_iota(jnp.int32, (_ROWS,), 0)
    q = q_ref[b, h, jnp.minimum(row, group - 1)]

    def product(a, x, dimensions):
        if scales:
            x = x.astype(q.dtype)
        return lax.dot_general(
            a, x, (dimensions, ((), ())), precision=precision_of(a.dtype), preferred_element_type=jnp.float32
        )

    def one_tile(i, carry):
        largest, total, out = carry
        place = i * tile
        at = layer, tables_ref[b, lax.div(place, page)], h, pl.ds(lax.rem(place, page), tile)
        valid = place + lax.broadcasted_iota(jnp.int32, (tile,), 0) < length

        def tile_of(ref):
            mask = valid if ref.ndim == 4 else jnp.broadcast_to(valid[:, None], (tile, size))
            return triton.load(ref.at[at if ref.ndim == 4 else (*at, slice(None))], mask=mask, other=0)

        scores = product(q, tile_of(k_ref), ((1,), (1,))) * (scale * LOG2_E)  # (_ROWS, tile)
        if scales:
            scores = scores * tile_of(scales[0])[None, :]
        scores = jnp.where(valid[None, :], scores, MASKED)
        new = jnp.maximum(largest, scores.max(1))
        weights = jnp.exp2(scores - new[:, None])
        decay = jnp.exp2(largest - new)
        total = total * decay + weights.sum(1)
        if scales:
            weights = weights * tile_of(scales[1])[None, :]
        added = product(weights.astype(q.dtype), tile_of(v_ref), ((1,), (0,)))
        return new, total, out * decay[:, None] + added

    start = jnp.full(_ROWS, MASKED, jnp.float32), jnp.zeros(_ROWS, jnp.float32), jnp.zeros((_ROWS, size), jnp.float32)
    largest, total, out = lax.fori_loop(first, lax.min(first + share, tiles), one_tile, start)
    used = row < group
    at = split, b, h
    triton.store(out_ref.at[(*at, slice(None), slice(None))], out, mask=jnp.broadcast_to(used[:, None], out.shape))
    triton.store(
        largest_ref.at[(*at, slice(None))], jnp.where(largest > MASKED / 2, largest / LOG2_E, -jnp.inf), mask=used
    )
    triton.store(total_ref.at[(*at, slice(None))], total, mask=used)


def phi4mm_decode_merge(o_ref, m_ref, l_ref, out_ref, largest_ref, total_ref, *, group: int):
    """Join all parts of a query's keys, as `merge_partials` does, in one launch instead of four."""
    b, head = pl.program_id(0), pl.program_id(1)
    at = slice(None), b, lax.div(head, group), lax.rem(head, group)
    m = m_ref[at]
    largest = m.max(0)
    weights = jnp.exp(m - jnp.maximum(largest, MASKED))
    out_ref[b, head] = (o_ref[(*at, slice(None))] * weights[:, None]).sum(0)
    largest_ref[b, head] = largest
    total_ref[b, head] = (l_ref[at] * weights).sum(0)
