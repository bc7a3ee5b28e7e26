"""A third adapter: one entry of the registry, and it is loaded, asked for, computed, exported and trained by name."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.merging import write_merged
from helpers.paths import TINY
from safetensors.numpy import load_file, save_file

import phi4mm_jax
from infer import generate
from phi4mm_jax import InputError
from phi4mm_jax.adapters import ADAPTERS, Adapter
from phi4mm_jax.checkpoint.convert import to_torch
from phi4mm_jax.checkpoint.peft import PeftAdapter, adapter_folders
from phi4mm_jax.commands.options import adapter_folders_of
from phi4mm_jax.data.examples import Size
from phi4mm_jax.data.sizing import check_reached, propose_trainable
from phi4mm_jax.training.export import export
from phi4mm_jax.training.metrics_log import read_log
from phi4mm_jax.training.recipe import load_recipe
from train import sft

RANK, ALPHA, PROMPT = 4, 6.0, "<|user|>Which colour has it?<|end|><|assistant|>"


@pytest.fixture(scope="module", autouse=True)
def entry():
    """The registry with one entry more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ADAPTERS, "legal", Adapter("legal", index=3))
        yield


@pytest.mark.parametrize(("name", "index", "problem"), [
    ("users", 4, "users"), ("none", 4, "none"), ("A", 4, "A"), ("medical", 0, "index 0"), ("medical", 256, "index 256"),
])  # fmt: skip
def test_adapters_of_reserved_names_and_indices_are_refused(name, index, problem):
    with pytest.raises(ValueError, match=problem):
        Adapter(name, index)


@pytest.mark.parametrize(("key", "adapter", "problem"), [
    ("medical", Adapter("medical", 3), "index 3 is that of 'legal'"),
    ("medical", Adapter("finance", 4), "'finance'"),
])  # fmt: skip
def test_entries_that_clash_are_refused(key, adapter, problem):
    """By each way into the registry; one of the same name replaces an entry."""
    ways = (lambda: ADAPTERS.__setitem__(key, adapter), lambda: ADAPTERS.update({key: adapter}),
            lambda: ADAPTERS.setdefault(key, adapter))  # fmt: skip
    for enter in ways:
        with pytest.raises(ValueError, match=problem):
            enter()
    assert list(ADAPTERS) == ["vision", "speech", "legal"]
    ADAPTERS["legal"] = Adapter("legal", 3)


@pytest.fixture(scope="module")
def matrices() -> dict[str, np.ndarray]:
    """A and B of each of the decoder's matrices, by the names that PEFT gives them."""
    rng = np.random.default_rng(0)
    found = {}
    for name, weight in base_weights().items():
        outputs, inputs = weight.shape
        found[f"base_model.model.{name}.lora_A.weight"] = rng.normal(0, 0.1, (RANK, inputs)).astype(np.float32)
        found[f"base_model.model.{name}.lora_B.weight"] = rng.normal(0, 0.1, (outputs, RANK)).astype(np.float32)
    return found


def base_weights() -> dict[str, np.ndarray]:
    """The tiny checkpoint's matrices that have adapters, by module."""
    mark = ".base_layer.weight"
    shards = [load_file(path) for path in sorted(TINY.glob("model-*.safetensors"))]
    return {n.removesuffix(mark): w for shard in shards for n, w in shard.items() if n.endswith(mark)}


