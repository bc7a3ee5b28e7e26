"""Staged folders: a folder appears whole or not at all."""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from phi4mm_jax.errors import CheckpointError, InputError
from phi4mm_jax.utils.files import check_parent, incomplete_path, try_lock

_log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MARKER = ".written-by-phi4mm-jax"  # in a folder that may be removed


@contextlib.contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """Yield a folder beside the destination, which takes the destination's name when all went well.

    What an interrupted run has left there is removed, and logged. Enter it before any work: from then on the name is
    this process's, and a destination that cannot be written is known.

    A marker in the folder tells the next run that it may be removed. It stays until everything is on the disk under the
    destination's name, so that a kill at any point leaves nothing that is in the way.

    Raises:
        CheckpointError: the destination exists, is being written by another process, or cannot be written.
    """
    destination = destination.absolute()
    try:
        check_parent(destination)
    except InputError as error:
        raise CheckpointError(str(error)) from error
    new_parents: list[Path] = []
    renamed = False
    try:
        _check_free(destination)
        aside = incomplete_path(destination)
        new_parents = [path for path in destination.parents if not path.exists()]
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _held(aside, destination):
            _check_free(destination)  # it may have been made before the folder was held
            leftover = _clear(aside)
            try:
                (aside / _MARKER).touch()
                if _reclaim(destination, aside) or leftover:
                    _log.warning("An earlier run was interrupted before %s was whole; starting again.", destination)
                yield aside
                _flush(aside)
                (aside / _MARKER).touch()  # no older than any file: see `_is_unfinished`
                os.rename(aside, destination)
                renamed = True
                for parent in [destination.parent, *(path.parent for path in new_parents)]:
                    _sync(parent)
                (destination / _MARKER).unlink()
                _sync(destination)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    _log.warning("Interrupted; removing the unfinished files of %s", destination)
                with contextlib.suppress(OSError):
                    if renamed:
                        (destination / _MARKER).touch()
                        os.rename(destination, aside)
                    _clear(aside)
                    (aside / _MARKER).unlink()
                raise
    except OSError as error:
        cause = "the disk is full" if error.errno in _FULL else str(error)
        raise CheckpointError(f"{destination}: cannot be written, nothing was left there ({cause})") from error
    finally:
        for path in new_parents:
            with contextlib.suppress(OSError):
                path.rmdir()  # where nothing came of it


def check_room(folder: Path, size: int) -> None:
    """Check that a folder's disk has room for so many bytes.

    Raises:
        CheckpointError: its disk has not so many free.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CheckpointError(f"{folder.parent}: needs {size:,} bytes, but only {free:,} are free there; make room")


def _flush(folder: Path) -> None:
    """Flush files and names to the disk: if the machine fails, the new name must not outlive what is in the folder."""
    paths = list(folder.rglob("*"))
    for path in [*filter(Path.is_file, paths), *filter(Path.is_dir, paths), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk; some mounts cannot sync a folder, and not every folder may be read."""
    ignored = (errno.EINVAL, errno.ENOTSUP, errno.EACCES) if path.is_dir() else ()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in ignored:
            raise


def _check_free(destination: Path) -> None:
    if destination.is_symlink():
        raise CheckpointError(f"{destination}: is a symbolic link; give the folder itself")
    if destination.name == "..":
        raise CheckpointError(f"{destination}: ends in '..'; give the folder's own name")
    is_empty = destination.is_dir() and not any(destination.iterdir())
    if destination.exists() and not is_empty and not _is_unfinished(destination):
        raise CheckpointError(f"{destination}: exists already; remove it, or give another destination")


def _is_unfinished(destination: Path) -> bool:
    """Return whether a run was interrupted, or is at work, between a folder's renaming and its end, and no file of it
    has changed since, which would then be lost."""
    try:
        marked = (destination / _MARKER).lstat().st_ctime_ns
    except (FileNotFoundError, NotADirectoryError):
        return False
    return all(path.is_dir() or path.lstat().st_ctime_ns <= marked for path in destination.rglob("*"))


def _reclaim(destination: Path, aside: Path) -> bool:
    """Remove a destination that an interrupted run has not finished; return whether there was one.

    It loses its name first, so that an interruption here leaves nothing that seems whole.
    """
    if not _is_unfinished(destination):
        return False
    with _locked(destination, destination):
        if not _is_unfinished(destination):
            raise CheckpointError(f"{destination}: exists already; remove it, or give another destination")
        os.rename(destination, aside / "unfinished")
    return _clear(aside)


def _clear(aside: Path) -> bool:
    """Remove what is in a folder that an interrupted run left; return whether there was anything.

    The marker stays, so that an interruption here leaves a folder that is known as well.
    """
    found = {path.name: path for path in aside.iterdir()}
    if found and found.pop(_MARKER, None) is None:
        raise CheckpointError(f"{aside}: is in the way, and no interrupted run has left it; move it, or remove it")
    for path in found.values():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return bool(found)


@contextlib.contextmanager
def _held(folder: Path, destination: Path) -> Iterator[None]:
    """Make the folder, or take over what is there, and keep other processes out of it."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    with _locked(folder, destination):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if it is empty: nothing was done


@contextlib.contextmanager
def _locked(folder: Path, destination: Path) -> Iterator[None]:
    """Lock a folder against other processes.

    The lock ends with its holder, however that ends. It is on the folder, which its holder renames or removes: one that
    is no longer there when it is locked was another process's.
    """
    descriptor = None
    try:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            is_there = try_lock(descriptor) and os.path.samestat(os.fstat(descriptor), os.lstat(folder))
        except FileNotFoundError:
            is_there = False
        if not is_there:
            raise CheckpointError(f"{destination}: another process is writing it; wait for it, or stop it")
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
