"""Matrix products at the precision that the dtype promises."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from phi4mm_jax.quantization import QuantizedWeight, product


def precision_of(dtype) -> lax.Precision:
    """float32 means float32: TPUs and recent GPUs would otherwise multiply in bfloat16 or TF32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def einsum(equation: str, *operands: Float[Array, "..."] | QuantizedWeight, result=None) -> Float[Array, "..."]:
    """`jnp.einsum` in the first operand's dtype, to which the others are cast; the result is in it, or in `result`.

    The second operand may be a quantised weight.
    """
    dtype: Any = operands[0].dtype  # type: ignore
    if isinstance(operands[-1], QuantizedWeight):
        x, weight = operands
        return product(equation, x, weight, precision=precision_of(dtype), result=result or dtype)  # type: ignore
    cast = (x.astype(dtype) for x in operands)  # type: ignore
    return jnp.einsum(equation, *cast, precision=precision_of(dtype), preferred_element_type=result or dtype)


def row_sum(x: Float[Array, "... D"]) -> Float[Array, "..."]:
    """The sum over the last axis, as a product with ones.

    XLA's CPU backend sums a row in another order when there are more rows, or when zeros follow; a product's order
    depends on the row alone. So a row's rounding does not depend on its batch.
    """
    return einsum("...D,D->...", x, jnp.ones(x.shape[-1], x.dtype))


def row_mean(x: Float[Array, "... D"]) -> Float[Array, "... 1"]:
    return (row_sum(x) / x.shape[-1])[..., None]


def gated(value: Float[Array, "..."], gate: Float[Array, "..."]) -> Float[Array, "..."]:
    """value * silu(gate), in float32 and rounded once."""
    return (value.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))).astype(value.dtype)
