"""The goldens' cases, as transformers' model takes them."""

from functools import cache
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from safetensors.numpy import load_file

from helpers.cases import media_of
from helpers.paths import TINY
from helpers.torch_native import Adapter, NativeImage
from phi4mm_jax.processing.audio_features import log_mel
from phi4mm_jax.processing.images import choose_grid, preprocess_image

ADAPTER_OF_MODE: dict[int, Adapter | None] = {0: None, 1: "vision", 2: "speech", 3: "vision"}


@cache
def image_of(index: int) -> NativeImage:
    processed = preprocess_image(Image.open(TINY / "inputs" / f"image_{index}.png"))
    height, width = load_file(TINY / "goldens.safetensors")[f"image_{index}.size"]
    pixels = np.ascontiguousarray(processed.crops.transpose(0, 3, 1, 2))
    return NativeImage(pixels, processed.patch_mask, (int(height) // 448, int(width) // 448))


@cache
def clip_of(index: int) -> np.ndarray:
    if index == 4:  # the one whose recorded features are thinned
        return log_mel(*soundfile.read(TINY / "inputs" / "audio_4.flac", dtype="float32"))
    return load_file(TINY / "goldens.safetensors")[f"audio_{index}.features"]


def native_media(case: dict[str, Any]) -> tuple[list[NativeImage], list[np.ndarray], Adapter | None]:
    images = [image_of(index) for index in case["images"]]
    return images, [clip_of(index) for index in case["audios"]], ADAPTER_OF_MODE[case["mode"]]


def native_inputs(model, case):
    """Return a case as our processor makes it, in the form that the native model takes."""
    media = media_of(case)
    row = model.processor.row(case["prompt"], media["images"][0], media["audios"][0])
    images = []
    for path, features in zip(media["images"][0], row.images, strict=True):
        with Image.open(path) as image:
            columns, rows = choose_grid(*image.size)
        assert rows * columns + 1 == len(features.crops)
        images.append(NativeImage(features.crops.transpose(0, 3, 1, 2), features.patch_mask, (rows, columns)))
    return row.tokens, images, list(row.clips), ADAPTER_OF_MODE[case["mode"]]
