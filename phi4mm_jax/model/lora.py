"""The mixture of LoRAs (arXiv:2503.01743): per row of the batch, one adapter or none on a fused projection.

y = x W + (alpha / rank) x A B, where A is shared by the parts of a fused matrix (q, k, v; gate, up). An adapter whose
collection is absent from the variables costs nothing; where several are present, each row's scales choose among them.

Users' adapters are another term of the same form, added beside it: their A and B lie in stacks of places, padded with
zeros to one rank, with the scale in B. A row has that of its place, or none.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Num, UInt32

from phi4mm_jax.adapters import ADAPTERS, USERS, adapter_indices, split_index
from phi4mm_jax.config import LoraConfig, Phi4MMConfig
from phi4mm_jax.kernels import linear
from phi4mm_jax.kernels.linear import computed_before
from phi4mm_jax.kernels.ring import zigzag_order
from phi4mm_jax.mesh import LOGICAL_AXES, constrain_param
from phi4mm_jax.model.layers import Sizes, declare
from phi4mm_jax.precision import einsum

RowScales = Mapping[str, Num[Array, " B"]]

ProjectionAxes = tuple[str, Mapping[str, str]]  # of the input, and of each part of the output
QKV: ProjectionAxes = "D", {"q": "NH", "k": "KH", "v": "KH"}
OUT: ProjectionAxes = "NH", {"out": "D"}
GATE_UP: ProjectionAxes = "D", {"gate": "F", "up": "F"}
DOWN: ProjectionAxes = "F", {"down": "D"}
PROJECTIONS: Mapping[tuple[str, str], ProjectionAxes] = {
    ("attention", "qkv"): QKV, ("attention", "out"): OUT, ("mlp", "gate_up"): GATE_UP, ("mlp", "down"): DOWN,
}  # fmt: skip


def lora_configs(config: Phi4MMConfig) -> dict[str, LoraConfig]:
    """Return the adapters that the model has, by collection."""
    return {ADAPTERS[name].collection: lora for name, lora in config.loras.items()}


def row_scales(config: Phi4MMConfig, adapters: Int[Array, " B"], users: bool = False) -> RowScales:
    """Return each adapter's scale per row: alpha / rank in the rows that use it, else 0.

    Args:
        users: rows may have users' adapters; their collection then has 1 + the place of each row's, 0 for none.
    """
    index, places = adapter_indices(), {}
    if users:
        adapters, place = split_index(adapters)
        places = {USERS: place}
    scales = {name: jnp.where(adapters == index[name], lora.scale, 0.0) for name, lora in lora_configs(config).items()}
    return scales | places


def merged(variables: Mapping[str, Any], collection: str, scale: float) -> dict[str, Any]:
    """Return the variables with one adapter merged into the weights, and without adapters: W + (alpha / rank) A B.

    The weights that change are donated: `variables` must not be used any more.
    """
    params: dict[Any, Any] = flatten_dict(variables["params"])
    adapter: dict[Any, Any] = flatten_dict(variables[collection])
    for path, b in adapter.items():
        if path[-1] != "a":
            weight = params[path]
            add = jax.jit(partial(_added, scale=scale), donate_argnums=0, out_shardings=weight.sharding)
            params[path] = add(weight, adapter[*path[:-1], "a"], b)
    return {"params": unflatten_dict(params)}


def _added(weight: Float[Array, "L ..."], a: Float[Array, "L ... R"], b: Float[Array, "L R ..."], scale: float):
    """Add A B layer by layer, so that one layer's product is held at a time."""

    def layer(arrays):
        weight, a, b = arrays
        rank = a.shape[-1]
        product = einsum("IR,RO->IO", a.astype(jnp.float32).reshape(-1, rank), b.reshape(rank, -1))
        return (weight.astype(jnp.float32) + scale * product.reshape(weight.shape)).astype(weight.dtype)

    return jax.lax.map(layer, (weight, a, b))


