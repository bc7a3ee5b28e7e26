"""Hosts of one run: how they are found out, and that they agree, fail together, train and evaluate as one."""

import argparse
import json
import signal
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.paths import FIXTURES, TINY

from phi4mm_jax import InputError
from phi4mm_jax.engine import Engine, EngineConfig
from phi4mm_jax.evaluation.answers import ask
from phi4mm_jax.evaluation.items import read_items
from phi4mm_jax.testing.host_runs import free_port, host_options, outcomes, start_hosts, write_recipe
from phi4mm_jax.training.checkpointing import Checkpoints
from phi4mm_jax.training.hosts import Coordination, add_host_options, coordination_of
from phi4mm_jax.training.metrics_log import read_log
from phi4mm_jax.training.preemption import PreemptionSignal
from phi4mm_jax.training.recipe import load_recipe
from phi4mm_jax.training.run_folder import CHECKPOINTS
from train import sft

ROOT = Path(__file__).parents[2]
METRIC = ["evaluation.metric=cer", "evaluation.samples=5", "evaluation.max_new_tokens=4"]  # one host answers 3


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_host_options(parser)
    return parser.parse_args(options)


def test_options_name_the_hosts():
    options = parsed("--coordinator", "10.0.0.2:8476", "--num-processes", "4", "--process-id", "3")
    assert coordination_of(options, {}) == Coordination("10.0.0.2:8476", 4, 3)


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a1", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # a batch script, outside srun
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1,t-2,t-3", "TPU_WORKER_ID": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t-0", "TPU_WORKER_ID": "0"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t-0", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1", "JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_the_environment_names_the_hosts(environment, several):
    assert coordination_of(parsed(), environment) == (Coordination() if several else None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "a:1"], "--num-processes, --process-id is missing"),
        (["--coordinator", "a", "--num-processes", "2", "--process-id", "0"], "--coordinator is 'a'; expected HOST"),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id is 2 of 2; expected 0 to 1",
        ),
        (["--coordinator", "a:1", "--num-processes", "0", "--process-id", "0"], "--num-processes is 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        coordination_of(parsed(*options), {})


HOSTS = """
    import os, signal, sys, time
    from pathlib import Path
    from phi4mm_jax import InputError
    from phi4mm_jax.training.hosts import (
        Coordination, check_same_on_all_hosts, check_shared_filesystem, connected_hosts, print_once,
    )
    me, folder = int(sys.argv[2]), Path(sys.argv[3])
    with connected_hosts(Coordination(sys.argv[1], 2, me)):
        check_shared_filesystem(folder)
        check_same_on_all_hosts("the recipes", {"seed": 0})
        print_once("both are here")
        if sys.argv[4] == "kill" and me == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[4] == "fail" and me == 1:
            raise InputError("a bad sample")
        check_same_on_all_hosts("the data", {"files": me if sys.argv[4] == "differ" else 0})
    """


def meet(tmp_path, scenario: str, folders: tuple[Path, Path]) -> list[tuple[int, str, str]]:
    script = tmp_path / "hosts.py"
    script.write_text(textwrap.dedent(HOSTS))
    return outcomes(start_hosts(lambda address, host: [script, address, host, folders[host], scenario]))


@pytest.mark.subprocess
def test_a_host_that_fails_ends_the_others_with_its_error(tmp_path):
    (status, out, error), (other_status, _, other) = meet(tmp_path, "fail", (tmp_path / "run",) * 2)
    assert (status, other_status) == (2, 2)
    assert "error: host 1 has failed: a bad sample" in error.splitlines()
    assert "error: a bad sample" in other.splitlines()
    assert out == "both are here\n"
    assert not list(tmp_path.glob(".shared*"))


@pytest.mark.subprocess
def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    """Each host has a disk of its own."""
    disks = tuple(tmp_path / name for name in ("one", "other"))
    for disk in disks:
        disk.mkdir()
    for host, (status, out, error) in enumerate(meet(tmp_path, "", disks)):
        assert (status, out) == (2, "")
        assert f"error: {disks[host]}: is not the same folder on all hosts (host 1 does not see" in error
    assert [list(disk.iterdir()) for disk in disks] == [[], []]


@pytest.mark.slow
@pytest.mark.subprocess
def test_other_files_on_a_host_are_refused(tmp_path):
    for status, _, error in meet(tmp_path, "differ", (tmp_path / "run",) * 2):
        assert status == 2
        assert "the data differ between the hosts (those of 1 from those of 0)" in error


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_host_that_is_killed_ends_the_others(tmp_path):
    (status, out, error), (other_status, *_) = meet(tmp_path, "kill", (tmp_path / "run",) * 2)
    assert (status, other_status) == (2, -signal.SIGKILL)
    told, _, remedy = error.splitlines()[-1].partition("? ")
    assert told == "error: host 1 has gone: was it killed, or is it cut off"
    assert remedy.startswith("Rerun the same command on all hosts: it resumes")
    assert out == "both are here\n"


@pytest.mark.slow
@pytest.mark.subprocess
def test_two_hosts_train_as_one(tmp_path):
    """Their run is then resumed by one process with two devices; figures and update are those of one process."""
    recipe = write_recipe(tmp_path, TINY)

    def command(address, host):
        return ["-m", "train.sft", recipe, "data.steps=2", *METRIC, *host_options(address, host)]

    for status, out, error in outcomes(start_hosts(command)):
        assert status == 0, error
        assert "trained" in out or not out
    assert sft.train(load_recipe(recipe, METRIC)) == 0
    assert sft.train(load_recipe(recipe, [f"output={tmp_path / 'one'}", *METRIC])) == 0
    runs = [tmp_path / name for name in ("run", "one")]
    names = ("loss", "evaluation_loss", "evaluation_cer")
    both = [[line[name] for line in read_log(run) for name in names if name in line] for run in runs]
    assert len(both[0]) == 8
    np.testing.assert_allclose(*both, rtol=1e-5)
    resumed, whole = (flatten_dict(Checkpoints(run / CHECKPOINTS, None, read_only=True).trained(4)) for run in runs)
    before = flatten_dict(jax.tree.map(np.asarray, sft.load(TINY, "float32", scan=True).variables))
    for path, value in whole.items():
        update, other = (np.asarray(x) - before[path] for x in (value, resumed[path]))
        assert np.linalg.norm(update - other) <= 5e-3 * np.linalg.norm(update) > 0, path


@pytest.mark.slow
@pytest.mark.subprocess
def test_two_processes_of_slurm_evaluate_as_one(tiny, tmp_path):
    """As within srun. The first one writes the report, in which is each answer of one engine."""
    manifest, port = tmp_path / "items.jsonl", free_port()
    manifest.write_text("".join((FIXTURES / "held" / "text.jsonl").read_text().splitlines(True)[:5]))
    sizes = ["--max-new-tokens", "4", "--slots", "2", "--cache-tokens", "2048"]
    options = ["--model", TINY, "--output", tmp_path / "out", "--task", "exact", "--dtype", "float32", *sizes]

    def environment(host: int) -> dict[str, str]:
        return {
            "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": f"{host}",
            "SLURM_LOCALID": f"{host}", "JAX_COORDINATOR_PORT": f"{port}",
        }  # fmt: skip

    ends = outcomes(start_hosts(lambda address, host: ["-m", "infer.evaluate", manifest, *options], environment))
    assert [status for status, *_ in ends] == [0, 0], ends
    assert [bool(out) for _, out, _ in ends] == [True, False]
    found = [json.loads(line)["answer"] for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    answers = ask(tiny.engine(EngineConfig(slots=2, cache_tokens=2048)), read_items(manifest), 4)
    assert answers is not None
    assert found == [answer.text for answer in answers]
    assert len(set(found)) > 2


def test_an_engine_of_several_hosts_is_refused(tiny):
    elsewhere = SimpleNamespace(sharding=SimpleNamespace(is_fully_addressable=False))
    with pytest.raises(InputError, match=r"give a mesh of jax\.local_devices"):
        Engine(tiny.programs, {"params": elsewhere}, tiny.processor, EngineConfig())


def test_a_run_may_be_outside_the_main_thread():
    """As Ray Train has it, where Python lets no handler of signals be set."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def run() -> bool:
        with PreemptionSignal() as preemption:
            return preemption.should_stop(1)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result() is False
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
