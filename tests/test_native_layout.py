"""The native layout, as transformers and PEFT write it, loads to the same parameters as the original."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch_native
from conftest import TINY
from safetensors.numpy import load_file, save_file
from transformers import Phi4MultimodalForCausalLM

import phi4mm_jax
from phi4mm_jax import CheckpointError
from phi4mm_jax.checkpoint.native import native_table


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """The tiny checkpoint, saved by transformers; the adapters' folders and the tokenizer as they are."""
    folder = tmp_path_factory.mktemp("native") / "checkpoint"
    original = json.loads((TINY / "config.json").read_text())
    model = Phi4MultimodalForCausalLM(torch_native.native_config(original))
    names = set(model.state_dict()) - {"lm_head.weight"}
    tensors = {}
    for path in TINY.glob("model-*.safetensors"):
        tensors |= load_file(path)
    base = {torch_native.original_to_native(n): v for n, v in tensors.items() if ".lora_" not in n}
    assert set(base) == names
    model.load_state_dict({n: torch_native._tensor(v, model.dtype) for n, v in base.items()}, strict=False)
    model.save_pretrained(folder, max_shard_size="1MB")
    for name in ("vision-lora", "speech-lora"):
        shutil.copytree(TINY / name, folder / name)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


def test_same_parameters(tiny, native):
    model = phi4mm_jax.load(native, dtype="float32")
    assert model.config == tiny.config
    same = jax.tree.map(np.array_equal, model.variables, tiny.variables)
    assert all(jax.tree.leaves(same))


def test_adapters_may_be_absent(native, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(native, folder)
    shutil.rmtree(folder / "vision-lora")
    model = phi4mm_jax.load(folder, dtype="float32")
    assert set(model.variables) == {"params", "lora_speech"}
    with pytest.raises(phi4mm_jax.InputError, match="vision adapter"):
        model.process(["<|image_1|>"], [[TINY / "inputs" / "image_0.png"]])


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


def test_names_are_one_to_one(tiny):
    keys = [tensor.key for tensor in native_table(tiny.config)]
    assert len(set(keys)) == len(keys)
