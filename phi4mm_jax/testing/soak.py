"""Requests of every kind through one engine, and what is lost by them."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import jax

import phi4mm_jax
from phi4mm_jax.engine import EngineConfig, Request, Sampling

_CONFIG = EngineConfig(slots=8, cache_tokens=8192, page_size=64, chunk=64, steps=4, feature_blocks=32)


class Soak:
    """Warm engine, and the requests that come to it.

    Args:
        inputs: a folder with image_0.png and audio_0.flac.
    """

    def __init__(self, model: phi4mm_jax.Model, inputs: Path, seed: int = 0):
        self._draw = random.Random(seed)
        self._image, self._clip = (inputs / "image_0.png").read_bytes(), (inputs / "audio_0.flac").read_bytes()
        self.engine = model.engine(_CONFIG)
        self.engine.warm_up()

    def run(self, count: int) -> Counter[str]:
        """Serve so many requests; return how many ended in which way ("closed": a stream that was closed)."""
        ended: Counter[str] = Counter()
        streams = count // 50
        asked, cancel_after = streams, {}  # rounds until a request is cancelled, by request
        while ended.total() < count - streams:
            while asked < count and len(self.engine.queue) < _CONFIG.slots:
                number, asked = self.engine.submit(self._request()), asked + 1
                if self._draw.random() < 0.1:
                    cancel_after[number] = self._draw.randint(0, 6)
            for number in [number for number, rounds in cancel_after.items() if rounds == 0]:
                self.engine.cancel(number)
            cancel_after = {number: rounds - 1 for number, rounds in cancel_after.items() if rounds}
            ended.update(u.completion.finish_reason for u in self.engine.step() if u.completion is not None)
        for _ in range(streams):
            stream = self.engine.stream(Request("<|user|>Tell me<|end|><|assistant|>", max_new_tokens=50))
            next(stream)
            stream.close()  # type: ignore
            ended["closed"] += 1
        return ended

    def _request(self) -> Request:
        draw = self._draw
        sampling = Sampling(
            draw.choice([0.0, 0.0, 0.9]), draw.choice([0, 7]), seed=draw.randrange(1000),
            repetition_penalty=draw.choice([1.0, 1.0, 1.2]),
        )  # fmt: skip
        settings: dict[str, Any] = {"max_new_tokens": draw.randint(1, 12), "sampling": sampling}
        text = f"<|user|>%sTell me {draw.randrange(10**6)}{' more' * draw.choice([0, 5, 60])}<|end|><|assistant|>"
        match draw.choices(["text", "image", "clip", "wrong", "long"], [80, 6, 6, 4, 4])[0]:
            case "image":
                return Request(text % "<|image_1|>", [self._image], **settings)
            case "clip":
                return Request(text % "<|audio_1|>", audios=[self._clip], **settings)
            case "wrong":
                return Request(text % "<|image_1|>", [draw.randbytes(64)], **settings)
            case "long":
                return Request(text % "", max_new_tokens=10**6)
        return Request(text % "", **settings)

    def lost(self) -> tuple[int, int]:
        """Return the numbers of slots and pages that were not freed."""
        slots = len(self.engine.scheduler.resident)
        return slots, self.engine.config.pages - self.engine.scheduler.allocator.num_unreserved

    @staticmethod
    def live_arrays() -> int:
        return len(jax.live_arrays())

    @staticmethod
    def resident() -> int:
        """Bytes of this process in memory."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
        raise OSError("/proc/self/status does not say VmRSS")
