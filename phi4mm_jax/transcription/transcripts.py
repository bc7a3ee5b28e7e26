"""Transcripts, and the formats that they are written in."""

import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from phi4mm_jax.engine import Completion

Task = Literal["transcribe", "translate"]

TASKS: dict[Task, str] = {
    "transcribe": "Transcribe the audio clip into text.",
    "translate": "Translate the audio to English.",
}
LANGUAGES = {
    "en": "english", "zh": "chinese", "de": "german", "fr": "french", "it": "italian", "ja": "japanese",
    "es": "spanish", "pt": "portuguese",
}  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording and what is said in it.

    Attributes:
        start: in seconds of the recording.
        end: likewise.
        text: without space at its ends.
        tokens: the generated ids.
        log_probabilities: of each token.
        cut_off: the answer was ended by the limit of new tokens.
    """

    start: float
    end: float
    text: str
    tokens: Sequence[int] = ()
    log_probabilities: Sequence[float] = ()
    cut_off: bool = False

    @classmethod
    def of(cls, start: float, end: float, completion: Completion) -> "Segment":
        """Return a segment with the answer that a clip got."""
        return cls(
            start, end, completion.text.strip(), completion.tokens, completion.log_probabilities,
            completion.finish_reason == "length",
        )  # fmt: skip

    @property
    def avg_logprob(self) -> float | None:
        values = self.log_probabilities
        return sum(values) / len(values) if values else None


def joined(segments: Sequence[Segment]) -> str:
    """Return the text of all segments."""
    text = ""
    for segment in segments:
        text += separator(text, segment.text) + segment.text
    return text


def separator(before: str, after: str) -> str:
    """Return what stands between two texts: a space, but for scripts that have none between words."""
    if not before or not after:
        return ""
    return "" if _is_unspaced(before[-1]) and _is_unspaced(after[0]) else " "


def _is_unspaced(character: str) -> bool:
    """Return whether a character is Chinese or Japanese, or their punctuation. (Korean is written with spaces.)"""
    wide = unicodedata.east_asian_width(character) in "WF"
    return wide and "HANGUL" not in unicodedata.name(character, "")


def plain_text(segments: Sequence[Segment]) -> str:
    """Return segments as text, on one line."""
    return joined(segments) + "\n"


def srt(segments: Sequence[Segment]) -> str:
    """Return segments as SubRip has them."""
    blocks = [
        f"{i}\n{_clock(segment.start, ',')} --> {_clock(segment.end, ',')}\n{_cue(segment).replace('-->', '->')}\n"
        for i, segment in enumerate(_with_text(segments), 1)
    ]
    return "\n".join(blocks)


def vtt(segments: Sequence[Segment]) -> str:
    """Return segments as WebVTT has them."""
    escape = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;"}
    blocks = [
        f"{_clock(s.start, '.')} --> {_clock(s.end, '.')}\n{_cue(s).translate(escape)}\n" for s in _with_text(segments)
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def verbose(
    segments: Sequence[Segment], *, task: Task, language: str | None, seconds: float, temperature: float
) -> dict[str, Any]:
    """Return segments as OpenAI's `verbose_json` has them.

    Args:
        language: its name, or None where it is not known.
        seconds: of the recording.
    """
    return {
        "task": task, "language": language, "duration": seconds, "text": joined(segments),
        "segments": [
            {
                "id": i, "seek": 0, "start": segment.start, "end": segment.end, "text": segment.text,
                "tokens": list(segment.tokens), "temperature": temperature, "avg_logprob": segment.avg_logprob,
                "compression_ratio": _compression(segment.text), "no_speech_prob": None,
            }
            for i, segment in enumerate(_with_text(segments))
        ],
    }  # fmt: skip


def _with_text(segments: Sequence[Segment]) -> list[Segment]:
    """Return the segments that have text."""
    return [segment for segment in segments if segment.text]


def _cue(segment: Segment) -> str:
    """Return a segment's text without empty lines, which end a cue."""
    return re.sub(r"\s*[\r\n]\s*", "\n", segment.text)


def _compression(text: str) -> float:
    content = text.encode(errors="replace")
    return len(content) / len(zlib.compress(content))


def _clock(seconds: float, point: str) -> str:
    total = round(1000 * seconds)
    return f"{total // 3_600_000:02}:{total // 60_000 % 60:02}:{total // 1000 % 60:02}{point}{total % 1000:03}"
