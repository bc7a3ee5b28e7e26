"""Folder of a run: names of its files, checks before it is written, and its lock."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from phi4mm_jax.errors import InputError
from phi4mm_jax.training.hosts import gather, is_primary_process
from phi4mm_jax.utils.files import check_parent, make_folder, try_lock

CHECKPOINTS, RECIPE = "checkpoints", "recipe.yaml"  # in a run's folder


def check_folder(folder: Path) -> None:
    """Raise InputError if a run could not write its folder; called before the weights are read."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise InputError(f"output is {folder}, and {there} is a file; give a folder")
    check_parent(folder)
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"output is {folder}, and {there} may not be written to; give another one")


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it is not there. The first host locks for all of its run.

    Raises:
        InputError: on all hosts, another process holds the lock; on one, the folder cannot be written to.
    """
    try:
        make_folder(folder)
        lock = (folder / ".lock").open("a") if is_primary_process() else nullcontext()
    except OSError as error:
        raise InputError(
            f"output is {folder}, which cannot be written to ({error.strerror}); give another one"
        ) from error
    with lock as file:
        locked, *_ = gather(file is not None and try_lock(file))
        if not locked:
            raise InputError(f"{folder}: another process is training here; wait for it, or give another output")
        yield
