"""A batch of prompts in a file: an answer for each line, whatever the line, and however often the run was killed."""

import base64
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.paths import TINY

from infer import batch
from phi4mm_jax import InputError
from phi4mm_jax.commands.options import answer_settings
from phi4mm_jax.engine import Completion, EngineConfig, Request
from phi4mm_jax.engine.answer_file import AnswerFile
from phi4mm_jax.engine.jsonl import read_requests
from phi4mm_jax.engine.provenance import compare_settings, media_fingerprint, settings_of
from phi4mm_jax.utils.compilation import keep_compiled
from phi4mm_jax.utils.fingerprint import file_fingerprint

ROOT = Path(__file__).parents[2]
SMALL = EngineConfig(slots=3, cache_tokens=4096, page_size=64, chunk=256, steps=4)
IMAGE, CLIP = TINY / "inputs" / "image_0.png", TINY / "inputs" / "audio_0.flac"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def engine(tiny):
    return tiny.engine(SMALL)


class _AtOnce:
    """In place of an engine's worker: prompts are ready when they are submitted, so rounds alone make the order."""

    def submit(self, function) -> Future:
        future: Future = Future()
        future.set_result(function())
        return future


@pytest.fixture
def unhurried(engine, monkeypatch):
    monkeypatch.setattr(engine.queue, "workers", _AtOnce())
    return engine


def write(path: Path, lines) -> Path:
    """Lines as they are, objects as JSON."""
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def answers_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(engine, source: Path, output: Path, ordered: bool = True) -> list[dict]:
    with AnswerFile(output, read_requests(source, max_new_tokens=3), ordered=ordered) as answers:
        list(answers.run(engine))
    return answers_of(output)


def command(source: Path, output: Path, compiled: Path | str, *more: str, program=("-m", "infer.batch")) -> list[str]:
    return [
        sys.executable, *program, "--model", str(TINY), "--dtype", "float32", "--max-new-tokens", "3",
        "--cache-tokens", "4096", "--input", str(source), "--output", str(output), "--compilation-cache", str(compiled),
        *more,
    ]  # fmt: skip


