"""Files of this machine and of cloud storage, by pyarrow, or by fsspec for what pyarrow does not know."""

import itertools
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
from pyarrow import fs

from phi4mm_jax.errors import InputError
from phi4mm_jax.utils.files import open_atomically

SCHEMES = ("gs", "gcs", "s3", "s3a", "abfs", "abfss", "az", "hdfs", "viewfs", "hf", "local", "memory")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", re.DOTALL)
_PYARROW = ("gs", "gcs", "s3", "hdfs", "viewfs", "abfs", "abfss", "file")


def open_storage(url: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URL, and the path in it.

    Raises:
        InputError: nothing here reads such URLs.
    """
    match = _URL.fullmatch(url)
    if match is None or os.path.lexists(f"{match[1]}:"):
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(url))
    scheme, rest = match[1].lower(), match[2]
    try:
        if scheme in _PYARROW:
            root = "/" if scheme in ("file", "hdfs", "viewfs") else ""
            return fs.FileSystem.from_uri(f"{scheme}://{root}{rest}")
        import fsspec

        files, path = fsspec.url_to_fs(f"{scheme}://{'/' if scheme == 'local' else ''}{rest}")
        return fs.PyFileSystem(fs.FSSpecHandler(files)), path
    except (ImportError, ValueError, OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{url:.200}: cannot be opened ({error!s:.200}); check the URL and what reads it") from error


def find_files(pattern: str) -> dict[str, str]:
    """The files that a path, a folder or a glob names: their URLs, by their names below the part without wildcards.

    Raises:
        InputError: there are none, or the folder cannot be read.
    """
    from fsspec.implementations.arrow import ArrowFSWrapper

    storage, path = open_storage(pattern)
    prefix = pattern[: len(pattern) - len(path)] if pattern.endswith(path) else ""
    files = ArrowFSWrapper(storage)
    try:
        if files.isfile(path):
            return {PurePosixPath(path).name: f"{prefix}{path}"}
        found: Any = files.find(path) if files.isdir(path) else [p for p in files.glob(path) if files.isfile(p)]
    except OSError as error:
        raise InputError(f"{pattern}: cannot be read ({error!s:.200}); check the path") from error
    base = PurePosixPath(*itertools.takewhile(lambda part: not set(part) & set("*?["), PurePosixPath(path).parts))
    names = {str(PurePosixPath(p).relative_to(base)): p for p in sorted(found)}
    named = {name: f"{prefix}{p}" for name, p in names.items() if not PurePosixPath(p).name.startswith((".", "_"))}
    if not named:
        raise InputError(f"{pattern}: there is no such file; check the path, and quote a glob")
    return named


def read_file(url: str) -> bytes:
    """Return a file's content.

    Raises:
        InputError: it cannot be read.
    """
    storage, path = open_storage(url)
    try:
        with storage.open_input_file(path) as file:
            return file.read()
    except Exception as error:  # of whichever library reads it
        raise InputError(f"{url:.200}: cannot be read ({error!s:.200}); check the URL and its permissions") from error


def write_whole(storage: fs.FileSystem, path: str, content: bytes | pyarrow.Buffer) -> None:
    """Write a file whole or not at all: aside and then renamed, or as one object, which appears when it is complete.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    is_local = isinstance(storage, fs.LocalFileSystem)
    with open_atomically(Path(path), "wb") if is_local else storage.open_output_stream(path) as file:
        file.write(content)
