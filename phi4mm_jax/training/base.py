"""Fingerprint of a run's base: with another base, what was trained would be resumed and exported as another model.

It is of what the numbers depend on: the weights, config.json and the tokenizer. A copy has its original's.
"""

import hashlib
import json
from pathlib import Path

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.checkpoint import orbax_io
from phi4mm_jax.checkpoint.hub import local_folder
from phi4mm_jax.checkpoint.pytorch import shard_files
from phi4mm_jax.config import read_json
from phi4mm_jax.errors import CheckpointError, InputError
from phi4mm_jax.training.hosts import gather, is_primary_process
from phi4mm_jax.training.run_folder import BASE, has_checkpoint
from phi4mm_jax.utils.files import write_atomically
from phi4mm_jax.utils.fingerprint import file_fingerprint

_PATTERNS = ("tokenizer.json", "vocab.json", "merges.txt", f"{orbax_io.FOLDER}/**/*")


def save_base(model: str, run: Path) -> None:
    """Write the fingerprint of a base into a run's folder."""
    write_atomically(run / BASE, json.dumps({"model": model, "fingerprint": base_fingerprint(model)}) + "\n")


def check_base(model: str, run: Path, remedy: str) -> None:
    """Check that a base is the one that a run with checkpoints was begun with, if it says so; the first host looks.

    Args:
        remedy: for the error.

    Raises:
        InputError: it is another, on all hosts.
        CheckpointError: it cannot be read.
    """
    begun = is_primary_process() and has_checkpoint(run) and (run / BASE).is_file()
    known = read_json(run / BASE).get("fingerprint") if begun else None
    differs, *_ = gather(known is not None and known != base_fingerprint(model))
    if differs:
        raise InputError(
            f"{run}: was begun with another model than {model} is now: its weights, config.json or tokenizer have "
            f"changed. Put those back, or {remedy}; if they compute the same, remove {run / BASE}"
        )


def base_fingerprint(model: str) -> str:
    """Return the fingerprint of a checkpoint's folder, or of a repository on the Hub.

    Raises:
        CheckpointError: a file cannot be read.
    """
    folder = local_folder(model)
    settings = json.dumps(read_json(folder / "config.json"), sort_keys=True)
    state = hashlib.blake2b(settings.encode("utf-8", "surrogateescape"), digest_size=16)
    try:
        adapters = [f"{adapter.folder_in(folder).name}/adapter_*" for adapter in ADAPTERS.values()]
        others = {path for pattern in (*_PATTERNS, *adapters) for path in folder.glob(pattern) if path.is_file()}
        for path in [*shard_files(folder), *sorted(others)]:
            state.update(str(path.relative_to(folder)).encode("utf-8", "surrogateescape") + b"\0")
            state.update(file_fingerprint(path))
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be read ({error.strerror}); see who may") from error
    return state.hexdigest()
