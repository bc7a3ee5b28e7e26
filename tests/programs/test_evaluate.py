"""`infer.evaluate` as a whole: what it prints, what it resumes, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest
from helpers.manifests import assistant, user, write
from helpers.paths import TINY

from infer import evaluate
from phi4mm_jax import CheckpointError, InputError
from phi4mm_jax.engine import EngineConfig
from phi4mm_jax.evaluation import metrics
from phi4mm_jax.evaluation.answers import ask
from phi4mm_jax.evaluation.items import Item
from phi4mm_jax.evaluation.report import TASKS

CLIP = TINY / "inputs" / "audio_0.flac"
SMALL = EngineConfig(slots=1, cache_tokens=2048)
SIZES = ["--slots", "1", "--cache-tokens", "2048"]


class Program:
    """The program with the tiny checkpoint, and how often it loaded it."""

    def __init__(self, tiny, monkeypatch, capsys):
        self.loads, self._patch, self._capsys = 0, monkeypatch, capsys

        def load(*_, **__):
            self.loads += 1
            return tiny

        monkeypatch.setattr(evaluate.phi4mm_jax, "load", load)

    def __call__(self, *arguments) -> tuple[int, str, str]:
        """Its status, output and errors."""
        given = ["--model", TINY, "--compilation-cache", "", "--max-new-tokens", 1, *SIZES, *arguments]
        self._patch.setattr(sys, "argv", ["evaluate", *map(str, given)])
        return evaluate.main(), *self._capsys.readouterr()


@pytest.fixture
def program(tiny, monkeypatch, capsys) -> Program:
    return Program(tiny, monkeypatch, capsys)


PROMPTS = [
    [user("Who are you?")],
    [user({"type": "audio", "audio": str(CLIP)}, "What is said?")],
    [user("How are you?")],
]


@pytest.fixture(scope="module")
def said(tiny) -> dict[str, list]:
    """What the model says to each prompt, and to that with the clip by other adapters."""
    items = [Item(str(i), None, prompt, ("",)) for i, prompt in enumerate(PROMPTS)]
    engine = tiny.engine(SMALL)
    answers = {"auto": ask(engine, items, 1)}
    answers |= {name: ask(engine, items[1:2], 1, name) for name in ("none", "speech", "vision")}
    return {name: [answer.text for answer in of_all or []] for name, of_all in answers.items()}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_whole_run(program, said, tmp_path):
    """Two answers right, one wrong, one item that fails; it is resumed, and measured anew with other references."""
    lost = [user({"type": "image", "image": "lost.png"}, "What?")]
    references = [said["auto"][0], said["auto"][1], "surely not this", "nor this"]
    prompts = [*PROMPTS, lost]
    lines = [
        {"id": f"i{i}", "messages": [*p, assistant(r)]}
        for i, (p, r) in enumerate(zip(prompts, references, strict=True))
    ]
    manifest, folder = write(tmp_path / "held.jsonl", lines), tmp_path / "runs" / "held"
    run = ["--task", "ocr", manifest, "--output", folder]
    status, output, errors = program(*run)
    assert status == 0, errors
    report = json.loads((folder / "report.json").read_text())
    (only,) = report["sets"]
    assert (only["name"], only["items"], only["errors"], only["cut"]) == ("held", 4, 1, 3)
    exact = only["figures"]["exact"]
    assert exact["value"] == 50
    assert (exact["low"], exact["high"]) == pytest.approx((15.00, 85.00), abs=0.01)
    assert report["settings"]["adapter"] == "auto"
    items = lines_of(folder / "items.jsonl")
    assert [item["id"] for item in items] == ["i0", "i1", "i2", "i3"]
    assert [item["where"] for item in items] == [f"{manifest}: line {n}" for n in range(1, 5)]
    assert [item["answer"] for item in items] == [*said["auto"], None]
    assert [item["metrics"]["exact"] for item in items] == [100, 100, 0, 0]
    assert [item["references"] for item in items] == [[r] for r in references]
    assert items[0]["prompt"] == PROMPTS[0]
    assert items[3]["error"].startswith(f"{manifest}: line 4: image 1 ")
    assert "50.00" in output
    assert "15.00 to 85.00" in output
    assert "1 of 4 items failed and count as wrong:" in output
    assert f"{manifest}: line 4: image 1 " in output
    assert "lost.png" in output
    assert "3 answers were cut at 1 tokens" in output

    before = (folder / "answers.jsonl").read_bytes()
    (folder / "answers.jsonl").write_bytes(before[: before.index(b"\n") + 20])  # as a killed run leaves it
    status, again, errors = program(*run)
    assert (status, again) == (0, output)
    assert "1 of 4 items are answered already; resuming" in errors
    assert sorted((folder / "answers.jsonl").read_bytes().splitlines()) == sorted(before.splitlines())
    write(manifest, [*lines[:2], {**lines[2], "answers": [said["auto"][2]]}, lines[3]])
    assert program(*run)[0] == 0
    assert program.loads == 2  # all is answered: nothing is loaded
    assert json.loads((folder / "report.json").read_text())["sets"][0]["figures"]["exact"]["value"] == 75

    status, _, errors = program(*run, "--adapter", "none")
    assert status == 2
    assert f"{folder}: holds answers of other adapter (auto, now none); give another folder" in errors
    write(manifest, [*lines[:3], {"messages": [user("Another one?"), assistant("nor this")]}])
    assert "holds answers of other prompts" in program(*run)[2]


def test_adapters_carry_what_they_carry(program, said, tmp_path):
    """The answer of no adapter is right without one, and wrong with the clip's own or the other one."""
    assert said["speech"] == said["auto"][1:2]
    assert len({*said["none"], *said["vision"], *said["speech"]}) == 3
    manifest = write(tmp_path / "m.jsonl", [{"messages": [*PROMPTS[1], assistant(said["none"][0])]}])
    values = []
    for adapter in ("none", "vision", "speech", "auto"):
        folder = tmp_path / adapter
        assert program("--task", "exact", manifest, "--adapter", adapter, "--output", folder)[0] == 0
        values.append(json.loads((folder / "report.json").read_text())["sets"][0]["figures"]["exact"]["value"])
    assert values == [100, 0, 0, 0]


