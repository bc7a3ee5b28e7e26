"""Fingerprints of files: by content, so that a copy has its original's, without reading all of a large one."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

_BLOCK, _STRIDE = 4096, 1 << 20  # of each stride so many bytes are read; a file below a stride is read whole


def file_fingerprint(path: Path) -> bytes:
    """16 bytes that tell a file from others: of its size, its first and last MiB and a block of each MiB between.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    state = hashlib.blake2b(b"%d" % size, digest_size=16)
    with path.open("rb", buffering=0) as file:
        state.update(file.read(_STRIDE))
        for start in range(_STRIDE, size - _STRIDE, _STRIDE):
            file.seek(start)
            state.update(file.read(_BLOCK))
        file.seek(max(size - _STRIDE, 0))
        state.update(file.read(_STRIDE))
    return state.digest()


def weights_fingerprint(folder: Path, adapters: Mapping[str, Path]) -> str:
    """Fingerprint of a checkpoint and of the folders of adapters that take the place of its own.

    Raises:
        OSError: a file cannot be read.
    """
    whole = {name: folder_fingerprint(path) for name, path in sorted(adapters.items())}
    return "".join([folder_fingerprint(folder), *(f" {name}={digest}" for name, digest in whole.items())])


def folder_fingerprint(folder: Path) -> str:
    """Fingerprint of all files in a folder with their names; hidden ones and texts for readers (.md) do not count.

    Raises:
        OSError: one cannot be read.
    """
    state = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and path.suffix != ".md" and not any(part.startswith(".") for part in name.parts):
            state.update(str(name).encode("utf-8", "surrogateescape") + b"\0" + file_fingerprint(path))
    return state.hexdigest()
