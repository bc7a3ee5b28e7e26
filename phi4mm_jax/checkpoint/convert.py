"""Conversion between the three layouts: parameters stream through, the other files travel along."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath

import jax
import numpy as np

from phi4mm_jax.checkpoint import orbax, pytorch
from phi4mm_jax.checkpoint.companions import companion_files
from phi4mm_jax.checkpoint.hub import local_folder
from phi4mm_jax.checkpoint.load import Checkpoint, check_trained, open_checkpoint, parameter_bytes
from phi4mm_jax.checkpoint.native import adapter_table
from phi4mm_jax.checkpoint.pytorch import SHARD_BYTES, Layout, layout_of, tensors_of
from phi4mm_jax.checkpoint.staging import staged
from phi4mm_jax.checkpoint.table import Path
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.errors import CheckpointError

Progress = Callable[[int, int], None]


def to_orbax(
    source: str | FilePath,
    destination: str | FilePath,
    *,
    dtype: str | None = None,
    fresh_adapters: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Convert a checkpoint of any layout to Orbax, which restores it sharded onto a mesh.

    Args:
        source: a folder that `phi4mm_jax.load` takes.
        destination: a folder that does not exist.
        dtype: "float32" or "bfloat16"; by default the source's.
        fresh_adapters: accept adapters whose B matrices are all zero.
        progress: called with the bytes written so far, and in all.
        say: called with what the user should know.

    Raises:
        CheckpointError: the source is not whole, or the destination cannot be written; nothing is left there.
    """
    source, destination = _folders(source, destination)
    config = Phi4MMConfig.from_folder(source)
    checkpoint = _checked(source, config, fresh_adapters)
    parameters = checkpoint.parameters
    if dtype is not None:
        parameters = {path: jax.ShapeDtypeStruct(p.shape, np.dtype(dtype)) for path, p in parameters.items()}
    size = sum(parameter_bytes(p) for p in parameters.values())
    with staged(destination, size, say) as folder:
        _write_files(folder, companion_files(source, layout_of(source)), dtype)
        orbax.write(folder / orbax.FOLDER, parameters, lambda path: checkpoint.read(path, dtype), progress=progress)


def to_torch(
    source: str | FilePath,
    destination: str | FilePath,
    layout: Layout,
    *,
    adapters_only: bool = False,
    fresh_adapters: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Write a checkpoint of any layout as PyTorch's safetensors.

    Args:
        layout: "original" (as published) or "native" (as transformers and PEFT save it).
        adapters_only: write the folders vision-lora and speech-lora alone, for PEFT.
        shard_bytes: the largest file, unless a single tensor is larger.
        The others are as in `to_orbax`.
    """
    source, destination = _folders(source, destination)
    config = Phi4MMConfig.from_folder(source)
    checkpoint = _checked(source, config, fresh_adapters)
    tensors = adapter_table(config) if adapters_only else tensors_of(layout, config)
    if not tensors:
        raise CheckpointError(f"{source}: has no adapters to write")
    size = sum(int(np.prod(t.shape)) * checkpoint.parameters[t.parts[0].path].dtype.itemsize for t in tensors)
    with staged(destination, size, say) as folder:
        _write_files(folder, companion_files(source, layout, adapters_only=adapters_only), None)
        pytorch.write(
            folder, tensors, checkpoint.parameters, checkpoint.read, shard_bytes=shard_bytes, progress=progress
        )


def _folders(source: str | FilePath, destination: str | FilePath) -> tuple[FilePath, FilePath]:
    source, destination = local_folder(source), FilePath(destination)
    if destination.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{destination}: lies within the source {source}; give another destination")
    return source, destination


def _checked(folder: FilePath, config: Phi4MMConfig, fresh_adapters: bool) -> Checkpoint:
    """The source, with its adapters' values checked before anything is written."""
    checkpoint = open_checkpoint(folder, config)

    def layers_used(path: Path) -> np.ndarray:
        stacked = checkpoint.read(path)
        bits = stacked.view(f"u{stacked.itemsize}").reshape(len(stacked), -1)
        return np.array([(layer << 1).any() for layer in bits])  # without the sign, so that -0 is zero

    if not fresh_adapters:
        check_trained(tensors_of(layout_of(folder), config), layers_used)
    if isinstance(checkpoint, pytorch.PyTorchCheckpoint):
        checkpoint.check_copies()
    return checkpoint


def _write_files(folder: FilePath, files: Mapping[str, bytes], dtype: str | None) -> None:
    for name, content in files.items():
        if name == "config.json" and dtype is not None:
            content = _with_dtype(content, dtype)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _with_dtype(config: bytes, dtype: str) -> bytes:
    """config.json tells PyTorch's loaders which dtype to make; unchanged where it already says this."""
    values = json.loads(config)
    changed = {key: dtype for key in ("torch_dtype", "dtype") if key in values and values[key] != dtype}
    return json.dumps(values | changed, indent=2).encode() + b"\n" if changed else config