def run(*arguments, **options) -> subprocess.CompletedProcess:
    # A bound on the folder of compiled programs would have jax note there when each was used.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_MAX_SIZE"}
    return subprocess.run(
        command(*arguments, **options), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


# ---------------------------------------------------------------------------------------------- lines


def test_ids_and_order_are_kept(tmp_path, unhurried):
    ids = ["b", 7, "7", "", "日本", -1, "half \ud800", 10**30]
    source = write(tmp_path / "in", [{"id": i, "prompt": f"a {n}", "max_new_tokens": 9 - n} for n, i in enumerate(ids)])
    found = answer(unhurried, source, tmp_path / "ordered")
    assert [a["id"] for a in found] == ids
    assert [len(a["tokens"]) for a in found] == [9 - n for n in range(len(ids))]
    assert all(a["finish_reason"] == "length" and a["prompt_tokens"] > 0 and "error" not in a for a in found)
    unordered = answer(unhurried, source, tmp_path / "unordered", ordered=False)
    assert unordered != found  # those that end first come first
    assert sorted(map(repr, unordered)) == sorted(map(repr, found))
    before = (tmp_path / "ordered").read_bytes()
    answer(unhurried, source, tmp_path / "ordered")
    assert (tmp_path / "ordered").read_bytes() == before


def test_a_line_without_an_id_has_its_number(tmp_path, engine):
    source = write(tmp_path / "in", [{"prompt": "a"}, b"", {"id": "x", "prompt": "b"}, b"  ", {"prompt": "c"}])
    assert [a["id"] for a in answer(engine, source, tmp_path / "out")] == [0, "x", 4]


@pytest.mark.parametrize("ending", [b"\r\n", b"\n\n", b" \n"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "not ended"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["no mark", "byte order mark"])
def test_ends_of_lines(tmp_path, ending, last, mark):
    content = ending.join([b'{"id": "a", "prompt": "x"}', b'{"id": "b", "prompt": "y"}'])
    (tmp_path / "in").write_bytes(mark + content + ending * last)
    lines = read_requests(tmp_path / "in", max_new_tokens=3)
    assert [(line.id, line.request.prompt, line.error) for line in lines] == [("a", "x", None), ("b", "y", None)]


GOOD = {"id": "good", "prompt": "a"}
BAD = [
    (b"oops", "is not JSON (Expecting value at character 1)"),
    (b'{"prompt": "a"', "is not JSON"),
    (b"[" * 100_000, "is not JSON"),
    (b'{"prompt": "\xff"}', "is not UTF-8 (at byte 12)"),
    ("é".encode("utf-16"), "is not UTF-8"),
    (["a"], "is a list; expected an object"),
    (None, "is a NoneType; expected an object"),
    ({"prompt": "a", "id": 1.5}, "id is 1.5; expected a string or a whole number"),
    ({"prompt": "a", "id": None}, "id is None"),
    ({"prompt": "a", "id": True}, "id is True"),
    (
        {"prompt": "a", "promt": "b"},
        "'promt' is not known; expected some of adapter, audios, beams, continue_final_message, draft, grammar, id",
    ),
    ({}, "expected a prompt or messages"),
    ({"prompt": "a", "messages": []}, "expected either a prompt or messages, not both"),
    ({"prompt": ["a"]}, "prompt is a list; expected a string"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": "\ud800"}, ""),
    ({"messages": "a"}, "messages is a str; expected a list"),
    ({"messages": []}, "messages is empty"),
    ({"messages": [{"role": "king", "content": "a"}]}, "role is 'king'"),
    ({"prompt": "a", "images": "a.png"}, "images is 'a.png'; expected a list"),
    ({"prompt": "a", "images": [3]}, "images is [3]; expected a list"),
    ({"prompt": "<|image_1|>"}, "1 image placeholder"),
    ({"prompt": "<|image_1|>", "images": ["nowhere.png"]}, "nowhere.png'): the file does not exist"),
    ({"prompt": "<|image_1|>", "images": [""]}, "empty string"),
    ({"prompt": "<|image_1|>", "images": ["https://a.b/c.png"]}, "nothing is downloaded"),
    ({"prompt": "<|image_1|>", "images": ["in"]}, "the file is in no format"),
    ({"prompt": "<|image_1|>", "images": ["data:image/png;base64,!"]}, "is not base64"),
    ({"prompt": "<|audio_1|>", "audios": ["."]}, "the file cannot be opened (Is a directory)"),
    ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"prompt": "a", "max_new_tokens": 100_000}, "give it more tokens, or ask for fewer"),
    ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot'"),
    ({"prompt": "a", "temperature": "0.5"}, "temperature is '0.5'"),
    (b'{"prompt": "a", "temperature": NaN}', "temperature is nan"),
    ({"prompt": "a", "top_k": 1.5}, "top_k is 1.5"),
    ({"prompt": "a", "seed": -1}, "seed is -1"),
    ({"prompt": "a", "adapter": "voice"}, "adapter is 'voice'; expected one of none, vision, speech"),
    ({"prompt": "a", "draft": "guess"}, "draft is 'guess'; expected None or 'lookup'"),
    ({"prompt": "a", "stop": "end"}, "stop is 'end'"),
    ({"prompt": "a", "stop": [""]}, "stop is ['']"),
    ({"prompt": "a", "stop_tokens": ""}, "stop_tokens is ''"),
    ({"prompt": "a", "stop_tokens": ["b"]}, "stop_tokens is ['b']"),
    ({"prompt": "a " * 200_000}, "has 200001 tokens (text: 200001), more than the context of 131072"),
]


def test_a_bad_line_is_an_error_of_its_own(tmp_path, engine):
    lines = [GOOD | {"id": "first"}, *(line for line, _ in BAD), GOOD | {"id": "last"}]
    found = answer(engine, write(tmp_path / "in", lines), tmp_path / "out")
    broken = 10  # lines that have no id
    assert [a["id"] for a in found] == ["first", *[None] * broken, *range(broken + 1, len(BAD) + 1), "last"]
    assert [a["line"] for a in found[1 : broken + 1]] == list(range(2, broken + 2))
    assert found[0]["tokens"] == found[-1]["tokens"]
    for number, (result, (line, cause)) in enumerate(zip(found[1:-1], BAD, strict=True), 2):
        assert set(result) - {"line"} == {"id", "request", "error"}, line
        assert result["error"].startswith(f"line {number}"), result
        assert cause in result["error"], result
        assert "Traceback" not in result["error"]


def test_a_broken_line_takes_no_id(tmp_path, engine):
    """Not even that of another line."""
    lines = [{"id": 1, "prompt": "a"}, {"id": 2, "prompt": "b"}, b'{"id": 3, "prompt":', {"id": 4, "prompt": "d"}]
    source = write(tmp_path / "in", lines)
    found = answer(engine, source, tmp_path / "out")
    assert [(a["id"], a.get("line"), "error" in a) for a in found] == [
        (1, None, False), (2, None, False), (None, 3, True), (4, None, False)
    ]  # fmt: skip
    assert answer(engine, source, tmp_path / "out") == found


def test_answers_to_other_requests_are_not_taken(tmp_path, engine):
    """A line that has changed, or that has another's number now, is not answered already."""
    source = write(tmp_path / "in", [{"prompt": "a"}, {"prompt": "b"}])
    found = answer(engine, source, tmp_path / "out")
    for changed in ([{"prompt": "new"}, {"prompt": "a"}, {"prompt": "b"}], [{"prompt": "a"}, {"prompt": "c"}]):
        write(source, changed)
        with pytest.raises(InputError, match=r"out: its answer with id [01] is to another request than line [12]"):
            answer(engine, source, tmp_path / "out")
        assert answers_of(tmp_path / "out") == found
    write(source, [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}])
    assert answer(engine, source, tmp_path / "out")[:2] == found


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ([GOOD, GOOD | {"id": "b"}, GOOD | {"id": "c"}], "has more lines than when the run began"),
        ([GOOD], "has fewer lines than when the run began"),
        ([GOOD, GOOD | {"id": "b", "prompt": "new"}], "line 2 has changed since the run began"),
        (None, "cannot be read (No such file or directory)"),
    ],
    ids=["more", "fewer", "other", "gone"],
)
def test_an_input_that_changes_meanwhile_is_refused(tmp_path, changed, cause):
    source = write(tmp_path / "in", [GOOD, GOOD | {"id": "b"}])
    lines = read_requests(source, max_new_tokens=3)
    source.unlink()
    if changed is not None:
        write(source, changed)
    with pytest.raises(InputError, match=rf"^{re.escape(f'{source}: {cause}; ')}"):
        list(lines)


