"""Speed on one NVIDIA GPU, kernels and the full-size model, beside XLA and PyTorch in the same run: one table.

    python -m benchmarks.gpu [--small] [--minutes 25] [--parts NAME ...]

Unattended and bounded: each part is a process of its own with its share of the time, near the end of which it starts no
more rows, so that what fails, does not fit or takes too long is a row that says so, and not the end. Weights are
random, of the release's sizes, in bfloat16; no token stops an answer. Both sides are warm, and their fastest round
counts. Ceilings are measured beside: the bandwidth of reading and of a copy, and a product of large matrices. `--small`
shows only that it runs, on any platform.

PyTorch's columns need torch and transformers, built for CUDA.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
HEADS, KV_HEADS, SIZE = 24, 8, 128
AUDIO_SECONDS, ANSWER = 10, 32  # of a clip, and tokens of its transcript
# Name of each part, and its share of the time, most of which is compilation.
PARTS = {
    "ceilings": 0.03, "numbers": 0.08, "kernels": 0.08, "torch_kernels": 0.04, "model": 0.41, "torch_model": 0.09,
    "quantized": 0.21, "tuning": 0.03, "load": 0.03,
}  # fmt: skip
START_WITHIN = 0.8  # of a part's time, a row is started; at its end the part is ended
max_calls = 100  # of a round
SIDES = ("ours", "XLA", "Triton", "cuDNN bare", "SDPA flash", "SDPA cuDNN", "transformers")
CEILINGS = {"TB/s": "ceiling: read", "TFLOP/s": "ceiling: bfloat16 product"}  # by unit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows only that it runs")
    parser.add_argument("--minutes", type=float, default=25.0, help="of all parts together")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="NAME")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run_part(arguments.part, arguments.small, arguments.seconds)
        return 0
    rows = collect(arguments.parts, arguments.minutes * 60, arguments.small)
    print(f"\n{platform_line(rows)}\n\n{table(rows)}")
    return 0


# --- processes ---


def collect(parts: Sequence[str], seconds: float, small: bool) -> list[dict[str, Any]]:
    """Run the parts one after the other; what one leaves of its time the later ones have."""
    rows: list[dict[str, Any]] = []
    end, shares = time.monotonic() + seconds, sum(PARTS[name] for name in parts)
    for name in parts:
        left = end - time.monotonic()
        limit = left * PARTS[name] / shares
        shares -= PARTS[name]
        rows += in_process(name, max(limit, 1.0), small)
    return rows


def in_process(name: str, limit: float, small: bool) -> list[dict[str, Any]]:
    """Return the rows that a part has printed before its end or its time's."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, *["--small"] * small]
    command += ["--seconds", str(limit * START_WITHIN)]
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | os.environ
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    timer = threading.Timer(limit, process.kill)
    timer.start()
    rows, errors = [], []
    assert process.stderr is not None
    assert process.stdout is not None
    reader = threading.Thread(target=lambda stream: errors.extend(stream), args=(process.stderr,))
    reader.start()
    for line in process.stdout:
        if line.startswith("{"):
            rows.append(json.loads(line))
            print(line, end="", flush=True)
    process.wait()
    reader.join()
    timed_out = not timer.is_alive()
    timer.cancel()
    if process.returncode:
        last = next((line.strip() for line in reversed(errors) if line.strip()), "no message")
        reason = f"its {limit:.0f} s were over" if timed_out else f"{last:.150}"
        rows.append({"row": f"{name}: the rest", "side": "ours", "error": reason})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def run_part(name: str, small: bool, seconds: float) -> None:
    """Print one line of JSON for each result, as soon as it is there; behind these seconds, that it was not started."""
    global max_calls
    max_calls = 1 if small else max_calls
    part: Callable[[bool], Iterator[Measurement]] = globals()[name]
    end = time.monotonic() + seconds
    for row, side, unit, measure in part(small):
        try:
            result = {"value": measure()} if time.monotonic() < end else {"error": "not started: the time was over"}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            result = {"error": f"{type(error).__name__}: {lines[0]:.120}"}
        print(json.dumps({"row": row, "side": side, "unit": unit, **result}), flush=True)


Measurement = tuple[str, str, str, Callable[[], float | str]]  # row, side, unit, and what gives the value


# --- the table ---


