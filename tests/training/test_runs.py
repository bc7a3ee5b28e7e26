"""Runs of training, as their users start them: recipes, resuming, stopping, evaluation, export."""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax.traverse_util import flatten_dict
from helpers.cases import golden_cases, media_of
from helpers.environment import ONE_DEVICE
from helpers.marks import fast_are
from helpers.paths import FIXTURES, TINY
from helpers.quantized import dequantized
from safetensors.numpy import load_file, save_file

import phi4mm_jax
from phi4mm_jax import CheckpointError, InputError
from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.checkpoint.convert import to_orbax, to_torch
from phi4mm_jax.config import Phi4MMConfig, read_json
from phi4mm_jax.data.augment import SpeechAugmentation
from phi4mm_jax.engine import Completion, Engine, Request
from phi4mm_jax.mesh import training_mesh
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.testing.host_runs import tensorboard_steps
from phi4mm_jax.testing.recipe_steps import ANY, resolved_recipes, topology_of
from phi4mm_jax.testing.training_steps import CASES
from phi4mm_jax.training import throughput
from phi4mm_jax.training.checkpointing import Checkpoints
from phi4mm_jax.training.divergence import ZeroGradientCheck, check_finite
from phi4mm_jax.training.dry_run import trainable_table
from phi4mm_jax.training.evaluation import Evaluation
from phi4mm_jax.training.export import export
from phi4mm_jax.training.metrics_log import MetricsLog, read_log
from phi4mm_jax.training.preemption import PREEMPTED_EXIT_CODE
from phi4mm_jax.training.recipe import Recipe, load_recipe
from phi4mm_jax.training.run_folder import CHECKPOINTS
from phi4mm_jax.training.settings import ALIASES, setting_names
from phi4mm_jax.training.sharding import check_divisible
from phi4mm_jax.training.step import Metrics, TrainState
from phi4mm_jax.training.step_batches import step_batches, warn_of_few_steps
from phi4mm_jax.training.step_log import metric_values
from phi4mm_jax.training.throughput import Throughput
from train import dpo, sft

ROOT = Path(__file__).parents[2]
FITTED = ("small", "speech_adapter")  # which have a test of their own
RECIPES = sorted(p for p in (ROOT / "train" / "recipes").rglob("*.yaml") if p.stem not in FITTED)
QUICKEST = [p for p in RECIPES if f"{p.parent.name}/{p.stem}" == "tiny/speech"]
SLICES = sorted((ROOT / "train" / "recipes").glob("*.yaml"))  # recipes for these
SMALL = sorted((ROOT / "train" / "recipes" / "tiny").glob("*.yaml"))  # of the small model
RELEASE = Phi4MMConfig.from_dict(read_json(FIXTURES / "ms_release_config.json"))
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def message(role, *content):
    return {"role": role, "content": content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)}


def text(words):
    return {"type": "text", "text": words}


def speech_samples(count):
    clips = [TINY / "inputs" / f"audio_{i}.flac" for i in range(2)]
    for i in range(count):
        question = message("user", {"type": "audio", "audio": str(clips[i % 2])}, text(f"Number {i}?"))
        yield {"messages": [question, message("assistant", " ".join(WORDS[: i % 5 + 1]))]}


def write(path: Path, samples) -> Path:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def write_recipe(folder: Path) -> Path:
    """Sixteen clips, two epochs of packed rows: the speech adapter."""
    manifest = write(folder / "train.jsonl", speech_samples(16))
    settings = {
        "model": str(TINY), "output": str(folder / "run"), "trainable": ["lora_speech"], "dtype": "float32",
        "mesh": "fsdp=1",
        "data": {
            "sources": [{"path": str(manifest)}], "epochs": 2,
            "packing": {"rows": 2, "lengths": [192], "chunks": [4], "chunk_tokens": 64, "window": 4},
        },
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2}, "save_every": 2, "keep": 2,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(path, *overrides):
    return sft.train(load_recipe(path, overrides))


