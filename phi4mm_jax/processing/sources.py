"""What callers pass as media: files, arrays and tensors, in few forms; and what to call each in an error.

The loaders' errors say what is wrong; `each` adds which medium it is.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from phi4mm_jax.errors import InputError

T = TypeVar("T")


def each(kind: str, sources: Sequence[Any], process: Callable[[Any], T]) -> tuple[T, ...]:
    """`process` of each medium.

    Raises:
        InputError: what `process` raises, with the medium's number, from 1, and its name before it.
    """
    results = []
    for number, source in enumerate(sources, 1):
        try:
            results.append(process(source))
        except InputError as error:
            raise InputError(f"{kind} {number} ({_describe(source)}): {error}") from error
    return tuple(results)


def plain(source: Any) -> Any:
    """A path as a string, the content of bytes and of open files as bytes, arrays and tensors as numpy arrays; anything
    else as it is.

    Raises:
        InputError: a file is missing, empty or cannot be opened; a tensor cannot be copied.
    """
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        _check_opens(path)
        return path
    if hasattr(source, "read"):
        source = _content(source)
    if isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise InputError("the file is empty; pass a whole one")
        return bytes(source)
    return to_array(source) if hasattr(source, "__array__") and not isinstance(source, Image.Image) else source


def to_array(values: Any) -> np.ndarray:
    """Lists, arrays and tensors of any library as a numpy array.

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


def _check_opens(path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise InputError("the file does not exist; check the path") from None
    except (OSError, ValueError) as error:  # a folder, forbidden, a name too long; a null byte
        cause = getattr(error, "strerror", None) or error
        raise InputError(f"the file cannot be opened ({cause}); check the path") from error


def _content(file: Any) -> bytes:
    """All of an open file, wherever it was read to."""
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
