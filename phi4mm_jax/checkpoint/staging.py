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
_MARKER = ".written-by-phi4mm-jax"  # in a folder that may be removed


@contextlib.contextmanager
def staged(destination: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Yields a folder beside the destination, which takes the destination's name when all went well.

    What an interrupted run has left there is removed, and said. Enter it before any work: from then on the name is
    this process's, and a destination that cannot be written is known.

    Args:
        say: called with what the user should know.

    Raises:
        CheckpointError: the destination exists, is being written by another process, or cannot be written.
    """
    destination = destination.absolute()
    new_parents: list[Path] = []
    try:
        _check_free(destination)
        aside = aside_of(destination)
        new_parents = [path for path in destination.parents if not path.exists()]
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _held(aside, destination):
            _check_free(destination)  # it may have been made before the folder was held
            if _clear(aside):
                say(f"An earlier run was interrupted before {destination} was whole; starting again.")
            try:
                (aside / _MARKER).touch()
                yield aside
                (aside / _MARKER).unlink()
                _flush(aside)
                os.rename(aside, destination)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
    except OSError as error:
        cause = "the disk is full" if error.errno in _FULL else str(error)
        raise CheckpointError(f"{destination}: cannot be written, nothing was left there ({cause})") from error
    finally:
        for path in new_parents:
            with contextlib.suppress(OSError):
                path.rmdir()  # where nothing came of it


def aside_of(destination: Path) -> Path:
    """The folder that becomes the destination."""
    return destination.with_name(f".{destination.name}.incomplete")


def check_room(folder: Path, size: int) -> None:
    """Whether a folder can take so many bytes more.

    Raises:
        CheckpointError: its disk has not so many free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CheckpointError(f"{folder.parent}: needs {size:,} bytes, but only {free:,} are free there; make room")


def _flush(folder: Path) -> None:
    """Files onto the disk: should the machine fail, the folder's new name must not outlive what is in it."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _check_free(destination: Path) -> None:
    if destination.is_symlink():
        raise CheckpointError(f"{destination}: is a symbolic link; give the folder itself")
    if destination.name == "..":
        raise CheckpointError(f"{destination}: ends in '..'; give the folder's own name")
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise CheckpointError(f"{destination}: exists already; remove it, or give another destination")


def _clear(aside: Path) -> bool:
    """Remove what is in a folder that an interrupted run left; whether there was anything. The marker goes last, so
    that an interruption here leaves a folder that is known as well."""
    found = {path.name: path for path in aside.iterdir()}
    if found and found.pop(_MARKER, None) is None:
        raise CheckpointError(f"{aside}: is in the way, and no interrupted run has left it; move it, or remove it")
    for path in found.values():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return bool(found)


@contextlib.contextmanager
def _held(folder: Path, destination: Path) -> Iterator[None]:
    """Makes the folder, or takes over what is there, and holds it against other processes.

    The lock ends with its holder, however that ends. It is on the folder, which its holder renames or removes: one that
    is no longer there when it is locked was another process's.
    """
    descriptor = None
    try:
        try:
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.fstat(descriptor), os.lstat(folder))
        except (BlockingIOError, FileNotFoundError):
            is_there = False
        if not is_there:
            raise CheckpointError(f"{destination}: another process is writing it; wait for it, or stop it")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if it is empty: nothing was done
    finally:
        if descriptor is not None:
            os.close(descriptor)
