"""What a checkpoint folder holds of the model: people delete a tower or an adapter, train, and save the rest."""

import dataclasses
from collections.abc import Collection
from pathlib import Path as FilePath

from phi4mm_jax.checkpoint import orbax, pytorch
from phi4mm_jax.config import Phi4MMConfig

_TOWERS = {  # by the names of tensors in both layouts, and of parameters in a converted checkpoint
    "has_vision": (".image_embed.", "params.vision."),
    "has_speech": (".audio_embed.", "params.speech."),
}


def read_config(folder: FilePath) -> Phi4MMConfig:
    """The configuration of what a checkpoint folder holds: without the towers and adapters whose tensors it lacks.

    `config.json` may still describe them: fine-tuning samples delete parts of the model and save the rest.

    Raises:
        CheckpointError: a file is missing or unreadable.
        ConfigError: as in `Phi4MMConfig.from_folder`.
    """
    config = Phi4MMConfig.from_folder(folder)
    converted = folder / orbax.FOLDER
    if converted.exists():
        names: Collection[str] = [path.name + "." for path in converted.iterdir()] if converted.is_dir() else []
        adapters = {kind: (f"lora_{kind}.",) for kind in ("vision", "speech")}
    else:
        names = pytorch.shard_names(folder)
        adapters = {kind: (f".lora_A.{kind}.", f".lora_B.{kind}.") for kind in ("vision", "speech")}
    changes: dict[str, object] = {
        has: any(mark in name for name in names for mark in marks) for has, marks in _TOWERS.items()
    }
    if converted.exists() or pytorch.layout_of(folder) == "original":  # the native layout has them in folders
        for kind, marks in adapters.items():
            if not any(mark in name for name in names for mark in marks):
                changes[f"{kind}_lora"] = None
    return dataclasses.replace(config, **changes) if names else config
