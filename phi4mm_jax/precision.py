"""Matrix products at the precision that the dtype promises."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from phi4mm_jax.mesh import on_one_cpu


def precision_of(dtype) -> lax.Precision:
    """float32 means float32: TPUs and recent GPUs would otherwise multiply in bfloat16 or TF32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def einsum(equation: str, *operands: Float[Array, "..."], result: Any = None) -> Float[Array, "..."]:
    """`jnp.einsum` in the first operand's dtype, to which the others are cast; the result is in it, or in `result`."""
    dtype = operands[0].dtype
    cast = [x.astype(dtype) for x in operands]
    options: Any = {"precision": precision_of(dtype), "preferred_element_type": result or dtype}
    if (inputs := inputs_of_linear(equation)) and on_one_cpu():
        flat = partial(_linear, inputs=inputs, **options)
        return jax.checkpoint(flat, prevent_cse=False)(*cast)  # saves the kernel, not its other shape
    return jnp.einsum(equation, *cast, **options)


def inputs_of_linear(equation: str) -> int:
    """Return how many axes a linear map sums over, x's last and the kernel's first ones; 0 where it is none."""
    operands, out = equation.split("->")
    x, _, kernel = operands.partition(",")
    count = sum(letter not in out for letter in kernel)
    is_linear = 0 < count < len(kernel) and x.endswith(kernel[:count]) and out == x[:-count] + kernel[count:]
    return count if is_linear and not set(x[:-count]) & set(kernel) else 0


def _linear(x: Float[Array, "..."], kernel: Float[Array, "..."], inputs: int, **options: Any) -> Float[Array, "..."]:
    """Multiply as matrices: with more axes, XLA's CPU backend transposes the operands of the gradients' products."""
    width = math.prod(kernel.shape[:inputs])
    product = jnp.einsum("MI,IO->MO", x.reshape(-1, width), kernel.reshape(width, -1), **options)
    return product.reshape(*x.shape[: x.ndim - inputs], *kernel.shape[inputs:])


def row_sum(x: Float[Array, "... D"]) -> Float[Array, "..."]:
    """The sum over the last axis, as a product with ones.

    XLA's CPU backend sums a row in another order when there are more rows, or when zeros follow; a product's order
    depends on the row alone. So a row's rounding does not depend on its batch.
    """
    return einsum("...D,D->...", x, jnp.ones(x.shape[-1], x.dtype))


def row_mean(x: Float[Array, "... D"]) -> Float[Array, "... 1"]:
    """Return the mean over the last axis, as `row_sum` sums it."""
    return (row_sum(x) / x.shape[-1])[..., None]


def gated(value: Float[Array, "..."], gate: Float[Array, "..."]) -> Float[Array, "..."]:
    """value * silu(gate), in float32 and rounded once."""
    return (value.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))).astype(value.dtype)
