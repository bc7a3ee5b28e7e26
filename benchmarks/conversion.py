"""Conversion at full size beside copying the same files: python -m benchmarks.conversion FOLDER [--config FILE].

Writes about 40 GB below FOLDER (a checkpoint with random weights, a copy, both conversions) and removes it again.
Prints, for each step, its time, its share of the copy's speed, and the most memory that its process had resident.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.paths import RELEASE, TINY
from phi4mm_jax.utils.paths import path_argument


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion", description="Conversion beside cp.")
    parser.add_argument("folder", metavar="FOLDER", type=path_argument, help="where to work; must not exist")
    parser.add_argument(
        "--config", metavar="FILE", type=path_argument, default=RELEASE, help="sizes; by default the release's"
    )
    arguments = parser.parse_args()
    work: Path = arguments.folder
    if work.exists():
        parser.error(f"{work} exists already")
    work.mkdir(parents=True)
    original, copied, converted, back = (str(work / name) for name in ("original", "copy", "orbax", "back"))
    processor = str(TINY)  # smaller than the release's; conversion only copies it
    python = [sys.executable, "-m"]
    write = "from phi4mm_jax.checkpoint.random import write_random_checkpoint as w; import sys; w(*sys.argv[1:])"
    steps = {
        "random weights": (original, [sys.executable, "-c", write, str(arguments.config), original, processor]),
        "cp -r": (copied, ["cp", "-r", original, copied]),
        "original to Orbax": (converted, [*python, "convert.to_orbax", original, converted]),
        "Orbax to original": (back, [*python, "convert.to_torch", converted, back, "--layout", "original"]),
    }
    table = Table("step", "GB written", "seconds", "GB/s", "speed of cp", "peak resident GiB", title="Conversion")
    copy_speed = 0.0
    try:
        for step, (made, command) in steps.items():
            os.sync()  # none pays for the writes of the one before
            seconds, peak = run(command)
            size = size_of(Path(made))
            speed = size / seconds / 1e9
            copy_speed = speed if step == "cp -r" else copy_speed
            ratio = f"{speed / copy_speed:.2f}" if copy_speed else ""
            table.add_row(step, f"{size / 1e9:.1f}", f"{seconds:.1f}", f"{speed:.2f}", ratio, f"{peak:.2f}")
            if step == "cp -r":
                shutil.rmtree(copied)
        Console().print(table)
    finally:
        shutil.rmtree(work)
    return 0


def run(command: list[str]) -> tuple[float, float]:
    """Run a command that must succeed; return its seconds, and the GiB resident at its peak."""
    start = time.perf_counter()
    _, status, usage = os.wait4(os.spawnvp(os.P_NOWAIT, command[0], command), 0)
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


if __name__ == "__main__":
    sys.exit(main())
