"""Attention of rows whose tokens are spread over the mesh axis `context` (Liu et al., Ring Attention,
arXiv:2310.01889): queries stay, keys and values go around.

Of the 2C chunks that a row is cut into, device i of C has chunks i and 2C - 1 - i, so that all have as much to do:
"zigzag". It attends to its own keys causally. Of another device's keys two products of a chunk with a chunk remain,
neither of which has a mask: the later queries with the earlier keys; and the earlier ones with the earlier ones, where
the other device comes before it, or else the later ones with the later ones.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from phi4mm_jax.errors import InputError
from phi4mm_jax.kernels.api import flash_attention
from phi4mm_jax.kernels.partials import merge_outputs
from phi4mm_jax.mesh import HEADS, LENGTH, ROWS, automatic_axes, context_size

_AXIS = LENGTH[0]


def zigzag_order(length: int) -> Int[np.ndarray, " T"] | None:
    """The places of a row's tokens as its devices have them; None where rows are not spread."""
    if context_size() == 1:
        return None
    chunks = np.arange(length).reshape(2 * context_size(), -1)
    return np.concatenate([chunks[[i, -1 - i]].reshape(-1) for i in range(context_size())])


def to_zigzag(x: Array) -> Array:
    """Spread rows (B, T, ...), which are spread in order, in zigzag."""
    return x if context_size() == 1 else _on_devices(_deal, x)


def from_zigzag(x: Array) -> Array:
    """Spread rows (B, T, ...), which are spread in zigzag, in order."""
    return x if context_size() == 1 else _on_devices(_undeal, x)


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Causal attention, within segments, of rows in zigzag order; see `flash_attention`."""
    return _on_devices(_ring, q, k, v, segments, heads=True)


def _on_devices(function: Any, *arrays: Array, heads: bool = False) -> Any:
    """Call `function` on each device's part of arrays (B, T), (B, T, D) or, with `heads`, (B, T, N, H).

    Rows that the devices cannot share are whole on each; their gradients are its own, not summed.

    Raises:
        InputError: rows that do not divide into two chunks for each device of `context`.
    """
    sizes, (batch, length) = automatic_axes(), arrays[0].shape[:2]
    if length % (2 * sizes[_AXIS]):
        raise InputError(
            f"rows have {length} tokens, which context={sizes[_AXIS]} cannot share; pad them to a multiple of "
            f"{2 * sizes[_AXIS]}, or give a mesh without context"
        )
    rows = tuple(name for name in ROWS if name in sizes)
    if batch % math.prod(sizes[name] for name in rows):
        rows = ()
    split = tuple(name for name in HEADS if name in sizes) if heads else ()
    specs = tuple(jax.P(rows, _AXIS, *[split][: x.ndim - 2]) for x in arrays)
    spread = jax.shard_map(function, in_specs=specs, out_specs=specs[0], axis_names=set(sizes), check_vma=False)
    return spread(*arrays)


def _ring(q, k, v, segments):
    size, index, half = lax.axis_size(_AXIS), lax.axis_index(_AXIS), q.shape[1] // 2
    around = [(i, (i + 1) % size) for i in range(size)]
    attend = partial(flash_attention, return_lse=True, out_dtype=jnp.float32)
    own = attend(q, k, v, causal=True, q_segments=segments, kv_segments=segments)
    early, late = (tuple(x[:, part] for x in own) for part in (slice(half), slice(half, None)))
    queries = q, segments
    keys = k, v, segments
    for step in range(1, size):
        keys = tuple(lax.ppermute(x, _AXIS, around) for x in keys)
        is_before = index >= step  # the device that these keys are of
        q2, q_segments = (
            jnp.concatenate([x[:, half:], jnp.where(is_before, x[:, :half], x[:, half:])]) for x in queries
        )
        k2, v2, kv_segments = (
            jnp.concatenate([x[:, :half], jnp.where(is_before, x[:, :half], x[:, half:])]) for x in keys
        )
        with jax.named_scope("keys_of_others"):
            out, lse = attend(q2, k2, v2, causal=False, q_segments=q_segments, kv_segments=kv_segments)
        (out_late, out_other), (lse_late, lse_other) = jnp.split(out, 2), jnp.split(lse, 2)
        late = merge_outputs(late, (out_late, lse_late))
        early = merge_outputs(early, (out_other, jnp.where(is_before, lse_other, -jnp.inf)))
        late = merge_outputs(late, (out_other, jnp.where(is_before, -jnp.inf, lse_other)))
    return jnp.concatenate([early[0], late[0]], 1).astype(q.dtype)


def _owner(chunk: int, size: int) -> int:
    return min(chunk, 2 * size - 1 - chunk)


def _deal(x):
    """Each device sends its two chunks to those that have them in zigzag, and so gets an even and an odd one."""
    size, index, half = lax.axis_size(_AXIS), lax.axis_index(_AXIS), x.shape[1] // 2
    even = lax.ppermute(x[:, :half], _AXIS, [(i, _owner(2 * i, size)) for i in range(size)])
    odd = lax.ppermute(x[:, half:], _AXIS, [(i, _owner(2 * i + 1, size)) for i in range(size)])
    first = index % 2 == 0  # chunk `index` comes first
    return jnp.concatenate([jnp.where(first, even, odd), jnp.where(first, odd, even)], 1)


def _undeal(x):
    size, index, half = lax.axis_size(_AXIS), lax.axis_index(_AXIS), x.shape[1] // 2
    first = index % 2 == 0
    even, odd = jnp.where(first, x[:, :half], x[:, half:]), jnp.where(first, x[:, half:], x[:, :half])
    even = lax.ppermute(even, _AXIS, [(_owner(2 * i, size), i) for i in range(size)])
    odd = lax.ppermute(odd, _AXIS, [(_owner(2 * i + 1, size), i) for i in range(size)])
    return jnp.concatenate([even, odd], 1)
