"""Clips of espeak-ng in many voices, speeds and pitches."""

import io
import subprocess
from functools import cache

import numpy as np
import soundfile
from scipy.signal import resample_poly

from phi4mm_jax.errors import InputError
from train.tiny.content import Split

RATE = 16000
# Variants by the names of espeak-ng's files. Those that whisper, croak or imitate machines are in neither set.
HELD_OUT = str.split("Alex Mike benjamin f4 m3 pedro victor")  # max is RicishayMax, which is trained, with less echo
TRAINED = str.split(
    """Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario Michael Nguyen RicishayMax
    adam anika antonio aunty belinda boris caleb david ed edward edward2 f1 f2 f3 f5 grandma grandpa gustave iven iven2
    iven3 iven4 john klatt klatt2 klatt3 linda m1 m2 m4 m5 m6 m7 m8 marcelo michel miguel norbert pablo paul quincy rob
    robert sandro shelby steph steph2 steph3 travis zac"""
)
_ACCENTS = ("en-us", "en-gb", "en-us", "en-gb-x-rp")


@cache
def voices_of(split: Split) -> list[str]:
    """Return the voices of a split.

    Raises:
        InputError: espeak-ng or a voice is missing. It would speak with its usual voice instead, and say nothing.
    """
    listed = _run(["espeak-ng", "--voices=variant"]).decode()
    voices = HELD_OUT if split == "held" else TRAINED
    for voice in voices:
        if f"!v/{voice} " not in listed:
            raise InputError(f"espeak-ng has no voice {voice}; install espeak-ng 1.51, which has")
    return voices


def _run(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise InputError("espeak-ng is not installed; apt-get install espeak-ng") from None
    except subprocess.CalledProcessError as error:
        raise InputError(f"{' '.join(command)} failed: {error.stderr.decode(errors='replace').strip()}") from None


def say(rng: np.random.Generator, text: str, voices: list[str], *, hard: bool = False) -> np.ndarray:
    """Return a clip (S,) of 16 kHz: a voice at 85 to 115 words a minute, of middling pitch, in some noise.

    A hard one is faster, of more extreme pitch, stretched more, in more noise.
    """
    voice = f"{rng.choice(_ACCENTS)}+{rng.choice(voices)}"
    fastest, pitch, stretch, loudest = (135, 20, 0.2, -1.9) if hard else (116, 0, 0.1, -2.3)
    options = ["-s", rng.integers(85, fastest), "-p", rng.integers(25 - pitch, 76 + pitch), "-g", rng.integers(0, 3)]
    spoken = _run(["espeak-ng", "-v", voice, *map(str, options), "--stdout", text])
    samples, rate = soundfile.read(io.BytesIO(spoken), dtype="float32")
    stretched = rate * rng.uniform(1 - stretch, 1 + stretch)
    samples = resample_poly(samples, RATE, round(stretched)).astype(np.float32)
    samples *= rng.uniform(0.2, 0.9) / max(np.abs(samples).max(), 1e-3)
    silence = [np.zeros(int(RATE * s), np.float32) for s in rng.uniform(0, 0.15, 2)]
    clip = np.concatenate([silence[0], samples, silence[1]])
    return clip + rng.normal(0, 10 ** rng.uniform(-4, loudest), len(clip)).astype(np.float32)


def as_ogg(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples.clip(-1, 1), RATE, format="OGG", subtype="VORBIS")
    return file.getvalue()
