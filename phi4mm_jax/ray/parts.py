"""A folder of answers in parts, each written whole; rerun the same command to resume a run that was stopped."""

import contextlib
import json
import os
import re
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from phi4mm_jax.engine.answer_lines import Format, is_cut, parse_record
from phi4mm_jax.engine.jsonl import digest_number
from phi4mm_jax.engine.provenance import compare_settings
from phi4mm_jax.errors import InputError
from phi4mm_jax.ray.answer import with_columns
from phi4mm_jax.ray.inputs import is_parquet, key_of
from phi4mm_jax.ray.storage import open_storage, write_whole
from phi4mm_jax.utils.files import RESUME_REMEDY, check_parent, try_lock, writing
from phi4mm_jax.utils.strict_json import strict_json

_PART = re.compile(r"part-(\d{6,})\.(jsonl|parquet)")
_ROWS = 20_000  # of a part at most
_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Records:
    """Keys and outcomes of the answers of a part, one value each: see `inputs.Index`."""

    keys: np.ndarray
    digests: np.ndarray
    failed: np.ndarray
    cut: np.ndarray


class Parts:
    """The folder of a run's answers, written by one process.

    Args:
        url: of the folder, which is made where there is none.
        form: of the answers.
        parquet: write Parquet; by default a line of JSON for each answer.
        seconds: that an answer may wait to be written: what a killed run has to answer again.

    Attributes:
        answers: the number of answers that were added.
        errors: how many of them are errors.

    Raises:
        InputError: the folder has something else in it, or cannot be written.
    """

    def __init__(self, url: str, form: Format = "plain", parquet: bool = False, seconds: float = 30.0):
        self.url, self._form, self._suffix = url, form, "parquet" if parquet else "jsonl"
        self.storage, self._folder = open_storage(url)
        self.answers = self.errors = 0
        self._waiting: list[bytes] = []
        self._seconds = min(seconds, threading.TIMEOUT_MAX)
        self._timer: threading.Timer | None = None  # of the first that waits
        self._is_due = False
        self._writing = threading.Lock()
        with writing(self.url, remedy=RESUME_REMEDY):
            if isinstance(self.storage, fs.LocalFileSystem):
                check_parent(Path(self._folder))
            self.storage.create_dir(self._folder, recursive=True)
            self._lock()  # before it is read
            infos = self.storage.get_file_info(fs.FileSelector(self._folder, allow_not_found=True))
        names = [i.base_name for i in infos if not i.base_name.startswith(".") and i.base_name != _SETTINGS]
        for name in names:
            match = _PART.fullmatch(name)
            if match is None:
                raise InputError(
                    f"{url}: has {name!r:.80}, which is not a part of a run's answers; give another folder"
                )
            if match[2] != self._suffix:
                raise InputError(f"{url}: has answers in .{match[2]}; give that --output-format, or another folder")
        self._names = sorted(names, key=lambda name: int(_PART.fullmatch(name)[1]))  # type: ignore[index]
        self._next = int(_PART.fullmatch(self._names[-1])[1]) + 1 if self._names else 0  # type: ignore[index]

    def _lock(self) -> None:
        """Keep other runs of this machine, or of a shared disk with locks, out for as long as this one lives."""
        if not isinstance(self.storage, fs.LocalFileSystem):
            return
        descriptor = os.open(self._folder, os.O_RDONLY)
        self._closed = weakref.finalize(self, os.close, descriptor)
        with contextlib.suppress(OSError):  # of a disk that cannot lock folders
            if not try_lock(descriptor):
                raise InputError(f"{self.url}: another run is writing it; wait for it, or stop it")

    @property
    def paths(self) -> list[str]:
        """The parts that there are, in the order in which they were written."""
        return [f"{self._folder}/{name}" for name in self._names]

    def check_settings(self, now: Mapping[str, Any]) -> None:
        """Compare with the settings of the answers that are there; without answers, keep these.

        Raises:
            InputError: they differ, are missing or broken, or cannot be written.
        """
        path = f"{self._folder}/{_SETTINGS}"
        if not self._names:
            with writing(self.url, remedy=RESUME_REMEDY):
                write_whole(self.storage, path, (strict_json(now) + "\n").encode())
            return
        try:
            with self.storage.open_input_file(path) as file:
                before = json.loads(file.read())
        except (OSError, ValueError):
            before = None
        compare_settings(self.url, _SETTINGS, before, now)

    def add(self, lines: Iterable[bytes], errors: int) -> None:
        """Take answers, as lines of JSON; they are written with others, or after some seconds.

        Raises:
            InputError: they cannot be written, or those before could not and still cannot.
        """
        with self._writing:
            before = len(self._waiting)
            self._waiting += lines
            self.answers += len(self._waiting) - before
            self.errors += errors
            if self._is_due or self._seconds <= 0 or len(self._waiting) >= _ROWS:
                self._flush()
            elif self._waiting and self._timer is None:
                write = weakref.WeakMethod(self._write_in_time)  # keeps no folder locked
                self._timer = threading.Timer(self._seconds, lambda: (found := write()) and found())
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        """Write the answers that wait as one part.

        Raises:
            InputError: it cannot be written.
        """
        with self._writing:
            self._flush()

    def _write_in_time(self) -> None:
        """Write what waits though no other answer comes, in the timer's thread."""
        with self._writing:
            self._is_due = True
            with contextlib.suppress(Exception):  # they still wait: the next add or flush tries again, and raises
                self._flush()

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            name = f"part-{self._next:06d}.{self._suffix}"
            self._write(name, self._waiting)
            self._names.append(name)
            self._next += 1
            self._waiting = []
        self._is_due = False

    def keep(self, part: int, kept: np.ndarray) -> None:
        """Rewrite a part with some of its answers only, or remove it where it keeps none.

        Raises:
            InputError: it cannot be written.
        """
        path = self.paths[part]
        with writing(self.url, remedy=RESUME_REMEDY):
            if not kept.any():
                self.storage.delete_file(path)
                self._names.pop(part)
            elif self._suffix == "parquet":
                self._write(self._names[part], pq.read_table(path, filesystem=self.storage).filter(pa.array(kept)))
            else:
                self._write(self._names[part], list(compress(_lines(path, self.storage), kept)))

    def _write(self, name: str, answers: list[bytes] | pa.Table) -> None:
        if self._suffix == "parquet":
            sink = pa.BufferOutputStream()
            pq.write_table(answers if isinstance(answers, pa.Table) else _table(answers), sink)
            content = sink.getvalue()
        else:
            content = b"".join(line + b"\n" for line in answers)
        with writing(self.url, remedy=RESUME_REMEDY):
            write_whole(self.storage, f"{self._folder}/{name}", content)


