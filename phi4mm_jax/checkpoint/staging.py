"""A folder that is whole or not there."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from phi4mm_jax.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def staged(destination: Path, size: int, say: Callable[[str], None]) -> Iterator[Path]:
    """Yields a folder beside the destination, which takes the destination's name when all went well.

    What an interrupted run has left there is removed, and said.

    Args:
        size: how many bytes will be written.
        say: called with what the user should know.

    Raises:
        CheckpointError: the destination exists, is being written by another process, or has no room.
    """
    destination = destination.absolute()
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise CheckpointError(f"{destination}: exists already; remove it, or give another destination")
    aside = destination.with_name(f".{destination.name}.incomplete")
    if aside.exists():
        with _locked(aside, destination):
            shutil.rmtree(aside)
        say(f"An earlier run was interrupted before {destination} was whole; starting again.")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(destination.parent).free
        if free < size:
            raise CheckpointError(
                f"{destination}: needs {size / 1e9:.1f} GB, but {destination.parent} has only {free / 1e9:.1f} GB free"
            )
        aside.mkdir()
        with _locked(aside, destination):
            try:
                yield aside
                os.rename(aside, destination)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
    except OSError as error:
        cause = "the disk is full" if error.errno in _FULL else str(error)
        raise CheckpointError(f"{destination}: cannot be written, nothing was left there ({cause})") from error


@contextlib.contextmanager
def _locked(folder: Path, destination: Path) -> Iterator[None]:
    """Holds the folder against other processes; the lock ends with its holder, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CheckpointError(f"{destination}: another process is writing it; wait for it, or stop it") from None
    finally:
        os.close(descriptor)
