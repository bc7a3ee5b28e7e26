"""Augmentation of decoded media: a hook per kind, a simple one of each by name, and settings for speech."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageEnhance

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.audio_features import num_frames
from phi4mm_jax.utils.checks import check_whole

Clip = tuple[np.ndarray, int]  # samples (n,) of full scale 1; Hz
AugmentImage = Callable[[Image.Image, np.random.Generator], Image.Image]
AugmentClip = Callable[[Clip, np.random.Generator], Clip]


_SPEEDS, _SEMITONES = (0.5, 2.0), (-12.0, 12.0)
_MASKED_SHARE = 0.2  # of a clip's frames, by one mask


@dataclass(frozen=True)
class SpeechAugmentation:
    """Speech augmentation: speed and pitch of the samples, then SpecAugment on their features. All are off by
    default.

    Attributes:
        speed: range of the factor of speed, such as (0.9, 1.1), at the same pitch; None is off.
        pitch: range of the shift in semitones, such as (-2, 2), at the same speed; None is off.
        time_masks: number of spans of frames to mask (SpecAugment, arXiv:1904.08779).
        time_width: maximum width in frames of 10 ms; never more than a fifth of the clip.
        frequency_masks: number of spans of mel bands to mask.
        frequency_width: maximum width in bands.

    Raises:
        InputError: a value out of range.
    """

    speed: tuple[float, float] | None = None
    pitch: tuple[float, float] | None = None
    time_masks: int = 0
    time_width: int = 70
    frequency_masks: int = 0
    frequency_width: int = 27

    def __post_init__(self):
        for name, (min_, max_) in (("speed", _SPEEDS), ("pitch", _SEMITONES)):
            value = getattr(self, name)
            if value is not None and not (len(value) == 2 and min_ <= value[0] <= value[1] <= max_):
                raise InputError(
                    f"augment_speech.{name} is {value!r:.80}; expected a range within {min_:g} and {max_:g}, such as "
                    f"{'(0.9, 1.1)' if name == 'speed' else '(-2, 2)'}"
                )
        for name, min_ in (("time_masks", 0), ("time_width", 1), ("frequency_masks", 0), ("frequency_width", 1)):
            check_whole(f"augment_speech.{name}", getattr(self, name), min_)


@dataclass(frozen=True)
class Augment:
    """Augmentations of decoded media.

    The functions must keep an image's size and a clip's length and rate, from which tokens were counted before. All
    randomness comes from the generator, so that it repeats when a run is resumed.
    """

    image: AugmentImage | None = None
    clip: AugmentClip | None = None
    speech: SpeechAugmentation | None = None  # before `clip`; its lengths are counted before, too


def draw_speed(augmentation: SpeechAugmentation, num_samples: int, rate: int, rng: np.random.Generator) -> float:
    """Draw the speed of a clip, the first number of its generator; 1 for one that would become shorter than a frame."""
    if augmentation.speed is None:
        return 1.0
    speed = float(rng.uniform(*augmentation.speed))
    return speed if num_frames(stretched_length(num_samples, speed), rate) else 1.0


def stretched_length(num_samples: int, speed: float) -> int:
    """Return the number of samples of a clip after a change of speed."""
    return round(num_samples / speed)


def augment_clip(clip: Clip, augmentation: SpeechAugmentation, rng: np.random.Generator) -> Clip:
    """Change speed and pitch, each without the other, by librosa's phase vocoder.

    Args:
        clip: samples (n,) of full scale 1, and their rate in Hz.
        rng: draws the speed, then the pitch. The new length is `stretched_length` of what `draw_speed` gives.
    """
    samples, rate = clip
    speed = draw_speed(augmentation, len(samples), rate, rng)
    semitones = 0.0 if augmentation.pitch is None else float(rng.uniform(*augmentation.pitch))
    if speed == 1.0 and semitones == 0.0:
        return clip
    from librosa import effects  # which brings numba

    window = _window(len(samples))
    if speed != 1.0:
        length = stretched_length(len(samples), speed)
        samples = effects.time_stretch(samples, rate=speed, n_fft=window)
        samples = np.pad(samples[:length], (0, max(length - len(samples), 0)))
    if semitones != 0.0:
        samples = effects.pitch_shift(samples, sr=rate, n_steps=semitones, n_fft=window)
    return np.asarray(samples, np.float32), rate


def _window(num_samples: int) -> int:
    """librosa's window of the transform; shorter for clips that are."""
    return min(2048, 1 << (num_samples.bit_length() - 1))


def mask_features(
    features: Float[np.ndarray, "F 80"], augmentation: SpeechAugmentation, rng: np.random.Generator
) -> Float[np.ndarray, "F 80"]:
    """Mask spans of frames, then spans of bands, with each band's mean over the clip (SpecAugment).

    A width is drawn from 0 to the maximum, then a start.
    """
    if not augmentation.time_masks and not augmentation.frequency_masks:
        return features
    frames, bands = features.shape
    masked = np.zeros(features.shape, bool)
    for _ in range(augmentation.time_masks):
        start, stop = _span(frames, min(augmentation.time_width, math.floor(_MASKED_SHARE * frames)), rng)
        masked[start:stop] = True
    for _ in range(augmentation.frequency_masks):
        start, stop = _span(bands, min(augmentation.frequency_width, bands), rng)
        masked[:, start:stop] = True
    return np.where(masked, features.mean(axis=0, keepdims=True), features)


def _span(length: int, widest: int, rng: np.random.Generator) -> tuple[int, int]:
    width = int(rng.integers(0, widest + 1))
    start = int(rng.integers(0, length - width + 1))
    return start, start + width


def jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut off up to a tenth of each side, scale the rest back, and change the brightness by up to a fifth."""
    width, height = image.size
    left, top, right, bottom = rng.uniform(0, 0.1, 4)
    box = left * width, top * height, (1 - right) * width, (1 - bottom) * height
    cut = image.resize(image.size, Image.Resampling.BILINEAR, box=box)
    return ImageEnhance.Brightness(cut).enhance(rng.uniform(0.8, 1.2))


def noise(clip: Clip, rng: np.random.Generator) -> Clip:
    """Change the gain by up to 6 dB, and add white noise 20 to 50 dB below the clip's own power."""
    samples, rate = clip
    level = np.sqrt(np.mean(np.square(samples, dtype=np.float64))) * 10 ** (-rng.uniform(20, 50) / 20)
    noisy = samples + level * rng.standard_normal(len(samples), np.float32)
    return (noisy * 10 ** (rng.uniform(-6, 6) / 20)).astype(np.float32), rate


IMAGE_AUGMENTATIONS: dict[str, AugmentImage] = {"jitter": jitter}
CLIP_AUGMENTATIONS: dict[str, AugmentClip] = {"noise": noise}
