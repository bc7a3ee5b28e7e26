"""What is left out of manifests, and that outputs are whole or not there."""

import json
import os
import sys
from pathlib import Path

import pytest

from phi4mm_jax.data import filters as prepare
from phi4mm_jax.data.filters import decontaminate, dropped_path, filter_speech, words
from phi4mm_jax.errors import InputError
from train import prepare as program

SECRET = "the quick brown fox jumps over the lazy dog near a quiet river bank today"


def write(path: Path, lines) -> Path:
    path.write_bytes(b"".join(x if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(path: Path) -> list:
    return [line["id"] for line in read(path)]


def sample(question, answer="yes", **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def test_samples_that_share_a_run_of_words_are_dropped(tmp_path):
    count = len(SECRET.split())
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": f"So: {SECRET.upper()}!"}]
    source = write(tmp_path / "m.jsonl", [
        sample("unlike"),
        sample("in the answer", SECRET.replace(" ", ",  ")),
        sample(parts),
        sample(" ".join(SECRET.split()[1:-1])),  # two words fewer than the run
        sample(" ".join(SECRET.split()[:7]), " ".join(SECRET.split()[7:])),  # across two texts
        {"messages": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": SECRET, "id": "preference"},
    ])  # fmt: skip
    evaluation = write(tmp_path / "eval.jsonl", [{"id": 0, "prompt": f"<|user|>{SECRET}<|end|>"}, {"answer": "yes"}])
    outcome = decontaminate(source, [evaluation], tmp_path / "out.jsonl", ngram=count - 1)
    assert (outcome.kept, outcome.dropped) == (3, 3)
    assert outcome.notes[0] == f"1 of 2 evaluation texts have fewer than {count - 1} words and were not compared"
    assert outcome.notes[1].startswith("the run that most samples share (3 of them)")
    assert ids(tmp_path / "out.jsonl") == [0, 3, 4]
    assert ids(tmp_path / "out.dropped.jsonl") == [1, 2, "preference"]
    assert all(line["dropped"].startswith("shares: ") for line in read(tmp_path / "out.dropped.jsonl"))
    assert read(tmp_path / "out.jsonl")[0]["messages"] == sample("unlike")["messages"]
    decontaminate(source, [evaluation], tmp_path / "strict.jsonl", ngram=count - 2)
    assert ids(tmp_path / "strict.jsonl") == [0, 4]


def test_words_are_compared_without_case_and_punctuation():
    assert words("Don’t STOP,  e\u0301t\u00e9 ﬁn!") == ["don", "t", "stop", "été", "fin"]
    assert words("東京は 2024年") == ["東", "京", "は", "2024", "年"]


def test_words_keep_their_marks():
    """Vowels of Devanagari, Tamil and Arabic are marks, which Python's words are without; Thai is as it is."""
    assert words("मेरी किताब, को") == ["मेरी", "किताब", "को"]
    assert words("தமிழ் நாடு") == ["தமிழ்", "நாடு"]
    assert words("كِتَاب") == ["كِتَاب"]
    assert words("ที่นี่") == list("ที่นี่")


def test_texts_of_messages_that_are_a_string_are_compared(tmp_path):
    """Its escapes are no letters."""
    shared = "für die schöne Welt\nzehn Worte lang und mehr noch als nur das hier"
    chat = sample(shared)
    source = write(tmp_path / "m.jsonl", [chat, {**chat, "messages": json.dumps(chat["messages"])}])
    evaluation = write(tmp_path / "eval.jsonl", [{"text": shared.replace("\n", " ")}])
    assert decontaminate(source, [evaluation], tmp_path / "out.jsonl").dropped == 2


@pytest.mark.parametrize("stored", [list, json.dumps])
def test_media_are_found_from_another_folder(tmp_path, stored):
    (tmp_path / "a").mkdir()
    (tmp_path / "b" / "c").mkdir(parents=True)
    parts = [{"type": "image", "image": "x/1.png"}, {"type": "audio", "audio": "/abs.wav"}]
    made = sample(parts)
    source = write(tmp_path / "a" / "m.jsonl", [{**made, "messages": stored(made["messages"])}])
    evaluation = write(tmp_path / "eval.jsonl", [{"text": SECRET}])
    decontaminate(source, [evaluation], tmp_path / "b" / "c" / "out.jsonl")
    messages = read(tmp_path / "b" / "c" / "out.jsonl")[0]["messages"]
    image, audio = (json.loads(messages) if isinstance(messages, str) else messages)[0]["content"]
    assert image["image"] == os.path.join("..", "..", "a", "x", "1.png")
    assert audio["audio"] == "/abs.wav"


def test_media_beside_the_messages_are_found_from_another_folder(tmp_path):
    (tmp_path / "a").mkdir()
    turns = [{"from": "human", "value": "<image><image><video>"}, {"from": "gpt", "value": "yes"}]
    line = {"conversations": turns, "images": ["x/1.png", {"bytes": None, "path": "2.png"}], "videos": [["f.png"]]}
    source = write(tmp_path / "a" / "m.jsonl", [line, {**line, "images": None, "image": "https://a.b/c.png"}])
    decontaminate(source, [write(tmp_path / "eval.jsonl", [{"text": SECRET}])], tmp_path / "out.jsonl")
    first, second = read(tmp_path / "out.jsonl")
    assert first["images"] == ["a/x/1.png", {"bytes": None, "path": "a/2.png"}]
    assert first["videos"] == [["a/f.png"]]
    assert first["conversations"] == turns
    assert (second["images"], second["image"]) == (None, "https://a.b/c.png")


def test_media_of_preferences_are_found_from_another_folder(tmp_path):
    (tmp_path / "a").mkdir()
    asked = [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]
    said = [{"role": "assistant", "content": "[1,  2]"}]
    source = write(tmp_path / "a" / "m.jsonl", [
        {"input": {"messages": asked}, "preferred_output": said, "non_preferred_output": said},
        {"chosen": [*asked, *said], "rejected": [*asked, *said]},
        {"prompt": asked, "chosen": "[1,  2]", "rejected": "b"},
    ])  # fmt: skip
    decontaminate(source, [write(tmp_path / "eval.jsonl", [{"text": SECRET}])], tmp_path / "out.jsonl")
    openai, trl, plain = read(tmp_path / "out.jsonl")
    moved = [{"role": "user", "content": [{"type": "image", "image": os.path.join("a", "x.png")}]}]
    assert openai["input"]["messages"] == moved
    assert openai["preferred_output"] == said
    assert (trl["chosen"], trl["rejected"]) == ([*moved, *said], [*moved, *said])
    assert (plain["prompt"], plain["chosen"]) == (moved, "[1,  2]")


def test_media_are_found_from_a_linked_folder(tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "disk" / "big").mkdir(parents=True)
    (tmp_path / "project" / "out").symlink_to(tmp_path / "disk" / "big")
    (tmp_path / "project" / "a.wav").write_bytes(b"")
    source = write(tmp_path / "project" / "m.jsonl", [sample([{"type": "audio", "audio": "a.wav"}])])
    output = tmp_path / "project" / "out" / "o.jsonl"
    decontaminate(source, [write(tmp_path / "eval.jsonl", [{"text": SECRET}])], output)
    ((part,),) = (line["messages"][0]["content"] for line in read(output))
    assert (output.parent / part["audio"]).exists()


def test_an_answer_in_another_form_was_to_be_said(tmp_path):
    turns = [{"from": "human", "value": "<audio>"}, {"from": "gpt", "value": "one two"}]
    source = write(tmp_path / "m.jsonl", [{"conversations": turns, "audios": ["a.wav"]}])
    hypotheses = write(tmp_path / "h.jsonl", [{"text": "one three"}])
    assert filter_speech(source, hypotheses, 0.5, tmp_path / "out.jsonl").kept == 1
    assert filter_speech(source, hypotheses, 0.4, tmp_path / "strict.jsonl").dropped == 1


def test_speech_that_is_understood_is_kept(tmp_path):
    clip = [{"type": "audio", "audio": "a.wav"}]
    source = write(tmp_path / "m.jsonl", [
        sample(clip, "one two three four"),
        sample(clip, "one two three four"),
        sample(clip, "an answer", transcript="What is this?"),
        b"\n",
        sample(clip, "one two", id="named"),
        sample(clip, [{"type": "text", "text": "one two"}]),
    ])  # fmt: skip
    hypotheses = write(tmp_path / "h.jsonl", [
        {"id": "named", "error": "line 5: no such file"},
        {"id": 0, "text": " One, two; THREE four."},
        {"id": 1, "text": "one two tree"},
        {"id": 2, "text": "what is this"},
        {"id": 5, "text": ""},
    ])  # fmt: skip
    outcome = filter_speech(source, hypotheses, 0.25, tmp_path / "out.jsonl")
    assert (outcome.kept, outcome.dropped) == (2, 3)
    assert ids(tmp_path / "out.jsonl") == [0, 2]
    assert {line["id"]: line["dropped"] for line in read(tmp_path / "out.dropped.jsonl")} == {
        1: "word error rate: 0.500", "named": "could not be heard", 5: "word error rate: 1.000"
    }  # fmt: skip
    assert filter_speech(source, hypotheses, 0.5, tmp_path / "more.jsonl").kept == 3


def test_hypotheses_without_ids_are_by_line(tmp_path):
    source = write(tmp_path / "m.jsonl", [sample("a", "one"), sample("b", "two")])
    hypotheses = write(tmp_path / "h.jsonl", [{"text": "one"}, {"text": "three"}])
    filter_speech(source, hypotheses, 0.0, tmp_path / "out.jsonl")
    assert ids(tmp_path / "out.jsonl") == [0]


GOOD = {"id": 0, "text": "yes"}
FAULTS = {
    "no input": (None, [GOOD], "m.jsonl: cannot be read .No such file"),
    "broken input": ([sample("a"), b"{\n"], [GOOD], "m.jsonl: line 2 is not JSON"),
    "no object": ([b"3\n"], [GOOD], "m.jsonl: line 1 is a int"),
    "broken hypothesis": ([sample("a")], [b"{\n"], "h.jsonl: line 1 is not JSON"),
    "no hypothesis": ([sample("a"), sample("b")], [GOOD], "m.jsonl: line 2 .id 1.: .*h.jsonl lacks it"),
    "two hypotheses": ([sample("a")], [GOOD, GOOD], "lines 1 and 2 have the same id 0"),
    "no text": ([sample("a")], [{"id": 0}], "h.jsonl: line 1 has neither text nor error"),
    "no answer": ([{"messages": []}], [GOOD], 'm.jsonl: line 1 has neither "transcript" nor an answer'),
    "no words": ([sample("a", "...")], [GOOD], "m.jsonl: line 1 has no words"),
}


@pytest.mark.parametrize(("samples", "hypotheses", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_leave_nothing(tmp_path, samples, hypotheses, message):
    if samples is not None:
        write(tmp_path / "m.jsonl", samples)
    write(tmp_path / "h.jsonl", hypotheses)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        filter_speech(tmp_path / "m.jsonl", tmp_path / "h.jsonl", 0.1, tmp_path / "out.jsonl")
    assert sorted(tmp_path.iterdir()) == before


def test_outputs_are_not_overwritten(tmp_path):
    source, evaluation = write(tmp_path / "m.jsonl", [sample("a")]), write(tmp_path / "e.jsonl", [{"text": SECRET}])
    (tmp_path / "out.dropped.jsonl").write_text("mine")
    for output in (source, tmp_path / "out.jsonl"):
        with pytest.raises(InputError, match="exists already; remove it"):
            decontaminate(source, [evaluation], output)
    assert (tmp_path / "out.dropped.jsonl").read_text() == "mine"
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(InputError, match=r"cannot be written .No such file"):
        decontaminate(source, [evaluation], tmp_path / "nowhere" / "out.jsonl")


def test_texts_too_short_to_compare_are_refused(tmp_path):
    source, evaluation = write(tmp_path / "m.jsonl", [sample("a")]), write(tmp_path / "e.jsonl", [{"text": "short"}])
    with pytest.raises(InputError, match=r"e.jsonl: no text has 13 words"):
        decontaminate(source, [evaluation], tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="ngram is 0"):
        decontaminate(source, [evaluation], tmp_path / "out.jsonl", 0)


def test_a_stop_leaves_nothing(tmp_path, monkeypatch):
    source, evaluation = write(tmp_path / "m.jsonl", [sample("a")]), write(tmp_path / "e.jsonl", [{"text": SECRET}])

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        decontaminate(source, [evaluation], tmp_path / "out.jsonl")
    assert sorted(tmp_path.iterdir()) == [evaluation, source]


def test_the_program_filters_and_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(Path("m.jsonl"), [sample("a"), sample(SECRET)])
    write(Path("e.jsonl"), [{"text": SECRET}])
    write(Path("h.jsonl"), [{"text": "yes"}, {"text": "no"}])
    for given, kept in (
        (
            ["decontaminate", "--against", "e.jsonl", "--output", "a.jsonl"],
            "a.dropped.jsonl: 1 dropped",
        ),
        (["filter-speech", "--hypotheses", "h.jsonl", "--max-wer", "0", "--output", "b.jsonl"], "b.jsonl: 1 kept"),
    ):
        monkeypatch.setattr(sys, "argv", ["prepare", *given, "--input", "m.jsonl"])
        assert program.main() == 0
        assert kept in capsys.readouterr().out
    assert program.main() == 2
    assert capsys.readouterr().err == "error: b.jsonl: exists already; remove it, or give another output\n"
    assert dropped_path(Path("b.jsonl")).exists()
