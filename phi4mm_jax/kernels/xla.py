"""Attention in plain XLA: the reference, exact and with bounded memory on every platform.

The scores are computed tile by tile with a running maximum and sum, and recomputed in the backward pass (Dao et
al., FlashAttention, arXiv:2205.14135). Tiles that no query of theirs may attend to are not visited. Inside, arrays
have their heads in front, so that a tile is one contiguous piece per head. On a CPU a tile is of few heads of one row,
so that its scores stay in the cores' caches.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from phi4mm_jax.kernels.limits import MASKED, Limits
from phi4mm_jax.kernels.pages import as_floats
from phi4mm_jax.kernels.partials import Partials
from phi4mm_jax.mesh import on_one_cpu
from phi4mm_jax.precision import einsum, row_sum

_TILE_ELEMENTS = 1 << 24  # scores held at once, over batch and heads
_TILE_ELEMENTS_PER_CORE = 1 << 18  # likewise on a CPU: a megabyte, about what a core's own cache holds
_KEY_TILE = 512
_WHOLE_KEYS = 1024  # so many queries and keys are one tile, without a mask of causality: the patches of a crop
DECODE_BLOCK = 128  # a cache's capacity is a multiple of this
_einsum = partial(einsum, result=jnp.float32)


class _Tiling(NamedTuple):
    """Static arguments of one call."""

    causal: bool
    scale: float
    queries: int  # of a tile
    keys: int
    out_dtype: Any
    heads: int | None  # of keys, in one row; None takes all heads of all rows


def supports(operation: str, *arguments: Any) -> str | None:
    """Return why an operation cannot run on these arguments, if so; see `registry.Implementation`."""
    match operation, arguments:
        case "append", _:
            return "implementation 'xla' has no append"
        case "decode", (_, k, _, _, _, None, _) if k.shape[3] % DECODE_BLOCK:
            return f"k holds {k.shape[3]} keys a row; expected a multiple of {DECODE_BLOCK}"
    return None


def flash_attention(q, k, v, limits: Limits, *, causal: bool, scale: float, out_dtype) -> tuple[Array, Array]:
    """Compute the output and the log-sum-exp (B, T, N) of `phi4mm_jax.kernels.flash_attention`."""
    batch, q_len, heads, size = q.shape
    _, kv_len, kv_heads, _ = k.shape
    whole = not causal and kv_len <= _WHOLE_KEYS
    keys = kv_len if whole else min(-(-kv_len // 64) * 64, _KEY_TILE)
    at_once = _WHOLE_KEYS if whole else _KEY_TILE
    queries = min(q_len, max(64, _floor_power_of_two(_TILE_ELEMENTS // (batch * heads * keys))), at_once)
    if limits.segments is not None:
        limits = limits._replace(segments=(_pad(limits.segments[0], 1, queries), _pad(limits.segments[1], 1, keys)))
    if limits.q_offset.ndim == 2:
        limits = limits._replace(q_offset=_pad(limits.q_offset, 1, queries))
    groups = q.reshape(batch, q_len, kv_heads, heads // kv_heads, size)
    result: Any = _attend(
        _pad(groups.transpose(0, 2, 3, 1, 4), 3, queries),  # (B, K, G, T, H)
        _pad(k.transpose(0, 2, 1, 3), 2, keys),  # (B, K, S, H)
        _pad(v.transpose(0, 2, 1, 3), 2, keys),
        limits,
        _Tiling(
            causal, scale, queries, keys, out_dtype, _heads_at_once(batch, kv_heads, heads // kv_heads * queries * keys)
        ),
    )
    out, log_sum = (jnp.moveaxis(x[:, :, :, :q_len], 3, 1) for x in result)
    return out.reshape(batch, q_len, heads, size), log_sum.reshape(batch, q_len, heads)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, limits: Limits, tiling: _Tiling):
    return _attended(q, k, v, limits, tiling)


def _attended(q, k, v, limits: Limits, tiling: _Tiling):
    out, log_sum = _by_heads(partial(_forward, tiling=tiling), tiling.heads, limits, q, k, v)
    return out, jnp.where(log_sum > MASKED / 2, log_sum, -jnp.inf)


def _heads_at_once(batch: int, kv_heads: int, scores: int) -> int | None:
    """Return `_Tiling.heads`, by the number of scores of one of the keys' heads."""
    max_heads = _TILE_ELEMENTS_PER_CORE * (os.cpu_count() or 1) // scores
    if not on_one_cpu() or max_heads >= batch * kv_heads:
        return None
    return next(n for n in range(min(max(max_heads, 1), kv_heads), 0, -1) if kv_heads % n == 0)


