"""Folder of a run: names of its files, checks before it is written, and its lock."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from phi4mm_jax.errors import InputError
from phi4mm_jax.training.hosts import gather, is_primary_process
from phi4mm_jax.utils.files import check_parent, check_writable, make_folder, try_lock, write_remedy

CHECKPOINTS, RECIPE, BASE = "checkpoints", "recipe.yaml", "base.json"  # in a run's folder


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run has saved a checkpoint; one that ended before may be begun anew with other settings."""
    return any(path.name.isdigit() for path in (folder / CHECKPOINTS).glob("*"))


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Raise InputError where the body cannot write into a run's folder."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or path}: cannot be written ({error.strerror or error}); {write_remedy(error)}, then "
            "rerun the same command to resume from the last checkpoint"
        ) from error


def check_folder(folder: Path) -> None:
    """Raise InputError if a run could not write its folder; called before the weights are read."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise InputError(f"output is {folder}, and {there} is a file; give a folder")
    check_parent(folder)
    try:
        check_writable(there)
    except OSError as error:
        cause = f"output is {folder}, and {there} cannot be written to ({error.strerror})"
        raise InputError(f"{cause}; give another one") from error


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it is not there. The first host locks for all of its run.

    Raises:
        InputError: on all hosts, another process holds the lock.
    """
    make_folder(folder)
    with (folder / ".lock").open("a") if is_primary_process() else nullcontext() as file:
        locked, *_ = gather(file is not None and try_lock(file))
        if not locked:
            raise InputError(f"{folder}: another process is training here; wait for it, or give another output")
        yield
