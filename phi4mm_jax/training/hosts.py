"""Hosts of one run: how they find each other, and what they do together.

A process a host. All take the same steps; the first one alone writes the run's files. `host_watch` ends them together.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from phi4mm_jax.errors import InputError
from phi4mm_jax.training.host_watch import HostWatch, coordinator_client, end_process
from phi4mm_jax.training.rendezvous import Meeting, meet

_HEARTBEAT = 20  # seconds without one, after which a host counts as dead
_CONNECT = 300  # seconds for all hosts to start
_REGISTER = 60  # seconds for jax to connect them then
_VISIBLE = 10.0  # seconds for a new file to be seen by the other hosts


class Coordination(NamedTuple):
    """Way in which processes find each other; None where jax finds it out by the environment."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def add_host_options(parser: argparse.ArgumentParser) -> None:
    """Give a program the options --coordinator, --num-processes and --process-id, which `coordination_of` reads."""
    group = parser.add_argument_group("several hosts", "found out on TPU VMs, GKE and SLURM; elsewhere give all three")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of the first host, with a free port")
    group.add_argument("--num-processes", metavar="N", type=int, help="how many hosts there are")
    group.add_argument("--process-id", metavar="I", type=int, help="which of them this one is: 0 to N-1")


def coordination_of(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Coordination | None:
    """Return how this program's hosts find each other; None for a program on one host.

    Raises:
        InputError: some options are given and others not, or one is out of range.
    """
    given = Coordination(arguments.coordinator, arguments.num_processes, arguments.process_id)
    if all(x is None for x in given):
        return Coordination() if _has_several_hosts(environment) else None
    names = ("--coordinator", "--num-processes", "--process-id")
    if missing := [name for name, x in zip(names, given, strict=True) if x is None]:
        raise InputError(f"{', '.join(missing)} is missing; give all of {', '.join(names)}, or none")
    coordinator, num_processes, process_id = given
    assert coordinator is not None
    assert num_processes is not None
    assert process_id is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"--coordinator is {coordinator!r:.80}; expected HOST:PORT, such as 10.0.0.2:8476")
    if num_processes < 1:
        raise InputError(f"--num-processes is {num_processes}; expected a positive whole number")
    if not 0 <= process_id < num_processes:
        raise InputError(f"--process-id is {process_id} of {num_processes}; expected 0 to {num_processes - 1}")
    return given


def _has_several_hosts(environment: Mapping[str, str]) -> bool:
    """Return whether the environment is of a cluster that jax knows, with more than one process."""
    if environment.get("SLURM_PROCID") is not None and environment.get("SLURM_STEP_NODELIST") is not None:
        return int(environment.get("SLURM_NTASKS", "1")) > 1
    if environment.get("JAX_PLATFORMS", "tpu").partition(",")[0] != "tpu":
        return False
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if workers is not None:  # GKE
        return "," in workers or int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1
    is_tpu_vm = importlib.util.find_spec("libtpu") is not None and any(
        Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0")
    )
    return is_tpu_vm and environment.get("TPU_SKIP_MDS_QUERY") is None and _tpu_vm_workers() > 1


def _tpu_vm_workers() -> int:
    """Return how many hosts a TPU VM's slices have, by its metadata; 1 where there are none."""
    try:
        workers = len(_metadata("worker-network-endpoints").split(","))
        slices = re.search(r"MEGASCALE_NUM_SLICES:\s*'?(\d+)", _metadata("tpu-env"))
        return workers * (int(slices[1]) if slices else 1)
    except OSError:
        return 1


def _metadata(key: str) -> str:
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")  # as jax has it
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5) as reply:
        return reply.read().decode()


@contextmanager
def connected_hosts(coordination: Coordination | None) -> Iterator[None]:
    """Connect the hosts for the body of `with`; where one fails, all end with its error.

    Of several hosts, an error in the body ends the process here: Python's own end would wait for the others.

    Raises:
        InputError: the hosts do not find each other.
    """
    if coordination is None:
        yield
        return
    try:
        if (meeting := _meeting_of(coordination)) is not None:
            meet(meeting, _CONNECT)
        with _own_timeout():
            jax.distributed.initialize(
                *coordination, initialization_timeout=2 * _REGISTER, heartbeat_timeout_seconds=_HEARTBEAT,
                cluster_detection_method=None if coordination.coordinator is None else "deactivate",
            )  # fmt: skip
    except InputError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"the hosts of this run do not find each other ({str(error)[:300]}); start the same command on each of "
            "them, or give --coordinator, --num-processes and --process-id"
        ) from error
    watch = HostWatch() if jax.process_count() > 1 else None
    try:
        yield
        if watch is not None:
            coordinator_client().wait_at_barrier("phi4mm/end", 600_000)
    except BaseException as error:
        if watch is None:
            raise
        watch.fail(error)
    if watch is not None:
        watch.done.set()
    jax.distributed.shutdown()