def _by_heads(function: Callable[..., Any], heads: int | None, limits: Limits, *arrays: Array) -> Any:
    """Compute `function(limits, *arrays)` of arrays (B, K, ...), `heads` heads of a row at a time."""
    if heads is None:
        return function(limits, *arrays)
    batch, kv_heads = arrays[0].shape[:2]
    rows = jnp.repeat(jnp.arange(batch), kv_heads // heads)

    def some(row, *parts):
        of_row = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(jnp.asarray(x), row, 1), limits)
        return jax.tree.map(lambda x: x[0], function(of_row, *(x[None] for x in parts)))

    parts = (x.reshape(-1, heads, *x.shape[2:]) for x in arrays)
    found = lax.map(lambda xs: some(*xs), (rows, *parts))
    return jax.tree.map(lambda x: x.reshape(batch, kv_heads, *x.shape[2:]), found)


def _forward(limits: Limits, q, k, v, *, tiling: _Tiling):
    """Return the output and the log-sum-exp of the scores, (B, K, G, T), for the backward pass."""

    def factors(maximum, total):
        """Factors that normalise the rows: 0 in a row without keys, whose weights are all 1 until then."""
        return jnp.where(maximum > MASKED / 2, 1 / total, 0.0)

    def query_tile(i):
        q_i = _tile(q, i, tiling.queries, 3)
        if not tiling.causal and k.shape[2] == tiling.keys:
            # Plain softmax, normalised before it is applied: it rounds as PyTorch's does. Causal rows are not taken so:
            # their padded length, and with it their rounding, is that of the longest row beside them.
            scores = _scores(q_i, k, i, 0, limits, tiling)
            maximum = scores.max(-1)
            weights = jnp.exp(scores - maximum[..., None])
            total = row_sum(weights)
            weights = (weights * factors(maximum, total)[..., None]).astype(v.dtype)
            out = _einsum("BKGTS,BKSH->BKGTH", weights, v)
            return out.astype(tiling.out_dtype), maximum + jnp.log(total)

        def key_tile(j, carry):
            maximum, total, out = carry
            scores = _scores(q_i, _tile(k, j, tiling.keys, 2), i, j, limits, tiling)
            new_maximum = jnp.maximum(maximum, scores.max(-1))
            weights = jnp.exp(scores - new_maximum[..., None])
            decay = jnp.exp(maximum - new_maximum)
            out = out * decay[..., None] + _einsum(
                "BKGTS,BKSH->BKGTH", weights.astype(v.dtype), _tile(v, j, tiling.keys, 2)
            )
            return new_maximum, total * decay + row_sum(weights), out

        rows = q_i.shape[:-1]
        start = jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros(q_i.shape, jnp.float32)
        maximum, total, out = _loop(_last_key_tile(i, k.shape[2], limits, tiling), key_tile, start)
        return (out * factors(maximum, total)[..., None]).astype(tiling.out_dtype), maximum + jnp.log(total)

    num_tiles = q.shape[3] // tiling.queries
    if num_tiles == 1:
        return query_tile(0)
    out, log_sum = lax.map(query_tile, jnp.arange(num_tiles))  # (tiles, B, K, G, queries, H)
    return _join(out, 3), _join(log_sum, 3)