def platform_line(rows: Sequence[dict[str, Any]]) -> str:
    platform = [row["value"] for row in rows if row["row"] == "platform" and "value" in row]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=FIXTURES
    )
    return "; ".join([time.strftime("%Y-%m-%d"), f"commit {commit.stdout.strip() or 'unknown'}", *platform])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return Markdown: a line a row, a column a side that has a value, and the ratios of ours to others.

    They are that to the best other side, XLA only where there is no other, and that to the ceiling of the row's unit.
    """
    cells: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["row"] != "platform":
            cells.setdefault(row["row"], {})[row["side"]] = row
    sides = [side for side in SIDES if any("value" in found.get(side, {}) for found in cells.values())]
    head = f"| row | unit | {' | '.join(sides)} | ours over the best other | over the ceiling | |"
    lines = [head, "|---" * (len(sides) + 5) + "|"]
    for name, found in cells.items():
        values = {side: x["value"] for side, x in found.items() if "value" in x}
        others = [value for side, value in values.items() if side not in ("ours", "XLA")]
        others = others or [value for side, value in values.items() if side == "XLA"]
        ratio = f"{values['ours'] / max(others):.2f}" if "ours" in values and others else ""
        unit = next((x["unit"] for x in found.values() if "unit" in x), "")
        ceiling = cells.get(CEILINGS.get(unit, ""), {}).get("ours", {}).get("value")
        share = f"{values['ours'] / ceiling:.2f}" if ceiling and "ours" in values else ""
        notes = "; ".join(f"{side}: {x['error']}" for side, x in found.items() if "error" in x).replace("|", "/")
        shown = [f"{values[side]:.4g}" if side in values else "" for side in sides]
        lines.append(f"| {name} | {unit} | {' | '.join(shown)} | {ratio} | {share} | {notes} |")
    return "\n".join(lines)


# --- time ---


def fastest(call: Callable[[], Any], wait: Callable[[Any], Any], *, rounds: int = 3, seconds: float = 0.3) -> float:
    """Return the seconds of one call in the fastest round; a round has as many calls as fill `seconds`."""
    wait(call())
    start = time.perf_counter()
    wait(call())
    count = max(1, min(int(seconds / max(time.perf_counter() - start, 1e-6)), max_calls))
    best, result = float("inf"), None
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(count):
            result = call()
        wait(result)
        best = min(best, (time.perf_counter() - start) / count)
    return best


def of_jax(call: Callable[[], Any], **options: Any) -> float:
    import jax

    return fastest(call, jax.block_until_ready, **options)


def of_torch(call: Callable[[], Any], **options: Any) -> float:
    import torch

    return fastest(call, lambda _: torch.cuda.synchronize() if torch.cuda.is_available() else None, **options)


def torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# --- parts: ceilings and kernels ---


def ceilings(small: bool) -> Iterator[Measurement]:
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    yield "platform", "ours", "", lambda: f"{device.device_kind}, jax {jax.__version__}"
    size, side = (1 << 16, 128) if small else (1 << 31, 8192)

    def read() -> float:
        x, largest = jnp.ones(size, jnp.bfloat16), jax.jit(jnp.max)
        return 2 * size / of_jax(lambda: largest(x)) / 1e12

    def copy() -> float:
        x, add = jnp.ones(size, jnp.bfloat16), jax.jit(lambda x: x + jnp.bfloat16(1))
        return 4 * size / of_jax(lambda: add(x)) / 1e12

    def product() -> float:  # of random numbers: of equal ones it is faster
        x, y = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
        multiply = jax.jit(lambda a, b: a @ b)
        return 2 * side**3 / of_jax(lambda: multiply(x, y)) / 1e12

    yield "ceiling: read", "ours", "TB/s", read
    yield "ceiling: copy", "ours", "TB/s", copy
    yield "ceiling: bfloat16 product", "ours", "TFLOP/s", product


def lengths(small: bool) -> tuple[int, ...]:
    return (128, 256) if small else (4096, 16384, 65536, 131072)


def attention_row(length: int, backward: bool) -> tuple[str, float]:
    """Return the name of a row, and the operations of one call."""
    products = 7 if backward else 2  # of a causal half each: two forward, five backward
    name = f"attention {'forward and backward' if backward else 'forward'}, {length} tokens"
    return name, products * length * length * HEADS * SIZE


def kernels(small: bool) -> Iterator[Measurement]:
    import jax
    import jax.numpy as jnp

    from phi4mm_jax.kernels import flash_attention

    def draw(seed: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    def bare(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    sides = {
        "ours": lambda q, k, v: flash_attention(q, k, v, causal=True),
        "XLA": lambda q, k, v: flash_attention(q, k, v, causal=True, implementation="xla"),
        "cuDNN bare": bare,
    }
    for backward in (False, True):
        for length in lengths(small):
            if backward and length > 65536:
                continue
            name, operations = attention_row(length, backward)
            for side, attention in sides.items():
                if side == "XLA" and length > 16384:
                    continue

                def measure(attention=attention, length=length, operations=operations, backward=backward) -> float:
                    def both(q, k, v):
                        out, pull = jax.vjp(attention, q, k, v)
                        return pull(out)

                    call = jax.jit(both if backward else attention)
                    q, k, v = draw(0, 1, length, HEADS, SIZE), *(draw(i, 1, length, KV_HEADS, SIZE) for i in (1, 2))
                    return operations / of_jax(lambda: call(q, k, v)) / 1e12

                yield name, side, "TFLOP/s", measure
    yield from decoding_kernels(small, draw)


def decoding_kernels(small: bool, draw: Callable[..., Any]) -> Iterator[Measurement]:
    """One step's attention of four layers, in bytes of keys, values and scales that it has to read."""
    import jax
    import jax.numpy as jnp

    from benchmarks.gpu_numbers import decoders
    from phi4mm_jax.kernels import decode_attention

    layers, page = 4, 64
    for batch, length in ((1, 256), (2, 128)) if small else ((1, 131072), (8, 8192), (64, 2048)):
        for int8 in (False, True):
            for side, (context, name) in decoders().items():

                def measure(batch=batch, length=length, int8=int8, context=context, name=name) -> float:
                    pages = batch * length // page
                    shape = layers, pages, KV_HEADS, page, SIZE
                    tables = np.random.default_rng(0).permutation(pages).astype(np.int32).reshape(batch, -1)
                    if int8:
                        k = jax.random.randint(jax.random.key(1), shape, -127, 128, jnp.int8)
                        scales = jax.random.uniform(jax.random.key(2), shape[:4]) * 0.02
                    else:
                        k, scales = draw(1, *shape), None

                    @jax.jit
                    def step(q, k, v, k_scales, v_scales):
                        for layer in range(layers):
                            q = decode_attention(
                                q, k, v, layer=layer, lengths=jnp.full(batch, length), tables=jnp.asarray(tables),
                                k_scales=k_scales, v_scales=v_scales, implementation=name,
                            )  # fmt: skip
                        return q

                    q, v = draw(3, batch, HEADS, SIZE), k + k.dtype.type(0)  # pages of its own
                    bytes_read = layers * batch * length * KV_HEADS * 2 * (SIZE + 4 if int8 else 2 * SIZE)
                    with context():
                        return bytes_read / of_jax(lambda: step(q, k, v, scales, scales)) / 1e12

                kind = "int8" if int8 else "bfloat16"
                yield f"attention of a decoding step, {batch} x {length}, {kind}", side, "TB/s", measure