def _meeting_of(coordination: Coordination) -> Meeting | None:
    """Return where the hosts meet, which jax finds out where it is not given; None where it does not."""
    address, num_processes, process_id = coordination
    if address is None:
        from jax._src.clusters import ClusterEnv  # no public way leads to what `initialize` finds out

        found = os.environ.get("JAX_COORDINATOR_ADDRESS")
        address, num_processes, process_id, _ = ClusterEnv.auto_detect_unset_distributed_params(
            found, None, None, None, None, _CONNECT
        )
    if address is None or num_processes is None or process_id is None:
        return None  # as `initialize` will say
    return Meeting(address, num_processes, process_id)


@contextmanager
def _own_timeout() -> Iterator[None]:
    """End the process where jax does not connect the hosts in time, before jax itself aborts it."""

    def end() -> None:
        print(
            f"error: the hosts were all here, but jax has not connected them within {_REGISTER} seconds; has one "
            "ended meanwhile? Rerun the same command on all hosts",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        end_process(2)

    timer = threading.Timer(_REGISTER, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_primary_process() -> bool:
    """Return whether this process is the first host's, which writes the run's files and prints."""
    return jax.process_index() == 0


def print_once(*lines: str) -> None:
    """Print lines for the user, on the first host alone."""
    if is_primary_process():
        for line in lines:
            print(line, flush=True)


def check_same_on_all_hosts(what: str, value: Any) -> None:
    """Raise InputError, on all hosts, if a value is not the same on each of them.

    Args:
        value: plain values for JSON.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()[:4]
    found = _gather(np.frombuffer(digest, np.uint32))[:, 0]
    if different := [str(i) for i, x in enumerate(found) if x != found[0]]:
        raise InputError(
            f"{what} differ between the hosts (those of {', '.join(different)} from those of 0); give the same command "
            "and the same files to all"
        )


def check_shared_filesystem(folder: Path) -> None:
    """Raise InputError, on all hosts, if one of them does not see what the first writes into a folder.

    The folder need not be there yet: then the nearest one above it is looked at.
    """
    if jax.process_count() == 1:
        return
    client, key = coordinator_client(), "phi4mm/shared"
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    if is_primary_process():
        token = there / f".shared-{uuid.uuid4().hex}"
        token.write_text(token.name)
        client.key_value_set(key, token.name, allow_overwrite=True)
    else:
        token = there / client.blocking_key_value_get(key, 60_000)
    end = time.monotonic() + _VISIBLE
    while not (sees := _reads(token)) and time.monotonic() < end:
        time.sleep(0.2)
    seen = _gather(np.asarray([sees]))[:, 0]
    if is_primary_process():
        token.unlink(missing_ok=True)
    if not seen.all():
        blind = ", ".join(str(i) for i, x in enumerate(seen) if not x)
        raise InputError(
            f"{folder}: is not the same folder on all hosts (host {blind} does not see what host 0 writes there); give "
            "one that all share, such as a mounted bucket or NFS"
        )


def _reads(token: Path) -> bool:
    try:
        return token.read_text() == token.name
    except OSError:
        return False


def gather(value: Any) -> list[Any]:
    """Return a value of each host, on all of them.

    Args:
        value: plain values for JSON.
    """
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = _gather(np.asarray([own.size]))[:, 0]
    found = _gather(np.pad(own, (0, int(sizes.max()) - own.size)))
    return [json.loads(x[:size].tobytes()) for x, size in zip(found, sizes, strict=True)]


def deal_out(items: Sequence[Any]) -> Sequence[Any]:
    """Return this host's share of items: they are assigned round-robin."""
    return items[jax.process_index() :: jax.process_count()]


def collect(share: Sequence[Any]) -> list[Any]:
    """Return what has become of all items on all hosts, in their order before `deal_out`; plain values for JSON."""
    shares = gather(list(share))
    found: list[Any] = [None] * sum(map(len, shares))
    for host, values in enumerate(shares):
        found[host :: len(shares)] = values
    return found


def _gather(x: np.ndarray) -> np.ndarray:
    """Return an array of all hosts, stacked."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x))
