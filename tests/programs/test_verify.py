"""The proof of parity: goldens are read strictly, differences are found, and what transformers records passes."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import TINY
from safetensors.numpy import load_file, save_file

import phi4mm_jax
from convert import record, verify
from phi4mm_jax import CheckpointError
from phi4mm_jax.checkpoint import contents
from phi4mm_jax.checkpoint.convert import to_orbax
from phi4mm_jax.testing.compare import (
    ROUNDED_LOGITS,
    Bound,
    compare_exactly,
    compare_tokens,
    compare_values,
    verify_cases,
)
from phi4mm_jax.testing.goldens import read_goldens

ROOT = Path(__file__).parents[2]


def golden_folder(folder: Path, cases: list[str], media: list[str]) -> Path:
    """Some of the fixture's goldens, as a folder of their own."""
    (folder / "inputs").mkdir(parents=True)
    values = json.loads((TINY / "goldens.json").read_text())
    values["cases"] = [c for c in values["cases"] if c["name"] in cases]
    (folder / "goldens.json").write_text(json.dumps(values))
    for path in (TINY / "inputs").iterdir():
        shutil.copy(path, folder / "inputs")
    tensors = load_file(TINY / "goldens.safetensors")
    wanted = {*cases, *media}
    save_file({n: x for n, x in tensors.items() if n.split(".")[0] in wanted}, folder / "goldens.safetensors")
    return folder


