"""Provenance of answers: the settings, weights and media that they depend on besides their lines."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phi4mm_jax.checkpoint.hub import local_folder
from phi4mm_jax.checkpoint.peft import adapter_folders
from phi4mm_jax.engine.request import Request
from phi4mm_jax.engine.sampling import Sampling
from phi4mm_jax.errors import InputError
from phi4mm_jax.utils.files import write_atomically
from phi4mm_jax.utils.fingerprint import file_fingerprint, weights_fingerprint
from phi4mm_jax.utils.strict_json import strict_json

Settings = Mapping[str, Any]
_NEVER_MEDIA = ("text", "role", "type")  # keys of a message's parts


def settings_of(model: str | Path, adapters: Mapping[str, str | Path] | None = None, **settings: Any) -> dict[str, Any]:
    """Return the settings that a run's answers depend on; the checkpoint by its fingerprint.

    Args:
        adapters: as of `phi4mm_jax.load`.

    Raises:
        CheckpointError: there is no such model or adapter.
    """
    weights = weights_fingerprint(local_folder(model), adapter_folders(adapters))
    return {"model": str(model), "weights": weights, **settings, "sampling": list(asdict(Sampling()).values())}


def settings_path(output: Path) -> Path:
    """Return the path of the file that has the settings of an output's answers."""
    return output.with_name(f"{output.name}.settings.json")


def check_settings(output: Path, now: Settings, *, has_answers: bool) -> None:
    """Check that an output's answers are of these settings; without answers write the settings beside it.

    Raises:
        InputError: the answers are of other settings, or their settings cannot be read.
        OSError: the settings cannot be written.
    """
    path = settings_path(output)
    if not has_answers:
        write_atomically(path, strict_json(now) + "\n")
        return
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = None
    compare_settings(output, path.name, before, now)


def compare_settings(output: Path | str, file: str, before: Any, now: Settings) -> None:
    """Raise an InputError unless the answers of an output, with the settings `before`, are of these settings.

    Args:
        file: that has the settings.
        before: its content; None where it cannot be read.
    """
    if not isinstance(before, dict):
        raise InputError(
            f"{output}: has answers, but {file}, which tells their model and settings, is missing or broken; restore "
            "it, or give another output"
        )
    if others := [key for key in now if key != "model" and before.get(key) != now[key]]:
        names = [{"weights": "model"}.get(key, key) for key in others]
        causes = [f"{name} (was {before.get(name)!r}, now {now[name]!r})" for name in names]
        raise InputError(
            f"{output}: its answers are of another {', '.join(causes)}; give another output, or resume with what it was"
        )


def media_fingerprint(request: Request) -> str | None:
    """Return the digest of a request's media files; None if it has none, or one is missing."""
    sources: list[str] = [m for m in (*request.images, *request.audios) if isinstance(m, str)]
    if isinstance(request.prompt, list):
        for message in request.prompt:
            sources += _strings(message.get("content") if isinstance(message, dict) else None)
    state, found = hashlib.blake2b(digest_size=8), False
    for source in sources:
        path = Path(source.removeprefix("file://"))
        try:
            if len(source) > _LONGEST_PATH or not path.exists():
                continue
            files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
            for file in files:
                state.update(file_fingerprint(file) if file.is_file() else b"")
                found = True
        except (OSError, ValueError):
            return None
    return state.hexdigest() if found else None


_LONGEST_PATH = 4096


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in a message's content that may be the path of a medium."""
    if isinstance(value, list):
        for part in value:
            yield from [part] if isinstance(part, str) else _strings(part)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in _NEVER_MEDIA:
                yield from [inner] if isinstance(inner, str) else _strings(inner)