def test_log_probabilities_on_demand(tmp_path, engine):
    first, second = answer(
        engine, write(tmp_path / "in", [{"prompt": "a", "logprobs": True}, {"prompt": "a"}]), tmp_path / "out"
    )
    assert len(first["logprobs"]) == len(first["tokens"])
    assert all(x <= 0 for x in first["logprobs"])
    assert "logprobs" not in second


@pytest.mark.parametrize("ids", [["a", "a"], [1, 1], [1, None], [None, 0]])
def test_an_id_belongs_to_one_line(tmp_path, engine, ids):
    """Of the first that has it; the others are errors, and go by their numbers."""
    lines = [{"prompt": "x"} | ({} if i is None else {"id": i}) for i in ids] + [GOOD]
    source = write(tmp_path / "in", lines)
    found = answer(engine, source, tmp_path / "out")
    assert [("error" in a, a.get("line")) for a in found] == [(False, None), (True, 2), (False, None)]
    assert found[1]["error"].startswith("line 2: lines 1 and 2 have the same id")
    assert answer(engine, source, tmp_path / "out") == found


def test_copies_of_a_prompt_draw_by_their_ids(tmp_path, engine):
    """Whatever their order, and whichever run answers them; a seed of a line's own means the same in every line."""
    sampled = {"prompt": "<|user|>name any letter<|end|><|assistant|>", "temperature": 30.0}
    lines = [sampled | {"id": f"copy {i}"} for i in range(6)] + [sampled | {"id": i, "seed": 5} for i in range(2)]
    found = {a["id"]: a["tokens"] for a in answer(engine, write(tmp_path / "in", lines), tmp_path / "out")}
    assert len({tuple(found[f"copy {i}"]) for i in range(6)}) == 6
    assert found[0] == found[1]
    (tmp_path / "again").write_bytes((tmp_path / "out").read_bytes().splitlines(True)[3])  # a run that was stopped
    write(tmp_path / "in", lines[::-1])
    again = answer(engine, tmp_path / "in", tmp_path / "again", ordered=False)
    assert {a["id"]: a["tokens"] for a in again} == found


def test_an_empty_input_has_no_answers(tmp_path, engine):
    assert answer(engine, write(tmp_path / "in", []), tmp_path / "out") == []


# ---------------------------------------------------------------------------------------------- media


def data_url(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


@pytest.mark.slow
def test_media_of_every_kind(tmp_path, engine):
    """By a path relative to the input, an absolute one, a file URL, and base64; beside a prompt and in messages."""
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a:b.png").write_bytes(IMAGE.read_bytes())
    (tmp_path / "clip.flac").write_bytes(CLIP.read_bytes())
    images = ["media/a:b.png", str(IMAGE), f"file://{IMAGE}", data_url(IMAGE, "image/png")]
    clips = ["clip.flac", str(CLIP), data_url(CLIP, "audio/flac")]
    show, hear = "<|user|><|image_1|>What?<|end|><|assistant|>", "<|user|><|audio_1|>What?<|end|><|assistant|>"

    def chat(part):
        return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]}

    lines = [{"prompt": show, "images": [i]} for i in images]
    lines += [chat({"type": "image", "image": i}) for i in images]
    lines += [chat({"type": "image_url", "image_url": {"url": i}}) for i in images]
    lines += [chat({"type": "image_url", "image_url": i}) for i in images]
    num_images = len(lines)
    lines += [{"prompt": hear, "audios": [c]} for c in clips] + [chat({"type": "audio", "audio": c}) for c in clips]
    found = answer(engine, write(tmp_path / "in", lines), tmp_path / "out")
    ((_, shown),) = engine.run([Request(show, [IMAGE], max_new_tokens=3)])
    ((_, heard),) = engine.run([Request(hear, audios=[CLIP], max_new_tokens=3)])
    assert [a.get("tokens") for a in found[:num_images]] == [shown.tokens] * num_images
    assert [a.get("tokens") for a in found[num_images:]] == [heard.tokens] * len(found[num_images:])


