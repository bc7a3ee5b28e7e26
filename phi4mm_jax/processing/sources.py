"""Media as callers pass them: files, arrays and tensors, in few forms; and their names in errors.

The loaders' errors say what is wrong; `each` adds which medium it is.
"""

import errno
import io
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image

from phi4mm_jax.errors import InputError, MediaError

T = TypeVar("T")

# Decoding one file takes no longer; what the limits of sizes let through needs a small part of it.
MAX_DECODE_SECONDS = 300

# Each for a share of all objects, by their ids: images have no hash, by which a lock of their own could be found.
_LOCKS = tuple(threading.RLock() for _ in range(61))

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

_IMAGE, _AUDIO, _VIDEO, _NONE = "image", "audio", "video", "none"
_REMEDIES = {
    _IMAGE: "give it as an image", _AUDIO: "give it as audio", _VIDEO: "give it as a video",
    _NONE: "give a medium itself",
}  # fmt: skip
_RIFF = {b"WAVE": (_AUDIO, "a WAV sound"), b"WEBP": (_IMAGE, "a WebP image"), b"AVI ": (_VIDEO, "an AVI video")}
_BRANDS = {b"M4A ": (_AUDIO, "an M4A sound"), b"M4B ": (_AUDIO, "an M4A sound"), b"avif": (_IMAGE, "an AVIF image")}
_BRANDS |= dict.fromkeys((b"heic", b"heix", b"mif1"), (_IMAGE, "a HEIF image"))
_BEGINNINGS = (
    (b"\x89PNG\r\n\x1a\n", (_IMAGE, "a PNG image")),
    (b"\xff\xd8\xff", (_IMAGE, "a JPEG image")),
    (b"GIF8", (_IMAGE, "a GIF image")),
    (b"II*\0", (_IMAGE, "a TIFF image")),
    (b"MM\0*", (_IMAGE, "a TIFF image")),
    (b"fLaC", (_AUDIO, "a FLAC sound")),
    (b"OggS", (_AUDIO, "an Ogg sound")),
    (b"ID3", (_AUDIO, "an MP3 sound")),
    (b"\xff\xfb", (_AUDIO, "an MP3 sound")),
    (b"\x1aE\xdf\xa3", (_VIDEO, "a Matroska or WebM video")),
    (b"%PDF-", (_NONE, "a PDF document")),
    (b"PK\x03\x04", (_NONE, "a ZIP archive")),
    (b"\x1f\x8b", (_NONE, "a gzip archive")),
    (b"<!DOCTYPE html", (_NONE, "an HTML page")),
    (b"<html", (_NONE, "an HTML page")),
    (b"<svg", (_NONE, "an SVG drawing")),
    (b'{"', (_NONE, "a file of JSON")),
    (b"version https://git-lfs", (_NONE, "a pointer of Git LFS, in place of the file")),
)


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
        with open_file(path) as file:
            if not os.fstat(file.fileno()).st_size:
                raise InputError("the file is empty; pass a whole one")
        return path
    if hasattr(source, "read"):
        source = _content(source)
    if isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise InputError("the file is empty; pass a whole one")
        return bytes(source)
    return to_array(source) if hasattr(source, "__array__") and not isinstance(source, Image.Image) else source


def exclusive(opened: Any) -> AbstractContextManager:
    """Return what keeps other threads from an object that its caller opened, and that several requests may share.

    Reading moves a file's position, and decoding an image empties its list of what to decode.
    """
    return _LOCKS[id(opened) % len(_LOCKS)]


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


def other_kind(source: str | bytes, *taken: str) -> str | None:
    """Return what a file is by its first bytes, and what to do, as a clause; None if it may be of the kinds taken.

    Args:
        taken: of "image", "audio" and "video".

    Raises:
        InputError: as `open_file`.
    """
    with open_file(source) as file:
        head = file.read(64)
    found = _in_box(head) or next((found for begins, found in _BEGINNINGS if head.startswith(begins)), None)
    if found is None or found[0] in taken:
        return None
    kind, name = found
    return f"it is {name}; {_REMEDIES[kind]}"


def _in_box(head: bytes) -> tuple[str, str] | None:
    """Return the kind and name of a file whose format is within another: RIFF, or the boxes of MP4."""
    brand = head[8:12]
    if head[:4] in (b"RIFF", b"RF64"):
        return _RIFF.get(brand)
    if head[4:8] != b"ftyp":
        return None
    return _BRANDS.get(brand, ("video", "an MP4 video"))


class Deadline:
    """Time limit for the decoding of one file.

    Args:
        what: the medium, for the error.
        seconds: from now on.
    """

    def __init__(self, what: str, seconds: float = MAX_DECODE_SECONDS):
        self._what, self._seconds, self._end = what, seconds, time.monotonic() + seconds

    def restart(self) -> None:
        """Give it the whole time from now on."""
        self._end = time.monotonic() + self._seconds

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
        with exclusive(file):
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
