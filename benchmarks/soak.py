"""An hour of service, in short: python -m benchmarks.soak [--requests 10000].

Short requests to one engine with the tiny checkpoint of the tests: text, images and clips, greedy and sampled, some
cancelled, some that cannot be served, some streams that are closed early. Prints the memory meanwhile, and what is
lost in the end: slots, pages, arrays on the device, compilations.
"""

import argparse
import sys
import time
from collections import Counter

import jax
from rich.console import Console
from rich.table import Table

import phi4mm_jax
from benchmarks.paths import TINY
from phi4mm_jax.testing.soak import Soak
from phi4mm_jax.utils.progress import progress_bar


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
