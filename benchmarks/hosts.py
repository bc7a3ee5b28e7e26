"""Hosts that are killed, preempted, slow or started at once: python -m benchmarks.hosts [--starts 20] [--kills 10].

Two processes of this machine train the small model as the hosts of one run, on CPUs. Counted are:

    starts   both begin at the same moment, in a new folder: it has one recipe, each step's metrics once, one record
    pairs    two runs that know nothing of each other begin at the same moment in one folder: one trains, one is refused
    kills    one of the two is killed at a random moment: the other ends within 30 s with an error of one line that
             names the cause, nothing is half-written, and the same command ends in the state of a run left alone
    stops    one of them, or both, get SIGTERM at a random moment: both save the same step, and resume likewise
    slow     one loads each batch half a second late, and one batch 25 s: the numbers are the same
    moves    the first half is trained by two hosts and the second by one with two devices, or the other way round: the
             losses are the same within 1e-5
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks.paths import SMALL_MODEL
from phi4mm_jax.testing.host_runs import (
    free_port,
    host_options,
    outcomes,
    start_hosts,
    tensorboard_steps,
    write_recipe,
)
from phi4mm_jax.training.checkpointing import Checkpoints
from phi4mm_jax.training.metrics_log import read_log
from phi4mm_jax.training.preemption import PREEMPTED_EXIT_CODE
from phi4mm_jax.training.recipe import load_recipe
from phi4mm_jax.training.run_folder import CHECKPOINTS, RECIPE

STEPS, PATIENCE = 12, 30.0  # seconds in which a run must end after its cause
SLOW = """
import sys, time
from phi4mm_jax.data.pipeline import TrainingData
count, load = 0, TrainingData.__next__
def late(self):
    global count
    count += 1
    time.sleep(25 if count == 5 else 0.5)
    return load(self)
if "1" == sys.argv[-1]:
    TrainingData.__next__ = late
from train.sft import main
sys.exit(main())
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"starts": 20, "pairs": 5, "kills": 10, "stops": 6, "slow": 1, "moves": 2}
    for name, count in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=count, help="times (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hosts-") as name:
        folder = Path(name)
        recipe = write_recipe(folder, SMALL_MODEL, steps=STEPS)
        expected = None
        if arguments.kills or arguments.stops or arguments.slow:
            check_ends(train(recipe, folder / "alone"), [0, 0])
            expected = result(folder / "alone")
        scenarios: dict[str, Callable[[Path, random.Random], str]] = {
            "starts": lambda run, draw: start(recipe, run),
            "pairs": lambda run, draw: pair(recipe, run),
            "kills": lambda run, draw: kill(recipe, run, draw, expected),
            "stops": lambda run, draw: stop(recipe, run, draw, expected),
            "slow": lambda run, draw: slow(recipe, run, expected),
            "moves": lambda run, draw: move(recipe, run),
        }
        for name, scenario in scenarios.items():
            for i in range(getattr(arguments, name)):
                began = time.monotonic()
                outcome = scenario(folder / f"{name}-{i}", random.Random(f"{arguments.seed} {name} {i}"))
                print(f"{name} {i + 1}: {outcome} ({time.monotonic() - began:.0f} s in all)", flush=True)
    return 0


def train(recipe: Path, run: Path, *more: str) -> list[subprocess.Popen[str]]:
    return start_hosts(lambda address, host: [*command_of(recipe, run, *more), *host_options(address, host)])


def command_of(recipe: Path, run: Path, *more: str) -> list[object]:
    return ["-m", "train.sft", recipe, f"output={run}", *more]


