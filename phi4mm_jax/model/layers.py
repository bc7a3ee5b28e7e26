"""Parts that the three stacks share: declared parameters, linear maps, norms, and the stacking of layers.

Axes are named by one letter each, as in the einsums; the letter also gives a parameter's logical axis, so that a
sharding is a table from logical to mesh axes. A parameter is declared once, by `declare`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding
from jaxtyping import Array, Float

from phi4mm_jax.adapters import USERS, adapter_indices
from phi4mm_jax.kernels import linear
from phi4mm_jax.mesh import LOGICAL_AXES, constrain_param, sharding_within
from phi4mm_jax.precision import row_mean
from phi4mm_jax.quantization import SCALES, QuantizedWeight

Sizes = Mapping[str, int]
Remat = Literal["none", "full", "attention", "dots"]
_SAVED = {  # what the backward pass finds, by the names that `checkpoint_name` gives; it computes the rest again
    "full": (),
    "attention": ("attention", "residual", "lora"),
    "dots": ("attention", "residual", "lora", "mlp"),
}

_WEIGHT = nn.initializers.normal(0.02)


def declare(
    module: nn.Module, name: str, axes: str, sizes: Sizes, init: Any = _WEIGHT, collection: str = "params"
) -> Any:
    """Declare the parameter `name` of `module`, whose axes are the letters of `axes`.

    Returns:
        The array, or a `QuantizedWeight` where the variables have its scales.
    """
    logical = tuple(LOGICAL_AXES[a] for a in axes)
    boxed, shape = nn.with_logical_partitioning(init, logical), tuple(sizes[a] for a in axes)
    if collection == "params":
        value: Any = module.param(name, boxed, shape, jnp.float32)
    else:
        value = module.variable(collection, name, lambda: boxed(module.make_rng("params"), shape, jnp.float32)).value
    value = constrain_param(value, logical)  # unboxed by Linen
    if collection != "params" or not module.has_variable("params", name + SCALES):
        return value
    return QuantizedWeight(value, constrain_param(module.get_variable("params", name + SCALES), logical))


class Linear(nn.Module):
    """y = x W + b over the last axes of x; `inputs` and `outputs` are their letters."""

    inputs: str
    outputs: str
    sizes: Sizes

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = declare(self, "kernel", self.inputs + self.outputs, self.sizes)
        bias = declare(self, "bias", self.outputs, self.sizes, nn.initializers.zeros)
        equation = f"...{self.inputs},{self.inputs}{self.outputs}->...{self.outputs}"
        return (linear(equation, x, kernel, result=jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class Projector(nn.Module):
    """Projector of an encoder's features (D) into the decoder's embedding (E): Linear, exact GELU, Linear."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
        sizes = {**self.sizes, "F": self.sizes["E"]}
        return Linear("F", "E", sizes, name="down")(
            jax.nn.gelu(Linear("D", "F", sizes, name="up")(x), approximate=False)
        )


class LayerNorm(nn.Module):
    """LayerNorm with a learned scale and bias."""

    sizes: Sizes
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = declare(self, "scale", "D", self.sizes, nn.initializers.ones)
        bias = declare(self, "bias", "D", self.sizes, nn.initializers.zeros)
        return layer_norm(x, scale, bias, self.eps)


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale."""

    sizes: Sizes
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, declare(self, "scale", "D", self.sizes, nn.initializers.ones), self.eps)


def layer_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
    """LayerNorm in float32, then cast; in PyTorch's order, x / deviation - mean / deviation, to round alike."""
    wide = x.astype(jnp.float32)
    mean = row_mean(wide)
    inverse_deviation = jax.lax.rsqrt(row_mean(jnp.square(wide - mean)) + eps)
    normal = wide * inverse_deviation - mean * inverse_deviation
    return (normal * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by the tanh approximation (arXiv:1606.08415), in PyTorch's order, so that it rounds alike."""
    wide = x.astype(jnp.float32)
    inner = 0.7978845608028654 * (wide + 0.044715 * wide * wide * wide)
    return (0.5 * wide * (1.0 + jnp.tanh(inner))).astype(x.dtype)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """RMSNorm: normalised in float32, then cast, then scaled."""
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(row_mean(jnp.square(wide)) + eps)
    return normal.astype(x.dtype) * scale.astype(x.dtype)


def run_layers(block: type[nn.Module], config: Any, carry: Any, *shared: Any, scan: bool, remat: Remat) -> Any:
    """Run `config.num_layers` blocks over `carry`, with the parameters under "layers" stacked, or under "layers_I".

    A block is called as `block(config)(carry, layer, *shared)` and returns the new carry and None.
    """
    if remat != "none":
        policy = jax.checkpoint_policies.save_only_these_names(*_SAVED[remat])
        block = nn.remat(block, prevent_cse=not scan, policy=policy)
    if not scan:
        for i in range(config.num_layers):
            carry, _ = block(config, name=f"layers_{i}")(carry, jnp.int32(i), *shared)
        return carry
    in_axes: Any = (0, *(nn.broadcast for _ in shared))
    stacked = nn.scan(
        block,
        variable_axes=dict.fromkeys(("params", *adapter_indices(), USERS), 0),  # adapters are stacked like their layers
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=config.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return stacked(config, name="layers")(carry, jnp.arange(config.num_layers), *shared)[0]


def unstack_layers(variables: dict[str, Any]) -> dict[str, Any]:
    """Return a scanned model's variables in the form of an unrolled one: "layers" becomes "layers_0", "layers_1", ...

    `variables` is emptied on the way, so that no more than one stack is held twice at a time.
    """
    out: dict[str, Any] = {}
    while variables:
        name, value = variables.popitem()
        if name == "layers":
            out |= _unstacked(value)
        else:
            out[name] = unstack_layers(value) if isinstance(value, dict) else value
    return out


def _unstacked(stacked: dict[str, Any]) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    while stacked:
        name, value = stacked.popitem()
        each = _unstacked(value) if isinstance(value, dict) else _slices(name, value)
        for layer, part in each.items():
            layers.setdefault(layer, {})[name] = part
    return layers


def _slices(name: str, stack: Array) -> dict[str, Array]:
    """Return each layer's part of a stack, sharded likewise; on one host's CPUs by the host, which compiles nothing."""
    place, platform = sharding_within(stack.sharding, 0), next(iter(stack.devices())).platform
    if platform == "cpu" and stack.is_fully_addressable:
        return {f"layers_{i}": jax.device_put(x, place) for i, x in enumerate(np.asarray(stack))}
    place = tpu_format(name, stack.shape[1:], place) if platform == "tpu" else place
    layer = jax.jit(partial(jax.lax.dynamic_index_in_dim, keepdims=False), out_shardings=place)
    return {f"layers_{i}": layer(stack, i) for i in range(len(stack))}


def tpu_format(name: str, shape: Sequence[int], sharding: Sharding) -> Sharding | Format:
    """Return where an unrolled layer's parameter lies on TPUs, and in which layout.

    q, k, v (D, N, H) lie with their heads first, as they are multiplied: or else each call would copy them first. So do
    the scales of their groups.
    """
    heads_first = name.removesuffix(SCALES) in ("q", "k", "v") and len(shape) == 3 and shape[0] > 1
    return Format(Layout((1, 0, 2)), sharding) if heads_first else sharding
