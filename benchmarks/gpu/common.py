"""Sizes of the rows, which all sides share, and the time of a call."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

HEADS, KV_HEADS, SIZE = 24, 8, 128
AUDIO_SECONDS, ANSWER = 10, 32  # of a clip, and tokens of its transcript
max_calls = 100  # of a round

Measurement = tuple[str, str, str, Callable[[], float | str]]  # row, side, unit, and what gives the value


@dataclass(frozen=True)
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


def lengths(small: bool) -> tuple[int, ...]:
    return (128, 256) if small else (4096, 16384, 65536, 131072)


def attention_rows(small: bool) -> Iterator[tuple[bool, int, str, float]]:
    """Yield whether a row has the backward pass, its tokens, its name, and the operations of one call."""
    for backward in (False, True):
        products = 7 if backward else 2  # of a causal half each: two forward, five backward
        for length in lengths(small):
            if not backward or length <= 65536:
                name = f"attention {'forward and backward' if backward else 'forward'}, {length} tokens"
                yield backward, length, name, products * length * length * HEADS * SIZE


def noise(random: np.random.Generator) -> tuple[np.ndarray, int]:
    return (0.1 * random.standard_normal(16000 * AUDIO_SECONDS)).astype(np.float32), 16000


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
