"""Linear maps on one CPU, by a piece of a large weight after another, in float32.

Before it multiplies, XLA's CPU backend writes a weight of other numbers as floats, and packs the floats of one that few
rows are multiplied by: to memory, if the whole weight is one product. A piece stays in the caches. One row of floats
goes through all pieces at once, which reads a weight of many inputs faster.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Num

from phi4mm_jax.mesh import on_one_cpu
from phi4mm_jax.precision import einsum, inputs_of_linear
from phi4mm_jax.quantization import QuantizedWeight

_FEW_ROWS = 128  # whose sums stay in the caches, whatever the outputs
_PIECE = 1 << 21  # weights; as floats about what the caches hold
_PARTS = 32  # of the inputs of one row
# Leaves nothing of a piece for the gradients, which make its floats again.
_recomputed = partial(jax.checkpoint, prevent_cse=False)


def is_faster(equation: str, x: Float[Array, "..."], weight: Float[Array, "..."] | QuantizedWeight) -> bool:
    """Return whether pieces are faster: of large weights, quantised or for few rows of floats in their dtype."""
    if not on_one_cpu() or math.prod(weight.shape) <= _PIECE:
        return False
    if isinstance(weight, QuantizedWeight):
        return True
    sums = inputs_of_linear(equation)
    inputs = math.prod(x.shape[x.ndim - max(sums, 1) :])
    rows = x.size // inputs
    if x.dtype != weight.dtype or rows > _FEW_ROWS:
        return False
    if x.dtype != jnp.float32:
        return True
    return rows == 1 and inputs % _PARTS == 0 if sums else rows > 1


def widen_int4(variables: dict[str, Any]) -> dict[str, Any]:
    """Return the variables with large int4 weights as int8; each is freed as it is converted.

    In XLA's CPU backend an int4 value takes a byte as well, and is read by itself.
    """
    flat: dict[Any, Any] = flatten_dict(variables)
    variables.clear()
    for path, x in flat.items():
        if x.dtype == jnp.int4 and x.size > _PIECE:
            flat[path] = jnp.asarray(x, jnp.int8)
    return unflatten_dict(flat)


def product(
    equation: str, x: Float[Array, "..."], weight: Float[Array, "..."] | QuantizedWeight
) -> Float32[Array, "..."]:
    """Return the einsum of x with a weight, in float32."""
    sums = inputs_of_linear(equation)  # 0 of the head
    outputs = weight.shape[sums:] if sums else weight.shape[:1]
    width = math.prod(outputs)
    rows = x.reshape(-1, math.prod(weight.shape) // width).astype(jnp.float32)
    values, scales = weight if isinstance(weight, QuantizedWeight) else (weight, jnp.ones(width))
    values, scales = jnp.asarray(values), jnp.asarray(scales, jnp.float32)
    if not sums:
        found = _of_head(rows, values, scales.reshape(width, 1))
    else:
        values, scales = values.reshape(-1, width), scales.reshape(-1, width)
        if values.dtype == jnp.float32:
            found = _of_one_row(rows, values)
        else:
            take = _over_inputs if len(rows) <= _FEW_ROWS else _over_outputs
            found = take(rows, values, scales)
    return found.reshape(*x.shape[: x.ndim - max(sums, 1)], *outputs)


def _of_head(x: Float32[Array, "M D"], head: Num[Array, "V D"], scales: Float32[Array, "V 1"]) -> Float32[Array, "M V"]:
    """Multiply by a piece of the vocabulary after another: from the right by one row, or else XLA packs the piece."""
    size = len(head) // _pieces(len(head), head.size)

    @_recomputed
    def multiply(start: Int[Array, ""]) -> Float32[Array, "P M"]:
        own = _cut(head, start, size, 0)
        found = einsum("MD,DV->VM", x, own.T) if len(x) == 1 else einsum("VD,MD->VM", own.astype(x.dtype), x)
        return found * lax.dynamic_slice_in_dim(scales, start, size)

    return lax.map(multiply, jnp.arange(0, len(head), size)).reshape(-1, len(x)).T


def _of_one_row(x: Float32[Array, "1 I"], weight: Float32[Array, "I O"]) -> Float32[Array, "1 O"]:
    """Sum the products with parts of the inputs."""
    parts = einsum("PI,PIO->PO", x.reshape(_PARTS, -1), weight.reshape(_PARTS, -1, weight.shape[1]))
    return parts.sum(0, keepdims=True)


def _over_inputs(
    x: Float32[Array, "M I"], values: Num[Array, "I O"], scales: Float32[Array, "G O"]
) -> Float32[Array, "M O"]:
    """Sum the products with pieces of the inputs, as they lie: groups, if there are several."""
    has_groups = len(scales) > 1
    size = len(values) // (len(scales) if has_groups else _pieces(len(values), values.size))

    @_recomputed
    def add(total: Float32[Array, "M O"], start: Int[Array, ""]):
        rows = lax.dynamic_slice_in_dim(x, start, size, 1)
        found = einsum("MI,IO->MO", rows, _cut(values, start, size, 0))
        return total + (found * scales[start // size] if has_groups else found), None

    zeros = jnp.zeros((len(x), values.shape[1]), x.dtype)
    total, _ = lax.scan(add, zeros, jnp.arange(0, len(values), size))
    return total if has_groups else total * scales


def _over_outputs(
    x: Float32[Array, "M I"], values: Int[Array, "I O"], scales: Float32[Array, "G O"]
) -> Float32[Array, "M O"]:
    """Lay the products with pieces of the outputs side by side: the sums of many rows would not stay in the caches."""
    groups, (inputs, outputs) = len(scales), values.shape
    size = outputs // _pieces(outputs, values.size)

    @_recomputed
    def multiply(start: Int[Array, ""]) -> Float32[Array, "M P"]:
        own, own_scales = _cut(values, start, size, 1), lax.dynamic_slice_in_dim(scales, start, size, 1)
        if groups == 1:
            return einsum("MI,IO->MO", x, own) * own_scales
        floats = own.reshape(groups, -1, size).astype(x.dtype) * own_scales[:, None]
        return einsum("MI,IO->MO", x, floats.reshape(inputs, size))

    return lax.map(multiply, jnp.arange(0, outputs, size)).swapaxes(0, 1).reshape(len(x), outputs)


def _cut(values: Num[Array, "..."], start: Int[Array, ""], size: int, axis: int) -> Num[Array, "..."]:
    """Return a piece: behind a barrier, or else XLA has all bfloat16 values as floats before the loop."""
    values, start = lax.optimization_barrier((values, start))
    return lax.dynamic_slice_in_dim(values, start, size, axis)


def _pieces(length: int, size: int) -> int:
    """Return how many equal pieces of an axis have at most `_PIECE` weights each; 1 if only far smaller ones would."""
    min_count = -(-size // _PIECE)
    return next((n for n in range(min_count, 4 * min_count) if length % n == 0), 1)
