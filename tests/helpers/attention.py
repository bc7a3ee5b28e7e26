"""Attention written out, and random arrays and pages for it."""

import jax
import jax.numpy as jnp
import numpy as np


def reference(
    q, k, v, *, causal, q_offset=0, kv_lengths=None, kv_mask=None, q_segments=None, kv_segments=None, scale=None
):
    """Return the output (B, T, N, H) and the log-sum-exp (B, T, N) of attention, written out."""
    batch, length, heads, size = q.shape
    keys = k.shape[1]
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * (size**-0.5 if scale is None else scale)
    allowed = np.ones((batch, length, keys), bool)
    if causal:
        offset = np.broadcast_to(np.asarray(q_offset), (batch,))
        allowed &= np.arange(keys) <= (np.arange(length) + offset[:, None])[..., None]
    if kv_lengths is not None:
        allowed &= np.arange(keys) < np.asarray(kv_lengths)[:, None, None]
    if kv_mask is not None:
        allowed &= kv_mask[:, None, :]
    if q_segments is not None:
        allowed &= q_segments[:, :, None] == kv_segments[:, None]
    some, allowed = np.any(allowed, axis=-1)[:, None], np.expand_dims(allowed, 1)
    scores = jnp.where(allowed, scores, -1e30)
    lse = jax.nn.logsumexp(scores, -1)
    weights = jnp.where(allowed, jnp.exp(scores - lse[..., None]), 0.0)
    return jnp.einsum("bnts,bsnh->btnh", weights, v), jnp.where(some, lse, -np.inf).swapaxes(1, 2)


def random(seed, *shapes, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def pages_of(seed, lengths, *, kv_heads, size=128, page=128, layers=2, per_row=5):
    """Return keys and values (L, P, K, S, H) in shuffled pages, and the table; NaN lies behind a row's length."""
    rng = np.random.default_rng(seed)
    count = len(lengths) * per_row
    tables = rng.permutation(count).reshape(len(lengths), per_row).astype(np.int32)
    k, v = random(seed, *[(layers, count, kv_heads, page, size)] * 2)
    for row, length in zip(tables, lengths, strict=True):
        for i, at in enumerate(row):
            k[:, at, :, max(length - i * page, 0) :] = v[:, at, :, max(length - i * page, 0) :] = np.nan
    return k, v, tables


def unpaged(pages, table):
    """Return keys or values (B, S, K, H) of one layer's pages (P, K, S, H)."""
    rows = np.nan_to_num(pages[table]).swapaxes(2, 3)
    return rows.reshape(len(table), -1, *rows.shape[3:])


def quantized(pages):
    """Return pages as int8, and a scale for each token and head."""
    scales = np.abs(pages).max(-1) / 127
    return np.nan_to_num(np.round(pages / scales[..., None])).astype(np.int8), scales.astype(np.float32)
