"""Quantised weights as the floats that they stand for, by numpy."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from phi4mm_jax.quantization import QuantizedWeight, scales_of


def floats_of(weight: QuantizedWeight) -> np.ndarray:
    """A weight's integers times their scales, in float64."""
    scales = np.asarray(weight.scales, np.float64)
    for axis, size in enumerate(weight.shape):
        scales = np.repeat(scales, size // scales.shape[axis], axis)
    return np.asarray(weight.values).astype(np.float64) * scales


def dequantized(variables) -> dict:
    """The variables in float32, each weight its integers times their scales, by numpy."""
    flat: dict[Any, Any] = flatten_dict(variables)
    found = {}
    for path, x in flat.items():
        if path[-1].endswith("_scales"):
            continue
        found[path] = x
        if scales_of(path) in flat:
            found[path] = jnp.asarray(floats_of(QuantizedWeight(x, flat[scales_of(path)])), jnp.float32)
    return unflatten_dict(found)
