"""Augmentation of decoded media: a hook for each kind, and a small one of each by name."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

Clip = tuple[np.ndarray, int]  # samples (n,) of full scale 1; Hz
AugmentImage = Callable[[Image.Image, np.random.Generator], Image.Image]
AugmentClip = Callable[[Clip, np.random.Generator], Clip]


@dataclass(frozen=True)
class Augment:
    """What is done to media after they are decoded.

    It must keep an image's size and a clip's length and rate, by which tokens are counted before. Draws come from the
    generator alone, so that they repeat when a run goes on.
    """

    image: AugmentImage | None = None
    clip: AugmentClip | None = None


def jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cuts off up to a tenth of each side, scales the rest back, and changes the brightness by up to a fifth."""
    width, height = image.size
    left, top, right, bottom = rng.uniform(0, 0.1, 4)
    box = left * width, top * height, (1 - right) * width, (1 - bottom) * height
    cut = image.resize(image.size, Image.Resampling.BILINEAR, box=box)
    return ImageEnhance.Brightness(cut).enhance(rng.uniform(0.8, 1.2))


def noise(clip: Clip, rng: np.random.Generator) -> Clip:
    """Changes the gain by up to 6 dB, and adds white noise 20 to 50 dB below the clip's own power."""
    samples, rate = clip
    level = np.sqrt(np.mean(np.square(samples, dtype=np.float64))) * 10 ** (-rng.uniform(20, 50) / 20)
    noisy = samples + level * rng.standard_normal(len(samples), np.float32)
    return (noisy * 10 ** (rng.uniform(-6, 6) / 20)).astype(np.float32), rate


IMAGE_AUGMENTATIONS: dict[str, AugmentImage] = {"jitter": jitter}
CLIP_AUGMENTATIONS: dict[str, AugmentClip] = {"noise": noise}