def numbers(small: bool) -> Iterator[Measurement]:
    from benchmarks import gpu_numbers

    return gpu_numbers.measurements(small)


def torch_kernels(small: bool) -> Iterator[Measurement]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    yield "platform", "transformers", "", lambda: f"torch {torch.__version__}"
    device = torch_device()
    backends = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
    for backward in (False, True):
        for length in lengths(small):
            if backward and length > 65536:
                continue
            name, operations = attention_row(length, backward)
            for side, backend in backends.items():

                def measure(length=length, operations=operations, backward=backward, backend=backend) -> float:
                    options: Any = {"device": device, "dtype": torch.bfloat16, "requires_grad": backward}
                    q, k, v = (torch.randn(1, n, length, SIZE, **options) for n in (HEADS, KV_HEADS, KV_HEADS))

                    def call() -> torch.Tensor:
                        with sdpa_kernel(backend):
                            out = torch.nn.functional.scaled_dot_product_attention(
                                q, k, v, is_causal=True, enable_gqa=True
                            )
                            if backward:
                                out.backward(out.detach())
                        return out

                    return operations / of_torch(call) / 1e12

                yield name, side, "TFLOP/s", measure


# --- parts: the model ---


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the model's rows: what both sides do."""

    prompts: tuple[int, ...] = (4096, 32768, 131072 - 1024)
    batches: tuple[int, ...] = (1, 8, 64)
    cached: int = 512
    steps: int = 32
    crops: int = 16
    clips: int = 16
    transcripts: int = 160
    tuning: tuple[int, int] = (4, 4096)  # rows and tokens


