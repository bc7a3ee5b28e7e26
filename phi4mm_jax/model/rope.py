"""LongRoPE (arXiv:2402.13753): rotary positions with one set of frequencies for short and one for long sequences.

The engine chooses the set of a sequence in engine/sequence.py, and preempts it at the boundary in engine/scheduler.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from phi4mm_jax.config import RopeConfig
from phi4mm_jax.precision import einsum


def inverse_frequencies(rope: RopeConfig) -> Float[np.ndarray, "2 R"]:
    """Return 1 / (factor * theta**(2i/R)) in float32, for short and for long sequences.

    Each step is rounded as PyTorch rounds it: an error in the last place of a frequency would grow with the position,
    to 1e-3 in the logits after 2,000 tokens.
    """
    exponents = np.arange(0, rope.rotary_size, 2, dtype=np.float32) / np.float32(rope.rotary_size)
    powers = np.power(rope.theta, exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1.0) / (np.asarray([rope.short_factor, rope.long_factor], np.float32) * powers)


def is_long(rope: RopeConfig, lengths: Int[Array, "B ..."]) -> Bool[Array, "B ..."]:
    """Return whether a sequence of that length uses the long set, for all of its positions."""
    return lengths > rope.original_length


def rotations(
    rope: RopeConfig, positions: Int[Array, "B T"], long: Bool[Array, "B ..."]
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """The cosines and sines, scaled, in float32, of each position; see `widen`.

    Args:
        long: which set of frequencies, for each row or for each position.
    """
    long = long if long.ndim == 2 else long[:, None]
    frequencies = jnp.asarray(inverse_frequencies(rope))[long.astype(jnp.int32)]  # (B, T or 1, R)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * rope.magnitude, jnp.sin(angles) * rope.magnitude


def within_segments(segments: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Return the position of each token of packed rows in its segment, and the segment's length."""
    index = jnp.arange(segments.shape[1])
    border = segments[:, 1:] != segments[:, :-1]
    first = jnp.pad(border, ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(border, ((0, 0), (0, 1)), constant_values=True)
    start = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    stop = jax.lax.cummin(jnp.where(last, index + 1, segments.shape[1]), axis=1, reverse=True)
    return index - start, stop - start


def widen(
    cos: Float[Array, "B T R"], sin: Float[Array, "B T R"], size: int
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """Return the factors of all `size` dimensions of a head, as `rotate` takes them: once for all layers."""
    passing = (*cos.shape[:2], size - 2 * cos.shape[-1])
    ones, zeros = jnp.ones(passing), jnp.zeros(passing)
    return jnp.concatenate([cos, cos, ones], -1), jnp.concatenate([sin, sin, zeros], -1)


@jax.named_scope("rope")
def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H"], sin: Float[Array, "B T H"], half: int
) -> Float[Array, "B T N H"]:
    """Rotate the first 2 `half` dimensions of each head, the first half against the second; the others pass.

    x * cos + turned(x) * sin, all H dimensions wide; x is turned by a product with a signed permutation, which is
    exact: TPUs would cut and join pieces of their 128 lanes at several times the cost.
    """
    size = x.shape[-1]
    turn = np.zeros((size, size), np.float32)
    turn[np.arange(half) + half, np.arange(half)] = -1.0
    turn[np.arange(half), np.arange(half) + half] = 1.0
    turned = einsum("BTNH,HI->BTNI", x, jnp.asarray(turn), result=jnp.float32)
    return (x.astype(jnp.float32) * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)