def test_sets_are_averaged_and_shown_beside_what_is_published(program, said, tmp_path):
    """Without an output nothing stays."""
    right, wrong = ({"messages": [*PROMPTS[2], assistant(text)]} for text in (said["auto"][2], "surely not this"))
    first, second = write(tmp_path / "docvqa.jsonl", [right]), write(tmp_path / "infovqa.jsonl", [wrong, wrong, wrong])
    status, output, errors = program("--task", "vqa", first, second, "--reference", "vision")
    assert status == 0, errors
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert [row[:4] for row in rows] == [
        ["docvqa", "1", "0", "100.00"], ["infovqa", "3", "0", "0.00"], ["mean of sets", "", "", "50.00"],
    ]  # fmt: skip
    assert [row[7] for row in rows] == ["93.20", "72.70", "82.95"]
    assert "published: the card of microsoft/Phi-4-multimodal-instruct" in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["docvqa.jsonl", "infovqa.jsonl"]


def test_translations_show_their_signature(program, tmp_path):
    manifest = write(tmp_path / "de.jsonl", [{"messages": [*PROMPTS[1], assistant("es war spät")]}])
    status, output, errors = program("--task", "ast", manifest, "--tokenize", "zh", "--output", tmp_path / "out")
    assert status == 0, errors
    assert "|tok:zh|" in output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["signatures"]["bleu"] in output


GOOD = {"messages": [user("A?"), assistant("a")]}


@pytest.mark.parametrize(
    ("lines", "arguments", "named"),
    [
        ([], [], "m.jsonl: has no samples; give a file with some"),
        ([{"messages": [user("A?")]}], [], "m.jsonl: line 1: no reference"),
        ([GOOD], ["nowhere.jsonl"], "nowhere.jsonl: cannot be read (No such file or directory); check the path"),
        ([GOOD], ["m.jsonl"], "m.jsonl and m.jsonl: two sets have the same name; rename one"),
        ([GOOD], ["--max-new-tokens", "0"], "--max-new-tokens is 0; expected a positive whole number"),
        ([GOOD], ["--slots", "0"], "--slots is 0"),
        ([GOOD], ["--tokenize", "zh"], "--tokenize is for the task ast; leave it out for asr"),
        ([GOOD], ["--task", "ast", "--tokenize", "words"], "--tokenize is 'words'; expected one of sacreBLEU's: 13a"),
        (
            [GOOD],
            ["--reference", "open-asr"],
            "m: is not a set of the reference; name the manifests after its sets: ami",
        ),
        ([{"messages": [user("A?"), assistant("[noise]")]}], [], "m.jsonl: nothing is left of any reference by the"),
        ([GOOD], ["--model", "nowhere"], "nowhere: no such folder. Give the folder of a Phi-4-multimodal checkpoint"),
        ([GOOD], ["--output", "m.jsonl"], "m.jsonl: cannot be written to (File exists); a file is where a folder"),
        ([GOOD], ["--output", "."], ".: holds something else; give another folder"),
    ],
)
def test_what_cannot_be_is_told_before_the_weights_are_read(program, tmp_path, monkeypatch, lines, arguments, named):
    monkeypatch.chdir(tmp_path)
    write(Path("m.jsonl"), lines)
    status, _, errors = program("--task", "asr", "m.jsonl", *arguments)
    assert status == 2
    assert errors.startswith(f"error: {named}"), errors
    assert errors.count("\n") == 1
    assert not program.loads
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_an_unknown_task(program, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        program("--task", "tts", write(tmp_path / "m.jsonl", [GOOD]))
    error = capsys.readouterr().err
    assert "invalid choice: 'tts'" in error
    assert all(task in error for task in TASKS)


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "whisper_normalizer.english", None)
    with pytest.raises(InputError, match=r"evaluation needs whisper_normalizer; pip install '\.\[evaluate\]'"):
        metrics.make_normalizer("english")


def test_a_folder_that_is_no_checkpoint(program, tmp_path):
    (tmp_path / "model").mkdir()
    manifest = write(tmp_path / "m.jsonl", [GOOD])
    status, _, errors = program("--task", "asr", manifest, "--model", tmp_path / "model", "--output", tmp_path / "out")
    assert status == 2
    assert "config.json" in errors
    assert not (tmp_path / "out").exists()
    assert issubclass(CheckpointError, ValueError)
