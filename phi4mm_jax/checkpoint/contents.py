"""Contents of a checkpoint folder: people delete a tower or an adapter of the model, train, and save the rest."""

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.checkpoint import orbax_io, pytorch
from phi4mm_jax.checkpoint.peft import SETTINGS_FILE, WEIGHTS_FILE, PeftAdapter
from phi4mm_jax.checkpoint.safetensors_io import Stored
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.errors import CheckpointError, InputError

AdaptersFrom = Literal["folders", "shards"]
_SAMPLE = 4096  # bytes of a tensor, at a third and at two thirds of it, that are compared at load

_TOWERS = {  # by the names of tensors in both layouts, and of parameters in a converted checkpoint
    "has_vision": (".image_embed.", "params.vision."),
    "has_speech": (".audio_embed.", "params.speech."),
}


def read_config(folder: Path) -> Phi4MMConfig:
    """The configuration of what a checkpoint folder holds: without the towers and adapters whose tensors it lacks.

    `config.json` may still describe them: fine-tuning samples delete parts of the model and save the rest.

    Raises:
        CheckpointError: a file is missing or unreadable.
        ConfigError: as in `Phi4MMConfig.from_folder`.
    """
    config = Phi4MMConfig.from_folder(folder)
    converted = folder / orbax_io.FOLDER
    if converted.exists():
        names: Collection[str] = [path.name + "." for path in converted.iterdir()] if converted.is_dir() else []
        adapters = {name: (f"{adapter.collection}.",) for name, adapter in ADAPTERS.items()}
    else:
        names = pytorch.shard_names(folder)
        adapters = {name: (f".lora_A.{name}.", f".lora_B.{name}.") for name in ADAPTERS}
    changes: dict[str, object] = {
        has: any(mark in name for name in names for mark in marks) for has, marks in _TOWERS.items()
    }
    if converted.exists() or pytorch.layout_of(folder) == "original":  # the native layout has them in folders
        changes["loras"] = {
            kind: lora
            for kind, lora in config.loras.items()
            if any(mark in name for name in names for mark in adapters[kind])
        }
    return dataclasses.replace(config, **changes) if names else config


def folder_adapters(
    folder: Path,
    opened: Callable[[], Any],
    config: Phi4MMConfig,
    adapters_from: AdaptersFrom | None = None,
    given: Collection[str] = (),
) -> list[PeftAdapter]:
    """The adapters of the original layout that are taken from their folders, not from the shards.

    The release has each of its adapters twice; others may be in folders alone. What has been fine-tuned or exported is
    in the folders, which vLLM reads too: a folder that differs from the shards is the newer one, and deliberate.
    Settings, names, shapes, dtypes and 8 KiB of each tensor are compared.

    Args:
        opened: gives the folder's shards, see `open_checkpoint`; asked for where there is something to compare.
        config: of the shards, see `read_config`.
        adapters_from: take all that are in folders, or none; by default those that differ.
        given: names of adapters that are replaced by others in any case.

    Raises:
        CheckpointError: a folder is not whole; there is none where they are asked for; or the shards have no such
            adapter of the release, so that it may be merged into them.
        ConfigError: an adapter's settings are not supported.
        InputError: `adapters_from` is not one of its values, or the checkpoint has each adapter once.
    """
    if adapters_from not in (None, *get_args(AdaptersFrom)):
        raise InputError(f"adapters_from is {adapters_from!r:.60}; expected 'folders', 'shards' or None")
    if (folder / orbax_io.FOLDER).exists() or pytorch.layout_of(folder) != "original":
        if adapters_from is not None:
            raise InputError(
                f"adapters_from is {adapters_from!r}, but {folder} has each adapter once: only the original layout has "
                "them in folders and in shards; leave it out"
            )
        return []
    present = [a for a in ADAPTERS.values() if os.path.lexists(a.folder_in(folder) / WEIGHTS_FILE)]
    if adapters_from == "folders" and not present:
        names = " or ".join(adapter.folder for adapter in ADAPTERS.values())
        raise CheckpointError(f"{folder}: has no adapter in a folder {names}")
    # Without a tower an adapter is a remainder.
    present = [adapter for adapter in present if not config.lacks_tower(adapter) and adapter.name not in given]
    if adapters_from == "shards" or not present:
        return []
    for adapter in present:
        if adapters_from is None and adapter.name not in config.loras and adapter.media is not None:
            raise CheckpointError(
                f"{folder}: has an adapter in {adapter.folder_in(folder).name}, but none in the shards, into which it "
                "may be merged. If it is, remove the folder or give adapters_from='shards' (--adapters-from shards); "
                "if it is to be added, give 'folders'"
            )
    found = [PeftAdapter(adapter.folder_in(folder), adapter.name, config) for adapter in present]
    if adapters_from == "folders":
        return found
    different = _differences(opened(), config, found, whole=False)
    return [adapter for adapter in found if adapter.kind in different]


