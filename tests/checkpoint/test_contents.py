"""Checkpoints that have parts of the model alone, or adapters merged into the weights."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers.cases import golden_cases, media_of
from helpers.checkpoints import save_shards, shards
from helpers.paths import TINY
from safetensors.numpy import load_file, save_file

import phi4mm_jax
from phi4mm_jax import CheckpointError, ConfigError, InputError
from phi4mm_jax.checkpoint.convert import to_orbax, to_torch
from phi4mm_jax.engine import EngineConfig, Request
from phi4mm_jax.training.base import base_fingerprint

pytestmark = pytest.mark.torch

CASES = {c["name"]: c for c in golden_cases()}
IMAGE = "<|user|><|image_1|>hello there<|end|><|assistant|>"
CLIP = "<|user|><|audio_1|>hello there<|end|><|assistant|>"
MEDIA = {"image": [TINY / "inputs" / "image_0.png"], "clip": [TINY / "inputs" / "audio_0.flac"]}
NATIVE_FOLDERS = ("vision-lora", "speech-lora")


@pytest.fixture
def folder(tmp_path, native, request):
    """A copy of the tiny checkpoint: in the original layout, or in that of the test's parameter."""
    source = {"original": TINY, "native": native}[getattr(request, "param", "original")]
    copy = tmp_path / "checkpoint"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("goldens*", "inputs"))
    return copy


def without_folders(folder):
    for name in NATIVE_FOLDERS:
        shutil.rmtree(folder / name)


def adapter_of(folder, kind):
    """PEFT's tensors of an adapter, by the module of the decoder: (A, B)."""
    held = load_file(folder / f"{kind}-lora" / "adapter_model.safetensors")
    modules = {name.split(".lora_")[0] for name in held}
    return {
        m.removeprefix("base_model.model."): tuple(held[f"{m}.lora_{x}.weight"].astype(np.float32) for x in "AB")
        for m in modules
    }


def merge(folder, kind):
    """Leave what PEFT's merge_and_unload does: W + (alpha / r) B A under the modules' own names."""
    settings = json.loads((folder / f"{kind}-lora" / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    held = {n.replace(".base_layer.", "."): x for n, x in shards(folder).items() if ".lora_" not in n}
    for module, (a, b) in adapter_of(folder, kind).items():
        weight = held[f"{module}.weight"]
        held[f"{module}.weight"] = (weight.astype(np.float32) + scale * b @ a).astype(weight.dtype)
    without_folders(folder)
    save_shards(folder, held)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in ("vision_lora", "speech_lora")}))


def check_golden(model, goldens, name, **arguments):
    """The greedy tokens of a case, and by an engine as well, are the original implementation's."""
    case, expected = CASES[name], goldens[f"{name}.generated"].tolist()
    (completion,) = model.generate([case["prompt"]], **media_of(case), max_new_tokens=len(expected), **arguments)
    assert completion.tokens == expected
    logits = np.asarray(model.logits(model.process([case["prompt"]], **media_of(case))))[0, : case["tokens"]]
    golden = goldens[f"{name}.logits"]
    np.testing.assert_allclose(logits[-len(golden) :], golden, atol=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["original", "native"], indirect=True)
def test_merged_adapters(folder, goldens, tmp_path):
    merge(folder, "vision")
    model = phi4mm_jax.load(folder, dtype="float32", scan=True)  # less to compile
    assert set(model.variables) == {"params"}
    check_golden(model, goldens, "vision")
    engine = model.engine(EngineConfig(slots=1, cache_tokens=2048))
    request = Request(IMAGE, images=MEDIA["image"], max_new_tokens=3)
    asked = [request, Request(IMAGE, images=MEDIA["image"], max_new_tokens=3, adapter="none")]
    own, none = [completion.tokens for _, completion in sorted(engine.run(asked))]
    assert own == none != []
    for layout in ("original", "native"):  # and as it is through conversions
        to_torch(folder, tmp_path / layout, layout)
    to_orbax(tmp_path / "original", tmp_path / "converted")
    to_torch(tmp_path / "converted", tmp_path / "back", "native")
    ours, theirs = shards(tmp_path / "native"), shards(tmp_path / "back")
    assert ours.keys() == theirs.keys()
    assert all(ours[n].tobytes() == theirs[n].tobytes() for n in ours)
    check_golden(phi4mm_jax.load(tmp_path / "converted", dtype="float32", scan=True), goldens, "vision")


def cut(folder, *parts):
    save_shards(folder, {n: x for n, x in shards(folder).items() if not any(part in n for part in parts)})
    without_folders(folder)


