"""The native layout, as transformers and PEFT write it, loads to the same parameters as the original."""

import shutil

import jax
import numpy as np
import pytest
from helpers.paths import TINY
from safetensors.numpy import load_file, save_file

import phi4mm_jax
from phi4mm_jax import CheckpointError
from phi4mm_jax.checkpoint.layouts.native import native_table


@pytest.mark.torch
def test_same_parameters(tiny, native):
    model = phi4mm_jax.load(native, dtype="float32")
    assert model.config == tiny.config
    same = jax.tree.map(np.array_equal, model.variables, tiny.variables)
    assert all(jax.tree.leaves(same))


@pytest.mark.torch
def test_adapters_may_be_absent(native, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(native, folder)
    shutil.rmtree(folder / "vision-lora")
    model = phi4mm_jax.load(folder, dtype="float32")
    assert set(model.variables) == {"params", "lora_speech"}
    with pytest.raises(phi4mm_jax.InputError, match="vision adapter"):
        model.process(["<|image_1|>"], [[TINY / "inputs" / "image_0.png"]])


@pytest.mark.torch
def test_zero_adapters_are_an_error(native, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(native, folder)
    path = folder / "speech-lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.2.self_attn.qkv_proj.lora_B.weight"
    save_file(tensors | {name: np.zeros_like(tensors[name])}, path)
    with pytest.raises(CheckpointError, match=f"speech-lora/{name}: all zero"):
        phi4mm_jax.load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="holds an adapter"):
        phi4mm_jax.load(folder)
    shutil.copy(native / "speech-lora" / path.name, path)
    (path.parent / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"speech-lora/adapter_config\.json: no such file"):
        phi4mm_jax.load(folder)


def test_names_are_one_to_one(tiny):
    keys = [tensor.key for tensor in native_table(tiny.config)]
    assert len(set(keys)) == len(keys)
