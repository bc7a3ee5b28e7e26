"""Recordings made of the small model's held-out clips, with what is said in them and when."""

import json
from dataclasses import dataclass

import numpy as np
import soundfile

from helpers.paths import FIXTURES

HELD = FIXTURES / "held"
RATE = 16000


@dataclass(frozen=True)
class Said:
    """A clip of a recording: what is said, and between which seconds, by its loudness; and its place, by samples."""

    text: str
    start: float
    end: float
    place: slice


def held_clips(count: int) -> list[tuple[np.ndarray, str]]:
    """The first clips of the held-out set, with what is said in each."""
    lines = [json.loads(line)["messages"] for line in (HELD / "speech.jsonl").read_text().splitlines()[:count]]
    paths = [HELD / asked["content"][0]["audio"] for asked, _ in lines]
    return [
        (soundfile.read(path, dtype="float32")[0], answer["content"])
        for path, (_, answer) in zip(paths, lines, strict=True)
    ]


def recording(clips, *, noise: float = 0.004, pauses=(1.5, 4.0), seed: int = 0) -> tuple[np.ndarray, list[Said]]:
    """The clips one after the other, with pauses of so many seconds behind each, in the noise of a room."""
    rng, parts, said, at = np.random.default_rng(seed), [], [], 0
    for samples, text in clips:
        frames = np.sqrt(np.square(samples[: len(samples) // 160 * 160].reshape(-1, 160)).mean(1))
        loud = np.flatnonzero(frames > max(0.05 * frames.max(), 3 * np.quantile(frames, 0.1)))
        said.append(
            Said(text, at / RATE + loud[0] / 100, at / RATE + (loud[-1] + 1) / 100, slice(at, at + len(samples)))
        )
        pause = np.zeros(round(rng.uniform(*pauses) * RATE), np.float32)
        parts += [samples, pause]
        at += len(samples) + len(pause)
    joined = np.concatenate(parts)
    return (joined + noise * rng.standard_normal(len(joined))).astype(np.float32), said
