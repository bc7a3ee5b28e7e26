"""The full-size model: prefill, decoding, transcription, encoders, quantised weights, tuning and loading."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.common import (
    ANSWER,
    AUDIO_SECONDS,
    CLIPS,
    CROPS,
    DECODE,
    PREFILL,
    READ,
    SMALL,
    TRANSCRIPTS,
    Measurement,
    Sizes,
    noise,
    of_jax,
)
from benchmarks.models import random_row
from benchmarks.paths import TINY, release_config


def random_model(small: bool, scan: bool = False) -> Any:
    """Return the release's model with random weights, drawn on the device, and the tests' vocabulary file.

    The small one has one layer in the decoder, and a quarter more ids than that file.
    """
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    import phi4mm_jax
    from phi4mm_jax.config import Phi4MMConfig
    from phi4mm_jax.model import Phi4MM
    from phi4mm_jax.model.layers import unstack_layers
    from phi4mm_jax.model.phi4mm import abstract_variables

    tiny = Phi4MMConfig.from_folder(TINY)
    decoder = dataclasses.replace(tiny.decoder, num_layers=1, vocab_size=tiny.decoder.vocab_size * 5 // 4)
    config = dataclasses.replace(
        dataclasses.replace(tiny, decoder=decoder) if small else release_config(),
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
    """Return the tests' processor, with more ids than its vocabulary: most tokens that the model draws have no text."""
    from phi4mm_jax.processing.processor import Processor
    from phi4mm_jax.processing.tokenizer import Tokenizer, build_encoding, read_tokenizer_files

    files = read_tokenizer_files(TINY)
    tokenizer = Tokenizer(*build_encoding(files), files.special, config.decoder.vocab_size)
    own = Processor.from_folder(TINY, config)
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
    """Yield decoding as in `model`, with the weights in fewer bytes."""
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
    """Yield the tokens a second of all rows, and the bytes a second that they have to read for these."""
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
    """Yield an engine whose cache is freed at the end."""
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


def tuning(small: bool) -> Iterator[Measurement]:
    """Yield a step of the speech adapter over packed rows of text: forward, backward, clipping, AdamW."""
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
    """Yield the load of a checkpoint of two layers each: writing random weights takes longer than reading."""
    import shutil
    import tempfile

    import jax

    import phi4mm_jax

    def measure() -> float:
        with tempfile.TemporaryDirectory() as folder:
            if small:
                path = Path(shutil.copytree(TINY, Path(folder) / "checkpoint"))
            else:
                from benchmarks.models import wide_checkpoint

                path = wide_checkpoint(folder)
            size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            start = time.perf_counter()
            jax.block_until_ready(phi4mm_jax.load(path).variables)
            return size / (time.perf_counter() - start) / 1e9

    yield "load, two layers, from a warm page cache", "ours", "GB/s", measure