@pytest.fixture
def recipe(tmp_path) -> Path:
    return write_recipe(tmp_path)


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory) -> Path:
    """A folder whose `run` took four steps of its recipe, for tests that only read it."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(write_recipe(folder), "data.steps=4", "data.epochs=null") == 0
    return folder


def final(folder: Path):
    checkpoints = Checkpoints(folder / CHECKPOINTS, None)
    return checkpoints.last, flatten_dict(checkpoints.trained(checkpoints.last))


def test_a_run_compiles_once_and_logs_every_step(recipe, tmp_path, capsys, caplog):
    with jax.log_compiles():
        assert sft.train(load_recipe(recipe), profile=tmp_path / "profile") == 0
    assert caplog.text.count("XLA compilation of jit(step)") == 1
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    lines = read_log(tmp_path / "run")
    steps = [line["step"] for line in lines]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 4
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["learning_rate"] == 0.0
    assert sum(line["targets"] for line in lines) == 2 * sum(
        len(phi4mm_jax.load(TINY).processor.tokenizer.encode(s["messages"][1]["content"])) + 2
        for s in speech_samples(16)
    )
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000
    report = (tmp_path / "run" / "report.md").read_text()
    assert "lora_speech" in report
    assert str(tmp_path / "train.jsonl") in report
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert tensorboard_steps(events) == steps
    assert "trained; see report.md" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "run" / CHECKPOINTS, None).steps == [steps[-2] // 2 * 2, steps[-1]]


def command(recipe, *arguments):
    return [sys.executable, "-m", "train.sft", str(recipe), *arguments]


ENVIRONMENT = os.environ | {"XLA_FLAGS": ONE_DEVICE}


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("endings", "steps"),
    [
        pytest.param([signal.SIGKILL], 8, id="once"),
        pytest.param(
            [signal.SIGKILL] * 2 + [signal.SIGTERM] + [signal.SIGKILL] * 2, 50, id="five times", marks=pytest.mark.slow
        ),
    ],
)
def test_killed_and_resumed(recipe, tmp_path, endings, steps):
    """And told to end, in the longer case: weights and log are bitwise those of the run that nobody interrupted."""
    endless = ["data.epochs=null", f"data.steps={steps}"]
    whole = subprocess.run(
        command(recipe, f"output={tmp_path / 'whole'}", *endless), cwd=ROOT, env=ENVIRONMENT, capture_output=True,
        text=True,
    )  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    draw = random.Random(0)
    for ending in [*endings, None]:
        process = subprocess.Popen(
            command(recipe, f"output={tmp_path / 'cut'}", *endless, "save_every=1"), cwd=ROOT, env=ENVIRONMENT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if ending is not None:
            lines = len(read_log(tmp_path / "cut")) + draw.randint(1, 4)
            while process.poll() is None and len(read_log(tmp_path / "cut")) < lines:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.1))  # while a step is taken, or saved
            process.send_signal(ending)
        out, error = process.communicate()
        status = {None: 0, signal.SIGTERM: PREEMPTED_EXIT_CODE, signal.SIGKILL: -signal.SIGKILL}[ending]
        assert process.returncode == status, error
        assert ("Stopped and saved after step" in out) == (ending == signal.SIGTERM)
    (step, weights), (other_step, other) = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert step == other_step == steps
    assert weights.keys() == other.keys()
    for path, value in weights.items():
        np.testing.assert_array_equal(value, other[path], err_msg="/".join(path))
    losses = [[(line["step"], line["loss"]) for line in read_log(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_losses_on_a_mesh_are_those_of_one_device(recipe, tmp_path, caplog):
    """Eight devices, rows and parameters spread: the losses of one."""
    shared = ["dropout=false", "data.packing.rows=4", "data.packing.chunks=[8]", "data.steps=4", "data.epochs=null"]
    with jax.log_compiles():
        assert run(recipe, *shared) == 0
        assert run(recipe, *shared, "mesh=fsdp=4,tensor=2", f"output={tmp_path / 'spread'}") == 0
    assert caplog.text.count("XLA compilation of jit(step)") == 2
    losses = [[line["loss"] for line in read_log(tmp_path / name)] for name in ("run", "spread")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.parametrize("layout", ["original", "native"])
def test_an_export_has_the_trained_weights(trained_folder, tmp_path, layout):
    """What comes out is what was trained, in place of what it began with, and the rest is as it was."""
    export(trained_folder / "run", tmp_path / "out", layout)
    tuned, before = (phi4mm_jax.load(p, dtype="float32", scan=True) for p in (tmp_path / "out", TINY))
    _, weights = final(trained_folder / "run")
    flat, old = flatten_dict(tuned.variables), flatten_dict(before.variables)
    for path, value in flat.items():
        if path[0] == "lora_speech":
            np.testing.assert_array_equal(value, weights[path])
            assert not np.array_equal(value, old[path])
        else:
            np.testing.assert_array_equal(value, old[path])
    with pytest.raises(InputError, match=r"has no checkpoint '77'; those that it has: 2, 4"):
        export(trained_folder / "run", tmp_path / "other", layout, step="77")


@pytest.mark.parametrize(("folder", "cause"), [("nope", "there is no such folder"), (".", "is not a run's folder")])
def test_what_is_no_run_is_not_exported(tmp_path, folder, cause):
    with pytest.raises(InputError, match=f"{cause}; give the output of a recipe"):
        export(tmp_path / folder, tmp_path / "out", "native")


@pytest.mark.slow
@pytest.mark.torch
def test_a_tuned_adapter_loads_in_peft(trained_folder, native, tmp_path, caplog):
    """PEFT puts it into transformers' model: the logits are ours, and not those from before. The exports are silent,
    and their cards are of the run."""
    from helpers import torch_native
    from helpers.native_cases import native_inputs
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(trained_folder / "run", tmp_path / "whole", "original")
        export(trained_folder / "run", tmp_path / "adapters", "native", adapters_only=True)
    noise = [r for r in caplog.records if r.levelname != "DEBUG" and not r.name.startswith("phi4mm_jax")]
    assert not noise
    for name in ("whole", "adapters"):
        card = (tmp_path / name / "README.md").read_text()
        losses = [line["loss"] for line in read_log(trained_folder / "run")]
        for row in (
            f"| base model | {TINY} |",
            f"| data | {trained_folder / 'train.jsonl'} |",
            "| steps | 4 |",
            f"| training loss, first and last | {losses[0]:.4f}, {losses[-1]:.4f} |",
        ):
            assert row in card.splitlines()
        _, written, _ = re.split("```(?:yaml)?", card)
        assert yaml.safe_load(written) == yaml.safe_load((trained_folder / "run" / "recipe.yaml").read_text())
    model: Any = AutoModelForCausalLM.from_pretrained(native, attn_implementation="eager")
    PeftModel.from_pretrained(model, str(tmp_path / "adapters" / "speech-lora"), adapter_name="speech")
    (case,) = (case for case in golden_cases() if case["name"] == "speech")
    before, ours = (phi4mm_jax.load(folder, dtype="float32") for folder in (TINY, tmp_path / "whole"))
    tokens, *rest = native_inputs(ours, case)
    theirs = torch_native.NativeModel(model.eval()).logits(tokens, *rest)

    def logits(of):
        return np.asarray(of.logits(of.process([case["prompt"]], **media_of(case))))[0, : len(tokens)]

    np.testing.assert_allclose(theirs, logits(ours), atol=3e-4, rtol=0)
    assert np.abs(theirs - logits(before)).max() > 0.03


@pytest.mark.parametrize(
    "path",
    fast_are(QUICKEST, RECIPES),
    ids=[f"{p.parent.name}/{p.stem}" for p in RECIPES],
)
def test_every_recipe_trains(path, tmp_path):
    """Two steps on the tiny model, with data of its kind."""
    settings = yaml.safe_load(path.read_text())
    packing, trainable = settings["data"]["packing"], settings["trainable"]
    image = {"type": "image", "image": str(TINY / "inputs" / "image_2.png")}
    clip = {"type": "audio", "audio": str(TINY / "inputs" / "audio_0.flac")}
    has_images = "crops" in packing or "lora_vision" in trainable
    has_clips = "chunks" in packing or "lora_speech" in trainable
    media = [image] * has_images + [clip] * has_clips
    prompt = [message("user", *media, text("What?"))]
    if settings["data"].get("kind") == "preferences":
        sample = {"messages": prompt, "chosen": "Yes, this.", "rejected": "No."}
    else:
        sample = {"messages": [*prompt, message("assistant", "This.")]}
    manifest = write(tmp_path / "data.jsonl", [sample] * 4)
    length = 1280 if has_images else 256
    overrides = [
        f"model={TINY}", f"output={tmp_path / 'run'}", f"data.sources=[{{path: {manifest}}}]", "data.epochs=null",
        f"data.steps={2 * settings.get('accumulate', 1)}", "mesh=fsdp=1", "log_every=1", "optimizer.warmup_steps=1",
        *(["data.packing.rows=2", f"data.packing.lengths=[{length}]"] if packing != "auto" else []),
        *(["data.packing.crops=[4]"] if "crops" in packing else []),
        *(["data.packing.chunks=[2]", "data.packing.chunk_tokens=64"] if "chunks" in packing else []),
    ]  # fmt: skip
    program = dpo if "kind" in settings["data"] else sft
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", str(path), *overrides])
        assert program.main() == 0
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize(
    ("name", "held"), fast_are([("small", "text")], [("speech_adapter", "speech"), ("small", "text"), ("small", "ocr")])
)
def test_a_recipe_fits_a_set_of_twenty(name, held, tmp_path, capsys):
    """README's command, with the small model: every answer is learnt once, and the warm-up is over before the end."""
    folder = ROOT / "tests" / "fixtures" / "held"
    lines = (folder / f"{held}.jsonl").read_text().splitlines()[:20]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    for media in ("images", "clips"):
        (tmp_path / media).symlink_to(folder / media)
    overrides = [
        f"model={ROOT / 'assets' / 'tiny'}", f"data.sources=[{{path: {tmp_path / 'train.jsonl'}}}]",
        f"output={tmp_path / 'run'}", "data.epochs=1", "dtype=float32", "mesh=fsdp=1",
    ]  # fmt: skip
    path = ROOT / "train" / "recipes" / f"{name}.yaml"
    assert run(path, *overrides) == 0
    log = read_log(tmp_path / "run")
    answers = [json.loads(line)["messages"][1]["content"] for line in lines]
    assert sum(line["targets"] for line in log) == sum(len(answer) + 2 for answer in answers)  # its tokens are bytes
    assert len(log) >= 7
    assert max(line["learning_rate"] for line in log[:2]) == pytest.approx(load_recipe(path).optimizer.learning_rate)
    adapter = {"speech": "lora_speech", "text": "params/decoder", "ocr": "lora_vision"}[held]
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert saved["trainable"] == [adapter]
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown.partition("data.packing=")[2].partition('"')[0]) == saved["data"]["packing"]
    assert run(path, *overrides) == 0
    assert "already finished" in capsys.readouterr().out


@dataclass(frozen=True)
class Chip:
    """Device, as far as a mesh looks at it."""

    id: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


@pytest.mark.parametrize("path", SLICES, ids=[path.stem for path in SLICES])
def test_a_recipe_names_a_slice_that_its_mesh_covers(path):
    """The slice is one of those that `benchmarks.tpu_aot` compiles for, and the batches divide evenly over it."""
    topology, recipe = topology_of(path), load_recipe(path)
    assert topology in {case.topology for case in CASES.values()}
    count = {"v5e:2x4": 8, "v5e:4x4": 16, "v5p:2x2x1": 4, "v6e:2x4": 8}[topology]
    chips = [Chip(i) for i in range(count)]
    mesh = training_mesh(recipe.mesh, RELEASE, chips)
    assert mesh is not None
    assert set(mesh.devices.flat) == set(chips)
    check_divisible(recipe.data.packing, mesh)
    for resolved in resolved_recipes(recipe, chips, RELEASE).values():
        check_divisible(resolved.data.sizes, mesh)


@pytest.mark.parametrize("path", SMALL, ids=[path.stem for path in SMALL])
def test_recipes_of_the_small_model_are_for_any_machine(path):
    assert topology_of(path) == ANY
    assert load_recipe(path).mesh is None


