"""A checkpoint in one of PyTorch's two layouts, as a source of parameters and as what they are written to."""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.checkpoint.layouts.foreign import EMBEDDING, EMPTY, model_tensors
from phi4mm_jax.checkpoint.layouts.native import adapter_table, native_table
from phi4mm_jax.checkpoint.layouts.original import original_table
from phi4mm_jax.checkpoint.peft import WEIGHTS_FILE as ADAPTER_FILE
from phi4mm_jax.checkpoint.peft import PeftAdapter
from phi4mm_jax.checkpoint.safetensors_io import Stored, Writer, read_header, shard
from phi4mm_jax.checkpoint.stacked import StackedTensors, mismatch
from phi4mm_jax.checkpoint.tensor_types import ParamPath, Part, Tensor
from phi4mm_jax.config import Phi4MMConfig, read_json
from phi4mm_jax.errors import CheckpointError

Layout = Literal["original", "native"]
SHARD_BYTES = 5 * 10**9
_INDEX, _SHARDS = "model.safetensors.index.json", "model*.safetensors"
_NUMBERED = re.compile(r"(.*-)(\d+)-of-(\d+)\.safetensors")
_VOCABULARY = " by vocab_size of config.json, which has to be saved after resize_token_embeddings, too"
_OTHERS = {  # what training leaves in place of safetensors, in the order in which it is looked for
    ("pytorch_model*.safetensors", "consolidated*.safetensors"): "weights are not looked for under this name; call it "
    "model.safetensors, as transformers does",
    ("*.distcp", "pytorch_model_fsdp*"): "a sharded checkpoint of FSDP is not read; merge it into safetensors "
    "(accelerate merge-weights) and give that",
    ("global_step*", "zero_to_fp32.py"): "a checkpoint of DeepSpeed is not read; make safetensors of it (python "
    "zero_to_fp32.py FOLDER OUTPUT --safe_serialization) and give those",
    ("*.bin", "*.pt", "*.pth", "*.ckpt"): "pickle files are not read; save with safe_serialization=True",
}
_LAYOUTS: dict[str, Layout] = {"phi4mm": "original", "phi4_multimodal": "native"}


def layout_of(folder: Path) -> Layout:
    """The layout whose config.json the folder has; `Phi4MMConfig.from_folder` accepts no other."""
    return _LAYOUTS[read_json(folder / "config.json")["model_type"]]


def shard_files(folder: Path) -> list[Path]:
    """The main shards; none where there are none, as in a converted checkpoint.

    Raises:
        CheckpointError: the index is unreadable.
    """
    names = set(_read_index(folder).values()) or {path.name for path in folder.glob(_SHARDS)}
    return [folder / name for name in sorted(names)]


def shard_names(folder: Path) -> set[str]:
    """The names of all tensors in the main shards; none where there are no shards.

    Raises:
        CheckpointError: the index, or without one a shard, is unreadable.
    """
    if index := _read_index(folder):
        return set(index)
    return {name for file in folder.glob(_SHARDS) for name in _header(file, indexed=False)}


def tensors_of(layout: Layout, config: Phi4MMConfig) -> list[Tensor]:
    """All tensors of a layout, those of the adapters' folders included. The original has the adapters twice."""
    return native_table(config) if layout == "native" else [*original_table(config), *adapter_table(config)]


class PyTorchCheckpoint(StackedTensors):
    """The parameters of a checkpoint folder, read when asked for, "unused" ones included.

    Attributes:
        folder: where it is.
        files: those that hold them, with their index.

    Raises:
        CheckpointError: a file or tensor is missing, extra, misshapen, unreadable or of another dtype; it names them.
    """

    def __init__(self, folder: Path, config: Phi4MMConfig):
        self.folder = folder
        layout = layout_of(folder)
        table = tensors_of(layout, config)
        adapters = []
        if layout == "native":
            adapters = [PeftAdapter(ADAPTERS[name].folder_in(folder), name, config) for name in config.loras]
        main = [t for t in table if not t.folder]
        index = _read_index(folder)
        stored = _stored(folder, index)
        self.files = {tensor.file for tensor in stored.values()} | {folder / _INDEX}
        self.files |= {folder / t.folder / ADAPTER_FILE for t in table if t.folder}  # or their copies
        self.files |= {file for adapter in adapters for file in adapter.files}
        expected = {t.key for t in main}
        held = _as_in_table(model_tensors(folder, stored, expected), expected)
        _check(held, main)
        _check_index(folder, index, stored)
        super().__init__(
            [*main, *(t for adapter in adapters for t in adapter.tensors)],
            {**held, **{key: matrix for adapter in adapters for key, matrix in adapter.stored.items()}},
        )


