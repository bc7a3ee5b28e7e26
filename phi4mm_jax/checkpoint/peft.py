"""An adapter's folder as PEFT saves it, as a source of the model's parameters.

The model has one rank and one scale for all modules of an adapter. A module of a smaller rank is padded with zeros, one
of another scale has the ratio in its B, and one without LoRA is zero: its product adds what PEFT's does.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.checkpoint.hub import folders_beside, local_folder
from phi4mm_jax.checkpoint.layouts.foreign import EMPTY, check_prefixes
from phi4mm_jax.checkpoint.layouts.native import adapter_table
from phi4mm_jax.checkpoint.safetensors_io import DTYPES, Stored, read_header
from phi4mm_jax.checkpoint.stacked import StackedTensors, mismatch
from phi4mm_jax.checkpoint.tensor_types import Tensor
from phi4mm_jax.config import DecoderConfig, LoraConfig, Phi4MMConfig, read_adapter, read_json
from phi4mm_jax.config.peft_settings import MODULES, common_lora, module_loras
from phi4mm_jax.errors import CheckpointError, InputError

SETTINGS_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Of the decoder, as PEFT names them where it wraps the model with its head, or the model alone; with the adapter's name
# (`.default`) where the state was not saved by PEFT itself.
_NAME = re.compile(
    r"base_model\.model\.(?:model\.)?(?P<module>layers\.(?P<layer>\d+)\.(?P<projection>[\w.]+))"
    r"\.lora_(?P<matrix>[AB])(?:\.[^.]+)?\.weight"
)
_ROOT = "base_model.model.model."
_ON_MODULE = re.compile(rf"base_model\.model\.(?:model\.)?layers\.\d+\.({'|'.join(map(re.escape, MODULES))})\.\w+")
# The whole embedding, which PEFT saves beside an adapter unless it has the rows that the base's config.json says.
_EMBEDDING = re.compile(r"base_model\.model\.(model\.embed_tokens|embed_tokens|lm_head)\.weight")
_MERGE_OR_MATCH = (
    f"Is the file whole, and do its settings belong to it? Adapters can be on {', '.join(MODULES)} of the decoder; "
    "merge one that is on more with PEFT (merge_and_unload, then save_pretrained) and give it, or train it with "
    "target_modules that end with these names and exclude_modules=r'.*(audio|image)_embed.*'."
)
_MERGE_OR_RESIZE = (
    "Merge it with PEFT (merge_and_unload, then save_pretrained) and give that; or save the resized base, and the "
    "adapter by save_pretrained(FOLDER, save_embedding_layers=False)."
)


def adapter_folders(adapters: Mapping[str, str | Path] | None) -> dict[str, Path]:
    """The PEFT folders of adapters that are given beside a checkpoint, by name.

    Args:
        adapters: by the same names: a PEFT folder; one that holds it as `speech-lora` (an export of adapters, a whole
            checkpoint) or as `speech` (as PEFT saves one of several); or a repository on the Hub with either.

    Raises:
        InputError: an adapter of another name.
        CheckpointError: there is no such folder, or no adapter in it.
    """
    if not isinstance(adapters, Mapping | None):
        raise InputError(f"adapters is a {type(adapters).__name__}; expected names with folders: {{'speech': FOLDER}}")
    found: dict[str, Path] = {}
    for kind, given in (adapters or {}).items():
        if kind not in ADAPTERS:
            names = " or ".join(map(repr, ADAPTERS))
            raise InputError(f"adapter {kind!r:.60} is not known; an adapter takes the place of {names}")
        if not isinstance(given, str | os.PathLike):
            raise InputError(f"adapter {kind!r} is a {type(given).__name__}; expected the adapter's folder")
        folder = _folder_of(kind, given)
        inner = ADAPTERS[kind].folder
        places = [folder, folder / inner, folder / kind]
        held = [place for place in places if (place / SETTINGS_FILE).is_file()]
        _refuse_two(folder, held)
        place = next(iter(held), None)
        if place is None:
            others = ", ".join(sorted(str(path.parent) for path in folder.glob(f"*/{SETTINGS_FILE}")))
            hint = f"there are adapters in {others}; give that which is meant" if others else (
                "give a folder that PEFT or train.export --adapters-only has written"
            )  # fmt: skip
            raise CheckpointError(
                f"{folder}: holds no {kind} adapter: neither {SETTINGS_FILE}, nor a folder {inner} or {kind} with "
                f"one; {hint}"
            )
        others = (a.name for a in ADAPTERS.values() if place.name == a.folder and a.name != kind)
        if (other := next(others, None)) is not None:
            raise InputError(
                f"{place}: is the folder of a {other} adapter, given as {kind}; give it as {other}, or rename it"
            )
        found[kind] = place
    return found


def user_adapter_folder(given: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """Return the folder of an adapter that a user brings, and the built-in adapter whose place it takes.

    A folder that is named as an adapter's of a checkpoint (`speech-lora`), or that holds one such, is what was trained
    from that adapter (`train.export --adapters-only`), and takes its place. Any other is an adapter of PEFT's on top
    of whatever there is: None.

    Raises:
        CheckpointError: there is no such folder, or no adapter in it, or several.
    """
    folder = Path(os.path.abspath(_folder_of("user's", given)))
    places = [(folder / name, a.name) for a in ADAPTERS.values() for name in (a.folder, a.name)]
    found = [(place, name) for place, name in places if (place / SETTINGS_FILE).is_file()]
    if (folder / SETTINGS_FILE).is_file():
        _refuse_two(folder, [folder, *(place for place, _ in found)])
        return folder, next((a.name for a in ADAPTERS.values() if a.folder == folder.name), None)
    if len(found) == 1:
        return found[0]
    if found:
        names = " or ".join(str(place) for place, _ in found)
        raise CheckpointError(f"{folder}: holds {len(found)} adapters; give the one that is meant: {names}")
    raise CheckpointError(
        f"{folder}: holds no adapter: there is no {SETTINGS_FILE}; give a folder that PEFT or train.export "
        "--adapters-only has written"
    )


def _refuse_two(folder: Path, held: Sequence[Path]) -> None:
    """Refuse several adapters in a folder: PEFT saves "default" in it, and one that is named in a folder within."""
    if len(held) > 1:
        places = " and in ".join("the folder itself" if place == folder else place.name for place in held)
        inner = next(place for place in held if place != folder)
        raise CheckpointError(
            f"{folder}: holds adapters in {places}; give the one that is meant, such as {inner}; move it to a folder "
            "of its own if it is the one in the folder itself"
        )


def user_adapter_rank(given: str | os.PathLike[str], decoder: DecoderConfig) -> int:
    """Return the rank of an adapter that a user brings, by its settings alone.

    Raises:
        CheckpointError: there is no such folder, or no adapter in it, or several.
        ConfigError: a setting is missing, malformed or not supported; it names the key.
    """
    file = user_adapter_folder(given)[0] / SETTINGS_FILE
    return read_adapter(str(file), read_json(file), decoder).rank


def _folder_of(kind: str, given: str | os.PathLike[str]) -> Path:
    """Return an adapter's folder here, or the one that is downloaded.

    Raises:
        CheckpointError: there is none.
    """
    if os.path.exists(given) or not (beside := folders_beside(Path(given))):
        return local_folder(given, of_adapter=True)
    raise CheckpointError(f"{given}: no such folder for the {kind} adapter{beside}")


class PeftAdapter(StackedTensors):
    """The parameters of an adapter's folder.

    Attributes:
        folder: where it is.
        kind: its name.
        lora: rank and scale that the model has for it.
        files: those that hold it.

    Raises:
        CheckpointError: a file or tensor is missing, extra, misshapen or unreadable; it names them.
        ConfigError: a setting is missing, malformed or not supported; it names the key.
    """

    def __init__(self, folder: Path, kind: str, config: Phi4MMConfig):
        """Open a folder. `config` is the model's; its settings are the adapter's where the folder has none."""
        self.folder, self.kind = folder, kind
        own = config.loras.get(kind)
        if own is None or (folder / SETTINGS_FILE).exists():
            settings = read_json(folder / SETTINGS_FILE)
        else:
            settings = {"r": own.rank, "lora_alpha": own.alpha, "lora_dropout": own.dropout}
        self.lora: LoraConfig = read_adapter(str(folder / SETTINGS_FILE), settings, config.decoder)
        self.files = {folder / WEIGHTS_FILE}
        tensors = adapter_table(dataclasses.replace(config, loras={kind: self.lora}))
        super().__init__(tensors, _fitted(folder, settings, config.decoder.num_layers, tensors))


@dataclass(frozen=True)
class FittedTensor:
    """A matrix of a LoRA in the model's rank and scale.

    Attributes:
        stored: the matrix in its file; None for one of zeros.
        dtype: of the product with the factor, which only a power of two leaves in the matrix's own.
        factor: multiplies it, in float32.
    """

    stored: Stored | None
    shape: tuple[int, ...]
    dtype: str
    factor: float = 1.0

    def rows(self, start: int, stop: int, buffer: np.ndarray | None = None) -> np.ndarray:
        shape = stop - start, *self.shape[1:]
        if self.stored is None:
            return np.zeros(shape, DTYPES[self.dtype])
        own_rows, own_columns = self.stored.shape
        values = self.stored.rows(min(start, own_rows), min(stop, own_rows), buffer)
        if self.factor != 1.0:
            values = (values.astype(np.float32) * np.float32(self.factor)).astype(DTYPES[self.dtype])
        if values.shape == shape:
            return values
        out = np.zeros(shape, values.dtype)
        out[: len(values), :own_columns] = values
        return out


def _fitted(
    folder: Path, settings: Mapping[str, Any], num_layers: int, tensors: Iterable[Tensor]
) -> dict[str, Stored | FittedTensor]:
    """Find each tensor of the weight table, by `Tensor.key`, in the file."""
    file = folder / WEIGHTS_FILE
    loras = module_loras(str(folder / SETTINGS_FILE), settings, num_layers)
    common = common_lora(loras)
    tensors = list(tensors)
    found, resized, others, problems = _read_matrices(file)
    missing = {t.name for t in tensors if (m := _NAME.fullmatch(t.name)) and (m["module"], m["matrix"]) not in found}
    check_prefixes(file, {re.sub(r"(\.lora_[AB])\.[^.]+\.weight$", r"\1.weight", n) for n in others}, missing, _ROOT)
    usual = next((m.dtype for m in found.values() if m.dtype in DTYPES), "F32")
    stored: dict[str, Stored | FittedTensor] = {}
    for tensor in tensors:
        name = _NAME.fullmatch(tensor.name)
        assert name is not None  # the weight table has no others
        lora = loras.get((int(name["layer"]), name["projection"]))
        matrix = found.pop((name["module"], name["matrix"]), None)
        if lora is None:
            stored[tensor.key] = FittedTensor(None, tensor.shape, usual)
            if matrix is not None:
                problems.append(
                    f"{tensor.name}: is there, but by target_modules, exclude_modules or layers_to_transform the "
                    "adapter is not on it"
                )
            continue
        is_a = name["matrix"] == "A"
        shape = (lora.rank, tensor.shape[1]) if is_a else (tensor.shape[0], lora.rank)
        if matrix is None:
            problems.append(f"{tensor.name}: missing")
        elif problem := matrix.dtype_problem:
            problems.append(f"{tensor.name}: {problem}")
        elif matrix.shape != shape:
            hint = EMPTY if matrix.shape == (0,) else ""
            problems.append(f"{tensor.name}: has shape {matrix.shape}, expected {shape}{hint}")
        else:
            factor = 1.0 if is_a else lora.scale / common.scale
            dtype = matrix.dtype if math.frexp(factor)[0] == 0.5 else "F32"
            plain = shape == tensor.shape and factor == 1.0
            stored[tensor.key] = matrix if plain else FittedTensor(matrix, tensor.shape, dtype, factor)
    problems += [f"{module}.lora_{matrix}: not part of this model" for module, matrix in found]
    if problems or resized:
        remedy = _MERGE_OR_MATCH if problems else _MERGE_OR_RESIZE
        raise mismatch(f"{file}: the adapter's tensors do not match its {SETTINGS_FILE}", problems + resized, remedy)
    return stored


def _read_matrices(file: Path) -> tuple[dict[tuple[str, str], Stored], list[str], list[str], list[str]]:
    """Return the LoRA matrices of the decoder in a file, by module and "A" or "B", and what is wrong with the others.

    The latter are embeddings of a resized vocabulary; names that fit no matrix; and all problems but the embeddings.
    """
    try:
        header = read_header(file)
    except FileNotFoundError:
        pickles = sorted(p.name for p in file.parent.glob("*.bin"))
        hint = f"{pickles[0]}: pickle files are not read; save with safe_serialization=True" if pickles else ""
        raise CheckpointError(f"{file}: holds an adapter, but it is not there; {hint or 'download it again'}") from None
    found: dict[tuple[str, str], Stored] = {}
    resized: list[str] = []
    problems: list[str] = []
    others: list[str] = []
    for name, stored in header.items():
        matched = _NAME.fullmatch(name)
        if _EMBEDDING.fullmatch(name):
            resized.append(f"{name}: saved by PEFT, as of a resized vocabulary (resize_token_embeddings)")
        elif matched is None or matched["projection"] not in MODULES:
            others.append(name)
            reached = "target_modules reached a module that cannot have an adapter here"
            problems.append(f"{name}: {'is no matrix of plain LoRA' if _ON_MODULE.match(name) else reached}")
        elif (key := (matched["module"], matched["matrix"])) in found:
            problems.append(f"{name}: is there twice, under another name as well")
        else:
            found[key] = stored
    return found, resized, others, problems
