"""Start-up time, from a process's start to its first token, with the small model: python -m benchmarks.startup.

Each row is a process of its own; "cold" begins with no compiled programs, "warm" with those that the run before kept.

With `--checkpoint FOLDER`, of full size say, the time of `phi4mm_jax.load` beside plain reading of the same files: once
through a small buffer, as `cat`, and once into as much new memory as a model takes, which a system first has to clear.
"Cold" files are dropped from the page cache before they are read.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.paths import ROOT, SMALL_MODEL

CODE = """
import time
start = time.perf_counter()
import jax
imported = time.perf_counter()
import phi4mm_jax
phi4mm_jax.load  # imported when it is asked for
ours = time.perf_counter()
model = phi4mm_jax.load({model!r}, dtype="float32")
loaded = time.perf_counter()
model.generate(["<|user|>COPY one<|end|><|assistant|>"], max_new_tokens=1)
times = start, imported, ours, loaded, time.perf_counter()
print(*[f"{{b - a:.2f}}" for a, b in zip(times, times[1:])])
"""
MEASURED = """
import resource, sys, time
{prepare}
before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
{work}
after = resource.getrusage(resource.RUSAGE_SELF)
cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
print(time.perf_counter() - start, cpu, after.ru_maxrss / 2**20)
"""
READ = """
held = memoryview(bytearray(1 << 24)) if {reused} else np.empty({size}, np.uint8)
at = 0
for file in {files}:
    with open(file, "rb", buffering=0) as opened:
        while read := opened.readinto(held if {reused} else held[at:at + (1 << 24)]):
            at += read
assert at == {size}
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--model", default=str(SMALL_MODEL), help="a checkpoint's folder")
    parser.add_argument("--checkpoint", metavar="FOLDER", type=Path, help="time its loading beside plain reading")
    parser.add_argument("--rounds", metavar="N", type=int, default=3, help="of which the median is printed")
    arguments = parser.parse_args()
    if arguments.checkpoint is None:
        first_token(arguments.model)
    else:
        loading(arguments.checkpoint.resolve(), arguments.rounds)
    return 0


def first_token(model: str) -> None:
    print("| programs | import jax, s | import phi4mm_jax | load | first token | in all |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        environment["XDG_CACHE_HOME"] = cache
        for name in ("cold", "warm", "warm"):
            seconds = run(CODE.format(model=model), environment)
            print(f"| {name} | {' | '.join(seconds)} | {sum(map(float, seconds)):.2f} |", flush=True)


def loading(checkpoint: Path, rounds: int) -> None:
    files = sorted(checkpoint.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    read = {"files": list(map(str, files)), "size": size}
    steps = {
        "read, one buffer": ("import numpy as np", READ.format(reused=True, **read)),
        "read, new memory": ("import numpy as np", READ.format(reused=False, **read)),
        "phi4mm_jax.load": (
            "import jax, phi4mm_jax; phi4mm_jax.load",
            f"jax.block_until_ready(phi4mm_jax.load({str(checkpoint)!r}).variables)",
        ),
    }
    print(f"{checkpoint}: {size / 1e9:.1f} GB, the median of {rounds}\n")
    print("| files | step | seconds | GB/s | of plain reading | s of CPU a GB | peak GiB |")
    print("|---|---|---|---|---|---|---|")
    for name in ("cold", "warm"):
        measured: dict[str, list[list[float]]] = {step: [] for step in steps}
        for _ in range(rounds):
            for step, (prepare, work) in steps.items():
                if name == "cold":
                    drop(files)
                printed = run(MEASURED.format(prepare=prepare, work=work), dict(os.environ))
                measured[step].append(list(map(float, printed)))
        plain = 0.0
        for step, rows in measured.items():
            seconds, cpu, peak = (statistics.median(column) for column in zip(*rows, strict=True))
            plain = plain or seconds
            figures = f"{seconds:.1f} | {size / seconds / 1e9:.2f} | {plain / seconds:.2f} | {cpu * 1e9 / size:.2f}"
            print(f"| {name} | {step} | {figures} | {peak:.1f} |", flush=True)


def run(code: str, environment: dict[str, str]) -> list[str]:
    """Return the words that a process of its own prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()


def drop(files: list[Path]) -> None:
    """Take files out of the page cache, which needs no rights."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