def _attend_forward(q, k, v, limits: Limits, tiling: _Tiling):
    q, k, v = (checkpoint_name(x, "attention") for x in (q, k, v))
    out, log_sum = (checkpoint_name(x, "attention") for x in _attended(q, k, v, limits, tiling))
    return (out, log_sum), (q, k, v, limits, out, log_sum)


def _attend_backward(tiling: _Tiling, residuals, cotangents):
    q, k, v, limits, out, log_sum = residuals
    d_out, d_log_sum = cotangents
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1) - d_log_sum  # (B, K, G, T)
    backward = partial(_backward, tiling=tiling)
    dq, dk, dv = _by_heads(backward, tiling.heads, limits, q, k, v, d_out.astype(q.dtype), log_sum, delta)
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), limits)
    return dq, dk, dv, nothing


def _backward(limits: Limits, q, k, v, d_out, log_sum, delta, *, tiling: _Tiling):
    """Return the gradients of queries, keys and values; `delta` (B, K, G, T) is the products of rows with theirs."""

    log_sum = jnp.where(log_sum > -jnp.inf, log_sum, 0.0)  # a row without keys: the weights of its masked scores are 0

    def query_tile(carry, i):
        """Compute the gradients of one tile of queries; those of keys and values are summed in the carry."""
        q_i, d_out_i = _tile(q, i, tiling.queries, 3), _tile(d_out, i, tiling.queries, 3)
        log_sum_i, delta_i = _tile(log_sum, i, tiling.queries, 3), _tile(delta, i, tiling.queries, 3)

        def key_tile(j, carry):
            dq_i, dk, dv = carry
            k_j, v_j = _tile(k, j, tiling.keys, 2), _tile(v, j, tiling.keys, 2)
            weights = jnp.exp(_scores(q_i, k_j, i, j, limits, tiling) - log_sum_i[..., None])
            dv_j = _einsum("BKGTS,BKGTH->BKSH", weights.astype(v.dtype), d_out_i)
            d_weights = _einsum("BKGTH,BKSH->BKGTS", d_out_i, v_j)
            d_scores = (weights * (d_weights - delta_i[..., None]) * tiling.scale).astype(q.dtype)
            dq_i = dq_i + _einsum("BKGTS,BKSH->BKGTH", d_scores, k_j)
            dk_j = _einsum("BKGTS,BKGTH->BKSH", d_scores, q_i)
            return dq_i, _add_tile(dk, dk_j, j, tiling.keys), _add_tile(dv, dv_j, j, tiling.keys)

        start = jnp.zeros(q_i.shape, jnp.float32), *carry
        dq_i, dk, dv = _loop(_last_key_tile(i, k.shape[2], limits, tiling), key_tile, start)
        return (dk, dv), dq_i.astype(q.dtype)

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    num_tiles = q.shape[3] // tiling.queries
    (dk, dv), dq = lax.scan(query_tile, start, jnp.arange(num_tiles))
    return _join(dq, 3), dk.astype(k.dtype), dv.astype(v.dtype)


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(q_i, k_j, i, j, limits: Limits, tiling: _Tiling):
    """Return a tile's scores in float32, (B, K, G, queries, keys): `MASKED` where they may not be attended to."""
    scores = _einsum("BKGTH,BKSH->BKGTS", q_i, k_j) * tiling.scale
    key = j * tiling.keys + jnp.arange(tiling.keys)
    allowed = (key < limits.kv_lengths[:, None])[:, None, :]  # (B, 1, keys)
    if limits.segments is not None:
        q_ids, k_ids = limits.segments
        allowed &= _tile(q_ids, i, tiling.queries, 1)[:, :, None] == _tile(k_ids, j, tiling.keys, 1)[:, None]
    if tiling.causal:
        query = i * tiling.queries + jnp.arange(tiling.queries)
        offset = limits.q_offset[:, None] if limits.q_offset.ndim == 1 else _tile(limits.q_offset, i, tiling.queries, 1)
        allowed &= key <= (query + offset)[..., None]
    return jnp.where(allowed[:, None, None], scores, MASKED)


