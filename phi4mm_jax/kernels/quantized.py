"""Linear maps with quantised weights by XLA: those that no kernel takes."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from phi4mm_jax.precision import precision_of
from phi4mm_jax.quantization import QuantizedWeight

_FEW_ROWS = 128  # whose products of each group are held at once


def product(equation: str, x: Float[Array, "..."], weight: QuantizedWeight, result: Any) -> Array:
    """Return the einsum of x with a quantised weight, in `result`.

    With a scale per output, the product of x and the integers is scaled. With groups, the products of each are scaled
    and summed where there are few rows, as in decoding; where there are many, the weights are scaled instead.
    """
    inputs, outputs = equation.split("->")
    letters = inputs.split(",")[1]
    contracted = tuple(i for i, letter in enumerate(letters) if letter not in outputs)
    values, scales = weight
    rows = x.size // math.prod(values.shape[i] for i in contracted)
    exact = {"precision": precision_of(x.dtype), "preferred_element_type": jnp.float32}
    if all(scales.shape[i] == 1 for i in contracted):
        found = jnp.einsum(equation, x, values.astype(x.dtype), **exact)
        return (found * scales.squeeze(contracted).astype(jnp.float32)).astype(result)
    axis = contracted[-1]  # inputs come before outputs, and this one is the last of x
    letter, sums = letters[axis], len(contracted)
    size = values.shape[axis] // scales.shape[axis]
    x = x.reshape(*x.shape[:-1], -1, size)
    values = values.reshape(*values.shape[:axis], -1, size, *values.shape[sums:]).astype(x.dtype)
    grouped = equation.replace(letter, "g" + letter)
    if rows > _FEW_ROWS:
        weights = values * jnp.expand_dims(scales, sums).astype(x.dtype)
        return jnp.einsum(grouped, x, weights, **exact | {"preferred_element_type": result})
    found = jnp.einsum(grouped.replace("->", "->" + letters[:axis] + "g"), x, values, **exact)
    outer = found.ndim - scales.ndim
    scales = scales.astype(jnp.float32).reshape(*scales.shape[:sums], *[1] * outer, *scales.shape[sums:])
    return (found * scales).sum(tuple(range(sums))).astype(result)
