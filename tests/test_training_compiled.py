"""The training step at full size, compiled by the TPU's compiler for its chips, without one."""

import dataclasses
import json
import os
import re
from typing import Any

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # there is no TPU to ask about

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.phi4mm import abstract_batch, abstract_variables
from phi4mm_jax.sharding import shardings
from phi4mm_jax.training.batch import TrainingBatch
from phi4mm_jax.training.optimizer import OptimizerConfig, make_optimizer
from phi4mm_jax.training.patterns import split
from phi4mm_jax.training.step import dropout_key, initial_state, supervised, train_step

GIB = 2**30
LENGTH, CHUNKS, CHUNK_TOKENS = 4096, 64, 384


def compile_step(topology: str, rows: int, trained: list[str]):
    """The step of a recipe that trains these parameters, on clips of up to 30 s."""
    config = Phi4MMConfig.from_dict(json.loads((FIXTURES / "ms_release_config.json").read_text()))
    module = Phi4MM(config, jnp.bfloat16, remat="full")
    abstract = abstract_variables(module)
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(chips).reshape(-1, 1), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    places = shardings(abstract, mesh)

    def on_chips(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, jax.P(*axes)))

    flat: dict[Any, Any] = flatten_dict(nn.unbox(abstract))
    variables = unflatten_dict(
        {path: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=places[path]) for path, x in flat.items()}
    )
    trainable, frozen = split(variables, trained, "trainable")
    del frozen["lora_vision"]  # no row needs it
    optimizer = make_optimizer(OptimizerConfig(), 1000, trainable)
    of_parameter = {path: x.sharding for path, x in flatten_dict(trainable).items()}

    def placed(path, x):
        """Moments lie as their parameters do."""
        own = tuple(p.key for p in path if isinstance(p, jax.tree_util.DictKey))
        place = of_parameter.get(own, NamedSharding(mesh, jax.P()))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    state = jax.tree.map_with_path(placed, jax.eval_shape(lambda t: initial_state(t, optimizer), trainable))
    inner = abstract_batch(config, rows, LENGTH, 1, CHUNKS)
    assert inner.audio is not None
    frames = jax.ShapeDtypeStruct((CHUNKS, 8 * (CHUNK_TOKENS + 1), inner.audio.frames.shape[-1]), jnp.float32)
    inner = inner._replace(images=None, audio=inner.audio._replace(frames=frames), segments=inner.tokens)
    weights = jax.ShapeDtypeStruct((rows, LENGTH), jnp.float32)
    batch = jax.tree.map(lambda x: on_chips((1, *x.shape), x.dtype, None, "fsdp"), TrainingBatch(inner, inner.tokens, weights))  # fmt: skip
    key = jax.eval_shape(lambda: dropout_key(0))

    def step(state, frozen, batches, key):
        return train_step(supervised(module), optimizer, state, frozen, batches, key)

    places_of = jax.tree.map(lambda x: x.sharding, state)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(step, donate_argnums=0, out_shardings=(places_of, None)).trace(state, frozen, batch, key)
        return traced.lower(lowering_platforms=("tpu",)).compile()


def held(compiled) -> float:
    """GiB of a chip, while it steps."""
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes) / GIB


CASES = {  # chips, rows of 4096, what is trained, GiB of a chip that they may take
    "speech adapter": ("v5e:2x4", 8, ["lora_speech"], 12.0),
    "all parameters": ("v5e:4x4", 16, ["params", "!params/speech/mean", "!params/speech/inverse_deviation"], 15.75),
}


@pytest.mark.parametrize(("topology", "rows", "trained", "limit"), CASES.values(), ids=CASES)
def test_steps_fit_their_chips(topology, rows, trained, limit):
    compiled = compile_step(topology, rows, trained)
    assert held(compiled) < limit
    text = compiled.as_text()
    assert "phi4mm_flash" in text
    assert not re.search(r"\[200064,3072\]|\[3072,200064\]", text), "a chip holds the whole embedding"