def _stored(folder: Path, index: Mapping[str, str]) -> dict[str, Stored]:
    """Find each tensor of the main shards, by its name."""
    stored: dict[str, Stored] = {}
    names = sorted(set(index.values())) if index else _unindexed(folder)
    for file in (folder / name for name in names):
        for name, tensor in _header(file, indexed=bool(index)).items():
            if name in stored:
                raise CheckpointError(
                    f"{folder}: tensor {name} is in {stored[name].file.name} and again in {file.name}; remove "
                    "one of them"
                )
            stored[name] = tensor
    return stored


def _header(file: Path, indexed: bool) -> dict[str, Stored]:
    try:
        return read_header(file)
    except FileNotFoundError:
        cause = f"is named by {_INDEX}, but it is not there" if indexed else "is a link to what is not there"
        raise CheckpointError(f"{file}: {cause}; download it again") from None


def _as_in_table(stored: Mapping[str, Stored], expected: Collection[str]) -> dict[str, Stored]:
    """The tensors, those of adapted modules under the table's names.

    PEFT calls a wrapped module's own weight `base_layer`; merging takes that away.
    """

    def renamed(name: str) -> str:
        stem = name.removesuffix(".weight").removesuffix(".base_layer")
        aliases = [alias for alias in (f"{stem}.weight", f"{stem}.base_layer.weight") if alias in expected]
        return aliases[0] if name not in expected and aliases and aliases[0] not in stored else name

    return {renamed(name): tensor for name, tensor in stored.items()}


def _check_index(folder: Path, index: Mapping[str, str], stored: Mapping[str, Stored]) -> None:
    for name, file in index.items():
        found = f"in {stored[name].file.name}" if name in stored else "not there"
        if found != f"in {file}":
            raise CheckpointError(
                f"{folder / _INDEX}: says that {name} is in {file}, but it is {found}; download both again"
            )


