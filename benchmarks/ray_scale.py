"""Two engines beside one, and a run whose processes are killed: python -m benchmarks.ray_scale [--rows 500].

The small model of the repository answers mixed rows (texts, images, clips, both) with one processor for each engine.
Throughput is of the last four fifths of the rows, once every program is compiled. Then the rows are answered
once more by two engines, of which one is killed every few seconds, and so is the whole run from time to time: in the
end each id has one answer, which is the one that a single engine gives. Given a folder, the benchmark resumes there.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import processor
from benchmarks.paths import HELD, ROOT, SMALL_MODEL
from phi4mm_jax.testing.ray_runs import answers_in, engine_processes

TOKENS, CACHE = 8, 4096
COMMON = ("--max-new-tokens", f"{TOKENS}", "--cache-tokens", f"{CACHE}", "--dtype", "float32", "--cluster", "local")


class Progress:
    """Results so far, in a file that a benchmark that is resumed reads."""

    def __init__(self, path: Path):
        self._path = path
        saved = json.loads(path.read_text()) if path.exists() else {}
        self.rates: dict[str, float] = saved.get("rates", {})  # tokens/s by engines
        self.engines: int = saved.get("engines", 0)  # killed
        self.runs: int = saved.get("runs", 0)
        self.ended: bool = saved.get("ended", False)

    def save(self) -> None:
        self._path.write_text(json.dumps({name: x for name, x in vars(self).items() if name != "_path"}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--worker-seconds", type=float, default=2, help="between killed engines, on average")
    parser.add_argument("--driver-seconds", type=float, default=4, help="between killed runs, on average")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)  # engines, in a process of its own
    parser.add_argument("folder", nargs="?", type=Path)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.folder, arguments.measure)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="ray-scale-"))
    if not (folder / "in").exists():
        write_rows(folder / "in", arguments.rows)
    say(f"{folder}: {arguments.rows} rows, one processor an engine: {processor()}")
    progress = Progress(folder / "progress.json")
    for engines in ("1", "2"):
        if engines in progress.rates:
            continue
        shutil.rmtree(folder / f"out{engines}", ignore_errors=True)
        output = subprocess.run(
            [sys.executable, "-m", "benchmarks.ray_scale", "--measure", engines, str(folder)],
            cwd=ROOT, env=environment(folder), check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        progress.rates[engines] = json.loads(output.splitlines()[-1])["rate"]
        progress.save()
        say(f"{engines} engines: {progress.rates[engines]:.1f} tokens/s")
    expected, found = (answers_of(folder / f"out{engines}") for engines in (1, 2))
    assert found == expected, "two engines answer otherwise than one"
    say(f"throughput of two engines over one: {progress.rates['2'] / progress.rates['1']:.2f}")
    run_with_kills(folder, progress, arguments.worker_seconds, arguments.driver_seconds)
    found = answers_of(folder / "killed")
    assert found == expected, "answers after kills are others"
    say(f"{progress.engines} engines and {progress.runs} runs killed: {len(found)} ids, each answered once, as by one")
    return 0


def write_rows(folder: Path, count: int) -> None:
    """Write two files of rows of all kinds, in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [(kind, (HELD / f"{kind}.jsonl").read_text().splitlines()) for kind in ("text", "ocr", "speech", "asked")]
    rows = []
    for number in range(count):
        kind, lines = kinds[number % 4]
        (message, *_) = json.loads(lines[number // 4 % len(lines)])["messages"]
        for part in message["content"]:
            part.update({key: str(HELD / part[key]) for key in ("image", "audio") if key in part})
        rows.append({"id": f"{kind}-{number}", "messages": [message]})
    for name, part in (("a", rows[: count // 3]), ("b", rows[count // 3 :])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def measure(folder: Path, engines: int) -> int:
    """Answer all rows, and print tokens per second from the first answer on."""
    import ray

    from phi4mm_jax.ray import run
    from phi4mm_jax.ray.parts import Parts

    run.connect("local", engines)
    settings = {"max_new_tokens": TOKENS}
    inputs = run.index_files(f"{folder}/in/*.jsonl", settings, parquet=False)
    parts = Parts(f"{folder}/out{engines}")
    ray.data.DataContext.get_current().wait_for_min_actors_s = 600
    ends: list[tuple[float, int]] = []
    run.answer(
        inputs, inputs.keys == inputs.keys, parts, run.Engines(engines, "CPU", 1), form="plain", settings=settings,
        options={"model": str(SMALL_MODEL), "dtype": "float32", "engine": {"cache_tokens": CACHE}},
        advance=lambda _, tokens: ends.append((time.monotonic(), tokens)),
    )  # fmt: skip
    ends = ends[len(ends) // 5 :]
    print(json.dumps({"rate": sum(tokens for _, tokens in ends[1:]) / (ends[-1][0] - ends[0][0])}))
    return 0


def run_with_kills(folder: Path, progress: Progress, worker_seconds: float, driver_seconds: float) -> None:
    """Run infer.ray until it ends by itself; tell what was killed."""
    draw = random.Random(progress.engines + progress.runs)
    while not progress.ended:
        run = subprocess.Popen(
            [sys.executable, "-m", "infer.ray", "--model", str(SMALL_MODEL), "--input", f"{folder}/in/*.jsonl",
             "--output", f"{folder}/killed", "--engines", "2", "--slots", "2", "--write-seconds", "0", *COMMON],
            cwd=ROOT, env=environment(folder), stdout=subprocess.DEVNULL, stderr=(folder / "run.log").open("a"),
        )  # fmt: skip
        before = len(answers_in(folder / "killed"))
        while run.poll() is None and len(answers_in(folder / "killed")) == before:
            time.sleep(0.5)  # a run that is killed before its engines answer shows nothing
        end = time.monotonic() + draw.expovariate(1 / driver_seconds)
        while run.poll() is None and time.monotonic() < end:
            time.sleep(min(draw.expovariate(1 / worker_seconds), max(end - time.monotonic(), 0.1)))
            if engines := engine_processes(run.pid):
                os.kill(draw.choice(engines), signal.SIGKILL)
                progress.engines += 1
                progress.save()
                say(f"an engine killed, {len(answers_in(folder / 'killed'))} rows answered")
        if run.poll() is None:
            run.kill()
            run.wait()
            progress.runs += 1
            say(f"the run killed, {len(answers_in(folder / 'killed'))} rows answered")
            time.sleep(2)  # its cluster ends
        else:
            assert run.returncode == 0, f"infer.ray ended with {run.returncode}; see {folder}/run.log"
            progress.ended = True
        progress.save()


def answers_of(folder: Path) -> dict[str, Any]:
    """Return the tokens of each id's answer; an id must be there once."""
    answers = answers_in(folder)
    found = {answer["id"]: answer["tokens"] for answer in answers}
    assert len(found) == len(answers), "an id is answered twice"
    return found


def environment(folder: Path) -> dict[str, str]:
    """Return the environment: an engine has one processor, and one that is replaced finds its compiled programs."""
    one = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "NPROC": "1", "OMP_NUM_THREADS": "1"}
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/programs", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**os.environ, **one, **cache, "JAX_PLATFORMS": "cpu"}


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
