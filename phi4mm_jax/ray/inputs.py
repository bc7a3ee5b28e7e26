"""Request files as rows of a data set: an index of all their lines first, then the lines that are not answered."""

import codecs
import contextlib
import hashlib
import io
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from phi4mm_jax.engine.jsonl import digest_number, parse_line
from phi4mm_jax.errors import InputError
from phi4mm_jax.ray.media import REQUEST, as_json
from phi4mm_jax.ray.storage import open_storage
from phi4mm_jax.utils.checks import is_unicode
from phi4mm_jax.utils.strict_json import parse_json

_CHUNK_BYTES, _CHUNK_LINES = 16 << 20, 8192  # of a chunk at most: what one task reads


@dataclass(frozen=True)
class Chunk:
    """Chunk of a file: some of its lines, or a row group.

    Attributes:
        name: of the file, below the part of the glob without wildcards; begins the ids of lines that have none.
        url: of the file.
        number: of its first line, from 0.
        start: byte at which it begins; of a Parquet file the row group.
        lines: their number, empty ones not counted.
    """

    name: str
    url: str
    number: int
    start: int
    lines: int


@dataclass(frozen=True)
class Index:
    """The lines of a file, one value each.

    Attributes:
        keys: 8 bytes of a hash of the id.
        digests: of the line and the settings that its request depends on; 0 of a row of Parquet, which are not read
            whole before they are answered.
        broken: whether it cannot be asked.
        kinds: of ids, as columns hold them: "strings" or "whole numbers"; else what none holds.
    """

    chunks: list[Chunk]
    keys: np.ndarray
    digests: np.ndarray
    broken: np.ndarray
    kinds: frozenset[str]


def is_parquet(name: str) -> bool:
    """Return whether a file is Parquet, by its name."""
    return name.lower().endswith((".parquet", ".pq"))


def key_of(name: Any) -> int:
    """Return 8 bytes of a hash of an id; 1 and "1" are different ids."""
    content = repr(name).encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _kind(name: str | int) -> str:
    if isinstance(name, int):
        return "whole numbers" if -(2**63) <= name < 2**63 else "numbers beyond 64 bits"
    return "strings" if is_unicode(name) else "halves of surrogate pairs"


def index_file(name: str, url: str, settings: Mapping[str, Any], adapters: Collection[str] = ()) -> Index:
    """Read all of a file once.

    Args:
        settings: of lines that do not say.
        adapters: names of the users' adapters that are loaded.

    Raises:
        InputError: it cannot be read.
    """
    storage, path = open_storage(url)
    try:
        with storage.open_input_file(path) as file:
            if is_parquet(url):
                chunks, rows = _index_parquet(file, name, url)
            else:
                chunks, rows = _index_lines(file, name, url, settings, adapters)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{url}: cannot be read ({error!s:.200}); check the path") from error
    names, digests, broken = zip(*rows, strict=True) if rows else ((), (), ())
    return Index(
        chunks, np.array([key_of(name) for name in names], np.uint64), np.array(digests, np.uint64),
        np.array(broken, bool), frozenset(map(_kind, names)),
    )  # fmt: skip


def read_chunk(chunk: Chunk, wanted: np.ndarray) -> pa.Table:
    """Return the wanted lines of a chunk, as bytes with their numbers.

    Raises:
        InputError: the file has changed since it was indexed.
    """
    storage, path = open_storage(chunk.url)
    with storage.open_input_file(path) as file:
        lines = (_parquet_lines if is_parquet(chunk.url) else _chunk_lines)(file, chunk)
        numbers, texts, place = [], [], -1
        for place, (number, text) in enumerate(lines):
            if place >= len(wanted):
                break
            if wanted[place]:
                numbers.append(number)
                texts.append(text)
    if place + 1 < len(wanted):
        raise InputError(f"{chunk.url}: has changed since the run began; run again")
    return pa.table(
        {
            "number": pa.array(numbers, pa.int64()), "line": pa.array(texts, pa.large_binary()),
            "url": pa.array([chunk.url] * len(texts)), "name": pa.array([chunk.name] * len(texts)),
        }
    )  # fmt: skip


def folder_of(url: str) -> Path:
    """The folder of relative paths in a file. Of a URL it has lost a slash, which readers of media allow for."""
    return Path(os.path.dirname(url))


def _index_lines(
    file: Any, name: str, url: str, settings: Mapping[str, Any], adapters: Collection[str]
) -> tuple[list[Chunk], list[Any]]:
    chunks: list[Chunk] = []
    rows = []
    first, start, count, end = 0, 0, 0, 0
    for number, text in enumerate(_lines_from(file, 0)):
        if count == _CHUNK_LINES or (count and end - start >= _CHUNK_BYTES):
            chunks.append(Chunk(name, url, first, start, count))
            first, start, count = number, end, 0
        end += len(text)
        if (stripped := _without_mark(text, number)).strip():
            line = parse_line(number, stripped, folder_of(url), settings, f"{name}:{number}", adapters)
            rows.append((line.id, digest_number(line.digest), line.request is None))
            count += 1
    return [*chunks, Chunk(name, url, first, start, count)] if count else chunks, rows


def _index_parquet(file: Any, name: str, url: str) -> tuple[list[Chunk], list[Any]]:
    source = pq.ParquetFile(file)
    chunks: list[Chunk] = []
    rows, number = [], 0
    if unknown := sorted({*source.schema_arrow.names} - REQUEST - {"id"}):
        raise InputError(
            f"{url}: column {unknown[0]!r} is not known; expected id and some of {', '.join(sorted(REQUEST))} (a "
            "pipeline of your own may have others: see phi4mm_jax.ray.Answer)"
        )
    has_ids = "id" in source.schema_arrow.names
    for group in range(source.num_row_groups):
        count = source.metadata.row_group(group).num_rows
        ids = source.read_row_group(group, columns=["id"]).column("id").to_pylist() if has_ids else [None] * count
        chunks.append(Chunk(name, url, number, group, count))
        names = [x if isinstance(x, str | int) else f"{name}:{number + i}" for i, x in enumerate(ids)]
        rows += [(x, 0, False) for x in names]
        number += count
    return chunks, rows


def _lines_from(file: Any, start: int) -> Iterator[bytes]:
    """Lines with their ends, of the one that begins at a byte on."""
    file.seek(start)
    yield from io.BufferedReader(file, 1 << 20)


def _without_mark(text: bytes, number: int) -> bytes:
    return text.removeprefix(codecs.BOM_UTF8) if number == 0 else text


def _chunk_lines(file: Any, chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    for number, text in enumerate(_lines_from(file, chunk.start), chunk.number):
        if (stripped := _without_mark(text, number)).strip():
            yield number, stripped


def _parquet_lines(file: Any, chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """Yield rows as lines of JSON; messages and grammar may be JSON themselves."""
    table = pq.ParquetFile(file).read_row_group(chunk.start)
    for number, row in enumerate(table.to_pylist(), chunk.number):
        for name in ("messages", "grammar"):
            if isinstance(row.get(name), str):
                with contextlib.suppress(ValueError, RecursionError):  # else that row's error
                    row[name] = parse_json(row[name])
        yield number, json.dumps(as_json(row)).encode()
