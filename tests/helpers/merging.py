"""Adapters' folders of random matrices, and checkpoints whose weights have their products added by numpy."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from helpers.paths import TINY


def write_adapter(
    folder: Path, rank: int, alpha: float, seed: int, *, checkpoint: Path = TINY, **settings: Any
) -> dict[str, np.ndarray]:
    """Write random matrices on all of the decoder's modules as PEFT does; return them."""
    random, mark, matrices = np.random.default_rng(seed), ".base_layer.weight", {}
    shards = [load_file(path) for path in sorted(checkpoint.glob("model*.safetensors"))]
    weights = {n.removesuffix(mark): w for shard in shards for n, w in shard.items() if n.endswith(mark)}
    for name, weight in weights.items():
        for part, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
            matrices[f"base_model.model.{name}.lora_{part}.weight"] = random.normal(0, 0.1, shape).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(matrices, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha} | settings
    settings.setdefault("target_modules", r".*\.(self_attn|mlp)\..*_proj")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return matrices


def write_merged(folder: Path, matrices: Mapping[str, np.ndarray], scale: float, *, checkpoint: Path = TINY) -> None:
    """Copy a checkpoint, and add scale * B A to the weights for which there are matrices of PEFT."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("goldens*", "inputs"))
    for path in folder.glob("model*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            module = f"base_model.model.{name.removesuffix('.base_layer.weight')}"
            if f"{module}.lora_A.weight" in matrices:
                product = matrices[f"{module}.lora_B.weight"] @ matrices[f"{module}.lora_A.weight"]
                tensors[name] = tensors[name].astype(np.float32) + scale * product
        save_file(tensors, path)
