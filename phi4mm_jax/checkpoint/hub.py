"""A checkpoint's folder, downloaded from the Hub where its name is that of a repository."""

import difflib
import os
import re
from pathlib import Path

from phi4mm_jax.errors import CheckpointError, InputError
from phi4mm_jax.utils.paths import local_path

# What a checkpoint consists of. The release's *.py files are never run, but an export has to bring them back.
_NEEDED = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.py", "*.md", "LICENSE*", "NOTICE*")

_RUN_FILES = ("recipe.yaml", "checkpoints")  # what training leaves in a run's folder

_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)


def local_folder(path: str | os.PathLike[str], *, of_adapter: bool = False) -> Path:
    """The folder that a path or the name of a repository on the Hub stands for.

    Args:
        path: a folder, which is returned as it is; or a string "org/name" or "org/name@revision" that is not a path of
            this machine: its weights, settings and tokenizer are downloaded, with progress bars, to the Hub's cache.
            After an interruption, the files that were whole are not downloaded again. Any other path, and any `Path`,
            is never looked for on the Hub.
        of_adapter: an adapter's folder is meant, not a checkpoint's; errors say so.

    Raises:
        CheckpointError: it is a URL or no path at all; or there is no such folder, and no such repository could be
            downloaded.
    """
    given = path
    try:
        path = local_path(given)
    except InputError as error:
        raise CheckpointError(str(error)) from error
    if path.is_dir():
        _refuse_run(path, of_adapter)
        if not of_adapter:
            _refuse_adapter(path)
            _refuse_parent(path)
        return path
    name = _NAME.fullmatch(given) if isinstance(given, str) else None
    if os.path.exists(path):
        raise CheckpointError(f"{path}: is a file; give the folder that holds it")
    if name is None:
        meant = "an adapter of PEFT or train.export" if of_adapter else "a Phi-4-multimodal checkpoint"
        raise CheckpointError(
            f"{path}: no such folder{folders_beside(path)}. Give the folder of {meant}, or the name of a repository on "
            "the Hub: org/name, or org/name@revision."
        )
    return _download(str(given), name["repository"], name["revision"])


def folders_beside(path: Path) -> str:
    """Say which folders are where a missing one is looked for; "" where that is no named folder that can be read."""
    parent = path.parent
    if parent in (Path("."), Path("/")) or not parent.is_dir() or not os.access(parent, os.R_OK):
        return ""
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    close = difflib.get_close_matches(path.name, names, 8) or names[:8]
    return f"; in {parent} there are {', '.join(close) or 'no folders'}"


def _refuse_run(folder: Path, of_adapter: bool) -> None:
    if all((folder / name).exists() for name in _RUN_FILES) and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder}: is the output of a training run, whose checkpoints only training reads; export what it has "
            f"trained, and give that: python -m train.export {folder} FOLDER "
            f"{'--adapters-only' if of_adapter else '--layout original'}"
        )


def _refuse_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter, which transformers would load on top of the model there, or of its base."""
    if not (folder / "adapter_config.json").exists():
        return
    give = "load(BASE, adapters={'speech': FOLDER}), --adapter-folder speech=FOLDER"
    if (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder}: has an adapter_config.json beside config.json: transformers would load this adapter on top of "
            f"the model. Move it to a folder of its own and give that, too ({give}), or remove it"
        )
    raise CheckpointError(f"{folder}: is an adapter without its base; give the base's folder, and this one: {give}")


def _refuse_parent(folder: Path) -> None:
    """Refuse the output of a trainer, whose checkpoints are folders within."""
    if (folder / "config.json").exists():
        return
    if inner := [path for path in folder.glob("*/config.json") if path.parent.name.startswith("checkpoint-")]:
        last = max((path.parent for path in inner), key=lambda path: (len(path.name), path.name))
        raise CheckpointError(f"{folder}: has no config.json, but holds {len(inner)} checkpoints; give one: {last}")


def _download(path: str, repository: str, revision: str | None) -> Path:
    import huggingface_hub  # here, because most folders are local and it takes a while to import
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(_NEEDED))
    except Exception as error:  # each of the ways to download has errors of its own
        remedy = "check the connection and run again: files that were whole are kept"
        if isinstance(error, errors.GatedRepoError):
            remedy = f"accept its terms at huggingface.co/{repository}, then log in (hf auth login) or set HF_TOKEN"
        elif isinstance(error, errors.RepositoryNotFoundError):
            remedy = "check the spelling; if it is private, log in (hf auth login) or set HF_TOKEN"
        elif isinstance(error, errors.RevisionNotFoundError):
            remedy = f"the repository has no revision {revision!r}; check its spelling"
        elif isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            remedy = "unset HF_HUB_OFFLINE to download it"
        if (beside := folders_beside(Path(path))) and not isinstance(error, errors.GatedRepoError):
            raise CheckpointError(
                f"{path}: no such folder{beside}. If a repository on the Hub was meant, it was not downloaded "
                f"({type(error).__name__}); {remedy}."
            ) from error
        raise CheckpointError(
            f"{path}: neither a folder here nor downloaded from the Hub. If a path was meant, check its "
            f"spelling; for the Hub, {remedy}. The cause: {type(error).__name__}: {str(error).strip()}"
        ) from error
    return Path(folder)