def test_vision_alone_by_its_config(folder):
    cut(folder, "audio_embed", ".speech.")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "speech_lora"}))
    assert set(phi4mm_jax.load(folder, dtype="float32").variables) == {"params", "lora_vision"}


@pytest.mark.slow
def test_vision_alone(folder, goldens, tmp_path):
    """Microsoft's sample of vision fine-tuning saves this: no speech encoder, no speech adapter."""
    cut(folder, "audio_embed", ".speech.")
    saved = shards(folder)
    to_orbax(folder, tmp_path / "converted")
    to_torch(tmp_path / "converted", tmp_path / "back", "original")
    back = shards(tmp_path / "back")
    assert back.keys() == saved.keys()
    assert all(back[n].tobytes() == saved[n].tobytes() for n in saved)
    for source in (folder, tmp_path / "converted"):
        model = phi4mm_jax.load(source, dtype="float32", scan=True)
        assert set(model.variables) == {"params", "lora_vision"}
        assert not {"speech", "audio_projector", "audio_projector_with_images"} & set(model.variables["params"])
        check_golden(model, goldens, "vision")
        with pytest.raises(InputError, match="has clips, but this checkpoint has no speech encoder"):
            model.process([CLIP], audios=[MEDIA["clip"]])
        engine = model.engine(EngineConfig(slots=1, cache_tokens=2048))
        ((_, refused),) = engine.run([Request(CLIP, audios=MEDIA["clip"], max_new_tokens=1, adapter="none")])
        assert "no speech encoder" in (refused.error or "")


@pytest.mark.slow
def test_text_alone(folder, goldens):
    cut(folder, "embed_tokens_extend", ".lora_")
    model = phi4mm_jax.load(folder, dtype="float32", scan=True)
    check_golden(model, goldens, "text")
    model.engine(EngineConfig(slots=1, cache_tokens=512, chunk=64)).warm_up()
    for prompt, media in ((IMAGE, {"images": [MEDIA["image"]]}), (CLIP, {"audios": [MEDIA["clip"]]})):
        with pytest.raises(InputError, match="but this checkpoint has no"):
            model.generate([prompt], **media, max_new_tokens=1)


@pytest.mark.parametrize("folder", ["native"], indirect=True)
def test_a_missing_adapter_can_be_done_without(folder):
    shutil.rmtree(folder / "speech-lora")
    model = phi4mm_jax.load(folder, dtype="float32")
    with pytest.raises(InputError, match=r"needs the speech adapter, which this checkpoint lacks .* 'none'"):
        model.generate([CLIP], audios=[MEDIA["clip"]], max_new_tokens=1)
    (completion,) = model.generate([CLIP], audios=[MEDIA["clip"]], max_new_tokens=2, adapter="none")
    assert len(completion.tokens) == 2


# An adapter's folder that differs from the shards of the original layout


def tuned(folder, halved=False):
    """Write what fine-tuning leaves in vision-lora: other values, or another rank and alpha as well."""
    path = folder / "vision-lora" / "adapter_model.safetensors"
    held = {name: x * 3 for name, x in load_file(path).items()}
    settings = json.loads((path.parent / "adapter_config.json").read_text())
    if halved:
        rank = settings["r"] // 2
        held = {n: np.ascontiguousarray(x[:rank] if "lora_A" in n else x[:, :rank]) for n, x in held.items()}
        settings |= {"r": rank, "lora_alpha": 5 * rank}
    save_file(held, path)
    (path.parent / "adapter_config.json").write_text(json.dumps(settings))
    return path.parent


def assert_same(model, other):
    assert model.config.loras == other.config.loras
    jax.tree.map(np.testing.assert_array_equal, model.variables, other.variables)


@pytest.mark.parametrize("halved", [False, True])
def test_a_folder_that_differs_from_the_shards_is_taken(folder, tiny, native, tmp_path, caplog, halved):
    """Read them like the native layout, which has the adapter there alone; and it goes along in conversions."""
    copy = tmp_path / "native"
    shutil.copytree(native, copy)
    place = tuned(folder, halved)
    shutil.rmtree(copy / "vision-lora")
    shutil.copytree(place, copy / "vision-lora")
    expected = phi4mm_jax.load(copy, dtype="float32")
    caplog.clear()
    assert_same(phi4mm_jax.load(folder, dtype="float32"), expected)
    (line,) = caplog.messages
    assert "vision-lora taken in place of the shards'" in line
    assert_same(phi4mm_jax.load(folder, dtype="float32", adapters_from="shards"), tiny)
    caplog.clear()
    to_orbax(folder, tmp_path / "orbax")
    to_torch(folder, tmp_path / "original", "original")
    assert ["vision-lora taken" in text for text in caplog.messages] == [True, True]
    caplog.clear()
    for converted in ("orbax", "original"):
        assert_same(phi4mm_jax.load(tmp_path / converted, dtype="float32"), expected)
    assert not caplog.messages
    to_torch(folder, tmp_path / "shards", "original", adapters_from="shards")
    assert_same(phi4mm_jax.load(tmp_path / "shards", dtype="float32"), tiny)


