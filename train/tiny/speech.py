"""Clips of espeak-ng in many voices, speeds and pitches."""

import io
import subprocess

import numpy as np
import soundfile
from scipy.signal import resample_poly

from phi4mm_jax.errors import InputError
from train.tiny.content import Split

RATE = 16000
HELD_OUT = str.split("Alicia Benjamin Max Mike female4 male3 klatt2 Pedro")
TRAINED = str.split(
    """Adam Alex Andrea Andy Annie Antonio Auntie Belinda Boris Caleb David Denis Diogo Ed Edward Gene Gustave Henrique
    Hugo Iven Iven2 Jacky John Lee Linda Marcelo Marco Mario Michael Michel Miguel Mr_Serious Nguyen Pablo Paul Quincy
    RicishayMax Rob Robert Steph Steph2 Zac anika female2 female3 female5 grandma klatt klatt3 male1 male2 male4 male5
    male6 male7 norbert sandro shelby travis victor"""
)
_ACCENTS = ("en-us", "en-gb", "en-us", "en-gb-x-rp")


def voices_of(split: Split) -> list[str]:
    return HELD_OUT if split == "held" else TRAINED


def say(rng: np.random.Generator, text: str, voices: list[str]) -> np.ndarray:
    """A clip of 16 kHz: a voice at 85 to 115 words a minute, of any pitch and loudness, in some noise.

    Raises:
        InputError: there is no espeak-ng.
    """
    voice = f"{rng.choice(_ACCENTS)}+{rng.choice(voices)}"
    command = [
        "espeak-ng",
        "-v",
        voice,
        "-s",
        rng.integers(85, 116),
        "-p",
        rng.integers(25, 76),
        "-g",
        rng.integers(0, 3),
    ]
    try:
        spoken = subprocess.run([*map(str, command), "--stdout", text], capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise InputError("espeak-ng is not installed; apt-get install espeak-ng") from None
    samples, rate = soundfile.read(io.BytesIO(spoken), dtype="float32")
    samples = resample_poly(samples, RATE, round(rate * rng.uniform(0.9, 1.1))).astype(np.float32)
    samples *= rng.uniform(0.2, 0.9) / max(np.abs(samples).max(), 1e-3)
    silence = [np.zeros(int(RATE * s), np.float32) for s in rng.uniform(0, 0.15, 2)]
    clip = np.concatenate([silence[0], samples, silence[1]])
    return clip + rng.normal(0, 10 ** rng.uniform(-4, -2.3), len(clip)).astype(np.float32)


def as_ogg(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples.clip(-1, 1), RATE, format="OGG", subtype="VORBIS")
    return file.getvalue()