def edit(folder: Path, name: str, change) -> None:
    """Change a tensor in place."""
    tensors = load_file(folder / "goldens.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "goldens.safetensors")


@pytest.fixture
def folder(tmp_path):
    return golden_folder(tmp_path / "goldens", ["text", "speech"], ["image_0", "audio_0"])


@pytest.fixture
def loaded(tiny, monkeypatch):
    """`verify.main` compares with the model of the other tests, which is compiled already."""
    monkeypatch.setattr(phi4mm_jax, "load", lambda *_, **__: tiny)


def rows_of(printed: str) -> dict[str, list[str]]:
    """The table's rows, by case and tensor."""
    rows, subject = {}, ""
    for line in printed.splitlines()[1:]:
        if not line.startswith(" ") or not line.strip():
            break
        cells = line.split()
        if not line.startswith("  "):
            subject = cells.pop(0)
        rows[f"{subject}.{cells[0]}"] = cells[1:]
    return rows


# The program.


@pytest.mark.subprocess
def test_passes_as_a_user_starts_it(tmp_path):
    folder = golden_folder(tmp_path / "goldens", ["speech"], ["audio_0"])
    command = [sys.executable, "-m", "convert.verify", str(TINY), "--goldens", str(folder)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = rows_of(result.stdout)
    assert len(rows) == 4 + 6
    assert all(row[-1] == "yes" for row in rows.values())
    assert rows["speech.generated"][0] == "12/12"
    error, bound = map(float, rows["speech.logits"][:2])
    assert 0 < error < bound < 3.3e-4
    assert "PASS: all 10 agree" in result.stdout
    assert "Comparing" in result.stderr
    assert "Comparing" not in result.stdout


def add(amount: float, at=...):
    def change(tensor: np.ndarray) -> None:
        tensor[at] += np.asarray(amount, tensor.dtype)

    return change


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("text.logits", add(4e-4, (3, 5))),
        ("speech.logits_first", add(-4e-4, (0, 700))),
        ("text.logits", add(np.nan, (0, 0))),
        ("speech.logits", add(np.inf, (0, 0))),
        ("speech.generated", add(1, 11)),
        ("image_0.pixel_values", add(2 / 255, (1, 2, 63, 63))),
        ("image_0.attention_mask", add(1, (1, 31, 31))),
        ("audio_0.num_tokens", add(1)),
        ("audio_0.features", add(1e-3, (167, 79))),
        ("audio_0.encoder", add(5e-4, (20, 31))),
        ("image_0.embeds", add(-1e-3, (108, 95))),
    ],
)
def test_each_changed_tensor_is_found(loaded, folder, capsys, tensor, change):
    edit(folder, tensor, change)
    assert verify.main([str(TINY), "--goldens", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert [name for name, row in rows_of(printed).items() if row[-1] != "yes"] == [tensor]
    assert "FAIL: 1 of 20 differ" in printed


def test_says_what_no_case_exercises(loaded, folder, tmp_path, capsys):
    assert verify.main([str(TINY), "--goldens", str(folder)]) == 0
    missed = "the vision adapter, images and clips in one prompt, sequences longer than"
    assert f"No case exercises {missed}" in capsys.readouterr().out
    alone = golden_folder(tmp_path / "alone", ["text_cross"], [])
    assert verify.main([str(TINY), "--goldens", str(alone)]) == 0
    assert "the vision tower, the speech encoder: nothing" in capsys.readouterr().out


def test_compares_the_copies_of_the_adapters(loaded, folder, tmp_path, capsys, monkeypatch):
    """`load` reads one of them, and looks at some of their values only."""
    monkeypatch.setattr(contents, "_SAMPLE", 16)
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(TINY, checkpoint, ignore=shutil.ignore_patterns("goldens*", "inputs"))
    path = checkpoint / "speech-lora" / "adapter_model.safetensors"
    held = load_file(path)
    name = sorted(held)[0]
    held[name].flat[0] += 1
    save_file(held, path)
    assert verify.main([str(checkpoint), "--goldens", str(folder)]) == 2
    assert f"speech-lora/adapter_model.safetensors: {name} differs" in capsys.readouterr().err
    assert verify.main([str(checkpoint), "--goldens", str(folder), "--adapters-from", "shards"]) == 0


def test_other_token_ids_are_named_as_such(loaded, folder, capsys):
    edit(folder, "text.input_ids", add(1, 7))
    assert verify.main([str(TINY), "--goldens", str(folder)]) == 1
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert rows["text.input_ids"] == ["7/20", "NO"]
    assert "text.logits" not in rows  # of another prompt
    assert "speech.logits" in rows
    assert "text input_ids: token 7 is " in printed


def test_finds_a_perturbed_weight(tiny, folder, tmp_path, monkeypatch, capsys):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(TINY, checkpoint, ignore=shutil.ignore_patterns("goldens*", "inputs"))
    name = "model.layers.1.mlp.down_proj.lora_B.speech.weight"
    (path,) = (p for p in checkpoint.glob("model-*") if name in (tensors := load_file(p)))
    tensors = load_file(path)
    tensors[name][3, 4] += 0.01
    save_file(tensors, path)
    (checkpoint / "speech-lora" / "adapter_model.safetensors").unlink()  # the copy, which would differ
    perturbed = copy.copy(tiny)  # with what is compiled
    perturbed.variables = phi4mm_jax.load(checkpoint, dtype="float32").variables
    monkeypatch.setattr(phi4mm_jax, "load", lambda *_, **__: perturbed)
    assert verify.main([str(checkpoint), "--goldens", str(folder)]) == 1
    rows = rows_of(capsys.readouterr().out)
    assert rows["speech.logits"][-1] == "NO"
    assert rows["text.logits"][-1] == "yes"  # which has no adapter


def remove(name):
    def change(folder: Path) -> None:
        tensors = load_file(folder / "goldens.safetensors")
        del tensors[name]
        save_file(tensors, folder / "goldens.safetensors")

    return change


def rename(old, new):
    def change(folder: Path) -> None:
        tensors = load_file(folder / "goldens.safetensors")
        tensors[new] = tensors.pop(old)
        save_file(tensors, folder / "goldens.safetensors")

    return change


def set_cases(edit_cases):
    def change(folder: Path) -> None:
        values = json.loads((folder / "goldens.json").read_text())
        values["cases"] = edit_cases(values["cases"])
        (folder / "goldens.json").write_text(json.dumps(values))

    return change


def truncate(folder: Path) -> None:
    path = folder / "goldens.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "goldens.json").unlink(), "goldens.json: no such file"),
        (lambda folder: (folder / "goldens.json").write_text("{"), "goldens.json: cannot be read as JSON"),
        (lambda folder: (folder / "goldens.safetensors").unlink(), "goldens.safetensors: no such file"),
        (truncate, "goldens.safetensors: is not a whole safetensors file"),
        (remove("speech.logits"), "speech.logits: missing"),
        (remove("image_0.embeds"), "image_0.embeds: missing"),
        (rename("text.logits", "txt.logits"), "txt.logits: of no case"),
        (set_cases(lambda cases: []), 'no list of "cases"'),
        (set_cases(lambda cases: cases[:1]), "speech.input_ids: of no case"),
        (set_cases(lambda cases: cases + cases[:1]), "same name"),
        (set_cases(lambda cases: [cases[0] | {"tokens": 19}, cases[1]]), "text.input_ids: has shape (20,)"),
        (set_cases(lambda cases: [cases[0] | {"prompt": None}, cases[1]]), "cases[0].prompt is None"),
        (set_cases(lambda cases: [cases[0], cases[1] | {"audios": [7]}]), "audio_7.*"),
        (lambda folder: (folder / "inputs" / "audio_0.flac").unlink(), "audio_0.*"),
        (set_cases(lambda cases: [cases[0] | {"prompt": "<|image_1|>"}, cases[1]]), "case text: prompt 0"),
    ],
)
def test_malformed_goldens_are_errors(loaded, folder, capsys, change, named):
    change(folder)
    assert verify.main([str(TINY), "--goldens", str(folder)]) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert named in error
    assert str(folder.name) in error or "case" in error


