"""Safetensors files: read by rows, written in any order, both one piece at a time.

The safetensors package would hold all of a file in memory to write it. The format: the header's length (8 bytes,
little-endian), the header (JSON: name -> dtype, shape, first and last byte), the data.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from phi4mm_jax.errors import CheckpointError
from phi4mm_jax.utils.strict_json import unique_keys

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        dtype: as the file spells it ("BF16"); readable where it is in `DTYPES`.
        start: where its data begin, in bytes from the start of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype_problem(self) -> str | None:
        """Why it can't be read, where it can't."""
        if self.dtype in DTYPES:
            return None
        hint = " (model.float() in PyTorch, then save it again)" if self.dtype == "F64" else ""
        return f"has dtype {self.dtype}, expected one of {', '.join(DTYPES)}{hint}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def rows(self, start: int, stop: int, buffer: np.ndarray | None = None) -> np.ndarray:
        """Read rows `start` to `stop`.

        Args:
            buffer: bytes to read them into, until it is used again; new memory costs more time than the reading.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter than its header says.
        """
        shape, dtype = (stop - start, *self.shape[1:]), DTYPES[self.dtype]
        size = math.prod(shape) * dtype.itemsize
        if buffer is None:
            buffer = np.empty(size, np.uint8)
        rows = np.asarray(buffer)[:size].view(dtype).reshape(shape)
        offset = self.start + start * math.prod(self.shape[1:]) * rows.itemsize
        try:
            with self.file.open("rb", buffering=0) as opened:
                _read(opened.fileno(), rows, offset)
        except (OSError, EOFError) as error:
            raise CheckpointError(
                f"{self.file}: cannot be read ({error}); was it changed, or its disk lost?"
            ) from error
        return rows


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file cannot be read, is truncated, or not in this format.
    """
    try:
        with file.open("rb") as opened:
            with safe_open(file, framework="np"):  # checks that the header and the file's length agree
                pass
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); see who may read it") from error
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not a whole safetensors file ({error}); download it again. It has {file.stat().st_size} bytes."
        ) from error
    header.pop("__metadata__", None)
    return {
        name: Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


@dataclass(frozen=True)
class _Place:
    file: int  # descriptor
    start: int
    row: int  # bytes of one row


class Writer:
    """Files of tensors that are known beforehand, filled by rows in any order. A context manager.

    Disk space is reserved at the start, so that a full disk is an error before any work is done.

    Args:
        files: for each file the tensors in it: name -> (shape, dtype).

    Raises:
        OSError: a file cannot be made, or the disk has no room for it.
    """

    def __init__(self, files: Mapping[Path, Mapping[str, tuple[tuple[int, ...], np.dtype]]]):
        self._places: dict[tuple[Path, str], _Place] = {}
        self._descriptors: list[int] = []
        try:
            for path, tensors in files.items():
                self._create(path, tensors)
        except BaseException:
            self.close()
            raise

    def _create(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end, starts = 0, {}
        for name, (shape, dtype) in tensors.items():
            starts[name], end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        data = 8 + len(encoded)
        os.posix_fallocate(descriptor, 0, data + end)
        _write(descriptor, len(encoded).to_bytes(8, "little") + encoded, 0)
        for name, (shape, dtype) in tensors.items():
            row = math.prod(shape[1:]) * dtype.itemsize
            self._places[path, name] = _Place(descriptor, data + starts[name], row)

    def write(self, path: Path, name: str, first_row: int, rows: np.ndarray) -> None:
        place = self._places[path, name]
        _write(place.file, np.ascontiguousarray(rows).reshape(-1).view(np.uint8), place.start + first_row * place.row)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _read(descriptor: int, into: np.ndarray, offset: int) -> None:
    view: Any = memoryview(into.reshape(-1).view(np.uint8))  # type: ignore
    while view:
        read = os.preadv(descriptor, [view[: 1 << 30]], offset)
        if not read:
            raise EOFError(f"{len(view)} bytes are missing at its end")
        view, offset = view[read:], offset + read


def _write(descriptor: int, data, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view[: 1 << 30], offset)
        view, offset = view[written:], offset + written


def shard(tensors: Iterable[tuple[str, int]], limit: int) -> list[list[str]]:
    """Assign tensors, in order, to files of at most `limit` bytes each; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in tensors:
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
