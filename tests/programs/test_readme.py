"""Everything in README.md and docs/inference.md that can be run, as it stands there, on the small checkpoints."""

import ast
import asyncio
import importlib
import inspect
import os
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
from helpers.paths import TINY

import phi4mm_jax
from phi4mm_jax.engine.jsonl import read_requests

ROOT = Path(__file__).parents[2]
TEXT = "".join((ROOT / name).read_text() for name in ("README.md", "docs/inference.md"))
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.M | re.S)
TRAIN_LINE, BATCH_LINES = (block for language, block in BLOCKS if language == "json")
PYTHON = [block for language, block in BLOCKS if language == "python"]
LINES = [
    line.partition("  #")[0].strip() for language, block in BLOCKS if language == "" for line in block.splitlines()
]

# Every command, and what it is run as; placeholders stand for files of the test.
RUN_AS = {
    'python -m train.sft train/recipes/speech_adapter.yaml model=PATH "data.sources=[{path: train.jsonl}]"':
        'train.sft RECIPES/speech_adapter.yaml model=MODEL "data.sources=[{path: train.jsonl}]"',
    "python -m train.export runs/speech_adapter tuned --layout original":
        "train.export runs/speech_adapter tuned --layout original",
    "python -m infer.evaluate --model PATH --task asr|ast|ocr|vqa|exact MANIFEST...":
        "infer.evaluate --model tuned --task exact --dtype float32 --max-new-tokens 2 train.jsonl",
    "python -m convert.to_orbax SRC DST [--dtype float32|bfloat16]": "convert.to_orbax tuned orbax --dtype bfloat16",
    "python -m convert.to_torch SRC DST --layout original|native [--adapters-only]":
        "convert.to_torch orbax native --layout native",
}  # fmt: skip
# Lines that other tests, or CI itself, run.
RUN_ELSEWHERE = {
    "make demo": "tests/programs/test_small_model.py asks the demo's questions, in their order",
    "make test": "this",
    'python -m infer.generate --model PATH [--image FILE]... [--audio FILE]... "TEXT"': "tests/utils/test_cli.py",
    "python -m infer.batch --model PATH --input prompts.jsonl --output answers.jsonl": "tests/programs/test_batch.py",
    "python -m infer.ray --model PATH --input 'prompts/*.jsonl' --output answers": "tests/programs/test_ray.py",
    "python -m infer.transcribe --model PATH talk.mp3 --output FOLDER": "tests/programs/test_transcribe.py",
    "python -m infer.serve --model PATH": "tests/programs/test_serve.py",
    "python -m infer.chat --model PATH": "tests/programs/test_infer_chat.py",
    "python -m convert.verify CHECKPOINT --goldens DIR": "tests/programs/test_verify.py",
    "python -m convert.record --model HF_DIR --out DIR": "tests/programs/test_verify.py, with transformers",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with what the commands and the code find in one."""
    folder = tmp_path_factory.mktemp("readme")
    inputs = TINY / "inputs"
    shutil.copy(inputs / "image_0.png", folder / "chart.png")
    shutil.copy(inputs / "audio_0.flac", folder / "clip.wav")
    (folder / "prompts.jsonl").write_text(BATCH_LINES)
    (folder / "train.jsonl").write_text(2 * TRAIN_LINE)
    return folder


def test_every_line_is_known():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in filter(None, LINES):
        if line.startswith("pip install "):
            named = re.findall(r"'\.\[([\w,]+)\]'", line)
            assert named, line
            assert {extra for names in named for extra in names.split(",")} <= set(extras), line
        else:
            assert line in RUN_AS.keys() | RUN_ELSEWHERE.keys(), line
    assert {*RUN_AS, *RUN_ELSEWHERE} <= set(LINES)


@pytest.mark.slow
def test_the_layout_is_current():
    """Each package of the library has a row of its own, and each row is there."""
    section = (ROOT / "README.md").read_text().partition("## What is where")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \|", section, flags=re.M)
    named = {name.strip("`/") for row in rows for name in row.split(", ")}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    packages = {f"phi4mm_jax/{path.parent.name}" for path in (ROOT / "phi4mm_jax").glob("*/__init__.py")}
    assert packages - named == {"phi4mm_jax/generation"}, "packages that README.md does not name"


def test_lines_of_a_batch(work, tiny):
    lines = list(read_requests(work / "prompts.jsonl", max_new_tokens=256))
    assert [(line.id, line.error) for line in lines] == [("a1", None), ("a2", None)]
    rows = [tiny.processor.row(line.request.prompt, line.request.images) for line in lines]
    assert [len(row.images) for row in rows] == [1, 0]


@pytest.mark.slow
def test_commands(work, monkeypatch, capfd):
    monkeypatch.chdir(work)
    places = {"MODEL": TINY, "RECIPES": ROOT / "train/recipes"}
    for line, command in RUN_AS.items():
        for name, place in places.items():
            command = re.sub(rf"\b{name}\b", str(place), command)
        program, *arguments = shlex.split(command)
        monkeypatch.setattr("sys.argv", [program, *arguments])
        status = importlib.import_module(program).main()
        _, errors = capfd.readouterr()
        assert status == 0, (line, errors)
    assert (work / "native" / "config.json").is_file()


def test_code(work, tiny, monkeypatch):
    """Run it in one namespace, as a reader types it; `load` gives the tiny checkpoint."""
    monkeypatch.chdir(work)
    (work / "Phi-4-multimodal-instruct").symlink_to(TINY)
    monkeypatch.setattr(phi4mm_jax, "load", lambda folder: {str(TINY): tiny}[os.path.realpath(folder)])
    asked = "<|user|><|image_1|>hello<|end|><|assistant|>"
    scope = {"prompt": asked, "path": "chart.png", "work": [(asked, "chart.png")] * 2}
    smaller = {"max_new_tokens=64": "max_new_tokens=2", "Request(chat)": "Request(chat, max_new_tokens=2)"}
    smaller |= {"slots=16, cache_tokens=65536": "slots=2, cache_tokens=4096", "slots=16": "slots=2"}
    for block in PYTHON:
        for written, run in smaller.items():
            block = block.replace(written, run)
        code = compile(block, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if code.co_flags & inspect.CO_COROUTINE:
            asyncio.run(eval(code, scope))
        else:
            exec(code, scope)
    assert len(scope["answers"]) == 2
    assert all(len(answer.tokens) == 2 for answer in scope["answers"])
    assert scope["answer"].result().text
