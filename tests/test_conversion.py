"""Conversion: nothing is lost in either direction, and what is wrong is an error that leaves nothing behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from safetensors.numpy import load_file, save_file

import phi4mm_jax
from phi4mm_jax import CheckpointError
from phi4mm_jax.checkpoint import staging
from phi4mm_jax.checkpoint.convert import to_orbax, to_torch
from phi4mm_jax.checkpoint.random import write_random_checkpoint
from phi4mm_jax.sharding import make_mesh

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The tiny checkpoint without the goldens."""
    folder = tmp_path_factory.mktemp("original") / "checkpoint"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("goldens*", "inputs"))
    return folder


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "checkpoint"
    to_orbax(original, folder)
    return folder


def tensors(folder):
    """All tensors: (folder, name) -> array."""
    return {
        (str(path.parent.relative_to(folder)), name): value
        for path in folder.rglob("*.safetensors")
        for name, value in load_file(path).items()
    }


def other_files(folder):
    """All files but weights and their index."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".safetensors" and "index" not in path.name
    }


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert ours[key].shape == value.shape, key
        assert ours[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("layout", ["original", "native"])
def test_round_trip(layout, tmp_path, request):
    source = request.getfixturevalue(layout)
    to_orbax(source, tmp_path / "orbax")
    to_torch(tmp_path / "orbax", tmp_path / "back", layout, shard_bytes=10**6)
    assert_same_tensors(tensors(tmp_path / "back"), tensors(source))
    assert other_files(tmp_path / "back") == other_files(source)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    shards = list((tmp_path / "back").glob("model-*.safetensors"))
    assert set(index["weight_map"].values()) == {p.name for p in shards}
    assert len(shards) > 1
    assert max(p.stat().st_size for p in shards) < 10**6 + 10**5  # a header more
    for path in shards:
        assert {n for n, f in index["weight_map"].items() if f == path.name} == set(load_file(path))
    assert index["metadata"]["total_size"] == sum(v.nbytes for (f, _), v in tensors(source).items() if f == ".")


def test_bfloat16_round_trip(original, tmp_path):
    """The release's dtype, and what `--dtype` makes of it."""
    to_orbax(original, tmp_path / "half", dtype="bfloat16")
    to_torch(tmp_path / "half", tmp_path / "torch", "original")
    to_orbax(tmp_path / "torch", tmp_path / "again")
    to_torch(tmp_path / "again", tmp_path / "back", "original")
    assert_same_tensors(tensors(tmp_path / "back"), tensors(tmp_path / "torch"))
    whole = tensors(original)
    for key, value in tensors(tmp_path / "torch").items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, whole[key].astype(jnp.bfloat16))
    assert json.loads((tmp_path / "torch" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_original_to_native_is_what_transformers_saves(original, native, tmp_path):
    to_torch(original, tmp_path / "native", "native")
    assert_same_tensors(tensors(tmp_path / "native"), tensors(native))
    to_torch(native, tmp_path / "original", "original")
    assert_same_tensors(tensors(tmp_path / "original"), tensors(original))
    assert phi4mm_jax.load(tmp_path / "original", dtype="float32").config == phi4mm_jax.load(original).config


def test_adapters_only(original, converted, tmp_path):
    to_torch(converted, tmp_path / "adapters", "native", adapters_only=True)
    files = {str(p.relative_to(tmp_path / "adapters")) for p in (tmp_path / "adapters").rglob("*") if p.is_file()}
    each = ("adapter_config.json", "adapter_model.safetensors")
    assert files == {f"{kind}-lora/{name}" for kind in ("vision", "speech") for name in each}
    assert_same_tensors(tensors(tmp_path / "adapters"), {k: v for k, v in tensors(original).items() if k[0] != "."})


def test_converted_checkpoints_load(tiny, converted):
    model = phi4mm_jax.load(converted, dtype="float32")
    assert jax.tree.all(jax.tree.map(np.array_equal, model.variables, tiny.variables))
    assert model.generate(["Hello"], max_new_tokens=4) == tiny.generate(["Hello"], max_new_tokens=4)
    half = phi4mm_jax.load(converted)
    assert {x.dtype for x in jax.tree.leaves(half.variables)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(
        half.variables["params"]["decoder"]["embedding"],
        tiny.variables["params"]["decoder"]["embedding"].astype(jnp.bfloat16),
    )


def test_each_device_holds_its_share(tiny, converted):
    model = phi4mm_jax.load(converted, dtype="float32", mesh=make_mesh(fsdp=4, tensor=2))
    whole = share = 0
    for leaf in jax.tree.leaves(model.variables):
        shares = {s.device: s.data.nbytes for s in leaf.addressable_shards}
        assert len(shares) == 8
        assert len(set(shares.values())) == 1
        whole += leaf.nbytes
        share += shares[jax.devices()[0]]
    print(f"each of 8 devices holds {share / whole:.1%} of {whole} bytes")
    assert share < 0.2 * whole  # 12.5% but for norms, biases and what two and four do not divide in so small a model
    assert jax.tree.all(jax.tree.map(np.array_equal, model.variables, tiny.variables))


# ------------------------------------------------------------------------------------------------ faults


def one_of_each_class(names):
    """The last tensor of each name that differs in more than its numbers."""
    return sorted({re.sub(r"\.\d+\.", ".N.", name): name for name in sorted(names)}.values())


def damage(folder, name, change):
    """Apply `change` to the dictionary of tensors that `name` is in."""
    for path in sorted(folder.glob("model*.safetensors")):
        held = load_file(path)
        if name in held:
            change(held)
            save_file(held, path)
            return
    raise AssertionError(name)


def missing(name):
    return lambda held: held.pop(name)


def renamed(name):
    return lambda held: held.update({f"{name}2": held.pop(name)})


def transposed(name):
    return lambda held: held.update({name: np.ascontiguousarray(held[name].T)})


def another_dtype(name):
    return lambda held: held.update({name: held[name].astype(np.float16)})


@pytest.mark.parametrize("fault", [missing, renamed, transposed, another_dtype])
def test_a_fault_in_any_class_of_tensor(fault, original, tmp_path):
    """A transposed square matrix is not among them: nothing in the files tells it from a right one."""
    weights = {name: value for (folder, name), value in tensors(original).items() if folder == "."}
    shutil.copytree(original, tmp_path / "source")
    classes = one_of_each_class(weights)
    assert len(classes) > 100
    for name in classes:
        if fault is transposed and weights[name].T.shape == weights[name].shape:
            continue
        kept = {p: p.read_bytes() for p in (tmp_path / "source").glob("model-*")}
        damage(tmp_path / "source", name, fault(name))
        with pytest.raises(CheckpointError, match=re.escape(name)):
            to_orbax(tmp_path / "source", tmp_path / "destination")
        with pytest.raises(CheckpointError, match=re.escape(name)):
            to_torch(tmp_path / "source", tmp_path / "destination", "native")
        for path, content in kept.items():
            path.write_bytes(content)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("layout", ["original", "native"])
def test_all_zero_adapters(layout, tmp_path, request):
    source = tmp_path / "source"
    shutil.copytree(request.getfixturevalue(layout), source)
    stored = {name: path for path in source.rglob("*.safetensors") for name in load_file(path)}
    name = next(n for n in stored if "layers.1" in n and "lora_B" in n and (layout == "native") == ("base_model" in n))
    held = load_file(stored[name])
    save_file(held | {name: np.full_like(held[name], -0.0)}, stored[name])
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: all zero"):
        to_orbax(source, tmp_path / "destination")
    assert not (tmp_path / "destination").exists()
    if layout == "native":
        to_orbax(source, tmp_path / "destination", fresh_adapters=True)
        with pytest.raises(CheckpointError, match=f"{re.escape(name)}: all zero"):
            phi4mm_jax.load(tmp_path / "destination")
        phi4mm_jax.load(tmp_path / "destination", fresh_adapters=True)


def test_adapter_copies_must_agree(original, tmp_path):
    """The original layout has its adapters twice, and its users read one or the other."""
    shutil.copytree(original, tmp_path / "source")
    path = tmp_path / "source" / "speech-lora" / "adapter_model.safetensors"
    held = load_file(path)
    name = "base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"
    save_file(held | {name: held[name] + 1}, path)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        to_orbax(tmp_path / "source", tmp_path / "destination")
    assert not (tmp_path / "destination").exists()
    path.unlink()
    to_orbax(tmp_path / "source", tmp_path / "destination")


def test_wrong_files(original, converted, tmp_path):
    source, destination = tmp_path / "source", tmp_path / "destination"
    shutil.copytree(original, source)

    def fails(message, folder=source):
        for convert in (to_orbax, lambda a, b: to_torch(a, b, "native")):
            with pytest.raises(CheckpointError, match=message):
                convert(folder, destination)
        assert not destination.exists()
        assert not list(tmp_path.glob(".*"))

    first, second, _ = (source / f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    whole = first.read_bytes()
    first.write_bytes(whole[:-100])
    fails(first.name)
    first.write_bytes(whole[:100])
    fails(first.name)
    first.write_bytes(whole)

    index = source / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    some = next(iter(load_file(first)))
    index.write_text(json.dumps(listed | {"weight_map": listed["weight_map"] | {some: "elsewhere.safetensors"}}))
    fails(r"elsewhere\.safetensors: is named by")
    index.write_text(json.dumps(listed | {"weight_map": listed["weight_map"] | {some: second.name}}))
    fails(re.escape(some))
    twice = index.read_text().replace('"weight_map": {', f'"weight_map": {{"{some}": "{second.name}",', 1)
    index.write_text(twice)
    fails(f"'{re.escape(some)}' is in one object twice")
    shutil.copy(first, source / "again.safetensors")
    index.write_text(json.dumps(listed | {"weight_map": listed["weight_map"] | {some: "again.safetensors"}}))
    fails("and again in")
    index.write_text(json.dumps(listed))

    for path in source.glob("model*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"")
    fails("pickle")
    fails("nowhere: no such folder", tmp_path / "nowhere")

    shutil.copytree(converted, tmp_path / "damaged")
    gone = next((tmp_path / "damaged" / "parameters").glob("params.decoder.layers.mlp.down*"))
    shutil.rmtree(gone)
    fails("parameters", tmp_path / "damaged")
    with pytest.raises(CheckpointError, match="parameters"):
        phi4mm_jax.load(tmp_path / "damaged")


def test_destinations(original, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        to_orbax(original, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["precious"]
    with pytest.raises(CheckpointError, match="within the source"):
        to_orbax(original, original / "converted")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB, but .* has only"):
        to_orbax(original, tmp_path / "destination")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("program", [["convert.to_orbax"], ["convert.to_torch", "--layout", "native"]])
def test_a_disk_that_fills_up(program, original, tmp_path):
    """A limit on the size of files stands for the full disk: writes fail half-way."""
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__')"
    )
    name, *options = program
    result = subprocess.run(
        [sys.executable, "-c", limited, name, str(original), str(tmp_path / "destination"), *options],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    said = result.stderr.replace("\n", " ")
    assert re.search(r"error: .*destination: cannot be written, nothing was left there .the disk is full", said)
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_interrupted(tmp_path):
    """Killed half-way, a conversion leaves nothing under the destination's name; the next run says so, and is whole."""
    settings = json.loads((TINY / "config.json").read_text()) | {"vocab_size": 200064, "num_hidden_layers": 8}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    source, destination = tmp_path / "source", tmp_path / "destination"
    write_random_checkpoint(tmp_path / "config.json", source)
    aside = tmp_path / ".destination.incomplete"
    program = [sys.executable, "-m", "convert.to_orbax", str(source), str(destination)]
    running = subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE)
    while not aside.exists() and running.poll() is None:
        time.sleep(0.001)
    with pytest.raises(CheckpointError, match="another process is writing it"):
        to_orbax(source, destination)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    assert aside.exists()
    assert not destination.exists()

    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "interrupted" in result.stderr
    assert not aside.exists()
    to_torch(destination, tmp_path / "back", "original")
    assert_same_tensors(tensors(tmp_path / "back"), tensors(source))


def test_help_shows_how():
    environment = {**os.environ, "COLUMNS": "100"}
    for program in ("convert.to_orbax", "convert.to_torch"):
        result = subprocess.run(
            [sys.executable, "-m", program, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0
        assert "SRC" in result.stdout
        assert "DST" in result.stdout


def test_random_checkpoints(tiny, tmp_path):
    write_random_checkpoint(TINY / "config.json", tmp_path / "one", shard_bytes=10**6)
    write_random_checkpoint(TINY / "config.json", tmp_path / "two", shard_bytes=10**6)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert_same_tensors(one, two)
    assert {v.dtype for v in one.values()} == {jnp.dtype("bfloat16")}
    embedding = one[".", "model.embed_tokens.weight"].astype(np.float32)
    assert abs(embedding.std() - 0.02) < 1e-3
    write_random_checkpoint(TINY / "config.json", tmp_path / "three", seed=1)
    assert not np.array_equal(tensors(tmp_path / "three")[".", "model.embed_tokens.weight"], embedding)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(TINY / name, tmp_path / "one")
    model = phi4mm_jax.load(tmp_path / "one")
    assert jax.tree.map(jnp.shape, model.variables) == jax.tree.map(jnp.shape, tiny.variables)
