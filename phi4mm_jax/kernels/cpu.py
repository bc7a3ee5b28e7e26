"""Linear maps on one CPU, by a piece of a large weight after another.

Before it multiplies, XLA's CPU backend writes a quantised weight as floats, and packs the floats of one that few rows
are multiplied by: to memory, if the whole weight is one product. A piece stays in the caches. One row of floats goes
through all pieces at once, which reads a weight of many inputs faster.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from phi4mm_jax.mesh import on_one_cpu
from phi4mm_jax.precision import einsum, inputs_of_linear
from phi4mm_jax.quantization import QuantizedWeight

_FEW_ROWS = 128
_PIECE = 1 << 21  # weights; as floats about what the caches hold
_PARTS = 32  # of the inputs of one row


def supports(equation: str, x: Float[Array, "..."], weight: Float[Array, "..."] | QuantizedWeight) -> bool:
    """Return whether pieces are faster: of large weights, quantised or of float32 and for one row or few."""
    if not on_one_cpu() or math.prod(weight.shape) <= _PIECE:
        return False
    if isinstance(weight, QuantizedWeight):
        return True
    sums = inputs_of_linear(equation)
    inputs = math.prod(x.shape[x.ndim - max(sums, 1) :])
    has_few = x.size == inputs and inputs % _PARTS == 0 if sums else 1 < x.size // inputs <= _FEW_ROWS
    return has_few and x.dtype == weight.dtype == jnp.float32


def product(
    equation: str, x: Float[Array, "..."], weight: Float[Array, "..."] | QuantizedWeight
) -> Float[Array, "..."]:
    """Return the einsum of x with a weight, in float32."""
    sums = inputs_of_linear(equation)  # 0 of the head
    outputs = weight.shape[sums:] if sums else weight.shape[:1]
    rows = x.reshape(-1, math.prod(weight.shape) // math.prod(outputs))
    if not sums:
        found = _of_head(rows, weight)
    elif not isinstance(weight, QuantizedWeight):
        found = _of_one_row(rows, weight.reshape(rows.shape[1], -1))
    else:
        values, scales = (jnp.asarray(y).reshape(-1, math.prod(outputs)) for y in weight)
        take = _over_inputs if len(rows) <= _FEW_ROWS else _over_outputs
        found = take(rows, values, scales.astype(jnp.float32))
    return found.reshape(*x.shape[: x.ndim - max(sums, 1)], *outputs)


def _of_head(x: Float[Array, "M D"], head: Float[Array, "V D"] | QuantizedWeight) -> Float[Array, "M V"]:
    """Multiply by a piece of the vocabulary after another: from the right by one row, or else XLA packs the piece."""
    pieces = _pieces(head.shape[0], math.prod(head.shape))

    def multiply(piece: tuple[Num[Array, "V D"], ...]) -> Float[Array, "..."]:
        values, *scales = piece
        if len(x) == 1:
            found = einsum("MD,DV->VM", x, values.T, result=jnp.float32)
        else:
            found = einsum("VD,MD->VM", values.astype(x.dtype), x, result=jnp.float32)
        return found * scales[0] if scales else found

    parts = (head.values, head.scales) if isinstance(head, QuantizedWeight) else (head,)
    split = tuple(part.reshape(pieces, -1, part.shape[1]) for part in parts)
    return lax.map(_forgetful(multiply), split).reshape(-1, len(x)).T


def _of_one_row(x: Float[Array, "1 I"], weight: Float[Array, "I O"]) -> Float[Array, "1 O"]:
    """Sum the products with parts of the inputs."""
    parts = einsum("PI,PIO->PO", x.reshape(_PARTS, -1), weight.reshape(_PARTS, -1, weight.shape[1]))
    return parts.sum(0, keepdims=True)


def _over_inputs(x: Float[Array, "M I"], values: Int[Array, "I O"], scales: Float[Array, "G O"]) -> Float[Array, "M O"]:
    """Sum the products with pieces of the inputs, as they lie: groups, or parts of the only one."""
    has_groups = len(scales) > 1
    pieces = len(scales) if has_groups else _pieces(len(values), values.size)

    def add(total: Float[Array, "M O"], piece: tuple[Array, ...]):
        x, values, *own_scales = piece
        found = einsum("MI,IO->MO", x, values, result=jnp.float32)
        return total + (found * own_scales[0] if own_scales else found), None

    split = x.reshape(len(x), pieces, -1).swapaxes(0, 1), values.reshape(pieces, -1, values.shape[1])
    zeros = jnp.zeros((len(x), values.shape[1]), jnp.float32)
    if has_groups:
        return lax.scan(_forgetful(add), zeros, (*split, scales[:, None]))[0]
    return lax.scan(_forgetful(add), zeros, split)[0] * scales


def _over_outputs(
    x: Float[Array, "M I"], values: Int[Array, "I O"], scales: Float[Array, "G O"]
) -> Float[Array, "M O"]:
    """Lay the products with pieces of the outputs side by side: the sums of many rows would not stay in the caches."""
    groups, (inputs, outputs) = len(scales), values.shape
    size = outputs // _pieces(outputs, values.size)

    def multiply(start: Int[Array, ""]) -> Float[Array, "M P"]:
        own, own_scales = (lax.dynamic_slice_in_dim(y, start, size, 1) for y in (values, scales))
        if groups == 1:
            return einsum("MI,IO->MO", x, own, result=jnp.float32) * own_scales
        floats = own.reshape(groups, -1, size).astype(x.dtype) * own_scales[:, None].astype(x.dtype)
        return einsum("MI,IO->MO", x, floats.reshape(inputs, size), result=jnp.float32)

    return lax.map(_forgetful(multiply), jnp.arange(0, outputs, size)).swapaxes(0, 1).reshape(len(x), outputs)


def _forgetful(function: Callable) -> Callable:
    """Leave nothing of a piece for the gradients but its integers: they compute its floats again."""
    return partial(jax.checkpoint, prevent_cse=False)(function)


def _pieces(length: int, size: int) -> int:
    """Return how many equal pieces of an axis have at most `_PIECE` weights each; 1 if only far smaller ones would."""
    least = -(-size // _PIECE)
    return next((n for n in range(least, 4 * least) if length % n == 0), 1)
