"""The formats of transcripts, parsed back by their grammar."""

import html
import json
import re

import numpy as np
import pytest

from phi4mm_jax.transcription.transcripts import Segment, joined, plain_text, srt, verbose, vtt
from phi4mm_jax.utils.strict_json import strict_json

SEGMENTS = [
    Segment(0.0, 1.2346, "a <b> & c", [1, 2], [-0.5, -1.5]),
    Segment(59.9996, 61.0, "one\n\n  two --> three", [3], [-1.0]),
    Segment(62.0, 63.0, ""),
    Segment(3599.5, 36000.25, "日本"),
]
TIMES = [(0.0, 1.235), (60.0, 61.0), (3599.5, 36000.25)]


def seconds(clock: str) -> float:
    hours, minutes, rest = clock.replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def cues(text: str, point: str, number: str) -> list[tuple[float, float, str]]:
    """Cues by the grammar of SubRip and WebVTT: blocks between empty lines, a line of times and lines of text."""
    found = []
    clock = rf"(\d\d:[0-5]\d:[0-5]\d{point}\d{{3}})"
    for block in text.removesuffix("\n").split("\n\n"):
        match = re.fullmatch(rf"{number}{clock} --> {clock}\n((?:[^\n]+\n?)+)", block)
        assert match, block
        assert "-->" not in match[3]
        found.append((seconds(match[1]), seconds(match[2]), match[3]))
    return found


def test_subrip():
    found = cues(srt(SEGMENTS), ",", r"\d+\n")
    assert [block.split("\n")[0] for block in srt(SEGMENTS).split("\n\n")] == ["1", "2", "3"]
    np.testing.assert_allclose([cue[:2] for cue in found], TIMES, atol=1e-9)
    assert [cue[2] for cue in found] == ["a <b> & c", "one\ntwo -> three", "日本"]


def test_webvtt():
    head, _, rest = vtt(SEGMENTS).partition("\n\n")
    assert head == "WEBVTT"
    found = cues(rest, r"\.", "")
    np.testing.assert_allclose([cue[:2] for cue in found], TIMES, atol=1e-9)
    assert all("<" not in cue[2] and not re.search("&(?!amp;|lt;|gt;)", cue[2]) for cue in found)
    assert [html.unescape(cue[2]) for cue in found] == ["a <b> & c", "one\ntwo --> three", "日本"]


def test_json():
    told = verbose(SEGMENTS, task="transcribe", language="english", seconds=36001.0, temperature=0.0)
    found = json.loads(strict_json(told))
    assert (found["task"], found["language"], found["duration"]) == ("transcribe", "english", 36001.0)
    assert [(s["id"], s["start"], s["end"]) for s in found["segments"]] == [
        (0, 0.0, 1.2346), (1, 59.9996, 61.0), (2, 3599.5, 36000.25)
    ]  # fmt: skip
    assert [s["avg_logprob"] for s in found["segments"]] == [-1.0, -1.0, None]
    assert found["segments"][0]["tokens"] == [1, 2]


def test_nothing_said_is_an_empty_file():
    assert (plain_text([]), srt([]), vtt([])) == ("\n", "", "WEBVTT\n")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["one", "two"], "one two"),
        (["one", "", "two"], "one two"),
        (["今日は", "晴れ。", "ok", "です"], "今日は晴れ。 ok です"),
        (["안녕", "하세요"], "안녕 하세요"),
        ([], ""),
    ],
)
def test_texts_are_joined_as_their_script_has_it(texts, expected):
    assert joined([Segment(i, i + 1, text) for i, text in enumerate(texts)]) == expected