SMALL = Sizes((128,), (1, 2), 64, 4, 1, 1, 2, (1, 64))
PREFILL, DECODE = "prefill, {} tokens", "decoding, batch {}, {} cached"
READ = f"{DECODE}: bytes read"
CROPS, CLIPS = "image encoder, {} crops", f"audio encoder, {{}} clips of {AUDIO_SECONDS} s"
TRANSCRIPTS = f"transcription, batch {{}}, clips of {AUDIO_SECONDS} s"


def random_model(small: bool, scan: bool = False) -> Any:
    """The release's model with random weights, drawn on the device, and the tests' vocabulary file.

    The small one has one layer in the decoder, and a quarter more ids than that file.
    """
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    import phi4mm_jax
    from phi4mm_jax.config import Phi4MMConfig, read_json
    from phi4mm_jax.model import Phi4MM
    from phi4mm_jax.model.layers import unstack_layers
    from phi4mm_jax.model.phi4mm import abstract_variables

    tiny = Phi4MMConfig.from_folder(FIXTURES / "ms_tiny")
    release = Phi4MMConfig.from_dict(read_json(FIXTURES / "ms_release_config.json"))
    decoder = dataclasses.replace(tiny.decoder, num_layers=1, vocab_size=tiny.decoder.vocab_size * 5 // 4)
    config = dataclasses.replace(
        dataclasses.replace(tiny, decoder=decoder) if small else release,
        image_token_id=tiny.image_token_id,
        audio_token_id=tiny.audio_token_id,
        pad_token_id=tiny.pad_token_id,
        stop_token_ids=(),
    )
    abstract = nn.unbox(abstract_variables(Phi4MM(config, jnp.bfloat16)))
    leaves, structure = jax.tree.flatten(abstract)
    draw = jax.jit(
        lambda key, shape: (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(jnp.bfloat16), static_argnums=1
    )
    variables = structure.unflatten([draw(jax.random.key(i), x.shape) for i, x in enumerate(leaves)])
    if not scan:  # as `load` chooses on one CPU or GPU
        for collection in variables.values():
            collection["decoder"] = unstack_layers(collection["decoder"])
    module = Phi4MM(config, jnp.bfloat16, scan)
    return phi4mm_jax.Model(module, variables, random_processor(config))


def random_processor(config: Any) -> Any:
    """The tests' processor, with more ids than its vocabulary has: most tokens that the model draws have no text."""
    from phi4mm_jax.processing.processor import Processor
    from phi4mm_jax.processing.tokenizer import Tokenizer, build_encoding, read_tokenizer_files

    files = read_tokenizer_files(FIXTURES / "ms_tiny")
    tokenizer = Tokenizer(*build_encoding(files), files.special, config.decoder.vocab_size)
    own = Processor.from_folder(FIXTURES / "ms_tiny", config)
    return Processor(config, tokenizer, own.dynamic_hd, config.decoder.rope.max_length)


def model(small: bool) -> Iterator[Measurement]:
    import jax

    from phi4mm_jax.engine import EngineConfig, Request

    sizes = SMALL if small else Sizes()
    ours, random = random_model(small), np.random.default_rng(0)

    with engine_of(ours, EngineConfig(slots=1, cache_tokens=max(sizes.prompts) + 1024, steps=sizes.steps)) as engine:
        for length in sizes.prompts:

            def prefill(length=length) -> float:
                def call() -> None:  # other tokens each time: the engine keeps the pages of prompts that it has seen
                    engine.submit(Request("", max_new_tokens=1), random_row(random, length))
                    while not engine.idle:
                        engine.step()

                return length / of_jax(call, rounds=2, seconds=0.0)

            yield PREFILL.format(length), "ours", "tokens/s", prefill

        def decode_long() -> float:
            first = engine.submit(Request("", max_new_tokens=800), random_row(random, longest))
            return decoding_rate(engine, [first], sizes.steps)

        longest = max(sizes.prompts)
        yield from decoding_rows(lambda: ours, 1, longest, decode_long)
    for batch in sizes.batches:
        rate = functools.partial(decoding, ours, batch, sizes)
        yield from decoding_rows(lambda: ours, batch, sizes.cached, rate)

    def crops() -> float:
        from phi4mm_jax.batch import ImageStack

        vision = ours.config.vision
        pixels = np.zeros((sizes.crops, vision.crop_size, vision.crop_size, 3), np.float32)
        mask = np.ones((sizes.crops, vision.patches_per_side, vision.patches_per_side), bool)
        stack = jax.device_put(ImageStack(pixels, mask))
        encode = jax.jit(lambda variables, stack: ours.module.apply(variables, stack, method="encode_images"))
        variables = {"params": ours.variables["params"]}
        return sizes.crops / of_jax(lambda: encode(variables, stack))

    def clips() -> float:
        batch = ours.process(["<|audio_1|>"] * sizes.clips, audios=[[noise(random)] for _ in range(sizes.clips)])
        stack = jax.device_put(batch.audio)
        encode = jax.jit(lambda variables, stack: ours.module.apply(variables, stack, method="encode_audio"))
        variables = {"params": ours.variables["params"]}
        return sizes.clips * AUDIO_SECONDS / of_jax(lambda: encode(variables, stack))

    def transcripts() -> float:
        requests = [
            Request(
                "<|user|><|audio_1|>Transcribe the audio clip into text.<|end|><|assistant|>",
                audios=(noise(random),), max_new_tokens=ANSWER,
            )
            for _ in range(sizes.transcripts)
        ]  # fmt: skip
        config = EngineConfig(slots=sizes.transcripts, cache_tokens=sizes.transcripts * 512)
        best, answers = float("inf"), {}
        for _ in range(2):  # the first one compiles
            with engine_of(ours, config) as engine:  # a new one: nothing is in its cache
                start = time.perf_counter()
                answers = dict(engine.run(requests))
                best = min(best, time.perf_counter() - start)
        assert all(answer.error is None for answer in answers.values()), answers
        return sizes.transcripts * AUDIO_SECONDS / best

    yield TRANSCRIPTS.format(sizes.transcripts), "ours", "s of audio/s", transcripts
    yield CROPS.format(sizes.crops), "ours", "crops/s", crops
    yield CLIPS.format(sizes.clips), "ours", "s of audio/s", clips


def quantized(small: bool) -> Iterator[Measurement]:
    """Decoding as in `model`, with the weights in fewer bytes."""
    sizes = SMALL if small else Sizes()
    for weights in ("int8", "int4"):
        ours = functools.cache(functools.partial(quantized_model, small, weights))
        for batch in sizes.batches:

            def rate(batch=batch, ours=ours) -> float:
                return decoding(ours(), batch, sizes)

            yield from decoding_rows(ours, batch, sizes.cached, rate, f", {weights}")


def decoding_rows(
    ours: Callable[[], Any], batch: int, cached: int, rate: Callable[[], float], kind: str = ""
) -> Iterator[Measurement]:
    """The tokens a second of all rows, and the bytes a second that they have to read for these."""
    rates: list[float] = []

    def tokens() -> float:
        rates.append(rate())
        return rates[0]

    def bytes_read() -> float:
        if not rates:
            raise RuntimeError("decoding was not measured, see the row before")
        return rates[0] / batch * step_bytes(ours(), batch, cached) / 1e12

    yield DECODE.format(batch, cached) + kind, "ours", "tokens/s", tokens
    yield READ.format(batch, cached) + kind, "ours", "TB/s", bytes_read


def quantized_model(small: bool, weights: Any) -> Any:
    import phi4mm_jax
    from phi4mm_jax.quantization import quantize_variables

    floats = random_model(small)
    return phi4mm_jax.Model(floats.module, quantize_variables(floats.variables, weights), floats.processor)


def random_row(random: np.random.Generator, length: int) -> Any:
    from phi4mm_jax.processing.batching import Row

    return Row(random.integers(0, 500, length).astype(np.int32), (), (), ())


def decoding(ours: Any, batch: int, sizes: Sizes) -> float:
    """Return the tokens a second of all rows, each after `sizes.cached` of its own."""
    from phi4mm_jax.engine import EngineConfig, Request

    random = np.random.default_rng(batch)
    config = EngineConfig(slots=batch, cache_tokens=batch * (sizes.cached + 1024), steps=sizes.steps)
    with engine_of(ours, config) as engine:
        rows = [random_row(random, sizes.cached) for _ in range(batch)]
        ids = [engine.submit(Request("", max_new_tokens=900), row) for row in rows]
        return decoding_rate(engine, ids, sizes.steps)


def step_bytes(ours: Any, batch: int, cached: int) -> int:
    """Return the bytes of weights, keys and values that a step has to read."""
    import jax

    from phi4mm_jax.checkpoint.tensor_types import parameter_bytes

    decoder = ours.config.decoder
    token = decoder.num_layers * decoder.num_kv_heads * decoder.head_size * 2 * 2
    weights = sum(parameter_bytes(x) for x in jax.tree.leaves(ours.variables["params"]["decoder"]))
    return weights + batch * cached * token


@contextmanager
def engine_of(model: Any, config: Any) -> Iterator[Any]:
    """An engine whose cache is freed at the end."""
    import gc

    engine = model.engine(config)
    try:
        yield engine
    finally:
        for x in engine.runner.kv_cache.arrays:
            x.delete()
        del engine
        gc.collect()


def decoding_rate(engine: Any, ids: Sequence[int], steps: int) -> float:
    """Return tokens a second of all rows, once all of them decode; a round decodes `steps` tokens a row."""
    best, full = 0.0, 0
    while full < 4:
        before, start = count_drawn(engine), time.perf_counter()
        updates = engine.updates_of(ids)
        taken = time.perf_counter() - start
        assert not any(update.completion is not None for update in updates), "a row has ended"
        if (tokens := count_drawn(engine) - before) == len(ids) * steps:
            full += 1
            best = max(best, tokens / taken) if full > 1 else best  # the first one compiles
    return best


def count_drawn(engine: Any) -> int:
    return sum(sequence.num_output_tokens for sequence in engine.scheduler.resident)


def noise(random: np.random.Generator) -> tuple[np.ndarray, int]:
    return (0.1 * random.standard_normal(16000 * AUDIO_SECONDS)).astype(np.float32), 16000


def torch_model(small: bool) -> Iterator[Measurement]:
    import torch
    from transformers import DynamicCache

    from benchmarks.vs_transformers import leave_out_unused
    from tests.helpers import torch_native

    torch.set_grad_enabled(False)
    sizes, device = SMALL if small else Sizes(), torch_device()
    folder = FIXTURES / "ms_tiny" / "config.json" if small else FIXTURES / "ms_release_config.json"
    config = torch_native.native_config(json.loads(folder.read_text()))
    with torch.device(device):
        kind: Any = torch_native.Phi4MultimodalForCausalLM
        theirs = kind._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    leave_out_unused(theirs)

    def ids(rows: int, length: int) -> torch.Tensor:
        return torch.randint(0, 500, (rows, length), device=device)

    for length in sizes.prompts:

        def prefill(length=length) -> float:
            tokens = ids(1, length)
            call = lambda: theirs(input_ids=tokens, use_cache=True, logits_to_keep=1).logits  # noqa: E731
            return length / of_torch(call, rounds=2, seconds=0.0)

        yield PREFILL.format(length), "transformers", "tokens/s", prefill

    def decoding(rows: int, cached: int) -> float:
        cache = DynamicCache(config=theirs.config)
        last = theirs(input_ids=ids(rows, cached), use_cache=True, past_key_values=cache, logits_to_keep=1)
        last = last.logits[:, -1:].argmax(-1)

        def call() -> torch.Tensor:
            if more := cache.get_seq_length() - cached:
                cache.crop(-more)
            drawn = last
            for _ in range(sizes.steps):
                drawn = theirs(input_ids=drawn, use_cache=True, past_key_values=cache).logits[:, -1:].argmax(-1)
            return drawn

        return rows * sizes.steps / of_torch(call, rounds=2, seconds=0.0)

    for batch in sizes.batches:
        row = DECODE.format(batch, sizes.cached)
        yield row, "transformers", "tokens/s", lambda batch=batch: decoding(batch, sizes.cached)
    yield DECODE.format(1, max(sizes.prompts)), "transformers", "tokens/s", lambda: decoding(1, max(sizes.prompts))
    extend = theirs.model.embed_tokens_extend

    def crops() -> float:
        vision: Any = torch_native.vision_config(config)
        side, patches = vision.image_size, vision.image_size // vision.patch_size
        pixels = torch.zeros(sizes.crops, 3, side, side, device=device, dtype=torch.bfloat16)
        mask = torch.ones(sizes.crops, patches, patches, device=device, dtype=torch.bool)
        embed = extend.image_embed

        def call() -> torch.Tensor:
            features = embed.get_img_features(pixels, mask)
            return embed.img_projection_down(torch.nn.functional.gelu(embed.img_projection_up(features)))

        return sizes.crops / of_torch(call)

    def audio(count: int) -> dict[str, Any]:
        from transformers import Phi4MultimodalFeatureExtractor

        random = np.random.default_rng(0)
        made = Phi4MultimodalFeatureExtractor()(
            [noise(random)[0] for _ in range(count)], sampling_rate=16000, return_tensors="pt"
        )
        return {
            "audio_input_features": made["audio_input_features"].to(device, torch.bfloat16),
            "audio_embed_sizes": made["audio_embed_sizes"].to(device),
        }

    def clips() -> float:
        features = audio(sizes.clips)["audio_input_features"]
        mask = torch.ones(features.shape[:2], device=device, dtype=torch.bool)
        call = lambda: extend.audio_embed.encoder(features, mask)  # noqa: E731
        return sizes.clips * AUDIO_SECONDS / of_torch(call)

    def transcripts() -> float:
        special = theirs.config.audio_config.audio_token_id

        def call() -> torch.Tensor:
            media = audio(sizes.transcripts)
            count = int(media["audio_embed_sizes"][0])
            tokens = ids(sizes.transcripts, 12)
            tokens = torch.cat([tokens[:, :1], torch.full_like(tokens[:, :1], special).expand(-1, count), tokens], 1)
            return theirs.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), **media, max_new_tokens=ANSWER,
                min_new_tokens=ANSWER, do_sample=False, pad_token_id=0,
            )  # fmt: skip

        return sizes.transcripts * AUDIO_SECONDS / of_torch(call, rounds=1, seconds=0.0)

    yield TRANSCRIPTS.format(sizes.transcripts), "transformers", "s of audio/s", transcripts
    yield CROPS.format(sizes.crops), "transformers", "crops/s", crops
    yield CLIPS.format(sizes.clips), "transformers", "s of audio/s", clips