@pytest.mark.parametrize(
    ("head", "error"),
    [("", "names no topology"), ("# Topology: v5e", "v5e: expected a topology"), ("# Topology: v9:2x4", "v9:2x4: exp")],
)
def test_a_recipe_without_a_known_topology(tmp_path, head, error):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{head}\nmodel: microsoft/Phi-4-multimodal-instruct\n")
    with pytest.raises(InputError, match=error):
        topology_of(path)


def test_a_dry_run_shows_and_writes_nothing(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sft", str(recipe), "--dry-run"])
    assert sft.main() == 0
    shown = capsys.readouterr().out
    assert "lora_speech/decoder/layers/mlp/down/a" in shown
    assert "GiB besides" in shown
    assert 'Proposed for these: "data.packing={rows: ' in shown
    assert "media tokens>Number" in shown
    assert "<|assistant|>[[one two<|end|><|endoftext|>]]" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rat=1", r"rat: is not a setting of a recipe; did you mean optimizer\.learning_rate\?"),
        ("optimizer.lr=1", r"optimizer\.lr: is not a setting of a recipe; did you mean optimizer\.learning_rate\?"),
        ("num_train_epochs=1", r"did you mean data\.epochs\?"),
        ("min_lr=1e-6", r"did you mean optimizer\.final_share \(a share of the peak: min_lr / learning_rate\)\?"),
        ("per_device_train_batch_size=4", r"did you mean data\.packing\.rows \(of all devices together\)\?"),
        ("weight_decay=1", r"did you mean optimizer\.weight_decay\?"),
        ("dpo_label_smoothing=0.1", r"did you mean dpo\.label_smoothing\?"),
        ("gradient_clip_val=1", r"did you mean optimizer\.clip\?"),
        ("deepspeed=zero3.json", r"did you mean mesh\?"),
        ("lora_r=8", r"lora_r: is not a setting of a recipe: an adapter has the rank and scale .*; take it out$"),
        ("train_on_inputs=false", r"not a setting of a recipe: the loss covers the answers alone, .*; take it out$"),
        ("hub_token=x", r"hub_token: is not a setting of a recipe$"),
        ("optimizer.learning_rate=true", r"^'.*=true': optimizer\.learning_rate: expected a number \(it is True\)$"),
        ("save_every=yes", r"save_every: expected a number \(it is True\)$"),
        ("data.sources=[{path: x, weight: true}]", r"data\.sources\.0\.weight: expected a number \(it is True\)$"),
        ("optimizer={clip: 1, clip: 2}", r"'clip' is given twice"),
        ("data.sources=[{pth: x}]", r"data\.sources\.0\.pth: .* did you mean data\.sources\.path\?"),
        ("data.sources=x.jsonl", r"is 'x.jsonl', and a list is expected; write data\.sources=\[\{path: x\.jsonl\}\]"),
        ("data.sources=[x.jsonl]", r"data\.sources\.0: is 'x.jsonl', .* write data\.sources=\[\{path: x\.jsonl\}\]"),
        ("trainable=lora", r"trainable: is 'lora', and a list is expected; write trainable=\[lora\]"),
        ("optimizer=constant", r"optimizer: .* \(it is 'constant'\)"),
        ("data.steps=5", r"data: epochs is 2 and steps is 5; give one of them, and null for the other$"),
        ("dtype.kind=1", r"dtype is 'float32', which has no settings of its own; give dtype=\{...\} with all"),
        ("xyz=1", r"xyz: is not a setting of a recipe$"),
        ("output=/proc/run", r"output is /proc/run, and /proc cannot be written to \(.*\); give another one"),
        ("optimizer.learning_rate=-1", r"optimizer\.learning_rate is -1"),
        ("optimizer=5", r"optimizer"),
        ("seed=x", r"seed: .* \(it is 'x'\)"),
        ("trainable=[lora_sound]", r"trainable: the pattern 'lora_sound' matches no parameter"),
        ("data.packing.rows=3", r"data\.packing\.rows is 3, which 2 devices cannot share"),
        ("accumulate=0", "accumulate: expected a whole number from 1 on"),
        ("no", "expected key=value"),
        ("model=/nowhere", "/nowhere"),
    ],
)
def test_wrong_settings(recipe, override, message):
    overrides = [override, "mesh=fsdp=2"] if "rows" in override else [override]
    with pytest.raises((InputError, CheckpointError), match=message):
        run(recipe, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optimizer.learning_rate=abc"],
            r"^'optimizer\.learning_rate=abc': optimizer\.learning_rate: .*\(it is 'abc'\)$",
        ),
        (["data.sources=x.jsonl", "seed=0"], r"^'data\.sources=x\.jsonl': data\.sources: is 'x\.jsonl'"),
        (["seed=x", "seed=y", "keep=0"], r"^'seed=y': seed: .*; 'keep=0': keep: expected"),
        (["data.epochs=0", "seed=1"], r"^'data\.epochs=0': data: epochs is 0"),
        (["evaluation.every=5"], r"^'evaluation\.every=5': evaluation\.sources: is missing"),
        (["optimizer.warmup_steps=-1", "optimizer.clip=1"], r"^'optimizer\.warmup_steps=-1': optimizer: "),
        (["data.kind=preferences", "seed=1"], r"^'data\.kind=preferences': data\.kind is preferences, and"),
    ],
)
def test_a_wrong_override_is_named_as_the_place(recipe, overrides, message):
    with pytest.raises(InputError, match=message):
        load_recipe(recipe, overrides)


def test_a_wrong_setting_of_the_file_is_not_an_overrides(recipe):
    recipe.write_text(recipe.read_text() + "log_every: 0\n")
    with pytest.raises(InputError, match=rf"^{recipe}: log_every: expected"):
        load_recipe(recipe, ["seed=1"])


def test_a_setting_that_is_given_twice_is_refused(recipe):
    """PyYAML would keep the last, so that a section's settings are lost; what is merged in may be overridden."""
    own = recipe.read_text()
    recipe.write_text(own + "dpo: &both {beta: 0.1}\nevaluation: {<<: *both, beta: 0.2, beta: 0.3}\n")
    with pytest.raises(InputError, match=r"cannot be read as a recipe .*'beta' is given twice"):
        load_recipe(recipe)
    recipe.write_text(own + "optimizer: {clip: 2.0}\n")
    with pytest.raises(InputError, match="'optimizer' is given twice"):
        load_recipe(recipe)
    recipe.write_text(own)
    assert load_recipe(recipe, ["loss={<<: {z_loss: 0.1}, z_loss: 0.2}"]).loss.z_loss == 0.2


@pytest.mark.parametrize(("epochs", "steps", "warned"), [(3, 6, True), (3, 19, True), (3, 20, False), (None, 6, False)])
def test_few_steps_are_told(recipe, caplog, epochs, steps, warned):
    asked = "null" if epochs else steps  # a recipe that asks for its steps has them
    settings = load_recipe(recipe, [f"data.epochs={epochs or 'null'}", f"data.steps={asked}"])
    warn_of_few_steps(settings, steps)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == warned
    assert all(f"{steps} steps" in line and "data.epochs (now 3)" in line for line in said)


