"""Files that are whole or not there, and locks of files and folders."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

INCOMPLETE = ".incomplete"  # ends the name of a file or folder that is being written


def incomplete_path(path: Path) -> Path:
    """Return the name beside a file or folder under which it is written until it is whole."""
    return path.with_name(f".{path.name}{INCOMPLETE}")


@contextlib.contextmanager
def open_atomically(path: Path, errors: str = "strict") -> Iterator[IO[str]]:
    """Open a text file, UTF-8, that takes its name when the body ends, with all of it on the disk.

    Args:
        errors: as of `open`.

    Raises:
        OSError: it cannot be written. Then, and when the body raises, the file that was there is as it was.
    """
    aside = incomplete_path(path)
    try:
        with aside.open("w", encoding="utf-8", errors=errors) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


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
