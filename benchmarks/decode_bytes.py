"""Bytes that a step of decoding reads on one chip, by the program compiled for it: python -m benchmarks.decode_bytes.

The model is the release's, in full size. A step reads every weight of the decoder once, and the keys and values of its
rows: with the chip's bandwidth that bounds the tokens per second. "Copies" are float arrays of a weight's size that the
compiled program makes in main memory, which a step would read besides: there should be none. Needs libtpu (`pip install
'.[tpu]'`), and no TPU.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.serving import BANDWIDTH, PAGE, Serving, compile_serving
from phi4mm_jax.config import Phi4MMConfig, read_json
from phi4mm_jax.model import KVCache
from phi4mm_jax.testing.compiled import CHIPS, float_copies

RELEASE = Path(__file__).parent.parent / "tests" / "fixtures" / "ms_release_config.json"
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
    arguments = parser.parse_args()
    config = Phi4MMConfig.from_dict(read_json(RELEASE))
    print(
        "| weights | chip | weights, GB | temporaries, GB | copies | tokens of cache that fit | read a step, GB "
        "| of it the cache | ceiling, tokens/s |"
    )
    print("|" + "---|" * 9)
    for chip in arguments.chips:
        for weights in arguments.weights:
            kind: Any = None if weights == "bfloat16" else weights
            case = Serving(
                TOPOLOGIES[chip], "decode", arguments.rows, arguments.length, weights=kind, cache=arguments.cache,
                devices=1,
            )  # fmt: skip
            print(row(weights, chip, case, config, compile_serving(case, config)), flush=True)
    return 0


def row(weights: str, chip: str, case: Serving, config: Phi4MMConfig, compiled: jax.stages.Compiled) -> str:
    """A line of the table."""
    memory: Any = compiled.memory_analysis()
    d = config.decoder
    copies = float_copies(str(compiled.as_text()), d.embed_dim * d.num_kv_heads * d.head_size, d.vocab_size)
    cache = jax.eval_shape(lambda: KVCache.allocate(config.decoder, 1, PAGE, jnp.dtype(case.cache)))
    per_token = sum(math.prod(x.shape[2:]) * x.shape[0] * x.dtype.itemsize for x in jax.tree.leaves(cache)) / PAGE
    pages = case.rows * case.length // PAGE + 1  # and the scratch page
    held = memory.argument_size_in_bytes - pages * PAGE * per_token
    free = CHIPS[chip].hbm * 2**30 - held - memory.temp_size_in_bytes - memory.generated_code_size_in_bytes
    keys = case.rows * case.length * per_token
    ceiling = case.rows * BANDWIDTH[chip] / (held + keys)
    return (
        f"| {weights} | {chip} | {held / 1e9:.2f} | {memory.temp_size_in_bytes / 1e9:.2f} "
        f"| {len(copies)} | {free / per_token:,.0f} | {(held + keys) / 1e9:.2f} "
        f"| {keys / 1e9:.2f} | {ceiling:,.0f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
