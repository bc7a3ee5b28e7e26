"""Conversion between the three layouts: parameters are streamed, sidecar files are copied or translated."""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.checkpoint import orbax_io, pytorch
from phi4mm_jax.checkpoint.contents import (
    AdaptersFrom,
    check_copies,
    folder_adapters,
    read_config,
    taken_line,
    with_adapters,
)
from phi4mm_jax.checkpoint.hub import local_folder
from phi4mm_jax.checkpoint.layouts.native import adapter_table
from phi4mm_jax.checkpoint.load import Checkpoint, check_trained, is_finite, layers_used, open_checkpoint
from phi4mm_jax.checkpoint.peft import PeftAdapter
from phi4mm_jax.checkpoint.pytorch import SHARD_BYTES, Layout, layout_of, tensors_of
from phi4mm_jax.checkpoint.sidecar_files import read_sidecar_files, skipped_files
from phi4mm_jax.checkpoint.staging import check_room, staged
from phi4mm_jax.checkpoint.tensor_types import ParamPath, Tensor, parameter_bytes
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.errors import CheckpointError, ConfigError, InputError
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.quantization import (
    InputMoments,
    QuantizedWeight,
    Weights,
    check_weights,
    is_quantized,
    quantize,
    quantize_to_inputs,
    quantized_parameters,
    stored_weights,
    weight_of,
)
from phi4mm_jax.utils.files import incomplete_path
from phi4mm_jax.utils.paths import local_path

Progress = Callable[[int, int], None]
_log = logging.getLogger(__name__)


def to_orbax(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    weights: Weights | None = None,
    calibrate: Callable[[Path], InputMoments] | None = None,
    fresh_adapters: bool = False,
    adapters_from: AdaptersFrom | None = None,
    progress: Progress | None = None,
) -> None:
    """Convert a checkpoint of any layout to Orbax, which restores it sharded onto a mesh.

    Args:
        source: a folder that `phi4mm_jax.load` takes.
        destination: a folder that does not exist.
        dtype: "float32" or "bfloat16"; by default the source's.
        weights: quantise linear maps, as `phi4mm_jax.load` does in the same dtype.
        calibrate: measures the maps' inputs, with the source's folder: `calibration.input_moments` of a manifest.
            Weights are then rounded to int4 with the least error of the maps' outputs on these.
        fresh_adapters: accept adapters whose B matrices are all zero.
        adapters_from: of the original layout's two copies of the adapters, as in `phi4mm_jax.load`.
        progress: called with the bytes written so far, and in all.

    Raises:
        CheckpointError: the source is not whole, or the destination cannot be written; nothing is left there.
        ConfigError: the source's config.json asks for something unsupported.
        InputError: an unknown dtype, or `calibrate` with other weights than int4.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"dtype is {dtype!r}; expected 'float32', 'bfloat16' or None, the source's")
    check_weights(weights)
    if calibrate is not None and weights != "int4":
        raise InputError(f"weights is {weights!r}, but only int4 is calibrated; ask for it, or leave calibrate out")
    with _staged(source, destination) as (source, folder):
        config, checkpoint = _opened(source, fresh_adapters, adapters_from)
        _refuse_quantized(source, checkpoint)
        Processor.from_folder(source, config)  # without which nobody could use what comes out
        parameters = checkpoint.parameters
        if dtype is not None:
            parameters = {path: jax.ShapeDtypeStruct(p.shape, np.dtype(dtype)) for path, p in parameters.items()}
        written = parameters if weights is None else quantized_parameters(parameters, weights)
        check_room(folder, sum(parameter_bytes(p) for p in written.values()))
        files = read_sidecar_files(source, layout_of(source), config=config)
        read = _finite(checkpoint, tensors_of(layout_of(source), config), dtype)
        if weights is not None:
            moments = {} if calibrate is None else calibrate(source)
            _check_maps(moments, parameters)
            read = _quantized(read, parameters, weights, moments)
        orbax_io.write(folder / orbax_io.FOLDER, written, read, progress=progress)
        _write_files(folder, files, dtype)
        _log_skipped_files(source, checkpoint)


def to_torch(
    source: str | Path,
    destination: str | Path,
    layout: Layout,
    *,
    adapters_only: bool = False,
    fresh_adapters: bool = False,
    adapters_from: AdaptersFrom | None = None,
    trained: Mapping[ParamPath, np.ndarray] | None = None,
    card: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint of any layout as PyTorch's safetensors.

    Args:
        layout: "original" (as published) or "native" (as transformers and PEFT save it).
        adapters_only: write the adapters' folders alone (vision-lora, speech-lora), for PEFT.
        trained: parameters, with layers stacked, to write in place of the source's; they are cast to its dtypes. With
            `adapters_only`, adapters of which it has no parameter are not written.
        card: README.md, in place of the source's.
        shard_bytes: maximum size of a file, unless a single tensor is larger.
        source, destination, fresh_adapters, adapters_from, progress: as in `to_orbax`.

    Raises:
        CheckpointError, ConfigError, InputError: as in `to_orbax`.
    """
    if layout not in get_args(Layout):
        raise InputError(f"layout is {layout!r}; expected 'original' or 'native'")
    with _staged(source, destination) as (source, folder):
        config, checkpoint = _opened(source, fresh_adapters, adapters_from)
        if not adapters_only:
            _refuse_quantized(source, checkpoint)
            Processor.from_folder(source, config)
        if adapters_only and trained is not None:
            collections = {path[0] for path in trained}
            loras = {name: lora for name, lora in config.loras.items() if ADAPTERS[name].collection in collections}
            written = dataclasses.replace(config, loras=loras)
        else:
            written = config
        tensors = adapter_table(written) if adapters_only else tensors_of(layout, written)
        if not tensors:
            raise CheckpointError(f"{source}: has no adapters to write")
        check_room(folder, sum(pytorch.nbytes(t, checkpoint.parameters) for t in tensors))
        files = read_sidecar_files(source, layout, config=written, adapters_only=adapters_only)
        if card is not None:
            files["README.md"] = card.encode()
        read = _finite(_Tuned(checkpoint, trained or {}), tensors_of(layout_of(source), config))
        pytorch.write(folder, tensors, checkpoint.parameters, read, shard_bytes=shard_bytes, progress=progress)
        _write_files(folder, files, None)
        if not adapters_only:
            _log_skipped_files(source, checkpoint)