def test_only_media_are_paths(tmp_path):
    """An argument of a tool that is called image is none."""
    call = {"function": {"name": "draw", "arguments": {"image": "cat", "url": "x", "content": [{"image": "y"}]}}}
    messages = [{"role": "assistant", "content": "image", "tool_calls": [call]}]
    (line,) = read_requests(write(tmp_path / "in", [{"messages": messages}]), max_new_tokens=3)
    assert line.request.prompt == messages


def test_frames_are_paths(tmp_path):
    messages = [{"role": "user", "content": [{"type": "video", "video": ["frames/1.png", str(IMAGE)]}]}]
    (line,) = read_requests(write(tmp_path / "in", [{"messages": messages}]), max_new_tokens=3)
    ((message,),) = [line.request.prompt]
    assert message["content"][0]["video"] == [str(tmp_path / "frames" / "1.png"), str(IMAGE)]


# ---------------------------------------------------------------------------------------------- the output


def test_a_cut_last_line_is_answered_again(tmp_path, engine):
    """Cut at every byte within the last line, and so within an error and within a character."""
    source = write(tmp_path / "in", [{"id": i, "prompt": f"Tell me {i}"} for i in ("a", "b", "ü日")])
    output = tmp_path / "out"
    answer(engine, source, output)
    whole = output.read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(start, len(whole)):
        output.write_bytes(whole[:cut])
        with AnswerFile(output, read_requests(source, max_new_tokens=3), ordered=True) as answers:
            assert answers.answered == 2
            assert output.read_bytes() == whole[:start]
            if cut % 16 == 0 or cut in (start, len(whole) - 1):  # the rest of a run is the same for all
                list(answers.run(engine))
                assert output.read_bytes() == whole


def test_errors_are_counted_and_asked_again(tmp_path, engine):
    """But for a line that cannot be asked; what was answered is not touched, and each line is there once."""
    image = {"id": "i", "prompt": "<|user|><|image_1|>?<|end|>", "images": ["later.png"]}
    source = write(tmp_path / "in", [GOOD, b"oops", image, {"id": "c", "prompt": "c", "max_tokens": 2}])
    first = answer(engine, source, tmp_path / "out")
    assert [("error" in a) for a in first] == [False, True, True, True]
    with AnswerFile(tmp_path / "out", read_requests(source, max_new_tokens=3), ordered=True) as answers:
        assert (answers.total, answers.answered, answers.errors) == (4, 3, 2)
        assert [a["id"] for a, _ in answers.run(engine)] == ["i"]
    assert answers_of(tmp_path / "out") == first
    (tmp_path / "later.png").write_bytes(IMAGE.read_bytes())
    write(source, [GOOD, {"id": "b", "prompt": "b"}, image, {"id": "c", "prompt": "c", "max_new_tokens": 2}])
    with AnswerFile(tmp_path / "out", read_requests(source, max_new_tokens=3)) as answers:
        asked = answers.run(engine)
        next(asked)
        assert len(answers_of(tmp_path / "out")) == 4  # the stale error is gone, one answer is new
    with AnswerFile(tmp_path / "out", read_requests(source, max_new_tokens=3)) as answers:  # that one was stopped
        assert answers.answered == 2
        assert len(list(answers.run(engine))) == 2
    found = {a["id"]: a for a in answers_of(tmp_path / "out")}
    assert len(answers_of(tmp_path / "out")) == 4
    expected = {a["id"]: a for a in answer(engine, source, tmp_path / "expected")}
    assert found == expected
    assert not any("error" in a for a in found.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "in", "later.png", "out"]


@pytest.mark.parametrize("form", ["plain", "openai"])
def test_answers_that_are_cut_are_counted(tmp_path, engine, form):
    """Those of earlier runs, too."""
    ended = {"prompt": "c", "max_new_tokens": 64, "stop_tokens": list(range(768))}  # by its first token
    source = write(tmp_path / "in", [{"prompt": "a"}, {"prompt": "b"}, b"oops", ended])
    counts = []
    for _ in range(2):
        with AnswerFile(tmp_path / "out", read_requests(source, max_new_tokens=2), form=form) as answers:
            before = answers.cut
            list(answers.run(engine))
            counts.append((before, answers.cut, answers.errors, answers.answered))
    assert counts == [(0, 2, 1, 4), (2, 2, 1, 4)]


def test_repaired_lines_keep_the_order(tmp_path, engine):
    lines = [{"id": str(i), "prompt": f"a {i}"} for i in range(5)]
    broken = [*lines[:1], lines[1] | {"max_tokens": 1}, *lines[2:4]]
    answer(engine, write(tmp_path / "in", broken), tmp_path / "out")
    whole = answer(engine, write(tmp_path / "in", lines), tmp_path / "whole")
    assert answer(engine, tmp_path / "in", tmp_path / "out") == whole


