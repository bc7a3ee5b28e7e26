"""Speed of bfloat16, int8 and int4 weights beside float32 on this CPU.

    python -m benchmarks.cpu_weights [--small] [--rows NAME ...] [--rounds N]

The model has the release's widths and vocabulary, two layers in each stack, and random weights; activations and cache
are in float32, but in bfloat16 beside weights of it. The sides run in turns, and the fastest round of each counts. A
ratio is float32's time over theirs.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.machine import processor
from benchmarks.models import STEPS, Timed, decoding, endless, random_row, small_checkpoint, timed, wide_checkpoint
from phi4mm_jax import Model, load
from phi4mm_jax.batch import ImageStack
from phi4mm_jax.engine import EngineConfig, Request

SIDES: tuple[tuple[Any, Any], ...] = (  # dtype, weights
    ("float32", None), ("bfloat16", None), ("float32", "int8"), ("float32", "int4"),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the tests' tiny checkpoint: shows only that it runs")
    parser.add_argument("--rows", nargs="+", default=[""], metavar="NAME", help="those whose name begins so")
    parser.add_argument("--rounds", type=int, default=5, help="of each row; the fastest counts")
    arguments = parser.parse_args()
    print(f"{processor()}, jax {jax.__version__}", flush=True)
    rows: dict[str, Callable[[Model], Timed]] = {
        "decoding, 1 row": lambda model: step(model, 1),
        "decoding, 8 rows": lambda model: step(model, 8),
        "prefill, 64 tokens": lambda model: prefill(model, 64),
        "prefill, 512 tokens": lambda model: prefill(model, 512),
        "image encoder, 1 crop": one_crop,
    }
    if not (chosen := [name for name in rows if name.startswith(tuple(arguments.rows))]):
        parser.error(f"--rows: none begins so; there are {'; '.join(rows)}")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = small_checkpoint(folder) if arguments.small else wide_checkpoint(folder)
        models = [endless(load(checkpoint, dtype=dtype, weights=weights)) for dtype, weights in SIDES]
    print("| row, ms | float32 | bfloat16 | ratio | int8 | ratio | int4 | ratio |\n|---|---|---|---|---|---|---|---|")
    for name in chosen:
        sides = [rows[name](model) for model in models]
        rounds = [[call() for call in sides] for _ in range(arguments.rounds)]
        floats, *others = np.min(rounds, 0)
        cells = [f"{floats * 1e3:.1f}", *(cell for s in others for cell in (f"{s * 1e3:.1f}", f"{floats / s:.2f}"))]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


def step(model: Model, batch: int) -> Timed:
    """Time a step of rows with 512 tokens each in the cache."""
    random = np.random.default_rng(0)
    call = decoding(model, [random_row(random, 512) for _ in range(batch)])
    return lambda: call() / STEPS


def prefill(model: Model, length: int) -> Timed:
    """Time a prompt, with the first token of its answer."""
    engine, random = model.engine(EngineConfig(slots=1, cache_tokens=4 * length + 512)), np.random.default_rng(0)

    def answer() -> None:
        engine.submit(Request("", max_new_tokens=1), random_row(random, length))
        while not any(update.completion for update in engine.step()):
            pass

    answer()
    return timed(answer)


def one_crop(model: Model) -> Timed:
    vision: Any = model.config.vision
    crops = np.random.default_rng(0).uniform(-1, 1, (1, vision.crop_size, vision.crop_size, 3)).astype(np.float32)
    stack = ImageStack(crops, np.ones((1, vision.patches_per_side, vision.patches_per_side), bool))
    encode = jax.jit(lambda variables: model.module.apply(variables, stack, method="encode_images"))
    variables = {"params": model.variables["params"]}
    encode(variables)
    return timed(lambda: encode(variables))


if __name__ == "__main__":
    sys.exit(main())
