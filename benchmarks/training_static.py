"""The training step at full size, compiled by the TPU's compiler without a TPU: python -m benchmarks.training_static.

For each case, what a chip holds while it steps, and how long the compiler took.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # there is no TPU to ask about

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from phi4mm_jax.config import Phi4MMConfig, read_json
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.phi4mm import abstract_batch, abstract_variables
from phi4mm_jax.sharding import shardings
from phi4mm_jax.training.batch import TrainingBatch
from phi4mm_jax.training.optimizer import OptimizerConfig, make_optimizer
from phi4mm_jax.training.patterns import split
from phi4mm_jax.training.step import dropout_key, initial_state, supervised, train_step

RELEASE = Path(__file__).parent.parent / "tests" / "fixtures" / "ms_release_config.json"
LENGTH, CHUNKS, CHUNK_TOKENS = 4096, 64, 384  # of a row; of all clips


class Case(NamedTuple):
    topology: str
    rows: int
    trained: list[str]


CASES = {
    "speech adapter": Case("v5e:2x4", 8, ["lora_speech"]),
    "all parameters": Case("v5e:4x4", 16, ["params", "!params/speech/mean", "!params/speech/inverse_deviation"]),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_static", description=__doc__)
    parser.add_argument("--case", choices=CASES, help="one alone")
    arguments = parser.parse_args()
    print(f"| trained | chips | rows of {LENGTH} | GiB a chip | seconds to compile |")
    print("|---|---|---|---|---|")
    for name in [arguments.case] if arguments.case else CASES:
        start = time.perf_counter()
        compiled = compile_step(CASES[name])
        seconds, case = time.perf_counter() - start, CASES[name]
        print(f"| {name} | {case.topology} | {case.rows} | {held(compiled):.1f} | {seconds:.0f} |")
    return 0


def compile_step(case: Case) -> jax.stages.Compiled:
    """The step of a recipe that trains these parameters on packed rows with clips of up to 30 s."""
    config = Phi4MMConfig.from_dict(read_json(RELEASE))
    module = Phi4MM(config, jnp.bfloat16, remat="full")
    abstract = abstract_variables(module)
    chips = topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices
    mesh = Mesh(np.array(chips).reshape(-1, 1), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    places = shardings(abstract, mesh)
    flat: dict[Any, Any] = flatten_dict(nn.unbox(abstract))
    variables = unflatten_dict(
        {path: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=places[path]) for path, x in flat.items()}
    )
    trainable, frozen = split(variables, case.trained, "trainable")
    del frozen["lora_vision"]  # no row needs it
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
        traced = jitted.trace(state, frozen, _batches(config, case.rows, mesh), jax.eval_shape(lambda: dropout_key(0)))
        return traced.lower(lowering_platforms=("tpu",)).compile()


def held(compiled: jax.stages.Compiled) -> float:
    """GiB of a chip, while it steps."""
    memory: Any = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes) / 2**30


def _batches(config: Phi4MMConfig, rows: int, mesh: Mesh) -> TrainingBatch:
    """Shapes of one micro-batch of packed rows."""
    batch = abstract_batch(config, rows, LENGTH, 1, CHUNKS)
    assert batch.audio is not None
    frames = jax.ShapeDtypeStruct((CHUNKS, 8 * (CHUNK_TOKENS + 1), batch.audio.frames.shape[-1]), jnp.float32)
    batch = batch._replace(images=None, audio=batch.audio._replace(frames=frames), segments=batch.tokens)
    weights = jax.ShapeDtypeStruct((rows, LENGTH), jnp.float32)
    spread = NamedSharding(mesh, jax.P(None, "fsdp"))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype, sharding=spread),
        TrainingBatch(batch, batch.tokens, weights),
    )


if __name__ == "__main__":
    sys.exit(main())