def test_answers_of_another_model_or_setting_are_not_mixed(tmp_path, engine):
    """Whatever of them has changed is named; a copy of the model is the same."""
    source, output = write(tmp_path / "in", [GOOD, {"id": "b", "prompt": "b"}]), tmp_path / "out"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(3 << 20))
    given = {"model": tmp_path / "model", "dtype": "float32", "merge": None, "adapter": None, "cache_dtype": None}

    def begin(**changed):
        with AnswerFile(
            output, read_requests(source, max_new_tokens=3), settings=lambda: settings_of(**given | changed)
        ) as answers:
            list(answers.run(engine))
        return output.read_bytes()

    whole = begin()
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "model", copy)
    os.utime(copy / "model.safetensors", (0, 0))
    assert begin(model=copy) == whole
    with (copy / "model.safetensors").open("r+b") as file:  # one value of 786,432
        file.seek(2 << 20)
        file.write(b"\x01")
    for changed in ({"dtype": "bfloat16"}, {"cache_dtype": "int8"}, {"adapter": "none"}, {"model": copy}):
        (name,) = changed
        with pytest.raises(InputError, match=rf"out: its answers are of another {name} \(was .*, now .*\); give"):
            begin(**changed)
    assert output.read_bytes() == whole
    write(source, [{"id": "of another input", "prompt": "c"}])
    with pytest.raises(InputError, match=r"out: its answers are of another dtype"):
        begin(dtype="bfloat16")
    begin()  # of the same settings it may have answers of other inputs
    (tmp_path / "out.settings.json").unlink()
    with pytest.raises(InputError, match=r"out.settings.json, which has .* is missing"):
        begin()


@pytest.mark.parametrize(("option", "value"), [("--weights", "int8"), ("--adapters-from", "shards")])
def test_answers_with_an_option_are_not_continued_without_it(monkeypatch, option, value):
    """Nor the other way round; answers of a version that had no such option were made without."""

    def settings(*options):
        program = ["batch", "--model", str(TINY), "--input", "in", "--output", "out", *options]
        monkeypatch.setattr(sys, "argv", program)
        return answer_settings(batch.parse_arguments())

    plain, other = settings(), settings(option, value)
    for before, now in ((plain, other), (other, plain)):
        with pytest.raises(InputError, match=rf"its answers are of another \w+ \(was .*{value}|now .*{value}"):
            compare_settings("out", "out.settings.json", before, now)
    earlier = {name: setting for name, setting in plain.items() if setting == other[name]}
    assert len(earlier) == len(plain) - 1
    compare_settings("out", "out.settings.json", earlier, plain)


def test_answers_about_other_media_are_not_kept(tmp_path, engine):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(IMAGE.read_bytes())
    chat = [{"role": "user", "content": [{"type": "image", "image": "b.png"}]}]
    lines = [{"prompt": "<|image_1|>", "images": ["a.png"]}, {"messages": chat}]
    source = write(tmp_path / "in", lines)
    found = answer(engine, source, tmp_path / "out")
    assert answer(engine, source, tmp_path / "out") == found
    for name, line in (("a.png", 1), ("b.png", 2)):
        (tmp_path / name).write_bytes((TINY / "inputs" / "image_1.png").read_bytes())
        with pytest.raises(InputError, match=f"is about other media than line {line} has now"):
            answer(engine, source, tmp_path / "out")
        (tmp_path / name).unlink()  # what is gone cannot be compared
        assert answer(engine, source, tmp_path / "out") == found


def test_fingerprints_of_media(tmp_path, monkeypatch):
    """One of all files in order, as versions before have written it, and none where a file is gone.

    Strings of messages that name no medium are none, though there may be files of their names.
    """
    monkeypatch.chdir(tmp_path)
    names = ("high", "a.png", "b.png", "c d.png", "e.flac", "frames/1.png", "frames/2.png")
    (tmp_path / "frames").mkdir()
    for name in names:
        (tmp_path / name).write_text(name)
    inline = data_url(IMAGE, "image/png")
    content = [
        "high", {"type": "text", "text": "high"}, {"type": "image", "image": inline},
        {"type": "image_url", "image_url": {"url": "b.png", "detail": "high"}},
        {"type": "image", "image": inline.partition(",")[2]}, {"type": "image", "image": {"path": "c d.png"}},
        {"type": "image", "image": (tmp_path / "c d.png").as_uri()},  # not digested ever: it has an escape
        {"type": "video", "video": ["frames/2.png"]}, {"type": "video", "video": "frames"},
        {"type": "audio_url", "audio_url": f"file://{tmp_path}/e.flac"},
    ]  # fmt: skip
    request = Request([{"role": "user", "content": content}], images=["a.png", inline])
    digested = ("a.png", "b.png", "c d.png", "frames/2.png", "frames/1.png", "frames/2.png", "e.flac")
    expected = hashlib.blake2b(b"".join(file_fingerprint(tmp_path / n) for n in digested), digest_size=8).hexdigest()
    assert media_fingerprint(request) == expected
    (tmp_path / "high").unlink()
    assert media_fingerprint(request) == expected
    for name in ("a.png", "b.png", "e.flac"):
        (tmp_path / name).rename(tmp_path / "aside")
        assert media_fingerprint(request) is None
        (tmp_path / "aside").rename(tmp_path / name)
    assert media_fingerprint(Request("x", images=[inline])) is None


