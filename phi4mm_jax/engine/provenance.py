"""Provenance of answers: the settings, weights and media that they depend on besides their lines."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phi4mm_jax.checkpoint.hub import local_folder
from phi4mm_jax.checkpoint.peft import adapter_folders
from phi4mm_jax.engine.request import Request
from phi4mm_jax.engine.sampling import Sampling
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.media_urls import is_path, with_sources
from phi4mm_jax.utils.files import write_atomically
from phi4mm_jax.utils.fingerprint import file_fingerprint, weights_fingerprint
from phi4mm_jax.utils.strict_json import strict_json

Settings = Mapping[str, Any]


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
            f"{output}: has answers, but {file}, which has their model and settings, is missing or broken; restore "
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

    def note(source: str) -> str:
        sources.append(source)
        return source

    if isinstance(request.prompt, list):
        with_sources([m.get("content") for m in request.prompt if isinstance(m, dict)], note)
    state, found = hashlib.blake2b(digest_size=8), False
    try:
        for path in filter(None, map(_file_of, sources)):
            if not path.exists():
                return None
            for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
                state.update(file_fingerprint(file) if file.is_file() else b"")
                found = True
    except (OSError, ValueError):
        return None
    return state.hexdigest() if found else None


def _file_of(source: str) -> Path | None:
    """Return the path of a medium; None of one without a file, and of file URLs with escapes or a host.

    Versions before did not read those URLs: the digests that outputs have are without them.
    """
    if source.startswith("file:///") and "%" not in source:
        return Path(source.removeprefix("file://"))
    return Path(source) if is_path(source) else None