def _read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor in the main shards, where the folder has an index."""
    if not os.path.lexists(folder / _INDEX):
        return {}
    mapping = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(v, str) for v in mapping.values()):
        raise CheckpointError(f"{folder / _INDEX}: has no weight_map of tensor names to files; download it again")
    for name, file in mapping.items():
        if file != Path(file).name:
            raise CheckpointError(f"{folder / _INDEX}: says that {name} is in {file}, but shards lie beside the index")
    alone = folder / "model.safetensors"
    if alone.exists() and alone.name not in mapping.values():
        raise CheckpointError(
            f"{alone}: is there besides the shards that {_INDEX} names, and transformers would read it in their place; "
            "remove it, or the index with its shards, whichever is not meant"
        )
    return mapping


def _unindexed(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.glob(_SHARDS))
    for name in names:
        numbered = _NUMBERED.fullmatch(name)
        if numbered is None:
            continue
        for number in range(1, int(numbered[3]) + 1):
            other = f"{numbered[1]}{number:0{len(numbered[2])}}-of-{numbered[3]}.safetensors"
            if other not in names:
                raise CheckpointError(f"{folder / other}: belongs to {name}, but it is not there; download it again")
    if not names:
        hint = "Give the folder that holds config.json and the model's shards, or convert again."
        raise CheckpointError(
            f"{folder}: holds no weights: neither {_INDEX}, nor a model*.safetensors file, nor, as converted ones do, "
            f"a folder parameters. {_hint_at_others(folder) or hint}"
        )
    return names


def _hint_at_others(folder: Path) -> str:
    """Return what to do with the weights in a folder that are not read, such as pickles; "" where there are none."""
    if quantised := sorted(p.name for p in folder.glob("*.gguf")):
        return f"{quantised[0]}: GGUF files, mostly of quantised weights, are not read; give the safetensors"
    for patterns, remedy in _OTHERS.items():
        if names := ", ".join(sorted(p.name for pattern in patterns for p in folder.glob(pattern))):
            return f"{names}: {remedy}"
    return ""


def _check(stored: Mapping[str, Stored], table: Iterable[Tensor]) -> None:
    """Check that the files hold exactly the tensors of the table, with their shapes, in floating dtypes."""
    expected = {t.key: t for t in table}
    problems = [f"{n}: missing" for n in expected if n not in stored]
    problems += [f"{n}: not part of this model (in {stored[n].file.name})" for n in stored if n not in expected]
    for tensor, entry in ((t, stored[n]) for n, t in expected.items() if n in stored):
        if entry.shape != tensor.shape:
            hint = _VOCABULARY if tensor.key == EMBEDDING and entry.shape[1:] == tensor.shape[1:] else ""
            if entry.shape == (0,):
                hint = EMPTY
            problems.append(f"{tensor.key}: has shape {entry.shape}, expected {tensor.shape}{hint}")
        if problem := entry.dtype_problem:
            problems.append(f"{tensor.key}: {problem}")
    if problems:
        remedy = "Is the download complete, and does config.json belong to it?"
        if not any(": missing" in problem for problem in problems) and all(".lora_" in problem for problem in problems):
            remedy = "Merge this adapter of PEFT's (merge_and_unload(), then save_pretrained), or save it on its own."
        raise mismatch("the checkpoint's tensors do not match its config.json", problems, remedy)


def write(
    folder: Path,
    tensors: Iterable[Tensor],
    parameters: Mapping[ParamPath, jax.ShapeDtypeStruct],
    read: Callable[[ParamPath], np.ndarray],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write tensors to a folder: main shards with their index, and the adapters' files; one parameter at a time.

    Args:
        parameters: shape and dtype of at least all parameters that the tensors are made of.
        read: gives a parameter's values.
        progress: called with the bytes written so far, and in all.
    """
    tensors = list(tensors)
    sizes = {t.key: nbytes(t, parameters) for t in tensors}
    files = _files(folder, tensors, sizes, shard_bytes)
    rows: dict[ParamPath, list[tuple[Tensor, Part, int]]] = {}
    for tensor in tensors:
        for part, start, _ in tensor.spans():
            rows.setdefault(part.path, []).append((tensor, part, start))
    contents: dict[Path, dict[str, tuple[tuple[int, ...], np.dtype]]] = {}
    for tensor in tensors:
        described = tensor.shape, np.dtype(parameters[tensor.parts[0].path].dtype)
        contents.setdefault(files[tensor.key], {})[tensor.name] = described

    done, total = 0, sum(sizes.values())
    with Writer(contents) as writer, ThreadPoolExecutor(2) as pool:
        for path, places in rows.items():
            for written in pool.map(partial(_put, writer, files, read(path)), places):
                done += written
                if progress is not None:
                    progress(done, total)


def _put(writer: Writer, files: Mapping[str, Path], parameter: np.ndarray, place: tuple[Tensor, Part, int]) -> int:
    """Write (a layer of) a parameter to its rows of a tensor; returns how many bytes."""
    tensor, part, start = place
    rows = part.to_rows(parameter if tensor.layer is None else parameter[tensor.layer])
    writer.write(files[tensor.key], tensor.name, start, rows)
    return rows.nbytes


def nbytes(tensor: Tensor, parameters: Mapping[ParamPath, jax.ShapeDtypeStruct]) -> int:
    """Return the bytes of a tensor, in the dtype of its parameters."""
    return int(np.prod(tensor.shape)) * np.dtype(parameters[tensor.parts[0].path].dtype).itemsize


def _files(folder: Path, tensors: list[Tensor], sizes: Mapping[str, int], limit: int) -> dict[str, Path]:
    """Return the file that each tensor goes to; writes the index where there are several main files."""
    files = {t.key: folder / t.folder / ADAPTER_FILE for t in tensors if t.folder}
    shards = shard(((t.name, sizes[t.key]) for t in tensors if not t.folder), limit)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    where = {tensor: name for name, held in zip(names, shards, strict=True) for tensor in held}
    if len(shards) > 1:
        total = sum(sizes[name] for name in where)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, allow_nan=False) + "\n")
    return files | {tensor: folder / name for tensor, name in where.items()}
