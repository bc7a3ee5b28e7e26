"""Attention API. An implementation is chosen by name; a name succeeds or raises."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from phi4mm_jax.errors import InputError
from phi4mm_jax.kernels.limits import Limits
from phi4mm_jax.kernels.pages import BITS
from phi4mm_jax.kernels.registry import choose, find_operation


@jax.named_scope("flash_attention")
def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool,
    scale: float | None = None,
    q_offset: Int[Array, " B"] | Int[Array, "B T"] | int | None = None,
    kv_lengths: Int[Array, " B"] | None = None,
    kv_mask: Bool[Array, "B S"] | None = None,
    q_segments: Int[Array, "B T"] | None = None,
    kv_segments: Int[Array, "B S"] | None = None,
    return_lse: bool = False,
    out_dtype: Any = None,
    implementation: str | None = None,
) -> Any:
    """Compute softmax attention with grouped query heads; memory is bounded: (T, S) scores are never held.

    Query head n attends with KV head n // (N / K). Scores and softmax are in float32. A query that may attend to no
    key gives zeros. Differentiable in q, k and v.

    Args:
        causal: query t of row b attends to keys s <= t + q_offset[b] only.
        scale: of the scores; H**-0.5 by default.
        q_offset: the position of each row's first query among its keys; 0 by default, negative before them. Or one of
            each query, (B, T), in plain XLA only.
        kv_lengths: keys from this index on are not attended to; they may hold any value, NaN included.
        kv_mask: keys where it is False are not attended to, likewise.
        q_segments: a query attends to the keys with the same id only; ids are not negative. Needs `kv_segments`.
        kv_segments: ids of the keys. Needs `q_segments`.
        return_lse: also return the logarithm of the sum of the exponentials of each query's scores.
        out_dtype: of the output; q's by default. Results that are joined with others are best left in float32.
        implementation: None chooses what is best on this platform; a name succeeds or raises.

    Returns:
        (B, T, N, H) in `out_dtype`; with `return_lse` also (B, T, N) in float32, -inf for a query without keys.

    Raises:
        InputError: a shape, dtype or implementation that is not supported; the message names the argument.
    """
    _check_qkv(q, k, v)
    batch, q_len, _, size = q.shape
    kv_len = k.shape[1]
    if (q_segments is None) != (kv_segments is None):
        raise InputError("flash_attention: q_segments and kv_segments must be given together")
    is_known = q_offset is None or isinstance(q_offset, int)  # when traced: see `Limits`
    offset: Any = np.full(batch, q_offset or 0, np.int32) if is_known else jnp.asarray(q_offset)
    offset = jnp.broadcast_to(offset, batch) if offset.ndim == 0 else offset
    if offset.ndim == 2 and implementation is None:
        implementation = "xla"
    check_shapes(
        "flash_attention",
        q_offset=(offset, (batch, q_len)[: offset.ndim]),
        kv_lengths=(kv_lengths, (batch,)),
        kv_mask=(kv_mask, (batch, kv_len)),
        q_segments=(q_segments, (batch, q_len)),
        kv_segments=(kv_segments, (batch, kv_len)),
    )
    if kv_mask is not None:  # masked keys are a segment without queries
        k, v = _cleared(kv_mask, k, v)
        kv_segments = jnp.where(kv_mask, 0 if kv_segments is None else kv_segments, -1)
    segments = None
    if kv_segments is not None:
        ids = np.zeros((batch, q_len), np.int32) if q_segments is None else q_segments.astype(jnp.int32)
        segments = ids, ids if kv_segments is q_segments else kv_segments.astype(jnp.int32)
    limits = Limits(
        offset.astype(jnp.int32),
        np.full(batch, kv_len, np.int32) if kv_lengths is None else jnp.clip(kv_lengths, 0, kv_len).astype(jnp.int32),
        segments,
    )
    factor = size**-0.5 if scale is None else float(scale)
    out_dtype = jnp.dtype(q.dtype if out_dtype is None else out_dtype)
    chosen = choose("flash_attention", implementation, "prefill", q, k, v, limits, causal)
    if kv_lengths is not None and not chosen.masks_values:
        k, v = _cleared(jnp.arange(kv_len) < kv_lengths[:, None], k, v)
    out, lse = chosen.prefill(q, k, v, limits, causal=causal, scale=factor, out_dtype=out_dtype)
    return (out, lse) if return_lse else out


@jax.named_scope("decode_attention")
def decode_attention(
    q: Float[Array, "B *T N H"],
    k: Array,
    v: Array,
    *,
    layer: Int[Array, ""] | int,
    lengths: Int[Array, "B *T"],
    tables: Int[Array, "B M"] | None = None,
    k_scales: Float[Array, "L P K S"] | None = None,
    v_scales: Float[Array, "L P K S"] | None = None,
    scale: float | None = None,
    return_partials: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attend with one query per row to the first `lengths[b]` keys of `layer` in the cache.

    Or with a few, (B, T, N, H), the t-th to the first `lengths[b, t]` keys, which do not decrease with t: each key is
    read once for all of them.

    The cache of all layers is passed whole, so that no layer's slice has to be copied. The number of pages read
    grows with the lengths, not with the capacity.

    Args:
        k, v: pages (L, P, K, S, H): of each layer P pages of S tokens, those of one page in one piece. In q's dtype,
            or int8 with scales, or in plain XLA the bits of q's dtype in uint16 (see `kernels.pages`).
        tables: row b's tokens from S * i on lie in page tables[b, i]. Slots behind a row's length may hold any value,
            NaN included.
            Without tables, k and v are (L, B, K, S, H): one page per row.
        k_scales, v_scales: float32 (L, P, K, S), by which the int8 values of a token and head are multiplied.
        scale: of the scores; H**-0.5 by default.
        return_partials: return (o, m, l) for `merge_partials`, where each shard holds a part of the keys.

    Returns:
        As q, zeros for a query without keys. Or in float32: o as q, the sum of the values weighted by exp(score - m),
        m (B, N) or (B, T, N), near the maximum score (-inf if there are no keys), and l as m, the sum of the weights,
        which may be anything where there are no keys.

    Raises:
        InputError: a shape, dtype or implementation that is not supported; the message names the argument.
    """
    scales = check_pages("decode_attention", q, k, v, tables, k_scales, v_scales)
    check_shapes("decode_attention", lengths=(lengths, q.shape[:-2]))
    layer, lengths = jnp.asarray(layer, jnp.int32), lengths.astype(jnp.int32)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = _fold_queries(q, k.shape[2]), k, v, layer, lengths.reshape(len(q), -1), tables, scales
    partials = choose("decode_attention", implementation, "decode", *arguments).decode(*arguments, scale=factor)
    partials = tuple(_unfold_queries(x, q.shape[:-1], k.shape[2]) for x in partials)
    if return_partials:
        return partials
    out, _, total = partials
    return (out / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)  # an empty row's sums are zeros