def test_bad_usage():
    with pytest.raises(SystemExit) as raised:
        verify.main([str(TINY)])
    assert raised.value.code == 2
    with pytest.raises(CheckpointError, match="nowhere"):
        read_goldens("nowhere")


@pytest.mark.slow
def test_bfloat16_is_no_proof(tmp_path, monkeypatch, capsys):
    folder = golden_folder(tmp_path / "goldens", ["speech"], ["audio_0"])
    rounded = phi4mm_jax.load(TINY, dtype="bfloat16")
    monkeypatch.setattr(phi4mm_jax, "load", lambda path, dtype, **_: {"bfloat16": rounded}[dtype])
    arguments = [str(TINY), "--goldens", str(folder), "--dtype", "bfloat16"]
    assert verify.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "proves no parity" in printed
    assert "not judged in bfloat16" in printed
    rows = rows_of(printed)
    assert float(rows["speech.logits"][0]) > 1e-3  # rounding is seen
    assert rows["speech.generated"][0] != "12/12"
    assert float(rows["audio_0.features"][1]) < 1e-3  # and not excused where there is none
    edit(folder, "speech.logits", lambda x: np.negative(x, out=x))
    assert verify.main(arguments) == 1


# The comparisons.


@pytest.mark.parametrize("bound", [Bound("max", 5e-5), ROUNDED_LOGITS])
def test_values(bound):
    golden = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    assert compare_values("case", "logits", golden, golden, bound).passed
    scale = bound.size(golden)
    assert compare_values("case", "logits", golden + np.float32(0.9 * bound.relative * scale), golden, bound).passed
    assert not compare_values("case", "logits", golden + np.float32(1.1 * bound.relative * scale), golden, bound).passed
    for bad in (np.nan, np.inf, -np.inf):
        broken = golden.copy()
        broken[2, 3] = bad
        for ours, theirs in ((broken, golden), (golden, broken), (broken, broken)):
            assert not compare_values("case", "logits", ours, theirs, bound).passed
    assert "shape" in compare_values("case", "logits", golden[:4], golden, bound).note
    empty = np.zeros((0, 7), np.float32)
    assert not compare_values("case", "logits", empty, empty, bound).passed


def test_tokens_and_counts():
    assert compare_tokens("case", "generated", [1, 2], [1, 2]).passed
    for ours, golden, count in (([1, 3], [1, 2], 1), ([1], [1, 2], 1), ([1, 2, 3], [1, 2], 2), ([], [1], 0)):
        check = compare_tokens("case", "generated", ours, golden)
        assert not check.passed
        assert check.identical == (count, len(golden))
    assert compare_exactly("image_0", "size", np.array([448, 896]), np.array([448, 896])).passed
    assert not compare_exactly("image_0", "size", np.array([896, 448]), np.array([448, 896])).passed
    assert not compare_exactly("image_0", "size", np.array([448]), np.array([448, 448])).passed