def test_a_line_whose_other_medium_is_gone_is_resumed(tmp_path, engine):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(IMAGE.read_bytes())
    source = write(tmp_path / "in", [{"prompt": "<|image_1|><|image_2|>", "images": ["a.png", "b.png"]}])
    found = answer(engine, source, tmp_path / "out")
    (tmp_path / "b.png").unlink()
    assert answer(engine, source, tmp_path / "out") == found


def test_lines_of_openai(tmp_path, engine):
    """Taken as they are in OpenAI's batch files, and answered in that form; a run goes on in it."""
    messages = [{"role": "user", "content": "Hello"}]

    def line(name, **body):
        return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m"} | body}

    off = {
        "skip_special_tokens": False, "ignore_eos": False, "min_tokens": 0, "best_of": 1, "bad_words": [],
        "add_special_tokens": False, "early_stopping": False, "include_stop_str_in_output": False,
        "chat_template_kwargs": {}, "echo": False, "use_beam_search": False, "prompt_logprobs": None,
    }  # fmt: skip
    lines = [
        line("a", messages=messages, max_tokens=4, temperature=0, stop=None, n=1, **off),
        line("b", messages=messages, max_completion_tokens=2, logprobs=True, stream=False),
        line("c", messages=messages, presence_penalty=0.5),
        line("d", messages=messages) | {"url": "/v1/embeddings"},
        b"oops",
    ]
    source, output = write(tmp_path / "in", lines), tmp_path / "out"

    def run_all():
        lines = read_requests(source, max_new_tokens=3)
        with AnswerFile(output, lines, ordered=True, form="openai") as answers:
            list(answers.run(engine))
        return answers_of(output)

    found = run_all()
    ((_, expected),) = engine.run([Request(messages, max_new_tokens=4)])
    body = found[0]["response"]["body"]
    assert [a["custom_id"] for a in found] == ["a", "b", "c", "d", None]
    assert found[0]["error"] is None
    assert found[0]["response"]["status_code"] == 200
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {
        "prompt_tokens": expected.prompt_tokens, "completion_tokens": 4, "total_tokens": expected.prompt_tokens + 4
    }  # fmt: skip
    logprobs = [x["logprob"] for x in found[1]["response"]["body"]["choices"][0]["logprobs"]["content"]]
    np.testing.assert_allclose(logprobs, expected.log_probabilities[:2], atol=1e-4)
    messages = [a["error"]["message"] for a in found[2:]]
    assert all(a["response"] is None for a in found[2:])
    assert "body.presence_penalty is 0.5, which is not supported; expected 0" in messages[0]
    assert "POST /v1/embeddings; only POST /v1/chat/completions" in messages[1]
    assert "is not JSON" in messages[2]
    before = output.read_bytes()
    output.write_bytes(before[: before.index(b"\n") + 20])
    assert run_all() == found
    with pytest.raises(InputError, match="out: has answers of --format openai; give that format"):
        answer(engine, source, output)
    plain = answer(engine, source, tmp_path / "plain")
    assert [a["id"] for a in plain] == ["a", "b", "c", "d", None]
    assert plain[0]["tokens"] == expected.tokens


@pytest.mark.parametrize("role", ["system", "developer"])
def test_tools_of_openai_are_where_chats_have_them(tmp_path, role):
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [{"role": role, "content": "s"}, {"role": "user", "content": "q"}]
    bodies = [{"messages": messages, "tools": tools}, {"messages": messages, "tools": []},
              {"messages": [{**messages[0], "tools": tools}, messages[1]], "tools": tools}]  # fmt: skip
    lines = [{"custom_id": str(i), "body": body} for i, body in enumerate(bodies)]
    with_tools, without, twice = read_requests(write(tmp_path / "in", lines), max_new_tokens=3)
    assert with_tools.request.prompt == [{"role": role, "content": "s", "tools": tools}, messages[1]]
    assert without.request.prompt == messages
    assert "tools are given beside the messages and in the system message" in (twice.error or "")


