"""Cost of a decoding step by what it depends on, and of a shared image: python -m benchmarks.decode_cost.

With random weights at the release's widths and few layers, in float32. First the time of a step of all slots for
the same rows in caches of 2K and 32K tokens (whose tables have 32 and 512 pages per row), and for longer rows in the
large one. Then ten questions about one image beside ten questions about ten images.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.console import Console
from rich.table import Table

import phi4mm_jax
from benchmarks.paths import TINY, release_config
from phi4mm_jax.config import Phi4MMConfig, with_layers
from phi4mm_jax.engine import EngineConfig, Request
from phi4mm_jax.engine.sampling import Sampling, SamplingRows
from phi4mm_jax.engine.step_io import DecodeInputs
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.phi4mm import abstract_variables
from phi4mm_jax.processing.processor import Processor

_STEPS = 8  # of a round


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_cost", description="What a decoding step costs.")
    parser.add_argument("--layers", metavar="N", type=int, default=2, help="of the decoder and of the vision tower")
    parser.add_argument("--rounds", metavar="N", type=int, default=7, help="of 8 steps; the median counts")
    parser.add_argument("--image", metavar="PIXELS", type=int, default=896, help="side of each image")
    arguments = parser.parse_args()
    model = random_model(arguments.layers)
    Console().print(steps(model, arguments.rounds))
    Console().print(questions(model, arguments.image))
    return 0


def random_model(layers: int) -> phi4mm_jax.Model:
    """Return a model of full width, few layers, and the tests' small vocabulary: the head would hide all else."""
    release = with_layers(release_config(), layers, layers, 1)
    tiny = Phi4MMConfig.from_folder(TINY)
    names = "image_token_id", "audio_token_id", "pad_token_id", "stop_token_ids"
    decoder = dataclasses.replace(release.decoder, vocab_size=tiny.decoder.vocab_size)
    config = dataclasses.replace(release, decoder=decoder, **{name: getattr(tiny, name) for name in names})
    module = Phi4MM(config, jnp.float32, scan=False)  # as loaded on CPUs
    random = np.random.default_rng(0)

    def draw(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(0.02 * random.standard_normal(x.shape, np.float32))

    variables = jax.tree.map(draw, nn.unbox(abstract_variables(module)))
    return phi4mm_jax.Model(module, variables, Processor.from_folder(TINY, config))


def steps(model: phi4mm_jax.Model, rounds: int) -> Table:
    table = Table("cache", "keys per row", "ms per step", "ratio", title="A decoding step of 8 slots")
    cases = [(2048, 200), (32768, 200), (32768, 2000), (32768, 4000)]
    calls = {case: decoding(model, *case) for case in cases}
    times: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for _ in range(rounds):  # in turn: what else the machine does meets all alike
        for case, call in calls.items():
            start = time.perf_counter()
            call()
            times[case].append((time.perf_counter() - start) / _STEPS)
    first = statistics.median(times[cases[0]])
    for (cache, keys), taken in times.items():
        middle = statistics.median(taken)
        table.add_row(f"{cache // 1024}K", str(keys), f"{1e3 * middle:.1f}", f"{middle / first:.2f}")
    return table


def decoding(model: phi4mm_jax.Model, cache_tokens: int, keys: int) -> Callable[[], None]:
    """Return a compiled round of decoding 8 slots that have so many keys each."""
    config = EngineConfig(slots=8, cache_tokens=cache_tokens, steps=_STEPS, feature_blocks=16)
    runner, programs = model.engine(config).runner, model.programs
    state = [runner.kv_cache, runner.token_seen]
    needed = -(-(keys + _STEPS) // config.page_tokens)
    tables = np.zeros((8, runner.table_size), np.int32)
    tables[:, :needed] = np.arange(8 * needed).reshape(8, needed) % config.pages  # rows may share pages: all are read
    whole = np.zeros(8, np.int32)
    slots = DecodeInputs(
        last=whole, lengths=whole + keys, num_decode_steps=whole + _STEPS, tables=tables, adapters=whole,
        use_long_rope=whole.astype(bool), num_output_tokens=whole, sampling=SamplingRows.of([Sampling()] * 8),
    )  # fmt: skip
    variables = {"params": model.variables["params"]}

    def call() -> None:
        *state[:], drawn = programs.decode(variables, *state, slots, width=_STEPS)
        assert (jax.device_get(drawn).counts == _STEPS).all(), "a stop token was drawn; take another seed"

    call()
    return call


def questions(model: phi4mm_jax.Model, side: int) -> Table:
    random = np.random.default_rng(0)

    def images(count: int) -> list[np.ndarray]:
        return [random.integers(0, 256, (side, side, 3)).astype(np.uint8) for _ in range(count)]

    def asked(images: list[np.ndarray]) -> tuple[float, int]:
        requests = [
            Request(f"<|user|><|image_1|>What is {i}?<|end|><|assistant|>", [image], max_new_tokens=8)
            for i, image in enumerate(images)
        ]
        start = time.perf_counter()
        answers = dict(engine.run(requests))
        taken = time.perf_counter() - start
        assert all(a.error is None for a in answers.values()), answers
        return taken, answers[0].prompt_tokens

    engine = model.engine(EngineConfig(slots=8, cache_tokens=32768, feature_blocks=256))
    for some in (images(1) * 10, images(10)):  # compiles
        asked(some)
    many, tokens = asked(images(10))
    one, _ = asked(images(1) * 10)
    table = Table("", "seconds", "times as fast", title=f"Ten questions of {tokens} tokens, answers of 8")
    table.add_row("ten images", f"{many:.1f}", "")
    table.add_row("one image", f"{one:.1f}", f"{many / one:.1f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