def test_a_near_tie_is_said(tiny, folder):
    edit(folder, "text.generated", add(1, 11))
    read = read_goldens(folder)
    for margin, said in ((1e-4, True), (1e-2, False)):
        case = dataclasses.replace(read.cases[0], min_margin=margin)
        ((*_, tokens),) = verify_cases(tiny, dataclasses.replace(read, cases=(case,)))
        assert not tokens.passed
        assert ("near-tie" in tokens.note) == said


# The recorder.

RECORDED = {"text": 12, "text_cross": 40, "vision": 4, "speech": 12, "vision_speech": 4}


@pytest.fixture(scope="module")
def recorded(native, tmp_path_factory):
    """What transformers computes on cases of the fixture, by the program."""
    folder = tmp_path_factory.mktemp("recorded")
    cases = [c for c in json.loads((TINY / "goldens.json").read_text())["cases"] if c["name"] in RECORDED]
    for case in cases:
        case["images"] = [str(TINY / "inputs" / f"image_{i}.png") for i in case["images"]]
        case["audios"] = [str(TINY / "inputs" / f"audio_{i}.flac") for i in case["audios"]]
        case["max_new_tokens"] = RECORDED[case["name"]]
    (folder / "cases.json").write_text(json.dumps({"cases": cases}))
    arguments = ["--model", native, "--out", folder / "goldens", "--cases", folder / "cases.json"]
    assert record.main([str(a) for a in arguments]) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["cases.json", "goldens"]
    return folder / "goldens"


@pytest.mark.torch
def test_the_record_is_what_the_original_computed(recorded):
    ours, theirs = load_file(recorded / "goldens.safetensors"), load_file(TINY / "goldens.safetensors")
    read, fixture = read_goldens(recorded), {c.name: c for c in read_goldens(TINY).cases}
    assert [c.name for c in read.cases] == list(RECORDED)
    for case in read.cases:
        expected = dataclasses.replace(fixture[case.name], min_margin=case.min_margin)
        assert case == expected
        if RECORDED[case.name] >= 12:
            assert case.min_margin == pytest.approx(fixture[case.name].min_margin, abs=1e-4)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        case, _, tensor = name.partition(".")
        golden = theirs[name][: RECORDED[case]] if tensor == "generated" else theirs[name]
        if value.dtype == np.float32:
            atol = 3e-4 if tensor.startswith("logits") else 1e-4
            np.testing.assert_allclose(value, golden, atol=atol, rtol=0 if atol == 3e-4 else 1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(value, golden, err_msg=name)
    expected = {f"{c}.{t}" for c in RECORDED for t in ("input_ids", "logits", "logits_first", "generated")}
    assert expected < set(ours)
    assert {n.split(".")[0] for n in ours.keys() - expected} == {"image_0", "image_1", "audio_0"}
    for name in ("image_0.png", "image_1.png", "audio_0.flac"):
        assert (recorded / "inputs" / name).read_bytes() == (TINY / "inputs" / name).read_bytes()
    values, of_fixture = (json.loads((f / "goldens.json").read_text()) for f in (recorded, TINY))
    assert set(of_fixture) < set(values)
    assert values["image_sizes"] == of_fixture["image_sizes"][:2]
    assert values["audio"] == of_fixture["audio"][:1]


@pytest.mark.slow
@pytest.mark.torch
def test_the_record_verifies_the_original_checkpoint(loaded, recorded, capsys):
    assert verify.main([str(TINY), "--goldens", str(recorded)]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 5 * 4 + 3 * 6
    assert rows["text_cross.generated"][0] == "40/40"


@pytest.mark.torch
def test_a_prompt_ends_with_its_stop_token(native, goldens, tmp_path, capsys):
    """Both sides stop where the checkpoint says."""
    checkpoint, third = tmp_path / "native", int(goldens["text.generated"][2])
    shutil.copytree(native, checkpoint)
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [633, third]}))
    prompt = next(c.prompt for c in read_goldens(TINY).cases if c.name == "text")
    out = tmp_path / "goldens"
    assert record.main(["--model", str(checkpoint), "--out", str(out), "--prompt", prompt]) == 0
    assert load_file(out / "goldens.safetensors")["prompt.generated"].tolist()[-1] == third
    assert len(load_file(out / "goldens.safetensors")["prompt.generated"]) == 3
    capsys.readouterr()
    assert verify.main([str(checkpoint), "--goldens", str(out)]) == 0
    assert rows_of(capsys.readouterr().out)["prompt.generated"][0] == "3/3"