def test_continued_answers_of_openai_bodies_and_nulls(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    goes_on = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    lines = [
        {"custom_id": "a", "body": goes_on},
        {"custom_id": "b", "body": {"messages": messages[:1], "add_generation_prompt": True}},
        {"custom_id": "c", "body": {"messages": messages[:1], "add_generation_prompt": False}},
        {"id": "d", "prompt": None, "messages": messages[:1], "images": None, "logprobs": None},
    ]
    first, second, third, fourth = read_requests(write(tmp_path / "in", lines), max_new_tokens=3)
    assert first.request.continue_final_message
    assert not second.request.continue_final_message
    assert "add_generation_prompt is False" in (third.error or "")
    assert fourth.request.prompt == messages[:1]


def test_memory_grows_with_ids_alone(tmp_path):
    """Lines are read as they are asked for: those of 40 MB leave less than 1 MB."""
    with (tmp_path / "in").open("w") as file:
        for i in range(2000):
            file.write(json.dumps({"id": i, "prompt": f"{i} " + "x" * 20_000}) + "\n")
    tracemalloc.start()
    with AnswerFile(tmp_path / "out", read_requests(tmp_path / "in", max_new_tokens=3)) as answers:
        engine = SimpleNamespace(run=lambda requests: ((i, DONE) for i, _ in enumerate(requests)))
        assert len([None for _ in answers.run(engine)]) == 2000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert (tmp_path / "out").read_bytes().count(b"\n") == 2000


DONE = Completion("", [], "stop", 1)


def test_json_is_strict(tmp_path):
    """A log-probability that is not finite is null: NaN is not JSON."""
    nan = Completion("a", [1, 2], "stop", 1, (float("nan"), -1.0))
    engine = SimpleNamespace(run=lambda requests: ((i, nan) for i, _ in enumerate(requests)))
    found = answer(engine, write(tmp_path / "in", [{"prompt": "a", "logprobs": True}]), tmp_path / "out")
    assert found[0]["logprobs"] == [None, -1.0]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"a novel", 1),
        (b'{"id": "good", "prompt": "a"}\n', 1),
        (b'{"id": null, "error": ""}\n', 1),
        (b'{"id": [1], "error": ""}\n', 1),
        (b'{"id": "good", "text": "", "tokens": []}\n\n', 2),
        (b'{"id": "good", "error": ""}\n\xff\xfe', 2),
        (b"[]\n", 1),
        (b'{"text": ""}\n', 1),
    ],
)
def test_another_file_is_not_touched(tmp_path, content, line):
    (tmp_path / "out").write_bytes(content)
    lines = read_requests(write(tmp_path / "in", [GOOD]), max_new_tokens=3)
    with pytest.raises(InputError, match=f"out: line {line} is not an answer .* give another output"), AnswerFile(
        tmp_path / "out", lines
    ):  # fmt: skip
        pass
    assert (tmp_path / "out").read_bytes() == content


def test_two_runs_do_not_write_one_output(tmp_path, engine):
    lines = read_requests(write(tmp_path / "in", [GOOD]), max_new_tokens=3)
    with AnswerFile(tmp_path / "out", lines) as first:
        with pytest.raises(InputError, match="out: another run is writing it"), AnswerFile(tmp_path / "out", lines):
            pass
        list(first.run(engine))
    with AnswerFile(tmp_path / "out", lines) as second:
        assert second.answered == 1


def test_an_order_that_is_lost_is_not_claimed(tmp_path, unhurried):
    source = write(tmp_path / "in", [{"prompt": "a", "max_new_tokens": 12 - 5 * i} for i in range(3)])
    assert [a["id"] for a in answer(unhurried, source, tmp_path / "out", ordered=False)] == [2, 1, 0]
    with pytest.raises(InputError, match="out: its answers are not in the order of the input"):
        answer(unhurried, source, tmp_path / "out", ordered=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"--input": "nowhere"}, "nowhere: cannot be read (No such file or directory); check the path"),
        ({"--input": "binary"}, "binary: is no text in UTF-8; expected a file of lines of JSON, one for each prompt"),
        ({"--input": "."}, ".: cannot be read (Is a directory); give one file, or use python -m infer.ray"),
        ({"--input": "p*.jsonl"}, "p*.jsonl: cannot be read (No such file or directory); give one file, or use"),
        ({"--output": "."}, ".: cannot be written (Is a directory); it is a folder; give a file's path"),
        ({"--output": "nowhere/out"}, "nowhere/out: cannot be written (No such file or directory); make its"),
        ({"--output": "/dev/full"}, "/dev/full: is not a file"),
        ({"--output": "in"}, "in: is the input"),
        ({"--slots": "0"}, "--slots is 0"),
        ({"--hosts": "2", "--host": "1"}, "--hosts and --host are gone: python -m infer.ray answers on many hosts"),
        ({"--compilation-cache": "in"}, "in: compiled programs cannot be kept there (File exists)"),
        ({"--max-new-tokens": "0"}, "--max-new-tokens is 0; expected a positive whole number"),
    ],
)
def test_arguments_are_checked_before_the_checkpoint_is_read(tmp_path, change, named, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = write(Path("in"), [GOOD])
    Path("binary").write_bytes(bytes(9))
    given = {"--model": "nowhere", "--input": "in", "--output": "out", "--compilation-cache": ""} | change
    monkeypatch.setattr(sys, "argv", ["batch", *(x for pair in given.items() for x in pair)])
    monkeypatch.setattr(batch.phi4mm_jax, "load", None)  # not called
    assert batch.main() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {named}"), error
    assert error.count("\n") == 1
    assert source.read_text() == json.dumps(GOOD) + "\n"


def test_an_adapter_to_merge_that_is_not_there(tmp_path, monkeypatch, capsys):
    """The error names the option, whatever the setting behind it is called."""
    config = json.loads((TINY / "config.json").read_text())
    without = {key: value for key, value in config.items() if key not in ("vision_lora", "speech_lora")}
    (tmp_path / "config.json").write_text(json.dumps(without))
    source = write(tmp_path / "in", [GOOD])
    given = {"--model": tmp_path, "--input": source, "--output": tmp_path / "out", "--merge": "speech"}
    monkeypatch.setattr(sys, "argv", ["batch", *(str(x) for pair in given.items() for x in pair)])
    assert batch.main() == 2
    assert "error: --merge is 'speech'; expected" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(tmp_path, compiled):
    source, output = write(tmp_path / "in", [{"prompt": f"a {i}"} for i in range(12)]), tmp_path / "out"
    assert run(source, tmp_path / "whole", compiled, "--ordered").returncode == 0
    size = (tmp_path / "whole").stat().st_size // 2
    limit = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    program = "-c", f"{limit}; from infer import batch; sys.exit(batch.main())"
    full = run(source, output, compiled, "--ordered", program=program)
    assert full.returncode == 2, full.stderr
    last = full.stderr.splitlines()[-1]
    assert last.startswith(f"error: {output}: cannot be written (File too large)"), full.stderr
    assert "Traceback" not in full.stderr
    assert output.stat().st_size == size
    again = run(source, output, compiled, "--ordered")
    assert again.returncode == 0, again.stderr
    assert "of 12 lines are answered already; resuming" in again.stderr
    assert f"{output}: 12 answers, 0 of them errors" in again.stderr
    assert output.read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_second_start_compiles_nothing(tmp_path):
    """Every program comes from the files of the start before; a folder that is made is the user's own."""
    source, folder = write(tmp_path / "in", [GOOD]), tmp_path / "a" / "b"
    kept = []
    for output in ("first", "second"):
        result = run(source, tmp_path / output, folder)
        assert result.returncode == 0, result.stderr
        assert "1/1" in result.stderr
        assert "tokens/s" in result.stderr
        assert "1 answers, 0 of them errors" in result.stderr
        kept.append({path.name: path.stat().st_mtime_ns for path in folder.iterdir()})
    assert kept[0] == kept[1]
    assert {"jit__prefill", "jit__decode"} <= {name.partition("-")[0] for name in kept[0]}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "second").read_bytes() == (tmp_path / "first").read_bytes()