def test_equal_copies_of_adapters_log_nothing(folder, tiny, caplog):
    assert_same(phi4mm_jax.load(folder, dtype="float32"), tiny)
    assert not caplog.messages
    (folder / "vision-lora" / "adapter_config.json").unlink()
    assert_same(phi4mm_jax.load(folder, dtype="float32", adapters_from="folders"), tiny)


def test_a_folder_beside_merged_shards_is_asked_about(folder):
    """Whether it is merged already cannot be told."""
    save_shards(folder, {n.replace(".base_layer", ""): x for n, x in shards(folder).items() if ".lora_" not in n})
    with pytest.raises(CheckpointError, match=r"vision-lora, but none in the shards.*adapters_from='shards'"):
        phi4mm_jax.load(folder)
    assert set(phi4mm_jax.load(folder, adapters_from="shards").variables) == {"params"}
    both = phi4mm_jax.load(folder, dtype="float32", adapters_from="folders")
    assert set(both.variables) == {"params", "lora_vision", "lora_speech"}


@pytest.mark.parametrize("folder", ["native"], indirect=True)
def test_adapters_from_where_there_is_one_copy(folder):
    for value in ("folders", "shards"):
        with pytest.raises(InputError, match=f"adapters_from is '{value}'.*each adapter once"):
            phi4mm_jax.load(folder, adapters_from=value)
    with pytest.raises(InputError, match="adapters_from is 'both'"):
        phi4mm_jax.load(TINY, adapters_from="both")


def as_peft_saves(folder):
    """Rename `speech-lora` to `speech`, as PeftModel.save_pretrained names the folder of one of several adapters."""
    for name in NATIVE_FOLDERS:
        (folder / name).rename(folder / name.removesuffix("-lora"))


@pytest.mark.parametrize("folder", ["native"], indirect=True)
def test_adapters_that_peft_saved_beside_the_base_are_the_checkpoints(folder, native, tmp_path, caplog):
    as_peft_saves(folder)
    expected, found = (phi4mm_jax.load(path, dtype="float32") for path in (native, folder))
    assert list(found.config.loras) == ["vision", "speech"]
    assert found.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)
    to_torch(folder, tmp_path / "out", "native")
    assert not caplog.records
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == sorted(NATIVE_FOLDERS)
    assert phi4mm_jax.load(tmp_path / "out", dtype="float32").config == expected.config
    before = base_fingerprint(str(folder))
    (folder / "speech" / "adapter_model.safetensors").write_bytes(b"another")
    assert base_fingerprint(str(folder)) != before
    (folder / "speech" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"speech/adapter_config\.json: r is missing"):
        phi4mm_jax.load(folder)


def test_a_peft_folder_beside_the_original_layout_is_the_newer_one(folder, caplog):
    """As `speech-lora` is there: taken where it differs from the shards."""
    shutil.rmtree(folder / "vision-lora")
    (folder / "speech-lora").rename(folder / "speech")
    phi4mm_jax.load(folder, dtype="float32")
    assert not caplog.records
    path = folder / "speech" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"lora_alpha": 2 * settings["lora_alpha"]}))
    assert phi4mm_jax.load(folder, dtype="float32").config.loras["speech"].alpha == 2 * settings["lora_alpha"]
    assert f"{folder}: speech taken in place of the shards' adapters" in caplog.text


@pytest.mark.parametrize("folder", ["native"], indirect=True)
def test_adapters_that_are_not_loaded_are_named(folder, caplog):
    shutil.copytree(folder / "speech-lora", folder / "speech")
    phi4mm_jax.load(folder, dtype="float32")
    assert f"{folder}: has adapters that are not loaded: speech. Give one as adapters={{'speech':" in caplog.text
    caplog.clear()
    phi4mm_jax.load(folder, dtype="float32", adapters={"speech": folder / "speech"})
    assert not caplog.records
    shutil.rmtree(folder / "speech")
    for name in NATIVE_FOLDERS:
        (folder / name).rename(folder / f"my_{name}")
    phi4mm_jax.load(folder, dtype="float32")
    assert "has adapters that are not loaded: my_speech-lora, my_vision-lora. Give" in caplog.text
    assert "as merged ones" not in caplog.text