def tuning(small: bool) -> Iterator[Measurement]:
    """A step of the speech adapter over packed rows of text: forward, backward, clipping, AdamW."""
    import jax.numpy as jnp

    from phi4mm_jax.model import Phi4MM
    from phi4mm_jax.testing.adapter_steps import speech_adapter_step

    rows, length = (SMALL if small else Sizes()).tuning

    def measure() -> float:
        ours = random_model(small, scan=True)
        module = Phi4MM(ours.config, jnp.bfloat16, scan=True, remat="full")
        tokens = np.random.default_rng(0).integers(0, 500, (rows, length)).astype(np.int32)
        call = speech_adapter_step(module, ours.variables, tokens, np.ones(tokens.shape, np.float32))
        return rows * length / of_jax(call, rounds=2, seconds=1.0)

    yield f"speech-adapter tuning, {rows} x {length}", "ours", "tokens/s", measure


def load(small: bool) -> Iterator[Measurement]:
    """A checkpoint of the original layout; of two layers each, for writing random weights takes longer than reading."""
    import shutil
    import tempfile

    import jax

    import phi4mm_jax

    def measure() -> float:
        with tempfile.TemporaryDirectory() as folder:
            if small:
                path = Path(shutil.copytree(FIXTURES / "ms_tiny", Path(folder) / "checkpoint"))
            else:
                from benchmarks.vs_transformers import wide_checkpoint

                path = wide_checkpoint(folder)
            size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            start = time.perf_counter()
            jax.block_until_ready(phi4mm_jax.load(path).variables)
            return size / (time.perf_counter() - start) / 1e9

    yield "load, two layers, from a warm page cache", "ours", "GB/s", measure


if __name__ == "__main__":
    sys.exit(main())
