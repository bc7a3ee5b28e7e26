"""Quantised weights as the floats that they stand for, by numpy."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from phi4mm_jax.quantization import scales_of


def dequantized(variables) -> dict:
    """The variables in float32, each weight its integers times their scales, by numpy."""
    flat: dict[Any, Any] = flatten_dict(variables)
    found = {}
    for path, x in flat.items():
        if path[-1].endswith("_scales"):
            continue
        found[path] = x
        if scales_of(path) in flat:
            scales = np.asarray(flat[scales_of(path)], np.float32)
            for axis, size in enumerate(x.shape):
                scales = np.repeat(scales, size // scales.shape[axis], axis)
            found[path] = jnp.asarray(np.asarray(x).astype(np.float32) * scales)
    return unflatten_dict(found)
