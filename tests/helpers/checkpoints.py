"""Tensors of checkpoints, read and saved."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from phi4mm_jax.checkpoint.tensor_types import UNUSED, Tensor


def shards(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint's main shards."""
    return {name: x for path in sorted(folder.glob("model*.safetensors")) for name, x in load_file(path).items()}


def save_shards(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Save all tensors in one file, as small models are saved."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def original_tensor(tensor: Tensor, variables) -> np.ndarray:
    """A tensor of the original layout, from variables with stacked layers; zeros for one that is never used."""
    if tensor.collection == UNUSED:
        return np.zeros(tensor.shape)
    values = []
    for part in tensor.parts:
        value = variables
        for key in part.path:
            value = value[key]
        value = np.asarray(value)  # an index into an array of jax would compile a program for its shape
        values.append(value if tensor.layer is None else value[tensor.layer])
    return joined(tensor, values)


def joined(tensor: Tensor, parameters: Sequence[np.ndarray]) -> np.ndarray:
    """A whole tensor from the parameters of its parts."""
    rows = [part.to_rows(x) for part, x in zip(tensor.parts, parameters, strict=True)]
    return np.concatenate([x.reshape(-1, *tensor.shape[1:]) for x in rows])
