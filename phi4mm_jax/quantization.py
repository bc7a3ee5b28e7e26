"""Weights of linear maps in int8 or int4, with float scales: half or a quarter of the bytes that a step reads.

int8 has a scale for each output of the map; int4 for each output and each group of inputs, whose values are clipped
where that makes their squared error least. The embedding, which is also the head, is int8 in either case, with a scale
for each token. A weight becomes `scale * round(weight / scale)`: no zero points. With `quantize_to_inputs` weights are
rounded to int4 otherwise than to nearest, by the map's inputs: then its output is off by less.

Scales lie beside their weight, under its name and "_scales"; a step multiplies the integers and scales what comes out.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

from phi4mm_jax.errors import InputError

Weights = Literal["int8", "int4"]
ParamPath = tuple[str, ...]
ModulePath = tuple[str, ...]
InputMoments = Mapping[ModulePath, Sequence[Float[np.ndarray, "I I"]]]  # of each linear map's layers: the sum of x x^T

SCALES = "_scales"
_GROUP = 128  # inputs that share a scale in int4
_LARGEST = {"int8": 127, "int4": 7}
_SCALES = {"int8": jnp.float32, "int4": jnp.bfloat16}  # dtypes
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # shares of a group's largest value that int4's range may end at
_DAMPING = 0.01  # of the mean of an input's square, added to each


class QuantizedWeight(NamedTuple):
    """A weight as integers and scales; the scales' contracted axes have one entry, or one a group."""

    values: Int[Array | np.ndarray, "..."]
    scales: Float[Array | np.ndarray, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.values.shape


def weight_in(parameters: Mapping[str, Any], name: str) -> Any:
    """Return a module's weight, with its scales where they are there."""
    scales = parameters.get(name + SCALES)
    return parameters[name] if scales is None else QuantizedWeight(parameters[name], scales)


def check_weights(weights: Any) -> None:
    """Raise InputError where it is neither None nor one of `Weights`."""
    if weights is not None and (not isinstance(weights, str) or weights not in get_args(Weights)):
        raise InputError(f"weights is {weights!r:.60}; expected 'int8', 'int4' or None, as they are stored")


def stored_weights(parameters: Mapping[ParamPath, jax.ShapeDtypeStruct]) -> Weights | None:
    """Return how the parameters of a checkpoint are quantised; None where they are not."""
    kinds = {np.dtype(p.dtype).name for p in parameters.values()}
    return next((kind for kind in ("int4", "int8") if kind in kinds), None)


def quantized_parameters(
    parameters: Mapping[ParamPath, jax.ShapeDtypeStruct], weights: Weights, floats: Collection[ParamPath] = ()
) -> dict[ParamPath, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of parameters after they are quantised, each weight's scales behind it.

    Args:
        floats: those that are left as they are.
    """
    found: dict[ParamPath, jax.ShapeDtypeStruct] = {}
    for path, parameter in parameters.items():
        if path in floats or not is_quantized(path, len(parameter.shape)):
            found[path] = parameter
            continue
        kind = kind_of(path, weights)
        found[path] = jax.ShapeDtypeStruct(parameter.shape, jnp.dtype(kind))
        found[scales_of(path)] = jax.ShapeDtypeStruct(scales_shape(path, parameter.shape, weights), _SCALES[kind])
    return found


def is_quantized(path: ParamPath, ndim: int) -> bool:
    """Return whether a parameter is a linear map's, so that it is quantised where any is."""
    return contracted_axes(path, ndim) is not None


def scales_of(path: ParamPath) -> ParamPath:
    """Return the path of a weight's scales."""
    return *path[:-1], path[-1] + SCALES


def weight_of(path: ParamPath) -> ParamPath:
    """Return the path of the weight that scales belong to."""
    return *path[:-1], path[-1].removesuffix(SCALES)


def contracted_axes(path: ParamPath, ndim: int) -> tuple[int, ...] | None:
    """Return the axes of a parameter that its linear map sums over; None where it is not quantised.

    A kernel's inputs come first, and its outputs are the last axis, but for q, k, v, whose outputs are heads and their
    values. The embedding (V, D) is summed over D.

    Args:
        path: of the parameter; one under "layers" has their axis in front.
    """
    if path[0] != "params":
        return None
    first = 1 if "layers" in path else 0
    if path[-1] == "embedding":
        return (ndim - 1,)
    name = path[-2] if path[-1] == "kernel" else path[-1] if _is_projection(path) else None
    if name is None:
        return None
    return tuple(range(first, ndim - (2 if name in ("q", "k", "v") else 1)))


def _is_projection(path: ParamPath) -> bool:
    """Return whether it is a part of one of the decoder's fused matrices."""
    return path[1] == "decoder" and path[-2] in ("qkv", "out", "gate_up", "down")


def scales_shape(path: ParamPath, shape: tuple[int, ...], weights: Weights) -> tuple[int, ...]:
    """Return the scales' shape: 1 on contracted axes, but in int4 the groups of inputs on the last of them."""
    contracted = contracted_axes(path, len(shape)) or ()
    sizes = [1 if i in contracted else size for i, size in enumerate(shape)]
    if contracted and kind_of(path, weights) == "int4":
        *others, last = contracted
        for i in others:
            sizes[i] = shape[i]
        sizes[last] = shape[last] // _group_size(shape[last])
    return tuple(sizes)


def kind_of(path: ParamPath, weights: Weights) -> Weights:
    """Return how a parameter is quantised where `weights` is asked for."""
    return "int8" if path[-1] == "embedding" else weights


def _group_size(inputs: int) -> int:
    """The smallest divisor of the inputs from 128 on; fewer inputs are one group."""
    return next((n for n in range(_GROUP, inputs) if inputs % n == 0), inputs)


def quantize(path: ParamPath, weight: Float[Array, "..."], weights: Weights) -> QuantizedWeight:
    """Quantise a parameter, layer by layer if it is a stack of them; the integers have its sharding."""
    shape, kind = scales_shape(path, weight.shape, weights), kind_of(path, weights)
    found = _quantize(weight, shape, kind, "layers" in path)  # compiled once for all of a shape
    return found._replace(values=jax.device_put(found.values, weight.sharding))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(weight: Float[Array, "..."], shape: tuple[int, ...], kind: Weights, is_stack: bool) -> QuantizedWeight:
    if not is_stack:
        return _rounded(weight, shape, kind)
    return jax.lax.map(lambda layer: _rounded(layer, shape[1:], kind), weight)


def _rounded(weight: Float[Array, "..."], scales_shape: tuple[int, ...], kind: Weights) -> QuantizedWeight:
    """Round to the nearest multiples of the scales, the largest of which is the largest value of the kind."""
    largest = _LARGEST[kind]
    split, inner = _split_groups(weight.shape, scales_shape)
    wide = weight.astype(jnp.float32).reshape(split)
    extreme = jnp.abs(wide).max(inner, keepdims=True)

    def rounded(clip: float):
        scales = jnp.where(extreme > 0, extreme * (clip / largest), 1.0)
        scales = scales.astype(_SCALES[kind]).astype(jnp.float32)
        return jnp.clip(jnp.round(wide / scales), -largest, largest), scales

    values, scales = rounded(1.0)
    if kind == "int4":
        min_error = jnp.square(values * scales - wide).sum(inner, keepdims=True)
        for clip in _CLIPS[1:]:
            others, smaller = rounded(clip)
            error = jnp.square(others * smaller - wide).sum(inner, keepdims=True)
            values, scales, min_error = (
                jnp.where(error < min_error, new, old)
                for new, old in ((others, values), (smaller, scales), (error, min_error))
            )
    return QuantizedWeight(
        values.reshape(weight.shape).astype(jnp.dtype(kind)), scales.reshape(scales_shape).astype(_SCALES[kind])
    )


def _split_groups(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The weight's shape with each axis as groups and their members, and the axes of members."""
    pairs = [(groups, size // groups) for size, groups in zip(shape, scales, strict=True)]
    return tuple(n for pair in pairs for n in pair), tuple(2 * i + 1 for i in range(len(pairs)))


def quantize_to_inputs(
    path: ParamPath, weight: Float[np.ndarray, "..."], moments: Sequence[Float[np.ndarray, "I I"]]
) -> QuantizedWeight:
    """Quantise a parameter to int4 with little error of its map's outputs, by GPTQ (arXiv:2210.17323).

    The scales are those of `quantize`. The weights of one input after another are rounded, those of the largest inputs
    first; by what an output is off then, the weights of the later inputs make up for it, as far as inputs are alike.
    Where they are uncorrelated, each is rounded to the nearest.

    Args:
        moments: of the map's inputs, for each layer of the weight's stack; one, where it is none. See
            `calibration.input_moments`.

    Returns:
        Arrays of numpy.

    Raises:
        InputError: the moments are not of this map, or not finite.
    """
    sums, layers = contracted_axes(path, weight.ndim) or (), len(weight) if "layers" in path else 1
    inputs = math.prod(weight.shape[axis] for axis in sums)
    if [m.shape for m in moments] != [(inputs, inputs)] * layers or not all(np.isfinite(m).all() for m in moments):
        raise InputError(
            f"{'/'.join(path)}: the moments of its inputs are not finite, or not {layers} matrices of {inputs} inputs; "
            "measure them anew"
        )
    scales = np.asarray(quantize(path, jnp.asarray(weight), "int4").scales)
    groups = math.prod(scales.shape[axis] for axis in sums)
    matrices = zip(weight.reshape(layers, inputs, -1), scales.reshape(layers, groups, -1), moments, strict=True)
    values = [np.asarray(_rounded_to_inputs(w, s, *_order_and_shares(m))) for w, s, m in matrices]
    return QuantizedWeight(np.stack(values).reshape(weight.shape), scales)


def _order_and_shares(
    moments: Float[np.ndarray, "I I"],
) -> tuple[Int[np.ndarray, " I"], Float[np.ndarray, "I I"]]:
    """Return the inputs from the largest on, and by how much of one's error (first axis) a later one makes up for it.

    With moments R R^T, R upper triangular, the squared error of the outputs is that of R^T (W - V), whose row k depends
    on the weights of inputs up to k. Those of each make its own row's least.
    """
    sizes = np.diagonal(moments)
    order = np.argsort(-sizes, kind="stable")
    damped, mean = moments[np.ix_(order, order)].astype(np.float64), sizes.mean(dtype=np.float64)
    damped[np.diag_indices(len(damped))] += _DAMPING * mean if mean > 0 else 1
    root = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return order, (root / np.diagonal(root)).astype(np.float32)


@jax.jit
def _rounded_to_inputs(
    weight: Float[Array, "I O"], scales: Float[Array, "G O"], order: Int[Array, " I"], shares: Float[Array, "I I"]
) -> Int[Array, "I O"]:
    """Round a matrix to int4 in an order of its inputs; `shares` are those of `_order_and_shares`."""
    size = len(weight) // len(scales)  # of a block as well, whose rows make up together for what came before
    wide = weight.astype(jnp.float32)[order]
    wide_scales = jnp.repeat(scales.astype(jnp.float32), size, 0)[order]
    product, largest = partial(jnp.matmul, precision="highest"), _LARGEST["int4"]

    def round_block(errors: Float[Array, "I O"], start: Array):
        rows, of_rows = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (wide, wide_scales))
        own = jax.lax.dynamic_slice_in_dim(shares, start, size, 1)
        wanted = rows + product(own.T, errors)
        own = jax.lax.dynamic_slice_in_dim(own, start, size)

        def round_row(row: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            values, errors = state
            value = jnp.round((wanted[row] + product(own[:, row], errors)) / of_rows[row])
            value = jnp.clip(value, -largest, largest)
            return values.at[row].set(value), errors.at[row].set(rows[row] - value * of_rows[row])

        values, of_block = jax.lax.fori_loop(0, size, round_row, (jnp.zeros_like(rows), jnp.zeros_like(rows)))
        return jax.lax.dynamic_update_slice_in_dim(errors, of_block, start, 0), values

    values = jax.lax.scan(round_block, jnp.zeros_like(wide), jnp.arange(len(scales)) * size)[1]
    values = jnp.zeros(weight.shape, jnp.int8).at[order].set(values.reshape(weight.shape).astype(jnp.int8))
    return values.astype(jnp.int4)


def quantize_variables(
    variables: dict[str, Any], weights: Weights, floats: Collection[ParamPath] = ()
) -> dict[str, Any]:
    """Return the variables with all linear maps but `floats` quantised; their float weights are freed one by one."""
    flat: dict[Any, Any] = flatten_dict(variables)
    variables.clear()
    for path in list(flat):
        if path not in floats and is_quantized(path, flat[path].ndim):
            flat[path], flat[scales_of(path)] = quantize(path, flat.pop(path), weights)
    return unflatten_dict(flat)


def quantized_abstract(
    abstract: Mapping[str, Any], weights: Weights, floats: Collection[ParamPath] = ()
) -> dict[str, Any]:
    """Return the shapes of all variables, boxed with their logical axes, as `quantize_variables` would leave them."""
    boxed: dict[Any, Any] = flatten_dict(abstract, is_leaf=lambda _, x: not isinstance(x, dict))
    shapes = quantized_parameters({path: nn.unbox(leaf) for path, leaf in boxed.items()}, weights, floats)
    for path, shape in shapes.items():
        own = path if path in boxed else weight_of(path)
        boxed[path] = boxed[own].replace_boxed(shape) if isinstance(boxed[own], nn.Partitioned) else shape
    return unflatten_dict(boxed)