def _check_qkv(q: Array, k: Array, v: Array) -> None:
    """Raise an InputError unless queries, keys and values fit each other, as `flash_attention` takes them."""
    if q.ndim != 4 or k.ndim != 4:
        raise InputError(f"flash_attention: q {q.shape} and k {k.shape} must be (B, T, N, H) and (B, S, K, H)")
    if k.shape != v.shape:
        raise InputError(f"flash_attention: k {k.shape} and v {v.shape} differ in shape")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise InputError(f"flash_attention: k {k.shape} must share the batch and head sizes of q {q.shape}")
    if q.shape[2] % k.shape[2]:
        raise InputError(f"flash_attention: q's {q.shape[2]} heads are not a multiple of k's {k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise InputError(f"flash_attention: q, k, v must share one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")


def check_shapes(function: str, **arguments: tuple[Array | None, tuple[int, ...]]) -> None:
    """Raise an InputError unless each argument, by name, has its shape and whole numbers, or truth values in a mask."""
    for name, (argument, shape) in arguments.items():
        if argument is None:
            continue
        if argument.shape != shape:
            raise InputError(f"{function}: {name} has shape {argument.shape}; expected {shape}")
        if not jnp.issubdtype(argument.dtype, jnp.bool_ if name.endswith("mask") else jnp.integer):
            raise InputError(f"{function}: {name} has dtype {argument.dtype}")


def check_pages(
    function: str,
    q: Array,
    k: Array,
    v: Array,
    tables: Array | None,
    k_scales: Array | None,
    v_scales: Array | None,
) -> tuple[Array, Array] | None:
    """Check queries (B, ..., N, H) and pages, as `decode_attention` takes them; return the scales, None for floats.

    Raises:
        InputError: a shape or dtype that does not fit; it names the function and the argument.
    """
    if k.shape != v.shape or k.ndim != 5:
        raise InputError(f"{function}: k {k.shape} and v {v.shape} must both be (L, P, K, S, H)")
    if q.ndim not in (3, 4) or q.shape[-1] != k.shape[4] or q.shape[-2] % k.shape[2]:
        raise InputError(f"{function}: q {q.shape} does not fit k {k.shape}")
    if tables is None and k.shape[1] != q.shape[0]:
        raise InputError(f"{function}: without tables, k {k.shape} must have as many rows as q {q.shape}")
    if tables is not None and (tables.ndim != 2 or tables.shape[0] != q.shape[0]):
        raise InputError(f"{function}: tables has shape {tables.shape}; expected ({q.shape[0]}, pages per row)")
    quantized = k.dtype == jnp.int8
    is_bits = k.dtype == BITS and q.dtype.itemsize == BITS.itemsize
    if k.dtype != v.dtype or not (quantized or is_bits or k.dtype == q.dtype):
        raise InputError(
            f"{function}: k {k.dtype} and v {v.dtype} must both be {q.dtype}, as q, its bits (uint16, of two "
            "bytes) or int8"
        )
    for name, argument in (("k_scales", k_scales), ("v_scales", v_scales)):
        if (argument is not None) != quantized:
            raise InputError(f"{function}: {name} must be given with int8 pages, and with them only")
        if argument is not None and (argument.shape != k.shape[:4] or argument.dtype != jnp.float32):
            raise InputError(f"{function}: {name} must be float32 {k.shape[:4]}; got {argument.dtype} {argument.shape}")
    return None if k_scales is None or v_scales is None else (k_scales, v_scales)


def _fold_queries(q: Float[Array, "B *T N H"], kv_heads: int) -> Float[Array, "B X H"]:
    """Put the T queries of each key head's group together: to a kernel they are one larger group, (K, T, G)."""
    if q.ndim == 3:
        return q
    batch, count, heads, size = q.shape
    groups = q.reshape(batch, count, kv_heads, heads // kv_heads, size)
    return groups.swapaxes(1, 2).reshape(batch, count * heads, size)


def _unfold_queries(x: Float[Array, "B X ..."], shape: tuple[int, ...], kv_heads: int) -> Array:
    """Undo `_fold_queries` in a result of queries of this shape, (B, N) or (B, T, N)."""
    if len(shape) == 2:
        return x
    batch, count, heads = shape
    groups = x.reshape(batch, kv_heads, count, heads // kv_heads, *x.shape[2:])
    return groups.swapaxes(1, 2).reshape(batch, count, heads, *x.shape[2:])


@jax.named_scope("append_tokens")
def append_tokens(
    caches: Sequence[Array],
    new: Sequence[Array],
    *,
    layer: Int[Array, ""] | int,
    pages: Int[Array, " B"],
    slots: Int[Array, " B"],
) -> tuple[Array, ...] | None:
    """Write one token of each of B rows into pages, all at once and in place; None where no kernel does that.

    Args:
        caches: keys and values (L, P, K, S, H), and their scales (L, P, K, S) where they are int8.
        new: keys and values (B, K, H), which are quantised where the caches are int8.
        pages, slots: where each row's token goes. Rows have pages of their own, but for the cache's last page, in which
            nothing is written (the scratch page).
    """
    arguments = caches, new, jnp.asarray(layer, jnp.int32), pages.astype(jnp.int32), slots.astype(jnp.int32)
    append = find_operation("append", *arguments)
    return None if append is None else append(*arguments)


def _cleared(
    valid: Bool[Array, "B S"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"]
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Zero the keys and values that no query may attend to: a weight of 0 times NaN would be NaN."""
    valid = valid[:, :, None, None]
    return jnp.where(valid, k, 0), jnp.where(valid, v, 0)