def test_evaluation_is_never_augmented(recipe, scanned):
    """Though training is, by the same recipe."""
    held_out = write(recipe.parent / "held.jsonl", speech_samples(2))
    evaluation = [f"evaluation.sources=[{{path: {held_out}}}]", "evaluation.every=1"]
    settings = ["data.augment_speech={speed: [0.8, 0.8], time_masks: 2}", "data.augment_clip=noise"]
    augmented, plain = (load_recipe(recipe, [*evaluation, *more]) for more in (settings, []))
    assert augmented.data.augment_speech == SpeechAugmentation(speed=(0.8, 0.8), time_masks=2)
    own = scanned.processor, scanned.module, scanned.variables
    batches = [next(Evaluation(r.evaluation, r.data, *own).batches()) for r in (augmented, plain)]
    for ours, theirs in zip(*map(jax.tree.leaves, batches), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_other_tools_names_lead_to_settings():
    known = set(setting_names(Recipe))
    assert set(ALIASES.values()) <= known
    assert {name for name in known if "." not in name}.isdisjoint(ALIASES)


def test_overrides_reach_settings_that_are_not_there(recipe):
    """A saved recipe says null where there is nothing."""
    found = load_recipe(recipe, ["evaluation=null", "evaluation.every=3", "evaluation.sources=[{path: held.jsonl}]"])
    assert found.evaluation is not None
    assert found.evaluation.every == 3


@pytest.mark.slow
def test_resuming_with_other_settings_is_refused(recipe, tmp_path, capsys):
    """What was begun stays as it was said; and what is done is not done again."""
    assert run(recipe, "data.epochs=null", "data.steps=3") == 0
    kept = {p: p.read_bytes() for p in (tmp_path / "run" / "recipe.yaml", tmp_path / "run" / "report.md")}
    for override, named in [
        ("trainable=[params/audio_projector]", "trainable"), ("accumulate=2", "accumulate"), ("seed=4", "seed"),
        ("model=elsewhere", "model"), ("data.packing.rows=4", "data.packing.rows"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=f"the run was begun with {named}="):
            run(recipe, "data.epochs=null", "data.steps=3", override)
    capsys.readouterr()
    assert (
        run(recipe, "data.epochs=null", "data.steps=2", "optimizer.learning_rate=0.5", "optimizer.warmup_steps=0") == 0
    )
    assert "already finished" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in kept} == kept
    assert run(recipe, "data.epochs=null", "data.steps=4", "optimizer.clip=null") == 0
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 3, 4]


def test_what_is_logged_is_in_the_files_at_once(tmp_path):
    """A process that is killed has lost none of it, for TensorBoard neither."""
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 2.0})
    log.write(2, {"loss": 1.0, "other": 3.0})
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert tensorboard_steps(events) == [1, 2]
    log.close()


def test_a_second_run_in_a_folder_is_refused(recipe, trained_folder, tmp_path):
    """A second run is refused; an export reads beside a run, and touches nothing."""
    shutil.copytree(trained_folder / "run", tmp_path / "run")
    begun = tmp_path / "run" / CHECKPOINTS / "7.orbax-checkpoint-tmp"
    begun.mkdir()
    with (tmp_path / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        export(tmp_path / "run", tmp_path / "tuned", "original")
        with pytest.raises(InputError, match="another process is training here"):
            run(recipe, "data.epochs=null", "data.steps=5")
    assert begun.exists()
    with pytest.raises(InputError, match="has this run saved anything"):
        Checkpoints(tmp_path / "nowhere", None, read_only=True)


def test_a_run_belongs_to_its_base(trained_folder, tmp_path):
    """It is neither resumed nor exported over another; a copy of its own will do, and adapters need none."""
    shutil.copytree(trained_folder / "run", tmp_path / "run")
    shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("inputs", "goldens*"))
    moved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text()) | {
        "model": str(tmp_path / "base"), "output": str(tmp_path / "run"),
    }  # fmt: skip
    for path in (tmp_path / "run" / "recipe.yaml", tmp_path / "moved.yaml"):
        path.write_text(yaml.safe_dump(moved))
    export(tmp_path / "run", tmp_path / "of_a_copy", "original")
    shard = tmp_path / "base" / "model-00001-of-00003.safetensors"
    tensors = load_file(shard)
    tensors["model.embed_tokens.weight"][0, 0] += 1
    save_file(tensors, shard)
    with pytest.raises(InputError, match=r"was begun with another model than .*base is now.*base\.json"):
        export(tmp_path / "run", tmp_path / "of_another", "original")
    export(tmp_path / "run", tmp_path / "adapters", "native", adapters_only=True)
    with pytest.raises(InputError, match=r"was begun with another model.* give another output"):
        run(tmp_path / "moved.yaml", "data.steps=5")
    assert not (tmp_path / "of_another").exists()


@pytest.mark.slow
def test_adapters_alone_are_not_all(recipe, tmp_path):
    assert run(recipe, "data.epochs=null", "data.steps=3", "trainable=[lora_speech, params/audio_projector]") == 0
    with pytest.raises(InputError, match=r"params/audio_projector/.* besides adapters"):
        export(tmp_path / "run", tmp_path / "tuned", "original", adapters_only=True)
    assert not (tmp_path / "tuned").exists()


@pytest.mark.slow
def test_a_bad_sample_costs_no_step(recipe, tmp_path):
    """What was learnt before it is saved; repaired, the run ends as if it had never been bad."""
    manifest = tmp_path / "train.jsonl"
    good = manifest.read_bytes()
    steps = ["data.epochs=null", "data.steps=6", "data.shuffle=false", "save_every=100", "data.packing.window=1"]
    assert run(recipe, *steps, f"output={tmp_path / 'whole'}") == 0
    lines = good.splitlines(keepends=True)
    manifest.write_bytes(b"".join([*lines[:12], b"broken\n", *lines[13:]]))
    with pytest.raises(InputError, match=r"train\.jsonl: line 13"):
        run(recipe, *steps)
    saved = Checkpoints(tmp_path / "run" / CHECKPOINTS, None).last
    assert saved is not None
    assert 0 < saved < 6
    manifest.write_bytes(good)
    assert run(recipe, *steps) == 0
    (_, weights), (_, other) = final(tmp_path / "whole"), final(tmp_path / "run")
    for path, value in weights.items():
        np.testing.assert_array_equal(value, other[path])


def test_data_that_do_not_reach_what_is_trained(recipe, tmp_path):
    question = [message("user", "What?"), message("assistant", "This.")]
    write(tmp_path / "train.jsonl", [{"messages": question}] * 16)
    with pytest.raises(InputError, match=r"gradients of all logged steps .* are 0: .*lora_speech"):
        run(recipe, "data.epochs=null", "data.steps=3")


