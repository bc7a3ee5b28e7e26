"""Checkpoints whose weights have an adapter's products added by numpy."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from helpers.paths import TINY


def write_merged(folder: Path, matrices: Mapping[str, np.ndarray], scale: float) -> None:
    """Copy the tiny checkpoint, and add scale * B A to the weights for which there are matrices of PEFT."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("goldens*", "inputs"))
    for path in folder.glob("model-*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            module = f"base_model.model.{name.removesuffix('.base_layer.weight')}"
            if f"{module}.lora_A.weight" in matrices:
                product = matrices[f"{module}.lora_B.weight"] @ matrices[f"{module}.lora_A.weight"]
                tensors[name] = tensors[name].astype(np.float32) + scale * product
        save_file(tensors, path)
