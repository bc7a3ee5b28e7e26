"""Cost of a prefill chunk, beside another checkout of this project: python -m benchmarks.prefill_cost FOLDER.

With random weights at the release's widths and few layers, in float32, on the CPU. The two checkouts have a process
each and take turns. Times are of the processor, over all threads, so that what else the machine does counts little.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.paths import ROOT

CASES = [(64, 0), (64, 1920), (512, 0), (512, 448), (2048, 0), (2048, 2048)]  # new tokens, and those in the cache
CODE = """
import sys, time
import jax, numpy as np
from benchmarks.decode_cost import random_model
from phi4mm_jax.engine import EngineConfig, Sampling
from phi4mm_jax.engine.step_io import PrefillInputs
from phi4mm_jax.engine.sampling import SamplingRows
from phi4mm_jax.batch import NO_MEDIA

layers, cache_dtype = int(sys.argv[1]), sys.argv[2] if sys.argv[2] != "float32" else None
model = random_model(layers)
engine = model.engine(EngineConfig(slots=8, cache_tokens=32768, feature_blocks=16, cache_dtype=cache_dtype))
runner = engine.runner
cache, seen = runner.kv_cache, runner.token_seen
tables = np.arange(runner.table_size, dtype=np.int32)[None]
none = np.zeros(1, np.int32)
variables = {"params": model.variables["params"]}
for line in sys.stdin:
    new, cached = map(int, line.split())
    tokens = np.random.default_rng(0).integers(0, 200, (1, new)).astype(np.int32)
    chunk = PrefillInputs(
        tokens, np.full_like(tokens, NO_MEDIA), none + cached, none + cached + new, tables, none, none.astype(bool),
        none, none, SamplingRows.of([Sampling()]),
    )
    start = time.process_time()
    cache, *drawn = model.programs.prefill(variables, cache, runner.encoder_cache.table, seen, chunk)
    jax.device_get(drawn)
    print(time.process_time() - start, flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill_cost", description=__doc__)
    parser.add_argument("folder", type=Path, help="the other checkout; it is what the ratio is against")
    parser.add_argument("--layers", metavar="N", type=int, default=2)
    parser.add_argument("--rounds", metavar="N", type=int, default=5, help="the median counts")
    parser.add_argument("--cache-dtype", choices=("float32", "int8"), default="float32")
    parsed = parser.parse_args()
    command = [sys.executable, "-c", CODE, str(parsed.layers), parsed.cache_dtype]
    theirs, ours = (
        subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for folder in (parsed.folder, ROOT)
    )
    print("| new tokens | cached | ratio of seconds, ours over theirs |")
    print("|---|---|---|")
    for case in CASES:
        times = [[seconds(process, case) for process in (theirs, ours)] for _ in range(parsed.rounds + 1)][1:]
        before, after = (statistics.median(of_one) for of_one in zip(*times, strict=True))
        print(f"| {case[0]} | {case[1]} | {after / before:.2f} ({after:.2f} s of {before:.2f} s) |", flush=True)
    for process in (theirs, ours):
        process.communicate()
    return 0


def seconds(process: subprocess.Popen, case: tuple[int, int]) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{case[0]} {case[1]}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


if __name__ == "__main__":
    sys.exit(main())