@contextlib.contextmanager
def _staged(source: str | Path, destination: str | Path) -> Iterator[tuple[Path, Path]]:
    """The source's folder, downloaded where it has to be, and the one to write to: see `staged`."""
    try:
        destination = local_path(destination)
    except InputError as error:
        raise CheckpointError(f"{destination}: cannot be written ({error})") from error
    if os.path.isdir(local_path(source)):
        source = local_path(source)
        folder = Path(os.path.realpath(source))
        if Path(os.path.realpath(destination)).is_relative_to(folder):
            raise CheckpointError(f"{destination}: lies within the source {source}; give another destination")
        written = [incomplete_path(destination), destination] if destination.name else []
        if any(folder.is_relative_to(os.path.realpath(path)) for path in written):
            raise CheckpointError(f"{source}: is where {destination} would be written first; give another destination")
    with staged(destination) as aside:
        yield local_folder(source), aside


class _Source(NamedTuple):
    """Checkpoint with some of its adapters replaced."""

    checkpoint: Checkpoint
    adapters: Sequence[PeftAdapter]

    @property
    def parameters(self) -> dict[ParamPath, jax.ShapeDtypeStruct]:
        replaced = {ADAPTERS[adapter.kind].collection for adapter in self.adapters}
        own = {path: p for path, p in self.checkpoint.parameters.items() if path[0] not in replaced}
        return own | {path: p for adapter in self.adapters for path, p in adapter.parameters.items()}

    @property
    def files(self) -> set[Path]:
        return self.checkpoint.files | {file for adapter in self.adapters for file in adapter.files}

    def read(self, path: ParamPath, dtype: str | None = None) -> np.ndarray:
        adapter = next((adapter for adapter in self.adapters if path in adapter.parameters), None)
        return (adapter or self.checkpoint).read(path, dtype)


class _Tuned(NamedTuple):
    """Checkpoint with some of its parameters replaced."""

    checkpoint: _Source
    trained: Mapping[ParamPath, np.ndarray]

    def read(self, path: ParamPath, dtype: str | None = None) -> np.ndarray:
        if path not in self.trained:
            return self.checkpoint.read(path, dtype)
        return self.trained[path].astype(dtype or self.checkpoint.parameters[path].dtype)


