"""The safetensors shards of a folder, memory-mapped: tensors are read when asked for, by rows where wanted."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (makes numpy know bfloat16, which safetensors asks it for)
import numpy as np
from safetensors import SafetensorError, safe_open

from phi4mm_jax.checkpoint.table import Tensor
from phi4mm_jax.config import read_json
from phi4mm_jax.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16")


class Shards:
    """The tensors of a checkpoint, by `Tensor.key`. A context manager: files are closed at its end.

    Args:
        folder: holds the main shards.
        adapters: folders within it whose adapter file belongs to the checkpoint too.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, or a tensor is in two shards.
    """

    def __init__(self, folder: Path, adapters: Iterable[str] = ()):
        self._stack = contextlib.ExitStack()
        self._homes: dict[str, tuple[str, Any]] = {}  # tensor: (file's name, open file)
        files = [("", name) for name in _shard_names(folder)] + [(a, "adapter_model.safetensors") for a in adapters]
        for place, name in files:
            handle = self._open(folder / place / name)
            for tensor in handle.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                key = f"{place}/{tensor}" if place else tensor
                if key in self._homes:
                    raise CheckpointError(
                        f"{folder}: tensor {key} is in {self._homes[key][0]} and again in {name}; remove one of them"
                    )
                self._homes[key] = name, handle

    def _open(self, path: Path):
        try:
            return self._stack.enter_context(safe_open(path, framework="np"))
        except FileNotFoundError:
            cause = "holds an adapter" if path.name == "adapter_model.safetensors" else f"is named by {_INDEX}"
            raise CheckpointError(f"{path}: {cause}, but it is not there; download it again") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({error}); download it again. "
                f"It has {path.stat().st_size if path.exists() else 0} bytes."
            ) from error

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def rows(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        return self._homes[tensor.key][1].get_slice(tensor.name)[start:stop]

    def check(self, table: Iterable[Tensor]) -> None:
        """The files hold exactly the tensors of the table, with their shapes, in a floating dtype.

        Raises:
            CheckpointError: otherwise; it names the tensors and what is wrong with them.
        """
        expected = {t.key: t for t in table}
        problems = [f"{n}: missing" for n in expected if n not in self._homes]
        problems += [f"{n}: not part of this model (in {self._homes[n][0]})" for n in self._homes if n not in expected]
        for name in expected.keys() & self._homes.keys():
            view = self._homes[name][1].get_slice(expected[name].name)
            if (shape := tuple(view.get_shape())) != expected[name].shape:
                problems.append(f"{name}: has shape {shape}, expected {expected[name].shape}")
            if view.get_dtype() not in _DTYPES:
                problems.append(f"{name}: has dtype {view.get_dtype()}, expected one of {', '.join(_DTYPES)}")
        if problems:
            shown = "\n  ".join(sorted(problems)[:20])
            more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise CheckpointError(
                f"the checkpoint's tensors do not match its config.json ({len(problems)} problems):\n  {shown}{more}\n"
                "Is the download complete, and does config.json belong to it?"
            )


def _shard_names(folder: Path) -> list[str]:
    if (folder / _INDEX).exists():
        mapping = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
            raise CheckpointError(f"{folder / _INDEX}: has no weight_map of tensor names to files; download it again")
        return sorted(set(mapping.values()))
    names = sorted(p.name for p in folder.glob("model*.safetensors"))
    if not names:
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        hint = (
            f"It has {', '.join(pickles)}: pickle files are not read; save the model with safe_serialization=True."
            if pickles
            else "Give the folder that holds config.json and the model's shards."
        )
        raise CheckpointError(f"{folder}: holds neither {_INDEX} nor a model*.safetensors file. {hint}")
    return names
