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
from flax.traverse_util import flatten_dict
from helpers.paths import TINY
from safetensors.numpy import load_file, save_file

import phi4mm_jax
from convert import record, verify
from convert import to_orbax as programs_to_orbax
from convert import to_torch as programs_to_torch
from phi4mm_jax import CheckpointError, InputError
from phi4mm_jax.checkpoint import contents, staging
from phi4mm_jax.checkpoint.convert import to_orbax, to_torch
from phi4mm_jax.checkpoint.peft import user_adapter_folder
from phi4mm_jax.checkpoint.random import write_random_checkpoint
from phi4mm_jax.mesh import make_mesh
from phi4mm_jax.model.layers import unstack_layers
from train import export as train_export

ROOT = Path(__file__).parents[2]


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


@pytest.mark.torch
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


def test_adapters_only_of_what_was_trained(original, tmp_path, monkeypatch):
    """Then the folder is one adapter's, which a server takes by any name."""
    collection = phi4mm_jax.load(original, "float32", scan=True).variables["lora_speech"]
    trained = {("lora_speech", *path): np.asarray(x) + 1 for path, x in flatten_dict(collection).items()}
    to_torch(original, tmp_path / "tuned", "native", adapters_only=True, trained=trained)
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == ["speech-lora"]
    assert user_adapter_folder(tmp_path / "tuned") == (tmp_path / "tuned" / "speech-lora", "speech")
    before = load_file(original / "speech-lora" / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "tuned" / "speech-lora" / "adapter_model.safetensors").items():
        np.testing.assert_allclose(tensor.astype(np.float32), before[name].astype(np.float32) + 1, rtol=1e-2)


def test_the_layout_is_asked_for_where_it_matters(monkeypatch, capsys):
    for module in (programs_to_torch, train_export):
        monkeypatch.setattr(sys, "argv", ["program", "from", "to", "--adapters-only"])
        assert module.parse_arguments().layout == "native"
        monkeypatch.setattr(sys, "argv", ["program", "from", "to"])
        with pytest.raises(SystemExit, match="2"):
            module.parse_arguments()
        assert "--layout is needed: original or native" in capsys.readouterr().err


@pytest.mark.slow
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
    params = model.variables["params"]
    params |= {name: unstack_layers(params[name]) for name in ("vision", "speech")}  # as on one CPU
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
    return lambda held: held.update({name: held[name].astype(np.float64)})


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
    if layout == "original":  # the copy would be taken
        shutil.rmtree(source / f"{name.split('.')[-2]}-lora")
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: all zero"):
        to_orbax(source, tmp_path / "destination")
    assert not (tmp_path / "destination").exists()
    if layout == "native":
        to_orbax(source, tmp_path / "destination", fresh_adapters=True)
        with pytest.raises(CheckpointError, match=f"{re.escape(name)}: all zero"):
            phi4mm_jax.load(tmp_path / "destination")
        phi4mm_jax.load(tmp_path / "destination", fresh_adapters=True)


def test_adapter_copies_that_differ_in_a_few_values(original, tmp_path, monkeypatch):
    """The original layout has its adapters twice; of which is meant only most of their values can tell."""
    monkeypatch.setattr(contents, "_SAMPLE", 16)
    shutil.copytree(original, tmp_path / "source")
    path = tmp_path / "source" / "speech-lora" / "adapter_model.safetensors"
    held = load_file(path)
    name = "base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"
    held[name].flat[0] += 1
    save_file(held, path)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        to_orbax(tmp_path / "source", tmp_path / "destination")
    assert not (tmp_path / "destination").exists()
    path.unlink()
    to_orbax(tmp_path / "source", tmp_path / "destination")


def test_wrong_files(original, tmp_path):
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


def entry(name, file):
    """An index with this entry."""

    def change(folder):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"][name] = file
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def as_folder(name):
    """What cannot be read by anybody: permissions do not bind an administrator."""
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


def without_half_an_adapter(folder):
    """Take half of it out of the shards; without all of it, the checkpoint is one that has no such adapter."""
    (folder / "model.safetensors.index.json").unlink()
    for path in folder.glob("model-*"):
        save_file({n: x for n, x in load_file(path).items() if ".lora_A.speech.weight" not in n}, path)


