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
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from phi4mm_jax.adapters import adapter_indices
from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.mesh import activation_sharding, mesh_of_sizes, parse_mesh
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.layers import Remat
from phi4mm_jax.model.phi4mm import abstract_batch, abstract_variables
from phi4mm_jax.testing.abstract_variables import variables_on
from phi4mm_jax.training import sharding
from phi4mm_jax.training.flops import step_flops
from phi4mm_jax.training.optimizer import OptimizerConfig, make_optimizer
from phi4mm_jax.training.param_filter import join, split
from phi4mm_jax.training.step import Objective, Variables, dropout_key, initial_state, supervised

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


def chips_of(topology: str, slices: int = 1) -> Sequence[Any]:
    """Return the chips of a topology, such as v5e:2x4, or of several slices of it."""
    options = {} if slices == 1 else {"num_slices": slices}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def compile_step(case: Case, config: Phi4MMConfig) -> jax.stages.Compiled:
    """Compile the step of a case for a slice."""
    module = Phi4MM(config, jnp.bfloat16, remat=case.remat)
    chips = chips_of(case.topology, case.slices)
    mesh = mesh_of_sizes(parse_mesh(case.mesh) if case.mesh else {"fsdp": len(chips)}, chips)
    trainable, frozen = split(unflatten_dict(variables_on(mesh, module)), case.trained, "trainable")
    for adapter in adapter_indices().keys() - {path.split("/")[0] for path in case.trained}:
        del frozen[adapter]  # no row needs it
    optimizer = make_optimizer(OptimizerConfig(), 1000, trainable)
    return compile_on(mesh, supervised(module), optimizer, trainable, frozen, case_batch(config, case))


def compile_on(
    mesh: Mesh,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    trainable: Variables,
    frozen: Variables,
    batch: TrainingBatch,
    accumulate: int = 1,
    dropout: bool = True,
) -> jax.stages.Compiled:
    """Compile the step that `train.sft` would take with variables and a micro-batch of these shapes.

    Args:
        trainable, frozen: on the chips; what else is in `frozen`, such as a reference, lies as the parameters do.
    """
    flat: dict[Any, Any] = flatten_dict(join(trainable, frozen))
    places = {path: x.sharding for path, x in flat.items() if x.sharding is not None}
    everywhere = NamedSharding(mesh, jax.P())

    def placed(path: tuple[Any, ...], x: Any) -> Any:
        """Moments, and copies, lie as their parameters do."""
        names = tuple(p.key for p in path if isinstance(p, jax.tree_util.DictKey))
        place = places.get(names, places.get(names[1:], everywhere))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    state = jax.tree.map_with_path(placed, jax.eval_shape(lambda t: initial_state(t, optimizer), trainable))
    frozen = jax.tree.map_with_path(placed, frozen)
    key = jax.eval_shape(lambda: dropout_key(0)) if dropout else None
    step: Any = sharding.compile_step(objective, optimizer, state)
    traced = step.trace(state, frozen, _spread(batch, accumulate, mesh), key)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def hbm_gib(compiled: jax.stages.Compiled) -> float:
    """Return the GiB of memory that a chip needs for a program, its arguments included."""
    memory: Any = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes) / 2**30


def case_flops(case: Case, config: Phi4MMConfig) -> float:
    """Return the FLOP of a step, without recomputation."""
    trainable, _ = split(nn.unbox(abstract_variables(Phi4MM(config))), case.trained, "trainable")
    return step_flops(config, trainable, [full_batch(case_batch(config, case))])


def full_batch(batch: TrainingBatch) -> TrainingBatch:
    """Return a batch of these shapes whose every row is one sample, and every position a target."""
    ones = jax.tree.map(lambda x: np.ones(x.shape, bool if x.dtype == bool else np.int32), batch)
    inner, audio = ones.batch, ones.batch.audio
    if audio is not None:
        attended = np.full(len(audio.attended), audio.frames.shape[1] // 8 - 1)
        inner = inner._replace(audio=audio._replace(attended=attended))
    return ones._replace(batch=inner._replace(lengths=np.full_like(inner.lengths, inner.tokens.shape[1])))


def _spread(batch: TrainingBatch, accumulate: int, mesh: Mesh) -> TrainingBatch:
    """Return micro-batches, stacked and split by rows."""

    def spread(*axes: str):
        def on_mesh(x):
            shape = accumulate, *x.shape
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=activation_sharding(mesh, shape, None, *axes))

        return partial(jax.tree.map, on_mesh)

    return sharding.spread_batch(batch, rows=spread("batch"), tokens=spread("batch", "length"), media=spread("media"))


def case_batch(config: Phi4MMConfig, case: Case) -> TrainingBatch:
    """Return the shapes of a micro-batch of a case."""
    return batch_shapes(config, case.rows, case.length, case.crops, case.chunks, CHUNK_TOKENS)


def batch_shapes(
    config: Phi4MMConfig, rows: int, length: int, crops: int, chunks: int, chunk_tokens: int, packed: bool = True
) -> TrainingBatch:
    """Return the shapes of a micro-batch, as the data make it."""
    batch = abstract_batch(config, rows, length, max(crops, 1), max(chunks, 1))
    assert batch.audio is not None
    frames = jax.ShapeDtypeStruct((chunks, 8 * (chunk_tokens + 1), config.speech.num_bands), jnp.float32)
    batch = batch._replace(
        images=batch.images if crops else None,
        audio=batch.audio._replace(frames=frames) if chunks else None,
        segments=batch.tokens if packed else None,
    )
    return TrainingBatch(batch, batch.tokens, jax.ShapeDtypeStruct((rows, length), jnp.float32))