def test_evaluation_is_checked_before_the_first_step(recipe, tmp_path):
    bad = {"messages": [message("user", {"type": "audio", "audio": "gone.flac"}), message("assistant", "a")]}
    held = write(tmp_path / "held.jsonl", [*speech_samples(2), bad])
    with pytest.raises(InputError, match=r"held\.jsonl: line 3"):
        run(recipe, f"evaluation={{sources: [{{path: {held}}}], every: 2}}")
    with pytest.raises(InputError, match="have no weights"):
        run(recipe, f"evaluation={{sources: [{{path: {held}, weight: 1}}], every: 2}}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_preemption_skips_the_evaluation(recipe, tmp_path, monkeypatch, sent):
    """There may be half a minute left. Ctrl-C ends a run like SIGTERM: the step is saved."""
    held = write(tmp_path / "held.jsonl", speech_samples(2))

    def told(*_):
        os.kill(os.getpid(), sent)

    monkeypatch.setattr("phi4mm_jax.training.metrics_log.MetricsLog.write", told)
    assert run(recipe, f"evaluation={{sources: [{{path: {held}}}], every: 1, metric: wer}}") == PREEMPTED_EXIT_CODE
    assert Checkpoints(tmp_path / "run" / CHECKPOINTS, None).last == 1


def test_what_can_be_checked_is_checked_before_the_weights_are_read(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "load", None)  # not called
    evaluation = f"evaluation={{sources: [{{path: {tmp_path / 'none'}}}], every: 2}}"
    for override, told in (
        (
            f"data.sources=[{{path: {tmp_path / 'none'}}}]",
            "none: cannot be read .No such file .*has it in data.sources",
        ),
        (evaluation, r"none: cannot be read .*has it in evaluation\.sources: give your own by evaluation\.sources="),
    ):
        with pytest.raises(InputError, match=told):
            run(recipe, override)
    with pytest.raises(InputError, match="profile cannot be written there"):
        sft.train(load_recipe(recipe), profile=tmp_path / "train.jsonl")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("beside", ["", "/below"])
def test_an_output_that_is_a_file(recipe, tmp_path, beside):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; give a folder"):
        run(recipe, f"output={tmp_path / 'file'}{beside}")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(recipe, tmp_path):
    assert run(recipe, "data.steps=2", "data.epochs=null", "optimizer.warmup_steps=0") == 0
    for file in (tmp_path / "run" / CHECKPOINTS / "2" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 500:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(
        CheckpointError, match=r"checkpoints/2: cannot be read .* remove it to resume from the one before"
    ):
        run(recipe, "data.steps=4", "data.epochs=null")


@pytest.mark.slow
def test_bad_data_end_a_run_or_are_counted(recipe, tmp_path):
    manifest = tmp_path / "train.jsonl"
    lines = manifest.read_text().splitlines()
    clip = {"type": "audio", "audio": "gone.flac"}
    lines[3] = json.dumps({"messages": [message("user", clip), message("assistant", "Gone.")]})
    lines[5] = '{"messages": ['
    manifest.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"train\.jsonl: line (4: .*gone\.flac|6: .*JSON)"):
        run(recipe)
    assert not (tmp_path / "run").exists()
    assert run(recipe, "data.bad_samples=0.2") == 0
    assert "{'line': 2, 'media': 2}" in (tmp_path / "run" / "report.md").read_text()  # two epochs


@pytest.mark.slow
def test_a_run_that_diverges_says_so(recipe):
    with pytest.raises(InputError, match="has diverged"):
        run(recipe, "optimizer.learning_rate=1e30", "optimizer.clip=null", "optimizer.warmup_steps=0")


def test_the_table_of_trained_parameters():
    table = trainable_table({"lora_speech": {"a": jax.ShapeDtypeStruct((2, 3), np.float32)}})
    assert table.split("\n")[0].split() == ["lora_speech/a", "(2,", "3)", "6"]


# Text alone: quick runs.


def texts(path: Path, sizes: list[int]) -> Path:
    """One sample for each size, which is about the tokens of its answer."""
    return write(path, [{"messages": [message("user", "q"), message("assistant", "x " * n)]} for n in sizes])


@pytest.fixture
def quick(tmp_path) -> Path:
    """A norm is trained on packed texts, in the order of their file."""
    manifest = texts(tmp_path / "train.jsonl", [5] * 12)
    settings = {
        "model": str(TINY), "output": str(tmp_path / "run"), "trainable": ["params/decoder/norm"], "dtype": "float32",
        "mesh": "fsdp=1",
        "data": {
            "sources": [{"path": str(manifest)}], "epochs": 1, "shuffle": False, "threads": 1,
            "packing": {"rows": 1, "lengths": [64], "window": 1},
        },
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1}, "save_every": 1000,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def loss_tokens(size: int) -> int:
    """Of an answer: its tokens, <|end|> and <|endoftext|>."""
    return len(Tokenizer.from_folder(TINY).encode("x " * size)) + 2


def stop_after(monkeypatch, step: int) -> None:
    monkeypatch.setattr("phi4mm_jax.training.preemption.PreemptionSignal.should_stop", lambda _, number: number == step)


def targets(folder: Path) -> float:
    return sum(line["targets"] for line in read_log(folder) if "targets" in line)


def test_a_finished_run_takes_no_other_data_in_silence(quick, tmp_path, capsys):
    assert run(quick) == 0
    assert run(quick) == 0
    assert "already finished" in capsys.readouterr().out
    other = tmp_path / "other.jsonl"
    other.write_text((tmp_path / "train.jsonl").read_text().replace("x ", "y "))
    with pytest.raises(InputError, match=r"the run is finished, and was trained on .*train\.jsonl; .*other\.jsonl now"):
        run(quick, f"data.sources=[{{path: {other}}}]")


@pytest.mark.parametrize(("before", "after"), fast_are([(5, 20)], [(5, 20), (20, 5)]), ids=["longer", "shorter"])
def test_resuming_with_repaired_files_takes_each_sample_once(quick, tmp_path, monkeypatch, before, after):
    """Those that were trained on have another length now, so that batches counted from the beginning are others."""
    manifest = tmp_path / "train.jsonl"
    texts(manifest, [before] * 8 + [5] * 4)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(quick) == PREEMPTED_EXIT_CODE
    done = read_log(tmp_path / "run")[-1]["step"]
    taken = targets(tmp_path / "run")
    samples = round(taken / loss_tokens(before))
    assert taken == samples * loss_tokens(before)
    assert 0 < samples <= 8
    texts(manifest, [after] * 8 + [5] * 4)
    for _ in range(2):  # again there is nothing left
        assert run(quick) == 0
        rest = [after] * (8 - samples) + [5] * 4
        assert targets(tmp_path / "run") - taken == sum(map(loss_tokens, rest))
    assert Checkpoints(tmp_path / "run" / CHECKPOINTS, None).last == read_log(tmp_path / "run")[-1]["step"] > done


def test_resuming_keeps_the_sizes_that_were_resolved(quick, tmp_path, monkeypatch):
    """Though the data would suggest others by now."""
    texts(tmp_path / "train.jsonl", [20] * 8)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(quick, "data.packing=auto") == PREEMPTED_EXIT_CODE
    before = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["data"]["packing"]
    taken = targets(tmp_path / "run")
    texts(tmp_path / "train.jsonl", [5] * 8)
    assert run(quick, "data.packing=auto") == 0
    after = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["data"]["packing"]
    assert before == after
    assert targets(tmp_path / "run") - taken == (8 - taken / loss_tokens(20)) * loss_tokens(5)


@pytest.mark.slow
def test_resuming_on_other_devices_with_the_data_moved(quick, tmp_path, monkeypatch):
    """One device; or one and after a stop four by two, from another folder: the same losses and the same update."""
    trained = "trainable=[params/decoder/norm, params/decoder/layers/mlp/down]"
    shared = [trained, "data.epochs=null", "data.steps=4", "data.packing.rows=8", "data.shuffle=true"]
    texts(tmp_path / "train.jsonl", [12 + i % 8 for i in range(32)])
    assert run(quick, *shared, f"output={tmp_path / 'whole'}") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(quick, *shared) == PREEMPTED_EXIT_CODE
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "train.jsonl").rename(tmp_path / "elsewhere" / "data.jsonl")
    assert run(quick, *shared, "mesh=fsdp=4,tensor=2", f"data.sources=[{{path: {moved}}}]") == 0
    (step, whole), (other_step, resumed) = final(tmp_path / "whole"), final(tmp_path / "run")
    assert step == other_step == 4
    before = flatten_dict(phi4mm_jax.load(TINY, dtype="float32", scan=True).variables)
    for path, value in whole.items():
        update, other = (np.asarray(x) - before[path] for x in (value, resumed[path]))
        assert np.linalg.norm(update - other) <= 5e-3 * np.linalg.norm(update) > 0, path
    losses = [[line["loss"] for line in read_log(tmp_path / name)] for name in ("whole", "run")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert len(set(losses[0])) == 4


def test_more_epochs_after_a_partial_batch(quick, tmp_path):
    """The last batch of the first run is not full; the second epoch begins behind it, and none of it is left out."""
    assert run(quick) == 0
    once = targets(tmp_path / "run")
    assert once == 12 * loss_tokens(5)
    assert run(quick, "data.epochs=2") == 0
    assert targets(tmp_path / "run") == 2 * once


def test_what_has_diverged_is_not_saved(quick, tmp_path, monkeypatch):
    """Though its metrics are not written yet when a bad sample ends the run."""

    def broken(*arguments):
        yield from islice(step_batches(*arguments), 3)
        raise InputError("a bad sample")

    monkeypatch.setattr("phi4mm_jax.training.step_batches.step_batches", broken)
    texts(tmp_path / "train.jsonl", [20] * 12)
    wild = ["optimizer.learning_rate=1e38", "optimizer.warmup_steps=0", "optimizer.clip=null", "log_every=100"]
    with pytest.raises(InputError, match="has diverged"):
        run(quick, *wild, "optimizer.weight_decay=0.0")
    assert Checkpoints(tmp_path / "run" / CHECKPOINTS, None).last is None
    tame = ["log_every=100", f"output={tmp_path / 'tame'}"]
    with pytest.raises(InputError, match="a bad sample"):
        run(quick, *tame)
    assert Checkpoints(tmp_path / "tame" / CHECKPOINTS, None).last == 3


def test_a_run_that_has_saved_nothing_may_be_begun_anew(quick, tmp_path, monkeypatch):
    """Its first step failed, for want of memory say; a run with a checkpoint is what it was begun as."""
    with monkeypatch.context() as patch:
        patch.setattr(sft, "compile_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(quick)
    others = ["seed=4", "data.packing.rows=2", f"model={TINY}/"]
    assert run(quick, *others, "data.epochs=null", "data.steps=2") == 0
    with pytest.raises(InputError, match="the run was begun with seed=4"):
        run(quick, *others, "seed=5")


def test_an_extended_run_that_fails_has_not_finished(quick, tmp_path, monkeypatch):
    assert run(quick, "data.epochs=null", "data.steps=2") == 0
    assert (tmp_path / "run" / "report.md").exists()
    with monkeypatch.context() as patch:
        patch.setattr("phi4mm_jax.utils.files.os.replace", lambda *_: os.write(-1, b""))
        with pytest.raises(InputError, match=r"run: cannot be written .*rerun the same command"):
            run(quick, "data.epochs=null", "data.steps=3")
    assert not (tmp_path / "run" / "report.md").exists()
    assert run(quick, "data.epochs=null", "data.steps=3") == 0
    assert (tmp_path / "run" / "report.md").exists()


def test_scores_stay_comparable(quick, tmp_path, monkeypatch):
    """Without its metric, a run would not know any more which of its checkpoints is the best."""
    monkeypatch.setattr(Evaluation, "__call__", lambda *_: {"evaluation_loss": 1.0, "evaluation_cer": 0.5})
    held = texts(tmp_path / "held.jsonl", [5])
    steps = ["data.epochs=null", "data.steps=2"]
    assert run(quick, *steps, f"evaluation={{sources: [{{path: {held}}}], every: 5, metric: cer, samples: 1}}") == 0
    with pytest.raises(InputError, match=r"begun with evaluation\.metric='cer', and cannot be resumed with None"):
        run(quick, *steps)


@pytest.mark.parametrize(("log_every", "ends"), [(1, 10), (4, 12), (20, 20), (100, 24)])
def test_a_run_without_gradients_ends_at_the_next_line_of_the_log(log_every, ends):
    check = ZeroGradientCheck(["lora_vision"], 0, 24)
    logged = sorted({*range(log_every, 25, log_every), 24})
    for step in (s for s in logged if s < ends):
        check.observe(step, 0.0)
    with pytest.raises(InputError, match=rf"all logged steps up to {ends} are 0: the data do not reach .*lora_vision"):
        check.observe(ends, 0.0)


def test_a_run_of_few_steps_ends_without_gradients_too():
    with pytest.raises(InputError, match="up to 3 are 0"):
        ZeroGradientCheck(["lora_vision"], 0, 3).observe(3, 0.0)
    later = ZeroGradientCheck(["lora_vision"], 0, 30)
    later.observe(9, 0.5)
    later.observe(10, 0.0)
    ZeroGradientCheck(["lora_vision"], 1, 30).observe(10, 0.0)  # resumed


@pytest.mark.parametrize("resumed", [False, True])
def test_what_is_trained_is_held_once(quick, monkeypatch, resumed):
    """Neither the parameters as they were read nor, after a checkpoint was, the initial state stay on the devices."""
    steps = ["data.epochs=null", "trainable=[params/audio_projector, params/decoder/norm]", "dtype=bfloat16"]
    if resumed:
        assert run(quick, *steps, "data.steps=2") == 0
    known = {id(x) for x in jax.live_arrays()}
    held = []

    def compiled(*_):
        def stepped(state, frozen, batches, key):
            given = {id(x) for x in jax.tree.leaves((state, frozen, batches, key))}
            held.extend(x for x in jax.live_arrays() if id(x) not in given | known)
            raise InputError("seen")

        return stepped

    monkeypatch.setattr(sft, "compile_step", compiled)
    with pytest.raises(InputError, match="seen"):
        run(quick, *steps, "data.steps=4")
    assert sum(x.nbytes for x in held) < 1000, [(x.shape, x.dtype) for x in held]


def test_a_state_that_exceeds_the_memory_is_not_called_damaged(tmp_path, monkeypatch):
    state = TrainState(jnp.int32(1), {"a": jnp.ones(2)}, ())
    checkpoints = Checkpoints(tmp_path / "run" / CHECKPOINTS, 1)
    checkpoints.save(state, {})
    checkpoints.close()
    read = Checkpoints(tmp_path / "run" / CHECKPOINTS, 1)
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    def restore(*_, **__):
        raise full

    monkeypatch.setattr(read._manager, "restore", restore)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        read.restore(1, state)


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_score_that_is_no_number_is_the_worst(tmp_path, higher_is_better):
    checkpoints = Checkpoints(tmp_path / "run" / CHECKPOINTS, 3, higher_is_better)
    for step, score in ((1, np.nan), (2, 0.5), (3, np.nan)):
        checkpoints.save(TrainState(jnp.int32(step), {"a": jnp.ones(2)}, ()), {}, score)
    checkpoints.close()
    assert Checkpoints(tmp_path / "run" / CHECKPOINTS, 3, higher_is_better, read_only=True).best == 2


def test_an_evaluation_that_is_no_number_ends_the_run(quick, tmp_path, monkeypatch):
    held = texts(tmp_path / "held.jsonl", [5])
    monkeypatch.setattr(Evaluation, "__call__", lambda *_: {"evaluation_loss": np.nan})
    with pytest.raises(InputError, match="the evaluation after step 1 gave evaluation_loss nan: the run has diverged"):
        run(quick, f"evaluation={{sources: [{{path: {held}}}], every: 1}}")
    assert Checkpoints(tmp_path / "run" / CHECKPOINTS, None).last is None


def test_answers_are_dealt_out_over_the_sources(tiny, quick, tmp_path):
    paths = [texts(tmp_path / f"held_{i}.jsonl", [5] * 6) for i in range(3)]
    listed = ", ".join(f"{{path: {path}}}" for path in paths)
    recipe = load_recipe(quick, [f"evaluation={{sources: [{listed}], every: 1, metric: cer, samples: 10}}"])
    evaluation = Evaluation(recipe.evaluation, recipe.data, tiny.processor, tiny.module, tiny.variables)
    assert len(evaluation._items) == 10


def test_answers_are_asked_for_as_the_data_say(tiny, quick, tmp_path, monkeypatch):
    """With the adapter and the crops of training, as the loss is computed."""
    held = texts(tmp_path / "held.jsonl", [5] * 3)
    given = f"evaluation={{sources: [{{path: {held}}}], every: 1, metric: cer}}"
    recipe = load_recipe(quick, [given, "data.max_crops=1", "data.adapter=vision"])
    asked: list[Request] = []

    class Asked:
        def __init__(self, *_):
            pass

        def run(self, requests):
            asked.extend(requests)
            return enumerate(Completion("x", [1], "stop", 1) for _ in asked)

    monkeypatch.setattr("phi4mm_jax.training.evaluation.Engine", Asked)
    evaluation = Evaluation(recipe.evaluation, recipe.data, tiny.processor, tiny.module, tiny.variables)
    assert evaluation._answers({}, tiny.variables, lambda: False) == ["x"] * 3
    assert [(r.max_crops, r.adapter) for r in asked] == [(1, "vision")] * 3


def test_a_log_that_cannot_be_written_says_so(tmp_path):
    log = MetricsLog(tmp_path / "run", 0)
    log._file.close()
    log._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be written \(No space left.*make room"):
        log.write(1, {"loss": 1.0})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tensorboard").write_text("")
    with pytest.raises(InputError, match="tensorboard: cannot be written"):
        MetricsLog(tmp_path / "other", 0)


def slow_steps(monkeypatch, seconds: float, peak: float | None = None) -> list[int]:
    """Each step takes so long of a clock that stands still meanwhile, an evaluation a hundred; their tokens."""
    clock, tokens = [0.0], []
    monkeypatch.setattr(sft, "Throughput", partial(Throughput, clock=lambda: clock[0], peak=peak))
    compile_step = sft.compile_step

    def slow(*arguments):
        step = compile_step(*arguments)

        def stepped(state, frozen, batches, key):
            tokens.append(int(batches.batch.lengths.sum()))
            clock[0] += seconds
            return jax.block_until_ready(step(state, frozen, batches, key))

        return stepped

    def evaluated(*_):
        clock[0] += 100.0
        return {"evaluation_loss": 1.0}

    monkeypatch.setattr(sft, "compile_step", slow)
    monkeypatch.setattr("phi4mm_jax.training.evaluation.Evaluation.__call__", evaluated)
    return tokens


@pytest.mark.parametrize(("dropout", "seed"), [("true", 0), ("true", 5), ("false", 0)])
def test_a_run_drops_out_by_its_seed(quick, monkeypatch, dropout, seed):
    keys = []

    def stepped(state, frozen, batches, key):
        keys.append(key)
        ones = [jnp.ones(())] * len(Metrics._fields)
        return state._replace(step=state.step + 1), Metrics(*ones)

    monkeypatch.setattr(sft, "compile_step", lambda *_: stepped)
    assert run(quick, f"dropout={dropout}", f"seed={seed}", "data.epochs=null", "data.steps=2") == 0
    expected = jax.random.key(seed, impl="rbg") if dropout == "true" else None
    assert len(keys) == 2
    for key in keys:
        assert jax.tree.map(lambda x: jax.random.key_data(x).tolist(), [key, key]) == jax.tree.map(
            lambda x: jax.random.key_data(x).tolist(), [expected, expected]
        )


def test_the_last_step_is_filled_with_micro_batches_without_targets():
    def batch(number):
        return TrainingBatch(None, np.full((1, 4), number), np.full((1, 4), float(number)))

    steps = list(step_batches(map(batch, range(1, 8)), accumulate=3, steps=3))
    assert [[int(b.targets[0, 0]) for b in step] for step in steps] == [[1, 2, 3], [4, 5, 6], [7, 7, 7]]
    assert [[b.weights.sum() for b in step] for step in steps] == [[4, 8, 12], [16, 20, 24], [28, 0, 0]]


def test_the_log_of_preferences_has_margins():
    """Preferences whose loss is 0.5 a pair, and whose better answers are ahead by 0.25."""
    metrics = Metrics(*map(jnp.float32, (0.5, -0.25, 0.75, 8.0, 2.0)))
    expected = {"loss": 0.5, "margin": 0.25, "accuracy": 0.75, "pairs": 8.0, "gradient_norm": 2.0}
    assert metric_values(metrics, "preferences") == expected
    assert metric_values(metrics, "answers")["cross_entropy"] == -0.25


def test_throughput_is_the_steps_own(quick, tmp_path, monkeypatch):
    """Each step takes two seconds, whatever an evaluation takes; a chip can do 10,000 operations a second."""
    tokens = slow_steps(monkeypatch, 2.0, peak=1e4)
    monkeypatch.setattr(throughput, "step_flops", lambda *given: 100.0 * given[2][0].batch.lengths.sum())
    held = texts(tmp_path / "held.jsonl", [5])
    texts(tmp_path / "train.jsonl", [20] * 12)
    assert run(quick, f"evaluation={{sources: [{{path: {held}}}], every: 3}}", "save_every=2") == 0
    lines = [line for line in read_log(tmp_path / "run") if "targets" in line]
    assert len(lines) == len(tokens) > 4
    assert "tokens_per_second" not in lines[0]  # it was compiled
    assert [line["seconds"] for line in lines[1:]] == [2.0] * (len(lines) - 1)
    assert [line["tokens_per_second"] for line in lines[1:]] == [n / 2.0 for n in tokens[1:]]
    devices = 8  # of this process
    expected = [100 * n / 2.0 / 1e4 / devices for n in tokens[1:]]
    np.testing.assert_allclose([line["mfu"] for line in lines[1:]], expected)


def test_throughput_of_several_steps_is_of_all_their_tokens(quick, tmp_path, monkeypatch):
    """Logged every three steps of two seconds each; rows are filled more and more."""
    tokens = slow_steps(monkeypatch, 2.0)
    texts(tmp_path / "train.jsonl", list(range(15, 24)))
    assert run(quick, "log_every=3", "data.packing.window=1") == 0
    assert len(tokens) == len(set(tokens)) == 9  # a sample each
    lines = read_log(tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 6, 9]
    assert "tokens_per_second" not in lines[0]
    assert [line["seconds"] for line in lines[1:]] == [2.0, 2.0]
    assert [line["tokens_per_second"] for line in lines[1:]] == [sum(tokens[i : i + 3]) / 6.0 for i in (3, 6)]


def test_a_score_that_was_cut_short_is_made_up_for(quick, tmp_path, monkeypatch):
    """SIGTERM during the last evaluation: the run is not done until its last state has a score."""
    held = texts(tmp_path / "held.jsonl", [5])
    evaluation = f"evaluation={{sources: [{{path: {held}}}], every: 100}}"
    with monkeypatch.context() as patch:
        patch.setattr("phi4mm_jax.training.evaluation.Evaluation.__call__", lambda *_: None)
        assert run(quick, evaluation) == PREEMPTED_EXIT_CODE
    folder = tmp_path / "run"
    last = Checkpoints(folder / CHECKPOINTS, None).last
    assert Checkpoints(folder / CHECKPOINTS, None).score(last) is None
    assert not (folder / "report.md").exists()
    weights = final(folder)[1]
    assert run(quick, evaluation) == 0
    score = Checkpoints(folder / CHECKPOINTS, None).score(last)
    assert score == [line["evaluation_loss"] for line in read_log(folder) if "evaluation_loss" in line][-1]
    assert Checkpoints(folder / CHECKPOINTS, None).last == last
    for path, value in final(folder)[1].items():
        np.testing.assert_array_equal(value, weights[path])
    assert run(quick, evaluation) == 0


@pytest.mark.torch
@pytest.mark.parametrize(
    ("metric", "scores", "best", "share"),
    [("loss", {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5}, 4, None), ("exact", {2: 0.1, 4: 0.2, 6: 0.9, 8: 0.3}, 6, 1 / 3)],
)
def test_the_best_state_by_evaluation_is_exported(tiny, quick, tmp_path, monkeypatch, metric, scores, best, share):
    """Neither the worst nor the last: its weights are those that were evaluated, its figures those of its logits."""
    prompt = "<|user|>Number 3?<|end|><|assistant|>"
    (said,) = tiny.generate([prompt], max_new_tokens=1)
    references = [said.text, "x x x", "x " * 20]
    held = write(
        tmp_path / "held.jsonl",
        [{"messages": [message("user", "Number 3?"), message("assistant", r)]} for r in references],
    )
    measure: Any = Evaluation.__call__
    evaluated: dict[int, dict] = {}

    def scored(evaluation, trainable, *arguments):
        step = 2 * len(evaluated) + 2
        evaluated[step] = jax.tree.map(np.array, flatten_dict(trainable))
        found = measure(evaluation, trainable, *arguments)
        values[step] = found
        return found | {f"evaluation_{metric}": scores[step]}

    answering: list[np.ndarray] = []  # the norm of what generates answers, a call each

    def engine(programs, variables, *arguments):
        answering.append(np.array(variables["params"]["decoder"]["norm"]["scale"]))
        return Engine(programs, variables, *arguments)

    values: dict[int, dict] = {}
    monkeypatch.setattr(Evaluation, "__call__", scored)
    monkeypatch.setattr("phi4mm_jax.training.evaluation.Engine", engine)
    evaluation = f"evaluation={{sources: [{{path: {held}}}], every: 2, metric: {metric}, max_new_tokens: 1}}"
    assert run(quick, evaluation, "data.epochs=null", "data.steps=8", "keep=1") == 0
    assert Checkpoints(tmp_path / "run" / CHECKPOINTS, None, read_only=True).steps == [best, 8]
    assert export(tmp_path / "run", tmp_path / "out", "original") == best
    exported = phi4mm_jax.load(tmp_path / "out", dtype="float32", scan=True)
    found = flatten_dict(exported.variables)
    for path, value in evaluated[best].items():
        np.testing.assert_array_equal(found[path], value)
        assert all(np.abs(other[path] - value).max() > 1e-5 for s, other in evaluated.items() if s != best)
    losses = [answer_losses(exported, prompt, reference) for reference in references]
    np.testing.assert_allclose(values[best]["evaluation_loss"], np.concatenate(losses).mean(), rtol=1e-5)
    assert values[best].get("evaluation_exact") == share
    norms = [evaluated[step]["params", "decoder", "norm", "scale"] for step in sorted(evaluated)]
    np.testing.assert_array_equal(answering, norms if metric == "exact" else [])
    assert f"step {best}" in (tmp_path / "run" / "report.md").read_text()


def answer_losses(model, prompt: str, answer: str) -> np.ndarray:
    """Losses of each token of an answer, by the whole logits."""
    import torch
    from torch.nn.functional import cross_entropy

    batch = model.process([f"{prompt}{answer}<|end|><|endoftext|>"])
    start, stop = len(model.processor.tokenizer.encode(prompt, special=True)), int(batch.lengths[0])
    logits = torch.tensor(np.asarray(model.logits(batch))[0, start - 1 : stop - 1])
    return cross_entropy(logits, torch.tensor(batch.tokens[0, start:stop]).long(), reduction="none").numpy()


@pytest.mark.parametrize(("higher_is_better", "best"), [(True, 2), (False, 3)])
def test_the_best_checkpoint_is_kept(tmp_path, higher_is_better, best):
    """Besides the last one; a score that came later counts like the others."""
    checkpoints = Checkpoints(tmp_path / "run" / CHECKPOINTS, 1, higher_is_better)
    for step, score in ((1, 0.4), (2, 0.9), (3, 0.1), (4, 0.5), (5, None)):
        checkpoints.save(TrainState(jnp.int32(step), {"a": jnp.full(2, step)}, ()), {}, score)
    checkpoints.add_score(5, 0.6)
    checkpoints.close()
    read = Checkpoints(tmp_path / "run" / CHECKPOINTS, None, higher_is_better, read_only=True)
    assert read.steps == sorted({best, 5})
    assert read.best == best
    assert read.trained(read.best)["a"].tolist() == [best, best]
    worst = Checkpoints(tmp_path / "run" / CHECKPOINTS, 1, higher_is_better)
    worst.add_score(5, 2.0 if higher_is_better else -2.0)
    assert worst.best == 5


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_score_that_came_later_keeps_its_checkpoint(tmp_path, higher_is_better):
    """The last state was scored on resuming, as the best; the run then goes on to worse ones."""
    better, worse = (0.9, 0.1) if higher_is_better else (0.1, 0.9)

    def save(checkpoints, step, score):
        checkpoints.save(TrainState(jnp.int32(step), {"a": jnp.full(2, step)}, ()), {}, score)

    folder = tmp_path / "run" / CHECKPOINTS
    first = Checkpoints(folder, 1, higher_is_better)
    save(first, 1, 0.5)
    save(first, 2, None)
    first.close()
    resumed = Checkpoints(folder, 1, higher_is_better)
    resumed.add_score(2, better)
    for step in (3, 4, 5):
        save(resumed, step, worse)
    resumed.close()
    read = Checkpoints(folder, 1, higher_is_better, read_only=True)
    assert (read.best, read.steps) == (2, [2, 5])
    assert read.trained(2)["a"].tolist() == [2, 2]


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_of_equal_scores_the_later_is_best(tmp_path, higher_is_better):
    checkpoints = Checkpoints(tmp_path / "run" / CHECKPOINTS, 1, higher_is_better)
    for step, score in ((1, 0.5), (2, 0.5), (3, 0.4 if higher_is_better else 0.6)):
        checkpoints.save(TrainState(jnp.int32(step), {"a": jnp.full(2, step)}, ()), {}, score)
    checkpoints.close()
    read = Checkpoints(tmp_path / "run" / CHECKPOINTS, 1, higher_is_better, read_only=True)
    assert (read.best, read.steps) == (2, [2, 3])


@pytest.mark.parametrize(
    ("values", "weight", "told"),
    [
        (
            {"loss": np.nan, "gradient_norm": 1.0},
            1.0,
            "the loss of step 7 is nan, its gradients' norm 1.0: the run has",
        ),
        ({"loss": 2.0, "gradient_norm": np.inf}, 1.0, "the loss of step 7 is 2.0, its gradients' norm inf"),
        (
            {"loss": 2.0, "gradient_norm": 1.0},
            np.inf,
            "step 7 has left trainable parameters or optimizer moments .* not finite",
        ),
    ],
)
def test_what_has_diverged_is_named(values, weight, told):
    with pytest.raises(InputError, match=told):
        check_finite(7, values, TrainState(jnp.int32(7), {"a": jnp.full(2, weight)}, ()))
    check_finite(7, {"loss": 2.0, "gradient_norm": 1.0}, TrainState(jnp.int32(7), {"a": jnp.ones(2)}, ()))


@pytest.mark.slow
def test_adapters_are_trained_beside_quantised_weights(recipe, tmp_path):
    """QLoRA: the losses are those of a base that int4's values, as floats, make up, and the export is an adapter's."""
    steps = "data.steps=3", "data.epochs=null", "dropout=false"
    assert run(recipe, *steps, "weights=int4") == 0
    quantized = phi4mm_jax.load(TINY, "float32", weights="int4", scan=True)
    plain = tmp_path / "plain"
    to_torch(TINY, plain, "original", trained=flatten_dict(dequantized(quantized.variables)))
    assert run(recipe, *steps, f"model={plain}", f"output={tmp_path / 'other'}") == 0
    losses = [[line["loss"] for line in read_log(tmp_path / name)] for name in ("run", "other")]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    export(tmp_path / "run", tmp_path / "tuned", "native", adapters_only=True)
    tuned = phi4mm_jax.load(
        TINY, "float32", weights="int4", adapters={"speech": tmp_path / "tuned" / "speech-lora"}, scan=True
    )
    _, weights = final(tmp_path / "run")
    for path, value in flatten_dict(tuned.variables).items():
        if path[0] == "lora_speech":
            np.testing.assert_array_equal(value, weights[path])


@pytest.mark.slow
def test_an_encoder_is_trained_beside_quantised_weights(recipe, tmp_path, capsys):
    """Resumed and evaluated; the export has the base's own weights, and what was trained in place of the encoder's."""
    held = f"evaluation={{sources: [{{path: {tmp_path / 'train.jsonl'}}}], every: 3, metric: wer, samples: 2}}"
    trained = "trainable=[params/speech, params/audio_projector]"
    given = trained, held, "evaluation.max_new_tokens=4", "weights=int4", "data.epochs=null", "dropout=false"
    assert run(recipe, *given, "data.steps=3") == 0
    assert run(recipe, *given, "data.steps=6") == 0
    assert "esum" in capsys.readouterr().out
    lines = read_log(tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert [line["step"] for line in lines if "evaluation_wer" in line] == [3, 6]
    export(tmp_path / "run", tmp_path / "tuned", "original", step="last")
    flat, old = (flatten_dict(phi4mm_jax.load(p, "float32", scan=True).variables) for p in (tmp_path / "tuned", TINY))
    _, weights = final(tmp_path / "run")
    assert {path[1] for path in weights} == {"speech", "audio_projector"}
    for path, value in flat.items():
        np.testing.assert_array_equal(value, weights.get(path, old[path]), err_msg="/".join(path))
    assert not np.array_equal(*(x["params", "speech", "layers", "q", "kernel"] for x in (flat, old)))
    to_orbax(TINY, tmp_path / "stored", weights="int8")
    with pytest.raises(InputError, match=r"trainable has params/\S+, which this checkpoint has quantised; begin"):
        run(recipe, f"model={tmp_path / 'stored'}", "weights=int8", trained, f"output={tmp_path / 'third'}")
    with pytest.raises(InputError, match=r"trainable=\['params'\] has all linear maps: none is frozen"):
        run(recipe, "weights=int8", "trainable=[params]", f"output={tmp_path / 'third'}")