class Projection(nn.Module):
    """A bias-free fused projection with its adapters: `outputs` maps each part's name to its axes.

    With `is_separate`, XLA for TPUs does not fuse what computes its input, or that one's gradient, into its products.
    """

    inputs: str
    outputs: Mapping[str, str]
    sizes: Sizes
    loras: Mapping[str, LoraConfig]  # by collection
    is_separate: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T ..."], scales: RowScales) -> tuple[Float[Array, "B T ..."], ...]:
        equations = {name: f"BT{self.inputs},{self.inputs}{axes}->BT{axes}" for name, axes in self.outputs.items()}
        weights = {name: declare(self, name, self.inputs + self.outputs[name], self.sizes) for name in equations}
        if self.is_separate:
            for name, equation in equations.items():
                x = computed_before(equation, x, weights[name])
        parts = {name: linear(equation, x, weights[name]) for name, equation in equations.items()}
        for collection, lora in self.loras.items():
            if not (self.is_initializing() or self.has_variable(collection, "a")):
                continue
            sizes = {**self.sizes, "R": lora.rank}
            a = declare(self, "a", self.inputs + "R", sizes, collection=collection)
            seen = x
            if lora.dropout and self.has_rng("dropout"):
                seen = dropout(x, self.make_rng("dropout"), lora.dropout, zigzag_order(x.shape[1]))
            hidden = einsum(f"BT{self.inputs},{self.inputs}R->BTR", seen, a)  # (B, T, R)
            scaled = hidden.astype(jnp.float32) * scales[collection][:, None, None]  # which bfloat16 may not have
            hidden = checkpoint_name(scaled.astype(x.dtype), "lora")
            chosen = scales[collection] != 0
            for name, axes in self.outputs.items():
                # B starts at zero: a fresh adapter changes nothing.
                b = declare(self, name, "R" + axes, sizes, nn.initializers.zeros, collection)
                # Behind a barrier, or else XLA adds the large product to this small one, not this to that.
                added = jax.lax.optimization_barrier(einsum(f"BTR,R{axes}->BT{axes}", hidden, b))
                # Selected, for a diverged adapter may hold NaN, and rows of others are multiplied by 0 only.
                parts[name] += jnp.where(chosen.reshape(-1, *[1] * (added.ndim - 1)), added, 0)
        if self.has_variable(USERS, "a"):
            self._add_users(x, scales[USERS], parts)
        return tuple(parts.values())

    def _add_users(self, x: Float[Array, "B T ..."], places: Int[Array, " B"], parts: dict[str, Any]) -> None:
        """Add the products of users' adapters: of all places, of which those that are not a row's are zeroed."""
        a = self._of_users("a", self.inputs + "R")
        hidden = einsum(f"BT{self.inputs},U{self.inputs}R->BTUR", x, a)
        chosen = places[:, None] == 1 + jnp.arange(a.shape[0])  # (B, U)
        hidden = jnp.where(chosen[:, None, :, None], hidden, 0)
        for name, axes in self.outputs.items():
            b = self._of_users(name, "R" + axes)
            added = jax.lax.optimization_barrier(einsum(f"BTUR,UR{axes}->BT{axes}", hidden, b))
            parts[name] += jnp.where((places > 0).reshape(-1, *[1] * (added.ndim - 1)), added, 0)

    def _of_users(self, name: str, axes: str) -> Float[Array, "U ..."]:
        return constrain_param(self.get_variable(USERS, name), (None, *(LOGICAL_AXES[axis] for axis in axes)))


def dropout(
    x: Float[Array, "B T ..."], key: Array, rate: float, order: Int[np.ndarray, " T"] | None = None
) -> Float[Array, "B T ..."]:
    """Zero each value with probability `rate`, and scale the others up (arXiv:1207.0580).

    The random bits are a hash of the key and of a value's position in x: the same however x is sharded, and never
    held in memory, unlike a generator's.

    Args:
        order: the positions of the tokens, if they are not in order.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    place = jnp.arange(math.prod(x.shape[:-1]), dtype=jnp.uint32).reshape(*x.shape[:-1], 1)
    if order is not None:
        inner = np.uint32(math.prod(x.shape[2:-1]))
        place = place[:, :1] + inner * jnp.asarray(order, jnp.uint32).reshape(-1, *[1] * (x.ndim - 2))
    rows = _hash(place ^ first)
    columns = _hash(jnp.arange(x.shape[-1], dtype=jnp.uint32) ^ second)
    bits = (rows ^ columns) * (_hash(rows) | 1)  # a factor of each row's own: two rows never drop alike
    return jnp.where(bits >= np.uint32(round(rate * 2**32)), x / (1.0 - rate), 0).astype(x.dtype)


def _hash(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Permute the 32-bit numbers in a way that looks random (lowbias32, nullprogram.com/blog/2018/07/31)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