@pytest.fixture(scope="module")
def peft_folder(tmp_path_factory, matrices) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "legal-lora"
    folder.mkdir()
    save_file(matrices, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": r".*\.(self_attn|mlp)\..*_proj"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, peft_folder) -> Path:
    """The tiny checkpoint with the adapter's folder among its own."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("goldens*", "inputs"))
    shutil.copytree(peft_folder, folder / "legal-lora")
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory, matrices) -> phi4mm_jax.Model:
    """The tiny checkpoint whose weights have the adapter's products added by numpy."""
    folder = tmp_path_factory.mktemp("merged") / "tiny"
    write_merged(folder, matrices, ALPHA / RANK)
    return phi4mm_jax.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def model(checkpoint) -> phi4mm_jax.Model:
    return phi4mm_jax.load(checkpoint, dtype="float32")


def test_rows_of_a_third_adapter_equal_the_base_merged_with_it(model, merged, tiny):
    """In one batch with rows of others, which stay as they are."""
    batch = model.process([PROMPT] * 4)
    rows = [ADAPTERS["legal"].index, 0, ADAPTERS["speech"].index, ADAPTERS["vision"].index]
    found = np.asarray(model.logits(batch._replace(adapters=np.array(rows, np.int32))))
    length = int(batch.lengths[0])
    alone = np.asarray(merged.logits(merged.process([PROMPT])))[0, :length]
    others = np.asarray(tiny.logits(batch._replace(adapters=np.array([0, *rows[1:]], np.int32))))
    assert np.abs(alone - others[1, :length]).max() > 0.1
    np.testing.assert_allclose(found[0, :length], alone, atol=1e-4)
    np.testing.assert_allclose(found[1:, :length], others[1:, :length], atol=1e-4)


def test_a_third_adapter_is_asked_for_by_name(model, merged, peft_folder, monkeypatch):
    """By a call, and by a program's options."""
    batch = merged.process([PROMPT])
    first, tokens = int(batch.lengths[0]), np.array(batch.tokens)
    for length in range(first, first + 4):
        logits = merged.logits(batch._replace(tokens=tokens, lengths=np.array([length], np.int32)))
        tokens[0, length] = np.asarray(logits)[0, length - 1].argmax()
    answer = model.generate([PROMPT], max_new_tokens=4, adapter="legal")[0]
    assert list(answer.tokens) == tokens[0, first : first + 4].tolist()
    options = ["--adapter", "legal", "--adapter-folder", f"legal={peft_folder}"]
    monkeypatch.setattr(sys, "argv", ["generate", "--model", str(TINY), *options, "Hello"])
    arguments = generate.parse_arguments()
    assert arguments.adapter == "legal"
    folder = adapter_folders(adapter_folders_of(arguments))["legal"]
    assert PeftAdapter(folder, "legal", model.config).lora == model.config.loras["legal"]


def test_an_adapter_that_the_checkpoint_lacks_is_refused_by_name(tiny):
    with pytest.raises(InputError, match="adapter is 'legal', which this checkpoint lacks"):
        tiny.generate([PROMPT], max_new_tokens=1, adapter="legal")
    with pytest.raises(InputError, match="expected one of none, vision, speech, legal"):
        tiny.generate([PROMPT], max_new_tokens=1, adapter="medical")


@pytest.mark.parametrize("layout", ["original", "native"])
def test_a_third_adapter_is_exported(checkpoint, matrices, tmp_path, layout):
    """In a PEFT folder of its own, beside the base and alone; what is written is read again."""
    to_torch(checkpoint, tmp_path / "whole", layout)
    to_torch(tmp_path / "whole", tmp_path / "adapters", layout, adapters_only=True)
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [
        "legal-lora",
        "speech-lora",
        "vision-lora",
    ]
    for folder in (tmp_path / "whole", tmp_path / "adapters"):
        written = load_file(folder / "legal-lora" / "adapter_model.safetensors")
        assert written.keys() == matrices.keys()
        for name, matrix in matrices.items():
            np.testing.assert_array_equal(written[name], matrix)
        settings = json.loads((folder / "legal-lora" / "adapter_config.json").read_text())
        assert (settings["r"], settings["lora_alpha"]) == (RANK, ALPHA)


def test_a_third_adapter_is_trained_by_name(checkpoint, merged, matrices, tmp_path):
    """From the loss that its rows have; it alone changes, and is exported."""
    answer = "It is red."
    messages = [{"role": "user", "content": "Which colour has it?"}, {"role": "assistant", "content": answer}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    settings = {
        "model": str(checkpoint), "output": str(tmp_path / "run"), "trainable": ["lora_legal"], "dtype": "float32",
        "mesh": "fsdp=1", "dropout": False, "save_every": 2,
        "data": {
            "sources": [{"path": str(tmp_path / "data.jsonl")}], "steps": 2, "adapter": "legal",
            "packing": {"rows": 1, "lengths": [32]},
        },
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "weight_decay": 0.0},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert sft.train(load_recipe(tmp_path / "recipe.yaml")) == 0

    batch = merged.process([f"{PROMPT}{answer}<|end|><|endoftext|>"])
    first, length = len(merged.processor.tokenizer.encode(PROMPT, special=True)), int(batch.lengths[0])
    logits = np.asarray(merged.logits(batch), np.float64)[0]
    targets = np.asarray(batch.tokens)[0, first:length]
    rows = logits[first - 1 : length - 1]
    losses = (
        np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1)) + rows.max(-1) - rows[np.arange(len(rows)), targets]
    )
    lines = read_log(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(losses.mean(), rel=1e-4)
    assert lines[1]["loss"] < lines[0]["loss"]

    export(tmp_path / "run", tmp_path / "tuned", "native", step="last", adapters_only=True)
    assert {path.name for path in (tmp_path / "tuned").iterdir()} == {"legal-lora", "README.md"}, "what was trained"
    tuned = load_file(tmp_path / "tuned" / "legal-lora" / "adapter_model.safetensors")
    assert all(0 < np.abs(tuned[name] - matrix).max() < 0.01 for name, matrix in matrices.items())


def test_data_that_no_row_of_the_trained_adapter_comes_from():
    text, asked = Size((9,), 0, 0, 0, 0), Size((9,), 0, 0, 0, 3)
    with pytest.raises(InputError, match=r"need samples with the legal adapter \(data.adapter=legal\)"):
        check_reached([text], ["lora_legal"])
    check_reached([text, asked], ["lora_legal"])
    assert propose_trainable([text, asked]) == ("lora_legal",)