def with_value(name, number):
    def change(folder):
        def put(held):
            held[name].flat[-1] = number

        damage(folder, name, put)

    return change


LAYER = "model.layers.2.self_attn.qkv_proj"
FIRST, SECOND = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (entry("model.ghost", FIRST), f"says that model.ghost is in {FIRST}, but it is not there"),
        (
            entry("model.norm.weight", f"w/{FIRST}"),
            f"model.norm.weight is in w/{FIRST}, but shards lie beside the index",
        ),
        (entry("model.norm.weight", "x" * 300), "File name too long"),
        (as_folder(SECOND), f"{SECOND}: cannot be read (Is a directory)"),
        (as_folder("config.json"), "config.json: cannot be read (Is a directory)"),
        (as_folder("tokenizer.json"), "no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff"), "tokenizer.json: cannot be read as JSON ("),
        (
            lambda folder: (folder / "preprocessor_config.json").unlink(),
            "preprocessor_config.json: no such file; copy it from the model that this one was tuned from",
        ),
        (without_half_an_adapter, f"{LAYER}.lora_A.speech.weight: missing"),
        (with_value(f"{LAYER}.base_layer.weight", np.nan), f"{LAYER}.base_layer.weight: holds NaN"),
        (with_value(f"{LAYER}.lora_B.speech.weight", -np.inf), f"{LAYER}.lora_B.speech.weight: holds NaN or infinity"),
    ],
)
def test_sources_that_are_not_whole(change, named, original, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(original, source)
    if "lora_B" in named:  # of the folder, which would differ
        shutil.rmtree(source / "speech-lora")
    change(source)
    for convert in (to_orbax, lambda a, b: to_torch(a, b, "native")):
        with pytest.raises(CheckpointError, match=re.escape(named)):
            convert(source, tmp_path / "destination")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.torch
def test_an_adapter_of_pickle_alone(native, tmp_path):
    shutil.copytree(native, tmp_path / "source")
    (tmp_path / "source" / "vision-lora" / "adapter_model.safetensors").rename(
        tmp_path / "source" / "vision-lora" / "adapter_model.bin"
    )
    with pytest.raises(CheckpointError, match=r"vision-lora.*adapter_model\.bin: pickle files are not read"):
        to_orbax(tmp_path / "source", tmp_path / "destination")


DOWN = "params.decoder.layers.mlp.down.down"


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        (f"{DOWN}/1.0.0", None, "params/decoder/layers/mlp/down/down"),
        (f"{DOWN}/1.0.0", b"123", "params/decoder/layers/mlp/down/down"),
        (f"{DOWN}/.zarray", None, "params/decoder/layers/mlp/down/down"),
        (f"{DOWN}/.zarray", b"{", ""),
        (DOWN, None, "params/decoder/layers/mlp/down/down"),
        ("_METADATA", None, ""),
        ("", None, "a folder parameters"),
    ],
)
def test_a_damaged_conversion(file, content, named, converted, tmp_path, capsys):
    """The parameter and the file are named, by whatever reads it."""
    shutil.copytree(converted, tmp_path / "damaged")
    path = tmp_path / "damaged" / "parameters" / file
    if content is not None:
        path.write_bytes(content)
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError) as loaded:
        phi4mm_jax.load(tmp_path / "damaged")
    with pytest.raises(CheckpointError) as converted:
        to_torch(tmp_path / "damaged", tmp_path / "destination", "original")
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]
    assert verify.main([str(tmp_path / "damaged"), "--goldens", str(TINY)]) == 2
    verified = capsys.readouterr().err
    assert "error: " in verified
    for said in (str(loaded.value), str(converted.value), verified):
        assert named in said
        assert str(path if file else path.parent) in said


@pytest.mark.parametrize(
    "convert",
    [
        lambda source, place: to_orbax(source, place, dtype="int32"),
        lambda source, place: to_torch(source, place, "foo"),
    ],
)
def test_unknown_arguments(convert, original, tmp_path):
    with pytest.raises(InputError, match=r"int32|foo"):
        convert(original, tmp_path / "destination")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["original", "native", "orbax", "random"])
