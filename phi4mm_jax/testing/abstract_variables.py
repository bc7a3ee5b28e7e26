"""Variables of a model on chips that are not there, to compile programs for."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from phi4mm_jax.mesh import shardings
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.layers import tpu_format
from phi4mm_jax.model.phi4mm import abstract_variables
from phi4mm_jax.quantization import Weights, quantized_abstract, scales_of, weight_of
from phi4mm_jax.training.param_filter import not_quantized


def variables_on(
    mesh: Mesh, module: Phi4MM, weights: Weights | None = None, trainable: Sequence[str] = ()
) -> dict[tuple[str, ...], Any]:
    """Return shape, dtype and place of each variable, by path, as `load` leaves it on TPUs; floats are bfloat16."""
    abstract = abstract_variables(module)
    if weights is not None:
        parameters: dict[Any, Any] = flatten_dict(nn.unbox(abstract))
        floats = not_quantized(parameters, trainable, weights) if trainable else ()
        abstract = quantized_abstract(abstract, weights, floats)
    flat: dict[Any, Any] = flatten_dict(nn.unbox(abstract))
    places = shardings(abstract, mesh)
    floats = {path for path in flat if scales_of(path) not in flat and weight_of(path) == path}
    return {
        path: jax.ShapeDtypeStruct(
            x.shape, jnp.bfloat16 if path in floats else x.dtype, sharding=tpu_format(path[-1], x.shape, places[path])
        )
        for path, x in flat.items()
    }