def index_part(path: str, storage: fs.FileSystem, form: Format) -> Records:
    """Read what the answers of a part tell of their lines.

    Raises:
        InputError: it is of another format, or has something else in it.
    """
    try:
        if is_parquet(path):
            table = pq.read_table(path, columns=["id", "request", "error", "finish_reason"], filesystem=storage)
            found = [(r["id"], r["request"], r["error"] is not None, is_cut(r)) for r in table.to_pylist()]
        else:
            records = [parse_record(Path(path), form, line, i, 0) for i, line in enumerate(_lines(path, storage), 1)]
            found = [(record.key, record.digest, record.failed, record.cut) for record in records]
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({error!s:.200}); restore it, or give another folder") from error
    names, digests, failed, cut = zip(*found, strict=True) if found else ((), (), (), ())
    return Records(
        np.array([key_of(name) for name in names], np.uint64),
        np.array([digest_number(digest) for digest in digests], np.uint64), np.array(failed, bool),
        np.array(cut, bool),
    )  # fmt: skip


def _lines(path: str, storage: fs.FileSystem) -> list[bytes]:
    with storage.open_input_file(path) as file:
        return file.read().split(b"\n")[:-1]


def _table(lines: list[bytes]) -> pa.Table:
    """Answers as columns; their ids are all whole numbers, or all strings."""
    answers = [json.loads(line) for line in lines]
    named = {name: pa.array([a.get(name) for a in answers], pa.string()) for name in ("request", "media")}
    return with_columns(pa.table({"id": pa.array([a["id"] for a in answers]), **named}), answers)
