"""Files of clients for /v1/files, on disk: each a content and a description, which is written last."""

import json
import os
import re
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from phi4mm_jax.errors import InputError
from phi4mm_jax.serve.errors import ApiError
from phi4mm_jax.serve.limits import Limits
from phi4mm_jax.utils.files import make_folder, try_lock, write_atomically, writing
from phi4mm_jax.utils.strict_json import strict_json

_ID = re.compile(r"(file|batch|req)-[0-9a-f]{32}")
_BLOCK = 1 << 20


def new_id(kind: str) -> str:
    """Return a name that nobody guesses: "file-...", "batch-...", "chatcmpl-..."."""
    return f"{kind}-{uuid.uuid4().hex}"


class Store:
    """Objects of clients and their contents. An owner sees its own only.

    Args:
        folder: made if it is not there.

    Raises:
        InputError: it cannot be made.
    """

    def __init__(self, folder: Path, limits: Limits):
        self.folder, self._limits = folder, limits
        with writing(folder, "cannot be made"):
            make_folder(folder, 0o700)

    def lock(self) -> None:
        """Keep other servers out of the folder, until `unlock` or the end of this object.

        Raises:
            InputError: another one has it, or it cannot be locked.
        """
        with writing(self.folder, "cannot be locked"):
            file = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
            self._unlock = weakref.finalize(self, os.close, file)
            locked = try_lock(file)
        if not locked:
            self.unlock()
            raise InputError(f"{self.folder}: another server uses it; stop that one, or give another --files")

    def unlock(self) -> None:
        """Let other servers have the folder."""
        self._unlock()

    def content(self, name: str) -> Path:
        """Return the path of an object's content."""
        return self._path(name, "content")

    def _path(self, name: str, suffix: str) -> Path:
        if not _ID.fullmatch(name):
            raise _unknown(name)
        return self.folder / f"{name}.{suffix}"

    def read(self, name: str, owner: str) -> dict[str, Any]:
        """Return an object.

        Raises:
            ApiError: there is none of that name, or not of this owner.
        """
        try:
            found = json.loads(self._path(name, "json").read_bytes())
        except FileNotFoundError:
            raise _unknown(name) from None
        if found.pop("owner") != owner:
            raise _unknown(name)
        return found

    def write(self, value: dict[str, Any], owner: str) -> None:
        """Write an object, whole or not at all."""
        write_atomically(self._path(value["id"], "json"), strict_json({**value, "owner": owner}))

    def all(self, kind: str) -> Iterator[dict[str, Any]]:
        """Yield all objects of a kind, with their owners, the newest first."""
        found: list[tuple[tuple[int, int], dict[str, Any]]] = []
        for path in self.folder.glob(f"{kind}-*.json"):
            with suppress(FileNotFoundError):  # it is deleted meanwhile
                written, value = path.stat().st_mtime_ns, json.loads(path.read_bytes())
                found.append(((value["created_at"], written), value))
        yield from (value for _, value in sorted(found, key=lambda entry: entry[0], reverse=True))

    def list(self, kind: str, owner: str) -> list[dict[str, Any]]:
        """Return an owner's objects of a kind, the newest first."""
        return [value for value in self.all(kind) if value.pop("owner") == owner]

    def add_file(self, source: BinaryIO, filename: str, purpose: str, owner: str) -> dict[str, Any]:
        """Keep a file.

        Raises:
            ApiError: it is too large, or all files together would be.
        """
        name = new_id("file")
        path = self.content(name)
        left = self._limits.stored_bytes - sum(map(_size, self.folder.iterdir()))
        room = min(self._limits.file_bytes, left)
        try:
            with path.open("xb") as file:
                while block := source.read(_BLOCK):
                    room -= len(block)
                    if room < 0:
                        raise ApiError(413, "file is larger than the room for it here; split it, or delete others",
                                       param="file", code="file_too_large")  # fmt: skip
                    file.write(block)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return self.describe_file(name, filename, purpose, owner)

    def describe_file(self, name: str, filename: str, purpose: str, owner: str) -> dict[str, Any]:
        """Make the content of that name a file."""
        size = self.content(name).stat().st_size
        value = {
            "id": name, "object": "file", "bytes": size, "created_at": int(time.time()),
            "filename": filename, "purpose": purpose, "status": "processed",
        }  # fmt: skip
        self.write(value, owner)
        return value

    def delete_file(self, name: str, owner: str) -> None:
        """Delete a file. Raises ApiError: there is none of that name."""
        self.read(name, owner)
        self._path(name, "json").unlink(missing_ok=True)
        self.content(name).unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it is deleted, or has taken its name, meanwhile
        return 0


def _unknown(name: str) -> ApiError:
    return ApiError(404, f"there is no {name!r:.80} here", code="not_found")
