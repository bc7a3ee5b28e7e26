"""The engine's programs compiled at full size for TPU slices, for `benchmarks.tpu_aot`: what a chip holds and reads.

The attention of decoding is counted as the transfer of its keys and values, which is what bounds it, a write of new
tokens as the start of two transfers, and the attention of prefill by its products; none of them has an estimate of the
compiler's. Latencies of collectives are left out.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.engine import Programs, Sampling
from phi4mm_jax.engine.sampling import SamplingRows
from phi4mm_jax.engine.step_io import DecodeInputs, PrefillInputs
from phi4mm_jax.model import KVCache, Phi4MM
from phi4mm_jax.quantization import Weights
from phi4mm_jax.testing.abstract_variables import variables_on
from phi4mm_jax.testing.compiled import CHIPS, cost

CACHED = {"v5e": 0.95, "v5p": 0.95, "v6e": 0.46}  # of the peak: `phi4mm_cached` by the measure of docs/kernels.md
PAGE = 128  # tokens
APPEND = 3e-6  # seconds of one `phi4mm_append`: two transfers one after the other, and some 2,000 cycles for 16 rows


class EngineProgram(NamedTuple):
    """A program of the engine: `rows` of `length` tokens each, those in the cache included; `chunk` are prefilled.

    With `devices`, on so many of the topology's.
    """

    topology: str
    program: Literal["decode", "prefill"]
    rows: int
    length: int
    chunk: int = 2048
    weights: Weights | None = None
    cache: Literal["bfloat16", "int8"] = "bfloat16"
    devices: int | None = None
    context: int = 1  # devices that share the tokens of each page; the others share the heads
    sampled: bool = False  # whether rows draw with top-k, top-p and a penalty, and else are greedy


CASES = {
    "prefill": EngineProgram("v5e:2x4", "prefill", 1, 131072),
    "prefill, context": EngineProgram("v5e:4x4", "prefill", 1, 131072, context=2),
    "decode": EngineProgram("v5e:2x4", "decode", 16, 8192),
    "decode, sampled": EngineProgram("v5e:2x4", "decode", 16, 8192, sampled=True),
    "decode, context": EngineProgram("v5e:4x4", "decode", 16, 8192, context=2),
    "decode, v6e": EngineProgram("v6e:2x4", "decode", 64, 8192),
}


class Estimate(NamedTuple):
    seconds: float  # of a step, or of a whole prompt
    floor: float  # seconds in which a step's weights, keys and values are read, or a prompt's products done
    moved: float  # bytes of collectives on a chip


def mesh_of(case: EngineProgram) -> Mesh:
    """Return a mesh of the case's chips, to compile for without them."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices[: case.devices]
    sizes = case.context, len(chips) // case.context
    return jax.make_mesh(sizes, ("context", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=chips)


def compile_program(case: EngineProgram, config: Phi4MMConfig) -> jax.stages.Compiled:
    """Compile a program with a cache that holds all rows, its heads over all chips, without adapters."""
    module = Phi4MM(config, jnp.bfloat16, scan=False)  # as `load` has it
    mesh = mesh_of(case)
    page = PAGE * case.context

    def on_chips(shape, dtype, place):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    given = variables_on(mesh, module, case.weights)
    variables = unflatten_dict({path: x for path, x in given.items() if path[0] == "params"})
    programs = Programs(module, variables)
    everywhere = partial(on_chips, place=NamedSharding(mesh, jax.P()))
    numbers, flags = partial(everywhere, dtype=jnp.int32), partial(everywhere, dtype=jnp.bool_)
    pages = jax.eval_shape(
        lambda: KVCache.allocate(config.decoder, case.rows * case.length // page, page, jnp.dtype(case.cache))
    )
    pages = jax.tree.map(lambda x: on_chips(x.shape, x.dtype, programs.sharding_of(x)), pages)
    settings = SamplingRows.of([Sampling()] * case.rows)
    settings = jax.tree.map(lambda x: everywhere(x.shape, x.dtype), settings)
    seen = flags((case.rows, config.decoder.vocab_size))
    seen = on_chips(seen.shape, seen.dtype, programs.sharding_of(seen))
    row, long, tables = numbers((case.rows,)), flags((case.rows,)), numbers((case.rows, case.length // page))
    if case.program == "decode":
        slots = DecodeInputs(row, row, row, tables, row, long, row, settings)
        return programs.decode.lower(variables, pages, seen, slots, width=8).compile()
    tokens = numbers((case.rows, case.chunk))
    chunk = PrefillInputs(tokens, tokens, row, row, tables, row, long, row, row, settings)
    features = everywhere((512 * 64, config.decoder.embed_dim), jnp.bfloat16)
    return programs.prefill.lower(variables, pages, features, seen, chunk).compile()


def estimate(case: EngineProgram, config: Phi4MMConfig, text: str) -> Estimate:
    kind = case.topology.split(":")[0]
    chip, bandwidth, d = CHIPS[kind], CHIPS[kind].bandwidth, config.decoder
    chips = len(topologies.get_topology_desc(platform="tpu", topology_name=case.topology).devices)
    heads = d.num_heads + 2 * d.num_kv_heads
    layer = d.embed_dim * d.head_size * (heads + d.num_heads) + 3 * d.embed_dim * d.mlp_dim
    weights = d.num_layers * layer + d.vocab_size * d.embed_dim
    if case.program == "decode":
        found = cost(text, chip, branch=max if case.sampled else min)
        keys = 4 * d.num_layers * case.rows * case.length * d.num_kv_heads * d.head_size / chips
        reading = 2 * weights / chips / bandwidth  # while others are computed with
        seconds = max(found.seconds, reading) + keys / bandwidth + d.num_layers * APPEND
        return Estimate(seconds, (2 * weights / chips + keys) / bandwidth, sum(found.bytes.values()))
    found = cost(text, chip, branch=min)  # of one chunk, without its attention
    count = case.length // case.chunk
    pairs = case.rows * case.length * (case.length + PAGE) / 2  # a page's queries attend to all of its keys
    macs = 2 * d.num_layers * d.num_heads * d.head_size * pairs / chips
    seconds = count * found.seconds + macs / (chip.macs * chip.cores * CACHED[kind]) / chip.clock
    products = 2 * d.num_layers * layer * case.length * case.rows
    ideal = 2 * d.num_layers * d.num_heads * d.head_size * case.length**2 * case.rows
    return Estimate(seconds, (products + ideal) / chips / chip.peak, count * sum(found.bytes.values()))


def row(name: str, compiled: jax.stages.Compiled, config: Phi4MMConfig, held: float, seconds: float) -> str:
    """Return a line of the table."""
    case = CASES[name]
    memory: Any = compiled.memory_analysis()
    found = estimate(case, config, str(compiled.as_text()))
    hbm = CHIPS[case.topology.split(":")[0]].hbm
    tokens = case.rows * (1 if case.program == "decode" else case.length)
    return (
        f"| {name} | {case.topology} | {case.rows} x {case.length} | {held:.1f} of {hbm:.1f} "
        f"| {memory.temp_size_in_bytes / 2**30:.2f} | {found.moved / 1e6:.0f} | {found.floor * 1e3:.2f} "
        f"| {found.seconds * 1e3:.2f} | {found.seconds / found.floor:.2f} | {tokens / found.seconds:.0f} "
        f"| {seconds:.0f} |"
    )