def test_warming_up_comes_before_the_first_answer(tmp_path, engine, monkeypatch, capsys):
    calls = []

    class Loaded:
        config = SimpleNamespace(cache_tokens=8192)

        def engine(self, config):
            return self

        def warm_up(self, progress):
            calls.append("warm up")
            progress(1, 1)

        def run(self, requests):
            calls.append("run")
            return engine.run(requests)

    monkeypatch.setattr(batch.phi4mm_jax, "load", lambda *_, **__: Loaded())
    given = command(
        write(tmp_path / "in", [GOOD]), tmp_path / "out", "", "--warmup", "--profile", str(tmp_path / "profile")
    )
    monkeypatch.setattr(sys, "argv", given[2:])
    assert batch.main() == 0
    assert calls == ["warm up", "run"]
    said = capsys.readouterr().err
    assert "Compiling" in said
    assert "1 answers are cut, their finish_reason is length: more of --max-new-tokens (now 3;" in said
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    assert batch.main() == 0  # all is answered: nothing is loaded
    assert calls == ["warm up", "run"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="compiled: compiled programs cannot be kept there"):
        keep_compiled(tmp_path / "file" / "compiled")


def written(output: Path) -> int:
    """Lines."""
    return output.read_bytes().count(b"\n") if output.exists() else 0


@pytest.mark.slow
@pytest.mark.subprocess
def test_killed_five_times_each_id_is_answered_once(tmp_path, compiled, tiny):
    """At random moments, from the start on; then each id is there once, with what a run without kills answers."""
    draw = random.Random(4)
    lines = [
        {"id": f"line {i}", "prompt": f"<|user|>Tell me {i}<|end|><|assistant|>", "max_new_tokens": draw.randint(1, 6),
         "temperature": draw.choice([0.0, 0.9]), "seed": i} if i % 50 else b"oops"
        for i in range(500)
    ]  # fmt: skip
    source, output = write(tmp_path / "in", lines), tmp_path / "out"
    kills, progress = 0, []
    targets = [0, 0, *sorted(draw.sample(range(20, 480), 3))]  # lines that are there when it is killed
    for target in targets:
        process = subprocess.Popen(
            command(source, output, compiled), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + draw.uniform(0.1, 4.0) if target == 0 else time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if target and written(output) >= target:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        progress.append(written(output))
    assert kills == 5
    assert len(set(progress[2:])) == 3
    assert 0 < progress[-1] < 500
    last = run(source, output, compiled)
    assert last.returncode == 1, last.stderr  # there are lines that are no JSON
    found = answers_of(output)
    expected = answer(tiny.engine(EngineConfig(cache_tokens=4096)), source, tmp_path / "expected")
    assert len(found) == 500
    assert sorted(found, key=lambda a: str(a["id"])) == sorted(expected, key=lambda a: str(a["id"]))
    assert sum("error" in a for a in found) == 10