def start(recipe: Path, run: Path) -> str:
    """Start two processes that have imported everything already: they come to the folder at the same moment."""
    os.environ |= {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    forks, address = multiprocessing.get_context("forkserver"), f"localhost:{free_port()}"
    forks.set_forkserver_preload(["train.sft"])
    logs = [run.with_name(f"{run.name}-{host}.log") for host in range(2)]
    commands = [[*command_of(recipe, run, "data.steps=2")[1:], *host_options(address, host)] for host in range(2)]
    hosts = [forks.Process(target=run_here, args=given) for given in zip(commands, logs, strict=True)]
    for host in hosts:
        host.start()
    end = time.monotonic() + 120
    for host in hosts:
        host.join(max(0, end - time.monotonic()))
    codes = [host.exitcode for host in hosts]
    for host in hosts:
        host.kill()
    assert codes == [0, 0], (codes, [log.read_text() for log in logs])
    check_whole(run, 2)
    return "one recipe, one log"


def run_here(command: list[object], log: Path) -> None:
    """Be a program of the package, in a process of its own."""
    from train.sft import main

    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [str(word) for word in command]
    sys.exit(main())


def pair(recipe: Path, run: Path) -> str:
    """Start two runs of one host each."""
    runs = start_hosts(lambda address, host: command_of(recipe, run, "data.steps=2", "mesh=fsdp=1"))
    ends = sorted(outcomes(runs))
    assert [status for status, *_ in ends] == [0, 2], ends
    assert "another process is training here" in ends[1][2], ends
    check_whole(run, 2)
    return "one trained, one was refused"


def kill(recipe: Path, run: Path, draw: random.Random, expected: Any) -> str:
    hosts = train(recipe, run)
    moment = wait_for_moment(hosts, run, draw)
    victim = draw.randrange(2)
    hosts[victim].kill()
    killed = time.monotonic()
    (_, _, error) = outcomes([hosts[1 - victim]], PATIENCE + 5)[0]
    seconds = time.monotonic() - killed
    hosts[victim].communicate()
    status, lines = hosts[1 - victim].returncode, error.strip().splitlines()
    assert seconds < PATIENCE, seconds
    outcome = f"host {victim} killed {moment}; the other ended {seconds:.1f} s later, status {status}: {lines[-1]:.120}"
    print(outcome, f"[{len(lines)} lines]", flush=True)
    assert status == 2, error
    assert f"error: host {victim}" in lines[-1], error
    check_whole(run)
    check_ends(train(recipe, run), [0, 0])
    check_whole(run, STEPS)
    check_same(result(run), expected)
    return "resumed bitwise"


def stop(recipe: Path, run: Path, draw: random.Random, expected: Any) -> str:
    hosts = train(recipe, run)
    moment = wait_for_moment(hosts, run, draw)
    which = draw.choice(([0], [1], [0, 1]))
    for host in which:
        hosts[host].send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    ends = outcomes(hosts, PATIENCE)
    seconds = time.monotonic() - signalled
    assert [status for status, *_ in ends] in ([PREEMPTED_EXIT_CODE] * 2, [0, 0]), (
        ends
    )  # it may have been the last step
    check_whole(run)
    saved = last_step(run)
    check_ends(train(recipe, run), [0, 0])
    check_whole(run, STEPS)
    check_same(result(run), expected)
    return f"SIGTERM to {which} {moment}, ended {seconds:.1f} s later, saved after step {saved}, resumed bitwise"


def slow(recipe: Path, run: Path, expected: Any) -> str:
    hosts = start_hosts(lambda address, host: ["-c", SLOW, recipe, f"output={run}", *host_options(address, host)])
    check_ends(hosts, [0, 0])
    check_same(result(run), expected)
    return "the same numbers"


def move(recipe: Path, run: Path) -> str:
    def train_alone(*more: str) -> list[subprocess.Popen[str]]:
        devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        return start_hosts(lambda address, host: command_of(recipe, run, *more), lambda host: devices, 1)

    ways = [lambda *more: train(recipe, run, *more), train_alone]
    if run.name.endswith(("1", "3", "5", "7", "9")):
        ways.reverse()
    constant = "optimizer.schedule=constant"  # or else the decay would be that of half the steps
    check_ends(train(recipe, whole := run.with_name(f"{run.name}-whole"), constant), [0, 0])
    half = ways[0](constant, f"data.steps={STEPS // 2}")
    check_ends(half, [0] * len(half))
    rest = ways[1](constant)
    check_ends(rest, [0] * len(rest))
    check_whole(run, STEPS)
    losses = [[line["loss"] for line in found[0] if "loss" in line] for found in (result(run), result(whole))]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    return f"{len(half)} processes, then {len(rest)}: the losses of the one run"


def wait_for_moment(hosts: list[subprocess.Popen[str]], run: Path, draw: random.Random) -> str:
    """Wait for a random step of a run, and a little more."""
    step, more = draw.randrange(STEPS), draw.random() / 2
    end = time.monotonic() + 300
    while not (logged := len(steps_logged(run)) >= step) or not (run / RECIPE).exists():
        assert all(host.poll() is None for host in hosts), outcomes(hosts)
        assert time.monotonic() < end, f"no step {step}"
        time.sleep(0.005)
    time.sleep(more)
    saving = [path.name for path in (run / CHECKPOINTS).glob("*orbax-checkpoint-tmp*")] if logged else []
    return f"{more:.2f} s after step {step}" + (" while saving" if saving else "")


def steps_logged(run: Path) -> list[int]:
    return [line["step"] for line in read_log(run) if "loss" in line]


def check_ends(hosts: list[subprocess.Popen[str]], wanted: list[int]) -> None:
    ends = outcomes(hosts)
    assert [status for status, *_ in ends] == wanted, ends


def check_whole(run: Path, steps: int | None = None) -> None:
    """Check that all files of a run can be read: checkpoints, recipe, metrics and TensorBoard's.

    Args:
        steps: of the run, if it has ended.
    """
    load_recipe(run / RECIPE)
    logged = steps_logged(run)
    assert logged == list(range(1, len(logged) + 1)), logged
    with closing(Checkpoints(run / CHECKPOINTS, None, read_only=True)) as checkpoints:
        for step in checkpoints.steps:
            checkpoints.trained(step)
        assert steps is None or checkpoints.last == steps
    events = {path: tensorboard_steps(path) for path in (run / "tensorboard").glob("events*")}
    if steps is not None:
        assert sorted({step for found in events.values() for step in found}) == logged, events
        assert len(logged) == steps, logged
        assert (run / "report.md").read_text()
        left = [path for path in run.rglob("*") if "incomplete" in path.name or "orbax-checkpoint-tmp" in path.name]
        assert not left, left


def last_step(run: Path) -> int | None:
    with closing(Checkpoints(run / CHECKPOINTS, None, read_only=True)) as checkpoints:
        return checkpoints.last


def result(run: Path) -> tuple[list[Any], dict[Any, Any]]:
    """Return all losses of a run, and what it has trained."""
    names = ("step", "loss", "gradient_norm", "evaluation_loss")
    losses = [{name: line[name] for name in names if name in line} for line in read_log(run)]
    with closing(Checkpoints(run / CHECKPOINTS, None, read_only=True)) as checkpoints:
        return losses, dict(flatten_dict(checkpoints.trained(STEPS)))


def check_same(found: Any, expected: Any) -> None:
    assert json.dumps(found[0]) == json.dumps(expected[0]), (found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for path, value in expected[1].items():
        assert np.array_equal(np.asarray(found[1][path]), np.asarray(value)), path


if __name__ == "__main__":
    sys.exit(main())
