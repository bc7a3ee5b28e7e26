"""Media as callers pass them: files, arrays and tensors, in few forms; and their names in errors.

The loaders' errors say what is wrong; `each` adds which medium it is.
"""

import errno
import io
import os
import stat
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image

from phi4mm_jax.errors import InputError, MediaError

T = TypeVar("T")

# Decoding one file takes no longer; what the limits of sizes let through needs a small part of it.
MAX_DECODE_SECONDS = 300

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def each(kind: str, sources: Sequence[Any], process: Callable[[Any], T]) -> tuple[T, ...]:
    """Process each medium.

    Raises:
        MediaError: an InputError of `process`, with the medium's number, from 1, and its name before it.
    """
    results = []
    for number, source in enumerate(sources, 1):
        try:
            results.append(process(source))
        except InputError as error:
            raise MediaError(f"{kind} {number} ({_describe(source)}): {error}") from error
    return tuple(results)


def plain(source: Any) -> Any:
    """Return a path as a string, the content of bytes and open files as bytes, arrays and tensors as numpy arrays.

    Anything else is returned as it is.

    Raises:
        InputError: a file is missing, empty, no regular file or cannot be opened; a tensor cannot be copied.
    """
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        open_file(path).close()
        return path
    if hasattr(source, "read"):
        source = _content(source)
    if isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise InputError("the file is empty; pass a whole one")
        return bytes(source)
    return to_array(source) if hasattr(source, "__array__") and not isinstance(source, Image.Image) else source


def to_array(values: Any) -> np.ndarray:
    """Convert lists, arrays and tensors of any library to a numpy array.

    Raises:
        InputError: it cannot be made one.
    """
    try:
        if hasattr(values, "detach"):  # a torch tensor, which may be on a device, or of a type that numpy lacks
            values = values.detach().cpu()
            values = values.float() if "bfloat16" in str(values.dtype) else values
        return np.asarray(values)
    except Exception as error:  # ragged lists, ...
        raise InputError(f"the values make no array ({error!r:.200}); pass a numpy array") from error


def open_file(source: str | bytes) -> BinaryIO:
    """Open a path, or the bytes of a file, for reading. Only regular files are opened, and never waited for.

    Raises:
        InputError: a file is missing, cannot be opened, or is a folder, a FIFO, a socket or a device.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        _check_regular(os.stat(source))  # before it is opened, which some devices answer to
        file = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            _check_regular(os.fstat(file))  # it may be another by now
            return os.fdopen(file, "rb")
        except BaseException:
            os.close(file)
            raise
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError("the file does not exist; check the path") from None
    except (OSError, ValueError) as error:  # a folder, forbidden, a name too long; a null byte
        cause = getattr(error, "strerror", None) or error
        raise InputError(f"the file cannot be opened ({cause}); check the path") from error


def _check_regular(status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if kind != stat.S_IFREG:
        what = _KINDS.get(kind, "of another kind")
        raise InputError(f"the file is {what}, not a regular file; pass its content as a file or as bytes")


class Deadline:
    """Time limit for the decoding of one file.

    Args:
        what: the medium, for the error.
        seconds: from now on.
    """

    def __init__(self, what: str, seconds: float = MAX_DECODE_SECONDS):
        self._what, self._seconds, self._end = what, seconds, time.monotonic() + seconds

    def check(self) -> None:
        """Raise an InputError when the time is over."""
        if time.monotonic() > self._end:
            raise InputError(
                f"decoding the {self._what} takes longer than {self._seconds:g} seconds; pass a shorter one, or "
                "convert it before"
            )


def _content(file: Any) -> bytes:
    """Read all of an open file, wherever it was read to."""
    try:
        if file.seekable():
            file.seek(0)
        content = file.read()
    except Exception as error:  # closed, in text mode, ...
        raise InputError(f"the open file cannot be read ({error!r:.200}); open it in binary mode") from error
    if not isinstance(content, bytes):
        raise InputError(f"reading the open file gives {type(content).__name__}, not bytes; open it in binary mode")
    return content


def _describe(source: Any) -> str:
    match source:
        case str() | os.PathLike():
            return f"{os.fsdecode(source)!r:.200}"
        case bytes() | bytearray() | memoryview():
            return f"{memoryview(source).nbytes} bytes"
        case (_, rate):
            return f"samples at {rate!r:.40} Hz"
    return type(source).__name__
