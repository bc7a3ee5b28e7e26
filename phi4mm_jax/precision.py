"""Matrix products at the precision that the dtype promises."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def precision_of(dtype) -> lax.Precision:
    """float32 means float32: TPUs and recent GPUs would otherwise multiply in bfloat16 or TF32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def einsum(equation: str, *operands: Float[Array, "..."]) -> Float[Array, "..."]:
    """`jnp.einsum` in the first operand's dtype; the others are cast to it. Sums are in float32 on every platform."""
    dtype = operands[0].dtype
    return jnp.einsum(equation, *(x.astype(dtype) for x in operands), precision=precision_of(dtype))
