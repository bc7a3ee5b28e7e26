"""The chips of one Ray actor: libtpu takes all of a host's, and waits for the slice's other hosts, unless told less."""

import os
from collections.abc import MutableMapping

from phi4mm_jax.errors import InputError

_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}  # of so many chips of one host
_PORT = 8476  # of libtpu, for its host's first chip


def restrict_to_chips(chips: list[int], environment: MutableMapping[str, str] | None = None) -> None:
    """Make this process a slice of its own, of some chips of its host. Before jax looks for devices.

    Ray sets TPU_VISIBLE_CHIPS and the bounds of one or two chips only. An engine that has a whole host of a larger
    slice would else wait for the other hosts, and two processes would wait for each other's lock.

    Args:
        environment: to change; by default this process's.

    Raises:
        InputError: libtpu knows no slice of so many chips.
    """
    environment = os.environ if environment is None else environment
    if len(chips) not in _BOUNDS:
        raise InputError(f"mesh has {len(chips)} TPU chips for an engine; give one of {', '.join(map(str, _BOUNDS))}")
    port = str(_PORT + min(chips))
    environment.update(
        TPU_VISIBLE_CHIPS=",".join(map(str, sorted(chips))),
        TPU_CHIPS_PER_PROCESS_BOUNDS=_BOUNDS[len(chips)],
        TPU_PROCESS_BOUNDS="1,1,1",
        TPU_PROCESS_ADDRESSES=f"localhost:{port}",
        TPU_PROCESS_PORT=port,
        CLOUD_TPU_TASK_ID="0",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # else bounds of four chips are taken for a whole host, which is locked
    )
    for former in ("TPU_CHIPS_PER_HOST_BOUNDS", "TPU_HOST_BOUNDS", "TPU_VISIBLE_DEVICES"):  # other names of the same
        environment.pop(former, None)


def restrict_to_processors(count: int, environment: MutableMapping[str, str] | None = None) -> None:
    """Have XLA use so many threads on the host. Before jax looks for devices."""
    (os.environ if environment is None else environment)["NPROC"] = str(count)