def _finite(
    checkpoint: "_Source | _Tuned", table: Iterable[Tensor], dtype: str | None = None
) -> Callable[[ParamPath], np.ndarray]:
    """Return what reads parameters, and checks that they are finite.

    Args:
        table: the source's tensors.
    """

    def read(path: ParamPath) -> np.ndarray:
        parameter = checkpoint.read(path, dtype)
        if not is_finite(parameter):
            layers = [t for t in table if any(part.path == path for part in t.parts)]
            name = next(t.key for t in layers if t.layer is None or not is_finite(parameter[t.layer]))
            raise CheckpointError(f"{name}: holds NaN or infinity; the checkpoint is damaged, or its training diverged")
        return parameter

    return read


def _refuse_quantized(source: Path, checkpoint: _Source) -> None:
    if (stored := stored_weights(checkpoint.parameters)) is not None:
        raise CheckpointError(
            f"{source}: its weights are {stored}, from which no others are made; convert its source, or write the "
            "adapters alone, for PEFT"
        )


def _check_maps(moments: InputMoments, parameters: Mapping[ParamPath, jax.ShapeDtypeStruct]) -> None:
    maps = {path[1:-1] for path, x in parameters.items() if is_quantized(path, len(x.shape))}
    if unknown := sorted(moments.keys() - maps):
        raise InputError(
            f"calibrate gave moments of {'/'.join(unknown[0])}, which is no linear map of this checkpoint; measure it "
            f"itself, whose maps are such as {'/'.join(min(maps))}"
        )


def _quantized(
    read: Callable[[ParamPath], np.ndarray],
    parameters: Mapping[ParamPath, jax.ShapeDtypeStruct],
    weights: Weights,
    moments: InputMoments,
) -> Callable[[ParamPath], np.ndarray]:
    """Return what reads parameters as they are quantised: a weight's integers, or the scales by a path of their own."""
    last: tuple[ParamPath, QuantizedWeight] | None = None  # scales are asked for beside their weight

    def read_quantized(path: ParamPath) -> np.ndarray:
        nonlocal last
        own = path if path in parameters else weight_of(path)
        if not is_quantized(own, len(parameters[own].shape)):
            return read(own)
        if last is None or last[0] != own:
            last = None
            weight, inputs = read(own), moments.get(own[1:-1])
            if inputs is None:
                last = own, quantize(own, jnp.asarray(weight), weights)
            else:
                last = own, quantize_to_inputs(own, weight, inputs)
        return np.asarray(last[1].values if path == own else last[1].scales)

    return read_quantized


def _log_skipped_files(source: Path, checkpoint: _Source) -> None:
    if names := skipped_files(source, checkpoint.files):
        _log.warning("Not carried along: %s", ", ".join(names))


def _opened(folder: Path, fresh_adapters: bool, adapters_from: AdaptersFrom | None) -> tuple[Phi4MMConfig, _Source]:
    """The source, with its adapters' values checked before anything is written."""
    own = read_config(folder)
    opened = open_checkpoint(folder, own)
    adapters = folder_adapters(folder, lambda: opened, own, adapters_from)
    if adapters:
        _log.warning("%s", taken_line(folder, adapters))
    config, checkpoint = with_adapters(own, adapters), _Source(opened, adapters)
    if not fresh_adapters:
        check_trained(tensors_of(layout_of(folder), config), lambda path: layers_used(checkpoint.read(path)))
    if adapters_from is None and isinstance(opened, pytorch.PyTorchCheckpoint):
        check_copies(opened, own, adapters)
    return config, checkpoint


def _write_files(folder: Path, files: Mapping[str, bytes], dtype: str | None) -> None:
    """Write the files, config.json last: a folder without it is not a checkpoint."""
    for name, content in sorted(files.items(), key=lambda file: file[0] == "config.json"):
        if name == "config.json" and dtype is not None:
            content = _with_dtype(content, dtype)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _with_dtype(config: bytes, dtype: str) -> bytes:
    """Return config.json with the dtype for PyTorch's loaders; unchanged if it already states it."""
    values = json.loads(config)
    changed = {key: dtype for key in ("torch_dtype", "dtype") if key in values and values[key] != dtype}
    try:
        return json.dumps(values | changed, indent=2, allow_nan=False).encode() + b"\n" if changed else config
    except ValueError as error:
        raise ConfigError(f"config.json: a value is NaN or infinite, which JSON cannot say ({error})") from error
