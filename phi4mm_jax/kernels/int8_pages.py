"""Keys and values as int8 pages hold them, with a scale for each token and head."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def quantized(x: Float[Array, "... H"]) -> tuple[Float[Array, "... H"], Float[Array, "... 1"]]:
    """Return the integers from -127 to 127, still as floats, and the scale: the largest absolute value over 127."""
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(-1, keepdims=True) / 127.0
    return jnp.round(wide / jnp.where(scale > 0, scale, 1.0)), scale


def as_cached(x: Sequence[Float[Array, "... H"]], dtype: Any) -> tuple[Array, ...]:
    """Return keys and values as pages of a dtype hold them: with their scales behind them where that is int8."""
    if jnp.dtype(dtype) != jnp.int8:
        return tuple(values.astype(dtype) for values in x)
    integers, scales = zip(*map(quantized, x), strict=True)
    return *(values.astype(dtype) for values in integers), *(scale[..., 0] for scale in scales)