@pytest.mark.torch
def test_a_generated_placeholder_is_a_token(native, goldens, tmp_path):
    checkpoint, out = tmp_path / "native", tmp_path / "goldens"
    shutil.copytree(native, checkpoint)
    name, first = "model.embed_tokens.weight", int(goldens["text.generated"][0])
    (path,) = (p for p in checkpoint.glob("model-*.safetensors") if name in load_file(p))
    tensors = load_file(path)
    tensors[name][636] = 3 * tensors[name][first]  # <|endoftext11|> beats the first token, whose logit is positive
    save_file(tensors, path, {"format": "pt"})
    prompt = next(c.prompt for c in read_goldens(TINY).cases if c.name == "text")
    assert record.main(["--model", str(checkpoint), "--out", str(out), "--prompt", prompt]) == 0
    generated = load_file(out / "goldens.safetensors")["prompt.generated"]
    assert generated[0] == 636
    assert len(generated) > 1


def test_the_default_cases_are_the_fixtures():
    requests, read = record.read_requests(record.DEFAULT_CASES, 12), read_goldens(TINY)
    assert [(r.name, r.prompt) for r in requests] == [(c.name, c.prompt) for c in read.cases]
    assert [([*r.images], [*r.audios]) for r in requests] == [read.media_of(c) for c in read.cases]


@pytest.mark.torch
def test_an_existing_folder_is_left_alone(native, tmp_path, capsys):
    out = tmp_path / "goldens"
    out.mkdir()
    (out / "mine").write_text("")
    assert record.main(["--model", str(native), "--out", str(out), "--prompt", "Hello"]) == 2
    assert "exists" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine"]


@pytest.mark.torch
def test_an_interrupted_record_leaves_nothing(native, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "record_case", interrupt)
    assert record.main(["--model", str(native), "--out", str(tmp_path / "goldens"), "--prompt", "Hello"]) == 130
    assert not list(tmp_path.iterdir())


IMAGE = str(TINY / "inputs" / "image_0.png")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", str(TINY), "--prompt", "Hello"], "convert.to_torch"),
        (["--model", "nowhere", "--prompt", "Hello"], "nowhere"),
        (["--cases", "nowhere.json"], "nowhere.json"),
        (["--prompt", "<|image_1|>"], "case prompt: prompt has 1 image placeholder"),
        (["--prompt", "Hello", "--image", IMAGE], "case prompt: prompt has 0 image placeholder"),
        (["--prompt", "<|image_1|>", "--image", "nowhere.png"], "nowhere.png"),
        (["--prompt", "<|image_1|><|endoftext11|>", "--image", IMAGE], "case prompt: prompt has 1 audio placeholder"),
    ],
)
def test_what_cannot_be_recorded_is_an_error(native, tmp_path, capsys, arguments, named):
    arguments = arguments if "--model" in arguments else ["--model", str(native), *arguments]
    assert record.main([*arguments, "--out", str(tmp_path / "goldens")]) == 2
    assert any(x.startswith("error: ") and named in x for x in capsys.readouterr().err.splitlines())
    assert not list(tmp_path.iterdir())


