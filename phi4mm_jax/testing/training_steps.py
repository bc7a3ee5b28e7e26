"""Full-size training steps compiled for TPU slices by the TPU's compiler, without a TPU.

Every row is full and every position a target, so that the work counted is the work done. Needs libtpu.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # there is no TPU to ask about

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from phi4mm_jax.adapters import adapter_indices
from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.mesh import activation_sharding, mesh_of_sizes, parse_mesh, shardings
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.layers import Remat
from phi4mm_jax.model.phi4mm import abstract_batch, abstract_variables
from phi4mm_jax.testing.compiled import CHIPS, Chip
from phi4mm_jax.training.flops import step_flops
from phi4mm_jax.training.optimizer import OptimizerConfig, make_optimizer
from phi4mm_jax.training.param_filter import split
from phi4mm_jax.training.sharding import spread_batch
from phi4mm_jax.training.step import compiler_options, dropout_key, initial_state, supervised, train_step

CHUNK_TOKENS = 384  # of a clip of 30 s
EVERYTHING = ["params", "!params/speech/mean", "!params/speech/inverse_deviation"]


class Case(NamedTuple):
    """Training step: `rows` of `length` packed tokens, with `crops` of images and `chunks` of clips in all."""

    topology: str
    trained: list[str]
    remat: Remat
    rows: int = 8
    length: int = 4096
    crops: int = 0
    chunks: int = 0
    mesh: str | None = None  # fsdp over all chips by default
    slices: int = 1


IMAGES = ["lora_vision", "params/vision", "params/image_embedder"]
CASES = {
    "speech adapter": Case("v5e:2x4", ["lora_speech"], "dots", chunks=64),
    "vision adapter": Case("v5e:2x4", IMAGES, "full", length=8192, crops=136),
    "vision stage 4": Case(
        "v5e:4x4",
        ["params/image_embedder", "lora_vision"],
        "full",
        rows=4,
        length=65536,
        crops=256,
        mesh="fsdp=4,context=4",
    ),
    "all parameters": Case("v5e:4x4", EVERYTHING, "attention", rows=16, chunks=64),
    "all parameters, v5p": Case("v5p:2x2x1", EVERYTHING, "dots", rows=8, chunks=64),
    "all parameters, v6e": Case("v6e:2x4", EVERYTHING, "attention", rows=16, chunks=64),
    "all parameters, two slices": Case(
        "v5e:4x4", EVERYTHING, "attention", rows=32, chunks=128, mesh="data=2,fsdp=16", slices=2
    ),
}


def chip_of(case: Case) -> Chip:
    return CHIPS[case.topology.split(":")[0]]


def chips_of(case: Case) -> Sequence[Any]:
    options = {} if case.slices == 1 else {"num_slices": case.slices}
    return topologies.get_topology_desc(platform="tpu", topology_name=case.topology, **options).devices


def compile_step(case: Case, config: Phi4MMConfig) -> jax.stages.Compiled:
    """Compile the step of a recipe for a slice."""
    module = Phi4MM(config, jnp.bfloat16, remat=case.remat)
    abstract = abstract_variables(module)
    chips = chips_of(case)
    mesh = mesh_of_sizes(parse_mesh(case.mesh) if case.mesh else {"fsdp": len(chips)}, chips)
    places = shardings(abstract, mesh)
    flat: dict[Any, Any] = flatten_dict(nn.unbox(abstract))
    variables = unflatten_dict(
        {path: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=places[path]) for path, x in flat.items()}
    )
    trainable, frozen = split(variables, case.trained, "trainable")
    for adapter in adapter_indices().keys() - {path.split("/")[0] for path in case.trained}:
        del frozen[adapter]  # no row needs it
    optimizer = make_optimizer(OptimizerConfig(), 1000, trainable)
    everywhere = NamedSharding(mesh, jax.P())

    def placed(path, x):
        """Moments lie as their parameters do."""
        names = tuple(p.key for p in path if isinstance(p, jax.tree_util.DictKey))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places.get(names, everywhere))

    state = jax.tree.map_with_path(placed, jax.eval_shape(lambda t: initial_state(t, optimizer), trainable))

    def step(state, frozen, batches, key):
        return train_step(supervised(module), optimizer, state, frozen, batches, key)

    kept = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(kept, None))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jitted.trace(state, frozen, _batches(config, case, mesh), jax.eval_shape(lambda: dropout_key(0)))
        return traced.lower(lowering_platforms=("tpu",)).compile(compiler_options=compiler_options(chips[0]))


def held(compiled: jax.stages.Compiled) -> float:
    """GiB of a chip, while it steps."""
    memory: Any = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes) / 2**30


def work(case: Case, config: Phi4MMConfig) -> float:
    """Operations of a step, without what is computed again."""
    trainable, _ = split(nn.unbox(abstract_variables(Phi4MM(config))), case.trained, "trainable")
    batch = jax.tree.map(lambda x: np.ones(x.shape, bool if x.dtype == bool else np.int32), _shapes(config, case))
    if batch.batch.audio is not None:
        attended = np.full(case.chunks, CHUNK_TOKENS)
        batch = batch._replace(batch=batch.batch._replace(audio=batch.batch.audio._replace(attended=attended)))
    return step_flops(config, trainable, [batch])


def _batches(config: Phi4MMConfig, case: Case, mesh: Mesh) -> TrainingBatch:
    """Return one micro-batch, split by rows."""
    shapes = _shapes(config, case)

    def spread(*axes: str):
        def on_mesh(x):
            place = activation_sharding(mesh, (1, *x.shape), None, *axes)
            return jax.ShapeDtypeStruct((1, *x.shape), x.dtype, sharding=place)

        return partial(jax.tree.map, on_mesh)

    return spread_batch(shapes, rows=spread("batch"), tokens=spread("batch", "length"), media=spread("media"))


def _shapes(config: Phi4MMConfig, case: Case) -> TrainingBatch:
    batch = abstract_batch(config, case.rows, case.length, max(case.crops, 1), max(case.chunks, 1))
    assert batch.audio is not None
    frames = jax.ShapeDtypeStruct((case.chunks, 8 * (CHUNK_TOKENS + 1), config.speech.num_bands), jnp.float32)
    batch = batch._replace(
        images=batch.images if case.crops else None,
        audio=batch.audio._replace(frames=frames) if case.chunks else None,
        segments=batch.tokens,
    )
    return TrainingBatch(batch, batch.tokens, jax.ShapeDtypeStruct((case.rows, case.length), jnp.float32))
