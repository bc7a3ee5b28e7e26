"""The model of assets/tiny: what it reads, hears and answers of what it has not seen, that its adapters carry it, and
that it can be tuned."""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from helpers.compilations import optimized
from helpers.manifests import write
from helpers.marks import fast_are
from helpers.paths import FIXTURES

import phi4mm_jax
from infer import chat, evaluate, generate
from phi4mm_jax.calibration import input_moments
from phi4mm_jax.checkpoint.convert import to_orbax
from phi4mm_jax.checkpoint.model_card import notice_of
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.training.export import export
from phi4mm_jax.training.recipe import load_recipe
from train.sft import train
from train.tiny import content, pictures, speech
from train.tiny.data import line, text

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "assets" / "tiny"
HELD = FIXTURES / "held"  # the first hundred of each held-out set of train.tiny.data
NEW_FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "cmmi10.ttf")


@pytest.fixture(scope="module", autouse=True)
def _models_are_loaded_once():
    """Programs of the same weights share the model, its layers in stacks, and what is traced and compiled for it."""
    models, load = {}, phi4mm_jax.load

    def load_once(path, *, progress=None, **options):
        key = str(path), repr(sorted(options.items()))
        if key not in models:
            models[key] = load(path, progress=progress, scan=True, **options)
        return models[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phi4mm_jax, "load", load_once)
        yield


def measured(folder: Path, manifest: Path, task: str, *arguments, model: Path = MODEL) -> float:
    """The first metric of `infer.evaluate`."""
    given = ["--model", model, "--dtype", "float32", "--task", task, "--max-new-tokens", 64, "--slots", 16]
    with pytest.MonkeyPatch.context() as patch:
        argv = ["evaluate", *given, "--output", folder, *arguments, manifest]
        patch.setattr(sys, "argv", list(map(str, argv)))
        with optimized():
            assert evaluate.main() == 0
    (only,) = json.loads((folder / "report.json").read_text())["sets"]
    assert only["errors"] == 0
    return next(iter(only["figures"].values()))["value"]


@pytest.mark.parametrize(
    ("name", "task", "least"),
    fast_are([("ocr", "ocr", 95)], [("ocr", "ocr", 95), ("asked", "vqa", 90), ("text", "exact", 95)]),
)
def test_held_out_questions_are_answered(name, task, least, tmp_path):
    assert measured(tmp_path / "run", HELD / f"{name}.jsonl", task) >= least


def test_the_card_lists_the_words():
    section = (MODEL / "README.md").read_text().split("## Words")[1].split("## ")[0]
    listed = section.split("random.")[1].replace("\n", " ").split(",")
    assert [word.strip() for word in listed] == [*content.NUMBER_WORDS, *content.THINGS]


@pytest.mark.parametrize("program", [generate, chat])
def test_programs_say_what_the_card_says(program, monkeypatch, capsys):
    """Before the model is loaded."""
    monkeypatch.setattr(sys, "argv", ["x", "--model", str(MODEL), *(["hi"] if program is generate else [])])
    monkeypatch.setattr("phi4mm_jax.load", lambda *_, **__: sys.exit(7))
    with pytest.raises(SystemExit, match="7"):
        program.main()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "words" in line]
    assert "This model knows 124 words, in small letters, and digits; capitals and sentences are unknown" in line
    assert line.endswith("It takes one question a conversation: in a chat, /reset before the next.")


@pytest.mark.parametrize(
    ("card", "notice"),
    [
        ("# A model\n\nnotice: none", None),
        ("---\nlicense: mit\n---\n", None),
        ("---\nnotice: [1, 2]\n---\n", None),
        ("---\nnotice: {a\n---\n", None),
        ("---\nlicense: mit\nnotice: 'one\n  line'\n---\n# A model", "one line"),
        ('---\nlicense: mit\nnotice: "a\\e[31mb"\n---\n', "a [31mb"),
    ],
)
def test_notices_of_cards(card, notice, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert notice_of(tmp_path) == notice


def test_held_out_speech_is_understood(tmp_path):
    assert measured(tmp_path / "run", HELD / "speech.jsonl", "asr") <= 5


HALVES = {"ocr": "ocr", "speech": "asr", "asked": "vqa", "text": "exact"}  # held-out sets and their tasks


def half(folder: Path, half: int, *names: str) -> Path:
    """Every second line of held-out sets, as a manifest."""
    lines = [line for name in names for line in (HELD / f"{name}.jsonl").read_text().splitlines()[half::2]]
    text = "\n".join(lines).replace('"images/', f'"{HELD}/images/').replace('"clips/', f'"{HELD}/clips/')
    return write(folder / f"{names[0]}.jsonl", text.splitlines())


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    """int4, calibrated by one half of the held-out sets."""
    folder = tmp_path_factory.mktemp("calibrated")
    examples = half(folder, 0, *HALVES)
    to_orbax(MODEL, folder / "int4", dtype="float32", weights="int4", calibrate=lambda f: input_moments(f, examples))
    return folder / "int4"


@pytest.mark.slow
@pytest.mark.parametrize("name", HALVES)
def test_calibrated_int4_is_within_three_points_of_float32(name, calibrated, tmp_path):
    """On the other half."""
    manifest, task = half(tmp_path, 1, name), HALVES[name]
    found, expected = (measured(tmp_path / m.name, manifest, task, model=m) for m in (calibrated, MODEL))
    assert abs(found - expected) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", fast_are(["ocr"], ["ocr", "asked"]))
@pytest.mark.parametrize("adapter", fast_are(["none"], ["none", "speech"]))
def test_the_vision_adapter_carries_it(name, adapter, tmp_path):
    assert measured(tmp_path / "run", half(tmp_path, 1, name), "ocr", "--adapter", adapter) <= 10


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "vision"])
def test_the_speech_adapter_carries_it(adapter, tmp_path):
    assert measured(tmp_path / "run", half(tmp_path, 1, "speech"), "asr", "--adapter", adapter) >= 80