def test_a_killed_conversion_leaves_nothing_that_loads(way, original, tmp_path):
    """Not even at the last moment, when all weights are written."""
    last = []

    def progress(done, total):
        if done == total:
            with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
                phi4mm_jax.load(tmp_path / ".destination.incomplete")
            last.append(done)

    destination = tmp_path / "destination"
    match way:
        case "orbax":
            to_orbax(original, destination, progress=progress)
        case "random":
            write_random_checkpoint(TINY / "config.json", destination, TINY, progress=progress)
        case "original" | "native":
            to_torch(original, destination, way, progress=progress)
    assert last
    phi4mm_jax.load(destination)


def test_what_stays_behind_is_logged(original, tmp_path, caplog, capsys, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(original, source)
    (source / "figures").mkdir()
    for name in ("figures/chart.png", "training_args.bin", ".gitattributes", "vision-lora/optimizer.pt", "notes.md"):
        (source / name).write_text("")
    (source / "LICENSE").symlink_to("nowhere")
    left = "Not carried along: .gitattributes, LICENSE, figures/, training_args.bin, vision-lora/optimizer.pt"
    to_orbax(source, tmp_path / "orbax")
    assert caplog.messages == [left]
    assert (tmp_path / "orbax" / "notes.md").exists()
    monkeypatch.chdir(tmp_path)
    to_torch("orbax", "torch", "original")
    assert caplog.messages == [left]  # what was read is not left behind
    monkeypatch.setattr(sys, "argv", ["to_orbax", str(source), str(tmp_path / "program")])
    assert programs_to_orbax.main() == 0
    assert capsys.readouterr().err.splitlines().count(left) == 1


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (programs_to_orbax, ["SRC", "DST"]),
        (programs_to_torch, ["SRC", "DST", "--layout", "native"]),
        (verify, ["CHECKPOINT", "--goldens", "DIR"]),
        (record, ["--model", "HF_DIR", "--out", "DIR"]),
    ],
)
@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [(KeyboardInterrupt(), 130, "interrupted\n"), (InputError("a reason"), 2, "error: a reason\n")],
)
def test_how_programs_end(program, arguments, raised, status, said, tmp_path, monkeypatch, capsys):
    def end(*_, **__):
        raise raised

    for name in ("to_orbax", "to_torch", "read_goldens", "record"):
        monkeypatch.setattr(program, name, end, raising=False)
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    monkeypatch.chdir(tmp_path)
    assert program.main() == status
    assert capsys.readouterr().err.endswith(said)
    assert not list(tmp_path.iterdir())


def test_destinations(original, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        to_orbax(original, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["precious"]
    with pytest.raises(CheckpointError, match="within the source"):
        to_orbax(original, original / "converted")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(CheckpointError, match=r"needs [\d,]{7,} bytes, but only 1,000 are free"):
        to_orbax(original, tmp_path / "destination")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


@pytest.mark.subprocess
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


@pytest.mark.subprocess
def test_interrupted(tmp_path):
    """Killed half-way, a conversion leaves nothing under the destination's name; the next run says so, and is whole."""
    settings = json.loads((TINY / "config.json").read_text()) | {"vocab_size": 200064, "num_hidden_layers": 8}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    source, destination = tmp_path / "source", tmp_path / "destination"
    write_random_checkpoint(tmp_path / "config.json", source, TINY)
    aside = tmp_path / ".destination.incomplete"
    program = [sys.executable, "-m", "convert.to_orbax", str(source), str(destination)]
    running = subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE)
    while not any(aside.glob("parameters*")) and running.poll() is None:
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


@pytest.mark.subprocess
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
    write_random_checkpoint(TINY / "config.json", tmp_path / "whole", TINY)
    model = phi4mm_jax.load(tmp_path / "whole")
    assert jax.tree.map(jnp.shape, model.variables) == jax.tree.map(jnp.shape, tiny.variables)
