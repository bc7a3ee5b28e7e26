"""Linear maps with weights as they are stored, and lookups: by a kernel, by pieces on one CPU, or by XLA."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from phi4mm_jax.kernels import cpu, quantized
from phi4mm_jax.kernels.registry import find_operation
from phi4mm_jax.mesh import on_one_cpu
from phi4mm_jax.precision import einsum, inputs_of_linear
from phi4mm_jax.quantization import QuantizedWeight


def linear(
    equation: str, x: Float[Array, "..."], weight: Float[Array, "..."] | QuantizedWeight, *, result: Any = None
) -> Float[Array, "..."]:
    """Return the einsum of x with a weight, in x's dtype or in `result`; differentiable in x and in floats.

    Args:
        equation: of a linear map: the last axes of x are summed over, and are the first of the weight, or the last of
            the head (V, D); those that are left come behind the others of x.
        weight: the letters of its axes are those of `mesh.LOGICAL_AXES`, by which a mesh splits it.
    """
    result = jnp.dtype(x.dtype if result is None else result)
    if isinstance(weight, QuantizedWeight) and (kernel := _kernel_of(equation, x, weight)):
        return _by_kernel((*kernel, result), x, *weight)
    if cpu.is_faster(equation, x, weight):
        return cpu.product(equation, x, weight).astype(result)
    if not isinstance(weight, QuantizedWeight):
        return einsum(equation, x, weight, result=result)
    return quantized.product(equation, x, weight, result)


def lookup(
    table: Float[Array, "V D"] | QuantizedWeight, tokens: Int[Array, "..."], dtype: Any
) -> Float[Array, "... D"]:
    """Return the rows of an embedding."""
    if isinstance(table, QuantizedWeight):
        values, scales = (jnp.asarray(part)[tokens] for part in table)
        return (values.astype(jnp.float32) * scales).astype(dtype)
    if on_one_cpu():  # or else XLA has all bfloat16 rows as floats first
        table, tokens = jax.lax.optimization_barrier((table, tokens))
    return jnp.asarray(table[tokens], dtype)


def computed_before(equation: str, x: Float[Array, "..."], weight: Float[Array, "..."] | QuantizedWeight) -> Array:
    """Return x behind a barrier, where a product by XLA would compute it more than once; a kernel never does."""
    if isinstance(weight, QuantizedWeight) and _kernel_of(equation, x, weight):
        return x
    return jax.lax.optimization_barrier(x)


def _kernel_of(
    equation: str, x: Float[Array, "..."], weight: QuantizedWeight
) -> tuple[Callable[..., Array], str, str, int] | None:
    """Return the kernel that takes a product, its equation, the weight's letters and its number of inputs."""
    if sums := inputs_of_linear(equation):
        letters = equation.partition("->")[0].partition(",")[2]
        if (product := find_operation("product", x, *weight, letters, sums)) is not None:
            return product, equation, letters, sums
    return None


Plan = tuple[Callable[..., Array], str, str, int, Any]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernel(
    plan: Plan, x: Float[Array, "..."], values: Int[Array, "..."], scales: Float[Array, "..."]
) -> Float[Array, "..."]:
    product, _, letters, sums, result = plan
    return product(x, values, scales, letters, sums, result=result)


def _forward(plan: Plan, x, values, scales):
    return _by_kernel(plan, x, values, scales), (x, values, scales)


def _backward(plan: Plan, saved, gradient):
    """Compute the gradients by XLA."""
    x, values, scales = saved
    _, equation, _, _, result = plan

    def by_xla(x, scales):
        return quantized.product(equation, x, QuantizedWeight(values, scales), result)

    of_x, of_scales = jax.vjp(by_xla, x, scales)[1](gradient)
    return of_x, None, of_scales


_by_kernel.defvjp(_forward, _backward)
