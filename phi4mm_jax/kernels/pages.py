"""Keys and values as pages hold them: as floats, as their bits, or in int8 with a scale for each token and head.

Bits are for CPUs: to put a token into pages of bfloat16 or float16, XLA's CPU backend would write the pages of all
layers as float32 and back.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.lax import bitcast_convert_type
from jaxtyping import Array, Float

BITS = jnp.dtype(jnp.uint16)  # of pages that hold the bits of bfloat16 or float16


def held_as(dtype: jnp.dtype, platform: str) -> jnp.dtype:
    """Return the dtype in which an array that steps write into holds values of a dtype."""
    return BITS if platform == "cpu" and dtype.itemsize == BITS.itemsize else dtype


def quantized(x: Float[Array, "... H"]) -> tuple[Float[Array, "... H"], Float[Array, "... 1"]]:
    """Return the integers from -127 to 127, still as floats, and the scale: the largest absolute value over 127."""
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(-1, keepdims=True) / 127.0
    return jnp.round(wide / jnp.where(scale > 0, scale, 1.0)), scale


def as_cached(x: Sequence[Float[Array, "... H"]], dtype: Any) -> tuple[Array, ...]:
    """Return keys and values as pages of a dtype hold them: with their scales behind them where that is int8."""
    if jnp.dtype(dtype) == BITS:
        return tuple(bitcast_convert_type(values, BITS) for values in x)
    if jnp.dtype(dtype) != jnp.int8:
        return tuple(values.astype(dtype) for values in x)
    integers, scales = zip(*map(quantized, x), strict=True)
    return *(values.astype(dtype) for values in integers), *(scale[..., 0] for scale in scales)


def as_floats(x: Array, scales: Float[Array, "..."] | None, dtype: Any) -> Float[Array, "... H"]:
    """Return keys or values of pages in the dtype of a step; bits are those of values of this dtype."""
    if x.dtype == BITS:
        return bitcast_convert_type(x, dtype)
    return x.astype(dtype) if scales is None else (x.astype(jnp.float32) * scales[..., None]).astype(dtype)
