"""Bytes that a step of decoding reads on a chip, by the program compiled for it: python -m benchmarks.decode_bytes.

The model is the release's, in full size, on one chip or its heads over several; bytes are of one of them, tokens of all
together. A step reads every weight of the decoder once, and the keys and values of its rows: with the chip's bandwidth
that bounds the tokens per second. The estimate is the compiler's, of greedy rows, or the transfer of the weights where
that is longer, and attention's the transfer of its keys and values. "Copies" are float arrays of a weight's size that
the compiled program makes in main memory. Cache fits beside the whole model: the decoder, both towers, both adapters.
Needs libtpu (`pip install '.[tpu]'`), and no TPU.
"""

import argparse
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.engine_aot import APPEND, PAGE, EngineProgram, compile_program, mesh_of
from benchmarks.paths import release_config
from phi4mm_jax.checkpoint.tensor_types import parameter_bytes
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.model import KVCache, Phi4MM
from phi4mm_jax.testing.abstract_variables import variables_on
from phi4mm_jax.testing.compiled import CHIPS, cost, float_copies

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_bytes", description=__doc__)
    parser.add_argument("--chips", nargs="+", choices=tuple(TOPOLOGIES), default=list(TOPOLOGIES))
    parser.add_argument(
        "--weights", nargs="+", choices=("bfloat16", "int8", "int4"), default=["bfloat16", "int8", "int4"]
    )
    parser.add_argument("--cache", choices=("bfloat16", "int8"), default="int8", help="dtype (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048, help="of a row, in tokens")
    parser.add_argument("--devices", type=int, default=1, help="chips that share the heads (default: %(default)s)")
    arguments = parser.parse_args()
    config = release_config()
    print(
        "| weights | chip | whole model, GB | decoder | temporaries | copies | tokens of cache that fit "
        "| read a step, GB | of it the cache | sent | ceiling, tokens/s | estimated, ms a step |"
    )
    print("|" + "---|" * 12)
    for chip in arguments.chips:
        for weights in arguments.weights:
            kind: Any = None if weights == "bfloat16" else weights
            case = EngineProgram(
                TOPOLOGIES[chip], "decode", arguments.rows, arguments.length, weights=kind, cache=arguments.cache,
                devices=arguments.devices,
            )  # fmt: skip
            print(row(weights, chip, case, config, compile_program(case, config)), flush=True)
    return 0


def row(weights: str, chip: str, case: EngineProgram, config: Phi4MMConfig, compiled: jax.stages.Compiled) -> str:
    """Return a line of the table."""
    memory: Any = compiled.memory_analysis()
    d, text, bandwidth, chips = config.decoder, str(compiled.as_text()), CHIPS[chip].bandwidth, mesh_of(case).size
    copies = float_copies(text, d.embed_dim * d.num_kv_heads * d.head_size // chips, d.vocab_size // chips)
    cache = jax.eval_shape(lambda: KVCache.allocate(d, 1, PAGE, jnp.dtype(case.cache)))
    whole = sum(math.prod(x.shape[2:]) * x.shape[0] * x.dtype.itemsize for x in jax.tree.leaves(cache))
    per_token = whole / PAGE / chips
    pages = case.rows * case.length // PAGE + 1  # and the scratch page
    decoder = memory.argument_size_in_bytes - pages * PAGE * per_token
    model = model_bytes(case, config)
    free = CHIPS[chip].hbm * 2**30 - model - memory.temp_size_in_bytes - memory.generated_code_size_in_bytes
    keys, found = case.rows * case.length * per_token, cost(text, CHIPS[chip], branch=min)
    seconds = max(found.seconds, decoder / bandwidth) + keys / bandwidth + d.num_layers * APPEND
    return (
        f"| {weights} | {chip if chips == 1 else f'{chips} of {case.topology}'} | {model / 1e9:.2f} "
        f"| {decoder / 1e9:.2f} | {memory.temp_size_in_bytes / 1e9:.2f} "
        f"| {len(copies)} | {free / per_token:,.0f} | {(decoder + keys) / 1e9:.2f} | {keys / 1e9:.2f} "
        f"| {sum(found.bytes.values()) / 1e6:.0f} MB | {case.rows * bandwidth / (decoder + keys):,.0f} "
        f"| {seconds * 1e3:.2f} |"
    )


def model_bytes(case: EngineProgram, config: Phi4MMConfig) -> int:
    """Return the bytes of a chip's weights as they are loaded: the decoder, both towers, both adapters."""
    given = variables_on(mesh_of(case), Phi4MM(config), case.weights).values()
    return sum(parameter_bytes(jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)) for x in given)


if __name__ == "__main__":
    sys.exit(main())