def _last_key_tile(i, kv_len: int, limits: Limits, tiling: _Tiling):
    """Return how many tiles of keys the i-th tile of queries has to visit."""
    if kv_len == tiling.keys:
        return 1
    last = limits.kv_lengths.max()
    if tiling.causal:
        last = jnp.minimum(last, (i + 1) * tiling.queries + limits.q_offset.max())
    return lax.div(last + tiling.keys - 1, tiling.keys)


def decode_attention(q, k, v, layer, lengths, tables, scales, *, scale: float) -> Partials:
    """Compute (o, m, l) of `phi4mm_jax.kernels.decode_attention`."""
    batch, heads, size = q.shape
    kv_heads, page = k.shape[2], k.shape[3]
    groups = q.reshape(batch, kv_heads, heads // kv_heads, size)
    of_queries = lengths  # (B, 1), or one of each query of a group
    if lengths.shape[1] > 1:
        of_queries = jnp.repeat(lengths, groups.shape[2] // lengths.shape[1], 1)
    lengths = lengths[:, -1]
    pages = max(_KEY_TILE // page, 1)
    keys = pages * page if tables is not None else next(n for n in (_KEY_TILE, 256, DECODE_BLOCK) if page % n == 0)
    table = None if tables is None else _pad(tables, 1, pages)

    def block(cache, j):
        """Return block j, (B, K, keys, H), or (B, K, keys) of scales."""
        if table is None:
            return lax.dynamic_slice(cache, (layer, 0, 0, j * keys, 0), (1, batch, kv_heads, keys, size))[0]
        taken = cache[layer, lax.dynamic_slice_in_dim(table, j * pages, pages, 1)]  # (B, pages, K, page, ...)
        return taken.swapaxes(1, 2).reshape(batch, kv_heads, keys, *taken.shape[4:])

    def values(cache, scales, j):
        return as_floats(block(cache, j), None if scales is None else block(scales, j), q.dtype)

    k_scales, v_scales = scales or (None, None)

    def key_tile(j, carry):
        maximum, total, out = carry
        scores = _einsum("BKGH,BKSH->BKGS", groups, values(k, k_scales, j)) * scale
        key = j * keys + jnp.arange(keys)
        allowed = (key < of_queries[..., None])[:, None]
        new_maximum = jnp.maximum(maximum, jnp.where(allowed, scores, MASKED).max(-1))
        weights = jnp.where(allowed, jnp.exp(scores - new_maximum[..., None]), 0.0)
        decay = jnp.exp(maximum - new_maximum)
        # Values behind a row's length may be anything, and 0 * NaN is not 0.
        v_j = jnp.where((key < lengths[:, None])[:, None, :, None], values(v, v_scales, j), 0)
        out = out * decay[..., None] + _einsum("BKGS,BKSH->BKGH", weights.astype(q.dtype), v_j)
        return new_maximum, total * decay + row_sum(weights), out

    rows = groups.shape[:-1]
    start = jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros(groups.shape, jnp.float32)
    maximum, total, out = _loop(lax.div(lengths.max() + keys - 1, keys), key_tile, start)
    maximum = jnp.where(maximum > MASKED / 2, maximum, -jnp.inf)
    return out.reshape(q.shape), maximum.reshape(batch, heads), total.reshape(batch, heads)


def _loop(stop, body, carry):
    """Run `fori_loop` from 0, without a loop where there is exactly one step."""
    return body(0, carry) if isinstance(stop, int) and stop == 1 else lax.fori_loop(0, stop, body, carry)


def _tile(x, index, size: int, axis: int):
    return x if x.shape[axis] == size else lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _add_tile(total, tile, index, size: int):
    return lax.dynamic_update_slice_in_dim(total, _tile(total, index, size, 2) + tile, index * size, 2)


def _join(tiles, axis: int):
    """Join tiles: (tiles, ..., n, ...) -> (..., tiles * n, ...)."""
    moved = jnp.moveaxis(tiles, 0, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])


def _pad(x, axis: int, multiple: int):
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def _floor_power_of_two(n: int) -> int:
    return 1 << max(n.bit_length() - 1, 0)