@pytest.mark.torch
@pytest.mark.parametrize(
    ("cases", "named"),
    [
        ("[", "is not JSON"),
        ("[]", "is not JSON with a list"),
        ('{"cases": []}', "at least one"),
        ('{"cases": [7]}', "cases[0] is 7"),
        ('{"cases": [{"prompt": "Hello"}]}', "cases[0].name is None"),
        ('{"cases": [{"name": "image_0", "prompt": "Hello"}]}', "cases[0].name"),
        ('{"cases": [{"name": "a.b", "prompt": "Hello"}]}', "cases[0].name"),
        ('{"cases": [{"name": "a", "prompt": "Hello", "images": "b.png"}]}', "cases[0].images"),
        ('{"cases": [{"name": "a", "prompt": "Hello", "max_new_tokens": 0}]}', "cases[0].max_new_tokens"),
        ('{"cases": [{"name": "a", "prompt": "x"}, {"name": "a", "prompt": "y"}]}', "the name a"),
        ('{"cases": [{"name": "a", "prompt": "<|image_1|>", "images": [3]}]}', "image_3"),
    ],
)
def test_bad_cases_are_errors(native, tmp_path, capsys, cases, named):
    (tmp_path / "cases.json").write_text(cases)
    arguments = ["--model", native, "--out", tmp_path / "goldens", "--cases", tmp_path / "cases.json"]
    assert record.main([str(a) for a in arguments]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.torch
def test_a_converted_checkpoint_is_not_recorded(native, tmp_path, capsys):
    to_orbax(native, tmp_path / "orbax")
    assert record.main(["--model", str(tmp_path / "orbax"), "--out", str(tmp_path / "o"), "--prompt", "Hello"]) == 2
    assert "is converted, which transformers does not load" in capsys.readouterr().err


@pytest.mark.torch
def test_a_broken_checkpoint_is_not_recorded(native, tmp_path, capsys):
    def attempt(change) -> str:
        shutil.rmtree(tmp_path / "native", ignore_errors=True)
        shutil.copytree(native, tmp_path / "native")
        change(tmp_path / "native")
        arguments = ["--model", tmp_path / "native", "--out", tmp_path / "goldens", "--prompt", "Hello"]
        assert record.main([str(a) for a in arguments]) == 2
        assert not (tmp_path / "goldens").exists()
        return capsys.readouterr().err

    def change_tensor(path: Path, name: str, change) -> None:
        tensors = load_file(path)
        change(tensors, name)
        save_file(tensors, path, {"format": "pt"})

    def zero(tensors, name) -> None:
        tensors[name] = np.zeros_like(tensors[name])

    adapter, b = (
        "speech-lora/adapter_model.safetensors",
        "base_model.model.model.layers.2.self_attn.qkv_proj.lora_B.weight",
    )
    assert "all zero" in attempt(lambda folder: change_tensor(folder / adapter, b, zero))
    assert "missing" in attempt(
        lambda folder: change_tensor(folder / adapter, b, lambda tensors, name: tensors.pop(name))
    )
    norm = "model.norm.weight"
    (shard,) = (p.name for p in native.glob("model-*") if norm in load_file(p))
    assert norm in attempt(lambda folder: change_tensor(folder / shard, norm, lambda tensors, name: tensors.pop(name)))
    assert "not finite" in attempt(lambda folder: change_tensor(folder / shard, norm, lambda x, n: x[n].fill(np.nan)))


@pytest.mark.torch
def test_the_packages_are_named(native, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record.importlib.util, "find_spec", lambda name: None)
    assert record.main(["--model", str(native), "--out", str(tmp_path / "goldens"), "--prompt", "Hello"]) == 2
    assert "torch, transformers, peft, not installed here: pip install '.[torch]'" in capsys.readouterr().err


@pytest.mark.torch
def test_bad_usage_of_the_recorder(native, tmp_path):
    out = ["--model", str(native), "--out", str(tmp_path / "goldens")]
    for arguments in (
        ["--image", IMAGE],
        ["--prompt", "x", "--cases", "y"],
        ["--prompt", "x", "--max-new-tokens", "0"],
    ):
        with pytest.raises(SystemExit) as raised:
            record.main([*out, *arguments])
        assert raised.value.code == 2


def test_cases_are_needed_outside_a_clone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "DEFAULT_CASES", tmp_path / "goldens.json")  # where an installed package looks
    with pytest.raises(SystemExit, match="2"):
        record.main(["--model", "m", "--out", str(tmp_path / "goldens")])
    assert "--cases FILE or --prompt TEXT is needed" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        record.main(["--help"])
    assert '{"cases": [{"name": "chart"' in capsys.readouterr().out, "--help shows the form of --cases"