def with_adapters(config: Phi4MMConfig, adapters: Iterable[PeftAdapter]) -> Phi4MMConfig:
    """The configuration with these adapters in place of its own."""
    return config.with_loras({adapter.kind: adapter.lora for adapter in adapters})


def taken_line(folder: Path, adapters: Sequence[PeftAdapter]) -> str:
    """Line that a program says where adapters are taken from folders."""
    names = " and ".join(adapter.folder.name for adapter in adapters)
    return f"{folder}: {names} taken in place of the shards' adapters (adapters_from='shards' takes those)"


def adapters_line(folder: Path, config: Phi4MMConfig, given: Collection[PeftAdapter]) -> str | None:
    """Line that a program says of adapters that a model lacks though its folder has them, or of media without any.

    Args:
        config: of the model, the given adapters included.
    """
    loaded = {path for adapter in ADAPTERS.values() for path in (adapter.folder_in(folder), folder / adapter.folder)}
    loaded |= {Path(os.path.abspath(adapter.folder)) for adapter in given}
    others = sorted(path.parent for path in folder.glob(f"*/{SETTINGS_FILE}"))
    names = [p.name for p in others if not {p, Path(os.path.abspath(p))} & loaded]
    if names := [name for name in names if name in ADAPTERS or not config.loras]:  # others may be for other programs
        kind = names[0] if names[0] in ADAPTERS else next(iter(ADAPTERS))
        return (
            f"{folder}: has adapters that are not loaded: {', '.join(names)}. Give one as "
            f"adapters={{{kind!r}: {str(folder / names[0])!r}}} (--adapter-folder {kind}=FOLDER), or to an engine "
            "under a name of its own (load_adapter, --adapter NAME=FOLDER)"
        )
    if not config.loras and (config.has_vision or config.has_speech):
        return f"{folder} has no adapters: images and clips are answered by its weights alone, as merged ones are"
    return None


def check_copies(checkpoint: pytorch.PyTorchCheckpoint, config: Phi4MMConfig, adapters: Iterable[PeftAdapter]) -> None:
    """Compare all of the adapters in folders, but for those that are taken, with those in the shards.

    Args:
        adapters: those that are taken from folders.

    Raises:
        CheckpointError: one differs in what `folder_adapters` does not look at, so that which is meant cannot be told.
    """
    if pytorch.layout_of(checkpoint.folder) != "original":
        return
    taken = {adapter.kind for adapter in adapters}
    places = {kind: ADAPTERS[kind].folder_in(checkpoint.folder) for kind in config.loras if kind not in taken}
    others = [
        PeftAdapter(place, kind, config) for kind, place in places.items() if os.path.lexists(place / WEIGHTS_FILE)
    ]
    for kind, name in _differences(checkpoint, config, others, whole=True).items():
        raise CheckpointError(
            f"{places[kind] / WEIGHTS_FILE}: {name} differs from the main shards' in a few values. If the shards are "
            "right, give adapters_from='shards' (--adapters-from shards), else 'folders'"
        )


def _differences(
    checkpoint: pytorch.PyTorchCheckpoint, config: Phi4MMConfig, adapters: Iterable[PeftAdapter], whole: bool
) -> dict[str, str]:
    """Name what differs, a tensor or the settings, for each adapter that is not the same as in the shards."""
    ours = {(tensor.parts[0].path, tensor.layer): tensor.key for tensor in checkpoint.tensors}
    found: dict[str, str] = {}
    with ThreadPoolExecutor(8) as pool:
        for adapter in adapters:
            own = config.loras.get(adapter.kind)
            if own is None or (own.rank, own.scale) != (adapter.lora.rank, adapter.lora.scale):
                found[adapter.kind] = "adapter_config.json"
                continue
            pairs = [
                (checkpoint.stored[ours[tensor.parts[0].path, tensor.layer]], adapter.stored[tensor.key])
                for tensor in adapter.tensors
            ]
            same = pool.map(lambda pair: _is_same(*pair, whole=whole), pairs)
            names = [t.name for t, is_same in zip(adapter.tensors, same, strict=True) if not is_same]
            if names:
                found[adapter.kind] = names[0]
    return found


def _is_same(first: object, second: object, whole: bool) -> bool:
    if not isinstance(first, Stored) or not isinstance(second, Stored):
        return False  # one that is fitted to the model's rank and scale
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    size = first.nbytes
    if whole or size <= 2 * _SAMPLE:
        ours, theirs = (held.rows(0, held.shape[0]).view(np.uint8) for held in (first, second))
        return np.array_equal(ours, theirs)
    return all(_bytes(first, at) == _bytes(second, at) for at in (size // 3, 2 * size // 3 - _SAMPLE))


def _bytes(held: Stored, at: int) -> bytes:
    with held.file.open("rb", buffering=0) as opened:
        return os.pread(opened.fileno(), _SAMPLE, held.start + at)
