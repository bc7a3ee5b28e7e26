"""Files of samples, read one sample at a time from anywhere in them: JSON Lines, Parquet, and Hugging Face datasets."""

import functools
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from phi4mm_jax.data.examples import BadSample
from phi4mm_jax.errors import InputError
from phi4mm_jax.utils.json_lines import BEGINNING, check_json_lines
from phi4mm_jax.utils.paths import local_path
from phi4mm_jax.utils.strict_json import parse_json

_BLOCK = 1 << 24  # bytes
_SHORT = 64  # bytes; longer lines are not looked at to tell whether they are empty
_ROW_GROUPS_KEPT = 4


class Manifest(Protocol):
    """Samples by number; threads may share it.

    Attributes:
        folder: that relative paths of media refer to.
        size: in bytes, to notice a changed file; 0 if unknown.
    """

    folder: Path
    size: int

    def __len__(self) -> int: ...

    def where(self, number: int) -> str:
        """Return the name of a sample in errors."""
        ...

    def read(self, number: int) -> Any:
        """Return a sample.

        Raises:
            BadSample: it is broken.
        """
        ...

    def close(self) -> None:
        """Close the file; a sample cannot be read afterwards."""
        ...


def open_manifest(path: Path) -> Manifest:
    """Open a file of JSON lines, a Parquet file (by its ending), or a folder that `Dataset.save_to_disk` has written.

    Returns:
        It, to be closed.

    Raises:
        InputError: it cannot be read, has no samples, or needs a package that is not installed.
    """
    path = local_path(path)
    try:
        reader = _Dataset if path.is_dir() else _Parquet if path.suffix == ".parquet" else _JsonLines
        manifest = reader(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except ImportError as error:
        package = "datasets" if path.is_dir() else "pyarrow"
        raise InputError(f"{path}: needs {package}; pip install {package}, or write it as JSON lines") from error
    if not len(manifest):
        manifest.close()
        raise InputError(f"{path}: has no samples; give a file with some, or leave it out")
    return manifest


def open_manifests(paths: Sequence[Path]) -> list[Manifest]:
    """Open all, or none: as `open_manifest`."""
    with ExitStack() as opened:
        manifests = [opened.enter_context(closing(open_manifest(path))) for path in paths]
        opened.pop_all()
    return manifests


class _JsonLines:
    """JSON Lines; only the offsets of its lines are held in memory: 16 bytes per line."""

    def __init__(self, path: Path):
        self.path, self.folder = path, path.parent
        self._file = path.open("rb", buffering=0)
        try:
            self._find_lines()
        except BaseException:
            self.close()
            raise

    def _find_lines(self) -> None:
        self.size = os.fstat(self._file.fileno()).st_size
        check_json_lines(self.path, os.pread(self._file.fileno(), BEGINNING, 0))
        starts = [np.zeros(1, np.int64)]
        at = 0
        while block := self._file.read(_BLOCK):
            starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at + 1)
            at += len(block)
        bounds = np.append(np.concatenate(starts), at)
        lengths = np.diff(bounds)
        is_empty = lengths <= 1
        for line in np.flatnonzero((lengths > 1) & (lengths < _SHORT)):
            is_empty[line] = not os.pread(self._file.fileno(), int(lengths[line]), int(bounds[line])).strip()
        self._lines = np.flatnonzero(~is_empty)
        self._starts, self._lengths = bounds[self._lines], lengths[self._lines]

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, number: int) -> str:
        return f"{self.path}: line {self._lines[number] + 1}"

    def read(self, number: int) -> Any:
        try:
            text = os.pread(self._file.fileno(), int(self._lengths[number]), int(self._starts[number]))
            return parse_json(text.decode("utf-8-sig"))
        except OSError as error:
            raise BadSample("line", f"the line cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise BadSample("line", f"the line is not UTF-8 (at byte {error.start}); save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise BadSample("line", f"the line is not JSON ({error}); expected one object per line") from None

    def close(self) -> None:
        self._file.close()


class _Parquet:
    """Parquet file, read one row group at a time; the last few are kept, so write small ones for a shuffled stream."""

    def __init__(self, path: Path):
        from pyarrow import ArrowException, parquet

        self.path, self.folder, self.size = path, path.parent, path.stat().st_size
        try:
            self._file = parquet.ParquetFile(path)
        except ArrowException as error:
            raise InputError(f"{path}: is not a Parquet file ({error}); write it again") from error
        groups = self._file.metadata.num_row_groups
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._group = functools.lru_cache(_ROW_GROUPS_KEPT)(self._file.read_row_group)
        self._lock = threading.Lock()  # a ParquetFile is not for several threads

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, number: int) -> str:
        return f"{self.path}: row {number + 1}"

    def read(self, number: int) -> Any:
        from pyarrow import ArrowException

        group = int(np.searchsorted(self._starts, number, "right")) - 1
        try:
            with self._lock:
                table = self._group(group)
        except (OSError, ArrowException) as error:
            raise BadSample("line", f"the row cannot be read ({error})") from error
        return _from_table(table.slice(number - int(self._starts[group]), 1).to_pylist()[0])

    def close(self) -> None:
        with self._lock:
            self._file.close()


class _Dataset:
    """Hugging Face dataset, whose Arrow files are mapped into memory."""

    def __init__(self, path: Path):
        import datasets

        self.path, self.folder, self.size = path, path, 0
        try:
            loaded = datasets.load_from_disk(str(path))
        except (FileNotFoundError, ValueError) as error:
            files = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in (".jsonl", ".json", ".parquet"))[:8])
            remedy = f"give one of its files ({files})" if files else "write one with Dataset.save_to_disk"
            raise InputError(f"{path}: is not a dataset ({error}); {remedy}") from error
        if not isinstance(loaded, datasets.Dataset):
            raise InputError(f"{path}: has several splits ({', '.join(map(str, loaded))}); give the folder of one")
        self._rows = loaded.with_format("arrow")  # as stored: media stay undecoded

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, number: int) -> str:
        return f"{self.path}: row {number + 1}"

    def read(self, number: int) -> Any:
        table: Any = self._rows[number : number + 1]
        return _from_table(table.to_pylist()[0])

    def close(self) -> None:
        """Leave the memory maps to the last table that refers to them."""


def _from_table(value: Any) -> Any:
    """Return a row as JSON has it: tables give every object all keys, and media as {"bytes": ..., "path": ...}."""
    if isinstance(value, list):
        return [_from_table(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"bytes", "path"}:
        return value["path"] if value["bytes"] is None else value["bytes"]
    return {key: _from_table(item) for key, item in value.items() if item is not None}
