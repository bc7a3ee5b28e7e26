"""Files that are whole or not there, and locks of files and folders."""

import contextlib
import errno
import fcntl
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Literal

from phi4mm_jax.errors import InputError

INCOMPLETE = ".incomplete"  # ends the name of a file or folder that is being written
RESUME_REMEDY = "with room and permission, rerun the same command to resume"


def incomplete_path(path: Path) -> Path:
    """Return the name beside a file or folder under which it is written until it is whole."""
    return path.with_name(f".{path.name}{INCOMPLETE}")


@contextlib.contextmanager
def open_atomically(path: Path, mode: Literal["w", "wb"] = "w", errors: str | None = None) -> Iterator[IO[Any]]:
    """Open a file that takes its name when the body ends, with all of it on the disk.

    Args:
        mode: "w" for text in UTF-8, "wb" for bytes.
        errors: of the encoding, as of `open`.

    Raises:
        OSError: it cannot be written. Then, and when the body raises, the file that was there is as it was.
    """
    aside = incomplete_path(path)
    try:
        with aside.open(mode, encoding="utf-8" if mode == "w" else None, errors=errors) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def check_parent(path: Path) -> None:
    """Check that an output's folder is there or may be made.

    It is made where the folder above it is there, and is not the root: anything else is likely a slip, or a disk that
    is not mounted.

    Raises:
        InputError: it is neither.
    """
    parent = path.absolute().parent
    missing = list(itertools.takewhile(lambda p: not os.path.lexists(p), (parent, *parent.parents)))
    above = missing[-1].parent if missing else parent
    if missing and above.is_dir() and (len(missing) > 1 or above == Path(parent.anchor)):
        raise InputError(f"{path}: there is no folder {missing[-1]}; make it first, or give another path")


def check_writable(folder: Path) -> None:
    """Raise the OSError of writing to a folder, which stays as it is; several processes may ask at once."""
    with TemporaryFile(dir=folder):
        pass


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make an output's folder, and where `check_parent` allows it the one above, unless they are there.

    Raises:
        InputError: as `check_parent`.
        OSError: it cannot be made.
    """
    check_parent(path)
    path.mkdir(mode, parents=True, exist_ok=True)


_REMEDIES = {
    errno.EISDIR: "it is a folder; give a file's path",
    errno.EEXIST: "a file is where a folder should be; give another path",
    errno.ENOTDIR: "a file is where a folder should be; give another path",
    errno.ENOENT: "make its folder first, or give another path",
    errno.EACCES: "give a path that you may write to",
    errno.EPERM: "give a path that you may write to",
    errno.EROFS: "give a path that you may write to",
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room in your quota",
}


def write_remedy(error: OSError) -> str:
    """Return what to do where something could not be written."""
    return _REMEDIES.get(error.errno or 0, "give another path")


@contextlib.contextmanager
def writing(path: Path | str, failure: str = "cannot be written", remedy: str | None = None) -> Iterator[None]:
    """Name the path, the cause and the remedy, by default one for the cause, where the body cannot write.

    Raises:
        InputError: in place of the body's OSError.
    """
    try:
        yield
    except OSError as error:
        cause = f"{path}: {failure} ({error.strerror or error})"
        raise InputError(f"{cause}; {remedy or write_remedy(error)}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all, as `open_atomically`."""
    with open_atomically(path, errors="backslashreplace") as file:
        file.write(text)


def try_lock(file: int | IO[Any]) -> bool:
    """Lock an open file or folder against other processes; return False if another one holds it.

    The lock ends when the file is closed, or its process ends, however that ends.

    Raises:
        OSError: the file system cannot lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
