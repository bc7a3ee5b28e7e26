"""From the start of a process to its first token, with the small model: python -m benchmarks.startup.

Each row is a process of its own; "cold" begins with no compiled programs, "warm" with those that the run before kept.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "assets" / "tiny"), help="a checkpoint's folder")
    model = parser.parse_args().model
    print("| programs | import jax, s | import phi4mm_jax | load | first token | in all |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        environment["XDG_CACHE_HOME"] = cache
        for name in ("cold", "warm", "warm"):
            command = [sys.executable, "-c", CODE.format(model=model)]
            run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
            seconds = run.stdout.split()
            print(f"| {name} | {' | '.join(seconds)} | {sum(map(float, seconds)):.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