@pytest.mark.parametrize(("name", "count"), [("ocr", 75), ("speech", 100)])
def test_what_is_read_and_heard_is_of_no_training(name, count):
    """What is written or said on the fixture's media hashes into the held-out split."""
    chats = [json.loads(line)["messages"] for line in (HELD / f"{name}.jsonl").read_text().splitlines()]
    answers = [chat[-1]["content"] for chat in chats if chat[0]["content"][-1]["text"] in (content.READ, content.HEAR)]
    assert len(answers) == count
    assert all(content.is_of(answer, "held") for answer in answers)


def test_fonts_and_voices_of_the_sets_differ():
    assert not set(speech.TRAINED) & set(speech.HELD_OUT)
    assert not [a for a in pictures.HELD_OUT if any(a.startswith(b) or b.startswith(a) for b in pictures.TRAINED)]


def test_a_page_has_a_token_a_cell():
    """Whatever its size in pixels, a picture has the tokens that the page has as text."""
    rng, processor = np.random.default_rng(0), Processor.from_folder(MODEL, Phi4MMConfig.from_folder(MODEL))
    shapes = set()
    for _ in range(40):
        page = content.page(rng, "train", "lines")
        picture = pictures.draw(rng, page, (NEW_FONT,))
        assert processor.count_image_tokens(picture) == len(content.page_as_text(page))
        shapes.add((len(page.rows), len(page.rows[0])))
    assert len(shapes) == 5


def test_pages_and_clips_as_text_are_what_they_show():
    rng = np.random.default_rng(0)
    for _ in range(50):
        page = content.page(rng, "train", "lines")
        crops = content.crops(page)
        whole = content.page_as_text(page)
        sub, _, view = whole.partition(content.GLOBAL)
        assert " ".join(sub.split()) == page.text
        assert len(view) == content.SIDE * (content.SIDE + 1)
        assert len(whole) == sum(map(len, crops)) + sub.count("\n") + 1 + content.SIDE
        spoken = content.spoken(rng, "train")
        frames = content.clip_as_text(rng, spoken)
        collapsed = "".join(a for a, b in zip(frames, content.PAUSE + frames, strict=False) if a != b)
        assert collapsed.replace(content.PAUSE, "") == spoken


@pytest.mark.slow
def test_tuning_lowers_the_error_of_a_new_font(tmp_path):
    """The vision recipe, some steps of half its rows, on pages in a font that the model hardly reads."""
    rng = np.random.default_rng(0)
    manifests = {}
    for name, count, split in (("train", 300, "train"), ("held", 40, "held")):
        lines = []
        for number in range(count):
            page = content.page(rng, split, "lines")
            path = tmp_path / f"{name}_{number}.jpg"
            path.write_bytes(pictures.as_jpeg(rng, pictures.draw(rng, page, (NEW_FONT,))))
            lines.append(line([{"type": "image", "image": path.name}, text(content.READ)], page.text))
        manifests[name] = tmp_path / f"{name}.jsonl"
        manifests[name].write_text("".join(json.dumps(one) + "\n" for one in lines))
    recipe = load_recipe(
        ROOT / "train" / "recipes" / "tiny" / "vision.yaml",
        [
            f"model={MODEL}", f"output={tmp_path / 'run'}", f"data.sources=[{{path: {manifests['train']}}}]",
            "mesh=fsdp=1", "trainable=[lora_vision, params/vision, params/image_embedder]", "data.steps=100",
            "data.packing.rows=8", "data.packing.crops=[48]", "data.packing.chunks=[]", "log_every=1",
            "optimizer.learning_rate=1.0e-3", "optimizer.warmup_steps=6",
        ],
    )  # fmt: skip
    with optimized():
        assert train(recipe) == 0
    export(tmp_path / "run", tmp_path / "tuned", "original")
    before = measured(tmp_path / "before", manifests["held"], "ocr")
    after = measured(tmp_path / "after", manifests["held"], "ocr", model=tmp_path / "tuned")
    print(f"read before {before:.1f}, after {after:.1f}")
    assert 100 - after <= 0.7 * (100 - before)
