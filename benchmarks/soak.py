"""An hour of service, in short: python -m benchmarks.soak [--requests 10000].

Short requests through one engine with the tiny checkpoint of the tests: text, images and clips, greedy and drawn, some
cancelled, some that cannot be served, some streams that are closed early. Prints the memory as it goes on, and what is
lost in the end: slots, pages, arrays on the device, compilations.
"""

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import phi4mm_jax
from phi4mm_jax.engine import EngineConfig, Request, Sampling
from phi4mm_jax.utils.progress import progress_bar

TINY = Path(__file__).parent.parent / "tests" / "fixtures" / "ms_tiny"
_CONFIG = EngineConfig(slots=8, cache_tokens=8192, page_size=64, chunk=64, steps=4, feature_blocks=32)


class Soak:
    """An engine that is warm, and the requests that come to it.

    Args:
        inputs: a folder with image_0.png and audio_0.flac.
    """

    def __init__(self, model: phi4mm_jax.Model, inputs: Path, seed: int = 0):
        self._draw = random.Random(seed)
        self._image, self._clip = (inputs / "image_0.png").read_bytes(), (inputs / "audio_0.flac").read_bytes()
        self.engine = model.engine(_CONFIG)
        self.engine.warm_up()

    def run(self, count: int) -> Counter[str]:
        """Serve so many requests; how many ended in which way ("closed": a stream that was closed)."""
        ended: Counter[str] = Counter()
        streams = count // 50
        asked, doomed = streams, {}  # requests to cancel, and the rounds until then
        while ended.total() < count - streams:
            while asked < count and len(self.engine._waiting) < _CONFIG.slots:
                number, asked = self.engine.submit(self._request()), asked + 1
                if self._draw.random() < 0.1:
                    doomed[number] = self._draw.randint(0, 6)
            for number in [number for number, rounds in doomed.items() if rounds == 0]:
                self.engine.cancel(number)
            doomed = {number: rounds - 1 for number, rounds in doomed.items() if rounds}
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
        """Slots and pages that nobody gave back."""
        slots = sum(active is not None for active in self.engine._slots)
        return slots, self.engine.config.pages - self.engine._pool.available

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


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", metavar="N", type=int, default=10_000)
    wanted = parser.parse_args().requests
    compiled = 0

    def count(event: str, duration_secs: float, **_) -> None:
        nonlocal compiled
        compiled += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(count)
    soak = Soak(phi4mm_jax.load(TINY, dtype="float32"), TINY / "inputs")
    table = Table("requests", "seconds", "resident MiB", "live arrays", "slots lost", "pages lost", "compiled")
    ended: Counter[str] = Counter()
    start = time.perf_counter()

    def report() -> None:
        lost = soak.lost()
        row = ended.total(), f"{time.perf_counter() - start:.0f}", f"{soak.resident() / 2**20:.0f}", soak.live_arrays()
        table.add_row(*map(str, (*row, *lost, compiled)))

    with progress_bar("Serving") as advance:
        report()
        for size in [wanted // 20] * 2 + [wanted // 10] * 9:
            ended += soak.run(size)
            advance(ended.total(), wanted)
            report()
    Console().print(table)
    Console().print(", ".join(f"{name} {number}" for name, number in sorted(ended.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
