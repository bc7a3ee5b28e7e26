"""Images against what the original makes of them, against torch's interpolation, and against bad input."""

import contextlib
import functools
import io
import json
import math
import os
import random
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from safetensors.numpy import load_file

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.images import (
    GLOBAL_SEPARATOR,
    SUB_SEPARATOR,
    ImageFeatures,
    choose_grid,
    count_image_tokens,
    image_size,
    load_image,
    preprocess_image,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
PREP, TINY = FIXTURES / "ms_prep", FIXTURES / "ms_tiny"
PREP_CASES = json.loads((PREP / "goldens.json").read_text())

# Normalised pixels lie in [-1, 1], or little beyond. The sub-crops are those of the original to the bit; the global
# view, which its bicubic interpolation computes with rounding errors and ours without, differs by 2.4e-7 at most.
GLOBAL_VIEW_TOLERANCE = 5e-7


@functools.cache
def features_of(path: Path) -> ImageFeatures:
    return preprocess_image(load_image(path))


@functools.cache
def goldens_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "goldens.safetensors")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def picture(width: int, height: int) -> Image.Image:
    """Something smooth, which lossy formats keep."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((255 * np.stack([x, y, (x + y) / 2], -1)).astype(np.uint8))


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


# The original's results


def check_golden(features: ImageFeatures, golden: Callable[[str], np.ndarray], thinned: tuple[slice, slice]) -> None:
    rows, columns = thinned
    pixels = features.crops.transpose(0, 3, 1, 2)[:, :, rows, columns]
    np.testing.assert_array_equal(pixels[1:], golden("pixel_values")[1:])
    np.testing.assert_allclose(pixels[0], golden("pixel_values")[0], rtol=0, atol=GLOBAL_VIEW_TOLERANCE)
    np.testing.assert_array_equal(features.patch_mask, golden("attention_mask").astype(bool))
    assert features.num_tokens == golden("num_tokens")[0]


@pytest.mark.parametrize("index", range(len(PREP_CASES)))
def test_preprocessing_is_golden(index: int) -> None:
    goldens, case = goldens_of(PREP), PREP_CASES[index]
    path = PREP / "inputs" / f"prep_{index}.png"
    features = features_of(path)
    check_golden(features, lambda name: goldens[f"prep_{index}.{name}"], (slice(3, None, 28), slice(5, None, 28)))
    global_view = features.crops[0].transpose(2, 0, 1)[:, ::3, ::3]
    np.testing.assert_allclose(global_view, goldens[f"prep_{index}.global_view"], rtol=0, atol=GLOBAL_VIEW_TOLERANCE)

    with Image.open(path) as image:
        assert (image.mode, *image.size) == (case["mode"], case["width"], case["height"])
        assert choose_grid(*image.size) == (case["grid_width"] // 448, case["grid_height"] // 448)
        assert count_image_tokens(*image.size) == case["tokens"]
    assert len(features.crops) == case["crops"]


@pytest.mark.parametrize("index", range(4))
def test_images_of_the_tiny_checkpoint_are_golden(index: int) -> None:
    goldens, path = goldens_of(TINY), TINY / "inputs" / f"image_{index}.png"
    features = features_of(path)
    check_golden(features, lambda name: goldens[f"image_{index}.{name}"], (slice(0, None, 7), slice(0, None, 7)))
    with Image.open(path) as image:
        columns, rows = choose_grid(*image.size)
    assert [448 * rows, 448 * columns] == goldens[f"image_{index}.size"].tolist()


def test_features_have_the_documented_types() -> None:
    features = preprocess_image(noise(900, 500))
    assert features.crops.dtype == np.float32
    assert features.crops.shape == (1 + 3 * 2, 448, 448, 3)
    assert features.crops.flags.c_contiguous
    assert features.patch_mask.dtype == np.bool_
    assert features.patch_mask.shape == (7, 32, 32)
    assert features.layout.dtype == np.int32
    assert features.layout.shape == (features.num_tokens,)


# The global view


@pytest.mark.torch
@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 2), (3, 2), (4, 3), (5, 4), (6, 6), (1, 8), (9, 1), (36, 1)])
def test_global_view_is_torch_bicubic(grid: tuple[int, int]) -> None:
    """All grids have sides in whole multiples of a crop; noise, so that each weight counts and values overshoot."""
    import torch

    columns, rows = grid
    features = preprocess_image(noise(columns * 448, rows * 448))
    tiles = features.crops[1:].reshape(rows, columns, 448, 448, 3).swapaxes(1, 2)
    whole = torch.from_numpy(tiles.reshape(rows * 448, columns * 448, 3).copy()).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(whole, (448, 448), mode="bicubic", align_corners=False, antialias=False)
    difference = features.crops[0] - expected[0].permute(1, 2, 0).numpy()
    assert np.abs(difference).max() <= GLOBAL_VIEW_TOLERANCE
    if rows % 2 == 0 or columns % 2 == 0:
        assert np.abs(features.crops[0]).max() > 1.05, "bicubic interpolation of noise overshoots, and is not clamped"


def test_padding_is_white_and_masked() -> None:
    features = preprocess_image(noise(448, 896 - 3 * 14))  # 3 rows of patches short of its grid
    assert features.crops.shape[0] == 3
    assert (features.crops[2, -42:] == 1).all()
    assert features.patch_mask[2, :-3].all()
    assert not features.patch_mask[2, -3:].any()
    assert features.patch_mask[:2].all()


@pytest.mark.parametrize(("padding", "masked"), [(13, 0), (14, 1), (27, 1), (28, 2)])
def test_only_whole_padded_patches_are_masked(padding: int, masked: int) -> None:
    features = preprocess_image(noise(448, 448 - padding))
    assert (~features.patch_mask[1]).any(axis=1).sum() == masked
    features = preprocess_image(noise(448 - padding, 448))
    assert (~features.patch_mask[1]).any(axis=0).sum() == masked


def test_scaled_sides_are_truncated() -> None:
    """97 * (448 / 97) is under 448 in floating point; of equal scales it is the height that fills the grid."""
    assert int(97 * (448 / 97)) == 447
    features = preprocess_image(Image.new("RGB", (97, 97)))
    assert (features.crops[1, :, 447] == 1).all()
    assert (features.crops[1, :, :447] == -1).all()


def test_pixel_values_are_scaled_to_minus_one_to_one() -> None:
    for value, expected in [(0, -1.0), (255, 1.0), (51, -0.6)]:
        features = preprocess_image(Image.new("RGB", (448, 448), (value, value, value)))
        np.testing.assert_allclose(features.crops, expected, rtol=0, atol=6e-8)


# The layout of the tokens


def test_the_global_view_overshoots_by_no_more_than_its_weights() -> None:
    """Where the signs of the pixels are those of bicubic weights: (2 * 19 / 32 + 2 * 3 / 32) ** 2."""
    signs = np.roll(np.tile([0, 1, 1, 0], 224), 1)
    pixels = np.where(signs[:, None] == signs, 255, 0).astype(np.uint8)
    crops = preprocess_image(Image.fromarray(np.repeat(pixels[..., None], 3, axis=2))).crops
    assert np.abs(crops[0]).max() == 1.375**2
    assert np.abs(crops[1:]).max() == 1


def layout_by_loops(features: ImageFeatures, columns: int, rows: int) -> list[int]:
    """The definition, one token at a time."""
    keep_rows = sum(bool(features.patch_mask[1 + r * columns, 2 * i, 0]) for r in range(rows) for i in range(16))
    keep_columns = sum(bool(features.patch_mask[1 + c, 0, 2 * i]) for c in range(columns) for i in range(16))
    tokens = []
    for y in range(keep_rows):
        for x in range(keep_columns):
            crop = 1 + (y // 16) * columns + x // 16
            tokens.append(crop * 256 + (y % 16) * 16 + x % 16)
        tokens.append(SUB_SEPARATOR)
    tokens.append(GLOBAL_SEPARATOR)
    for y in range(16):
        tokens += [y * 16 + x for x in range(16)] + [SUB_SEPARATOR]
    return tokens


@pytest.mark.parametrize("size", [(448, 448), (640, 480), (300, 900), (1500, 700), (460, 450), (100, 80), (3000, 180)])
def test_layout_takes_each_unmasked_feature_once(size: tuple[int, int]) -> None:
    features = preprocess_image(noise(*size))
    assert features.layout.tolist() == layout_by_loops(features, *choose_grid(*size))
    ids = features.layout[features.layout >= 0]
    assert len(set(ids.tolist())) == len(ids), "no feature is taken twice"
    # What is kept is what the mask, thinned as the pooling does, leaves.
    kept = np.zeros(len(features.crops) * 256, bool)
    kept[ids] = True
    np.testing.assert_array_equal(kept.reshape(-1, 16, 16), features.patch_mask[:, ::2, ::2])


def test_layout_of_one_crop_has_its_global_view_first() -> None:
    layout = preprocess_image(noise(448, 448)).layout
    assert len(layout) == 545
    assert layout[:17].tolist() == [*range(256, 272), SUB_SEPARATOR]
    assert layout[16 * 17] == GLOBAL_SEPARATOR
    assert layout[16 * 17 + 1 :][:17].tolist() == [*range(16), SUB_SEPARATOR]


# The grid and the number of tokens


def grid_by_definition(width: int, height: int, most: int) -> tuple[int, int]:
    """The original's choice, by exhaustive search with a key instead of a running best."""
    covering = -(-width // 448), -(-height // 448)
    if covering[0] * covering[1] <= most:
        return covering
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    least = min(abs(width / height - i / j) for i, j in grids)
    closest = sorted((g for g in grids if abs(width / height - g[0] / g[1]) == least), key=math.prod)
    filled = [g for g in closest[1:] if width * height > 0.5 * 448 * 448 * math.prod(g)]
    return (closest[:1] + filled)[-1]


def random_sizes(count: int, seed: int, most: float) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    return [(int(2 ** rng.uniform(0, most)), int(2 ** rng.uniform(0, most))) for _ in range(count)]


@pytest.mark.parametrize("dynamic_hd", [1, 2, 4, 9, 12, 36])
def test_grid_is_the_originals(dynamic_hd: int) -> None:
    for width, height in random_sizes(400, dynamic_hd, 14.5):
        assert choose_grid(width, height, dynamic_hd) == grid_by_definition(width, height, dynamic_hd)


def test_of_equally_close_grids_the_largest_is_taken() -> None:
    """1x1, 2x2, ..., 6x6 are equally close to a square: of those allowed it is the largest."""
    assert choose_grid(2689, 2689) == (6, 6)
    assert choose_grid(1000, 1000, dynamic_hd=8) == (2, 2)
    assert choose_grid(500, 500, dynamic_hd=3) == (1, 1)


def tokens_or_refusal(count: Callable[[], int]) -> int | str:
    try:
        return count()
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("dynamic_hd", [1, 4, 36])
def test_the_count_is_that_of_the_tokens(dynamic_hd: int) -> None:
    """Random sizes, up to ratios of 1:2000; an image that is refused is refused by both, with the same words."""
    sizes = random_sizes(50, dynamic_hd, 11)
    counts = [tokens_or_refusal(lambda s=s: count_image_tokens(*s, dynamic_hd)) for s in sizes]
    tokens = [
        tokens_or_refusal(lambda s=s: preprocess_image(Image.new("RGB", s), dynamic_hd).num_tokens) for s in sizes
    ]
    assert counts == tokens
    assert 0 < sum(isinstance(n, str) for n in tokens) < 25


def test_the_count_is_that_of_the_masks() -> None:
    for width, height in random_sizes(12, 7, 11):
        try:
            features = preprocess_image(Image.new("RGB", (width, height)))
        except InputError:
            continue
        columns, rows = choose_grid(width, height)
        mask = features.patch_mask[1:].reshape(rows, columns, 32, 32).swapaxes(1, 2).reshape(rows * 32, columns * 32)
        thinned = mask[::2, ::2]
        expected = 256 + 16 + 1 + thinned.sum() + thinned[:, 0].sum()
        assert count_image_tokens(width, height) == expected


def test_no_crop_is_all_padding() -> None:
    """Each sub-crop has a valid patch: attention over an empty set is undefined."""
    for dynamic_hd in (1, 2, 3, 6, 12, 36):
        for width, height in random_sizes(15, dynamic_hd + 100, 11):
            try:
                features = preprocess_image(Image.new("RGB", (width, height)), dynamic_hd)
            except InputError:
                continue
            assert features.patch_mask.any(axis=(1, 2)).all(), (dynamic_hd, width, height)


@pytest.mark.parametrize("dynamic_hd", [1, 2, 5, 8, 36])
def test_dynamic_hd_caps_the_crops(dynamic_hd: int) -> None:
    for size in [(2600, 2600), (3000, 400), (500, 2900), (30, 40)]:
        assert 2 <= len(preprocess_image(noise(*size), dynamic_hd).crops) <= dynamic_hd + 1
    assert len(preprocess_image(noise(2600, 2600), 1).crops) == 2


def test_no_image_has_more_than_10065_tokens() -> None:
    counts = {count_image_tokens(448 * i, 448 * j) for i in range(1, 60) for j in range(1, 60)}
    assert max(counts) == 10065  # 36 crops one above the other: 36 * 256, and a separator after each of 576 rows


# Sources, modes and formats

FORMATS = {
    "PNG": {},
    "BMP": {},
    "TIFF": {},
    "PPM": {},
    "TGA": {},
    "WEBP": {"lossless": True},
    "JPEG2000": {},
    "GIF": None,
    "JPEG": None,
}


@pytest.mark.parametrize("file_format", FORMATS)
def test_formats_are_known_by_their_content(file_format: str, tmp_path: Path) -> None:
    image = picture(70, 50)
    options = FORMATS[file_format]
    data = encoded(image, file_format, **(options or {}))
    path = tmp_path / "picture.bin"  # known by its content, not by its name
    path.write_bytes(data)
    loaded = load_image(data)
    assert (loaded.mode, loaded.size) == ("RGB", (70, 50))
    file = io.BytesIO(data)
    with path.open("rb") as opened:
        for source in (path, str(path), bytearray(data), memoryview(data), file, file, opened, opened):
            np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(loaded))
    difference = np.abs(np.asarray(loaded, np.int32) - np.asarray(image, np.int32))
    if options is None:  # lossy
        assert difference.mean() < 8
    else:
        assert difference.max() == 0


def test_arrays_are_read_as_pixels() -> None:
    pixels = np.asarray(picture(30, 20))
    np.testing.assert_array_equal(np.asarray(load_image(pixels)), pixels)
    np.testing.assert_array_equal(np.asarray(load_image(pixels[::2, ::-1])), pixels[::2, ::-1])
    for grey in (pixels[:, :, 0], pixels[:, :, :1]):
        np.testing.assert_array_equal(np.asarray(load_image(grey)), np.repeat(pixels[:, :, :1], 3, 2))
    opaque = np.concatenate([pixels, np.full_like(pixels[:, :, :1], 255)], 2)
    for source in (opaque, jnp.asarray(pixels)):
        np.testing.assert_array_equal(np.asarray(load_image(source)), pixels)


@pytest.mark.parametrize(("array", "remedy"), [
    (np.zeros((3, 8, 9), np.uint8), "; put channels last: permute(1, 2, 0)"),
    (np.zeros((8, 9, 3)), "; multiply by 255, round to uint8"),
    (np.zeros((1, 8, 9), np.float32), "; put channels last: permute(1, 2, 0); multiply by 255"),
    (np.zeros((8, 9, 2), np.uint8), "with 1, 3 or 4 channels"),
    (np.zeros((8, 9), bool), "with 1, 3 or 4 channels"),
])  # fmt: skip
def test_arrays_of_other_forms_are_refused_with_a_remedy(array: np.ndarray, remedy: str) -> None:
    with pytest.raises(InputError) as error:
        load_image(array)
    assert remedy in str(error.value)
    assert ("permute" in str(error.value)) == (array.shape[-1] == 9 and array.ndim == 3)
    assert ("round" in str(error.value)) == (array.dtype in (np.float32, np.float64))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_modes_convert_as_pillow_does(mode: str) -> None:
    image = picture(40, 30)
    image = image.convert(mode)
    assert image.mode == mode
    loaded = load_image(image)
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image.convert("RGB")))


def test_premultiplied_transparency_is_undone() -> None:
    grey = picture(40, 30).convert("L")
    image = Image.merge("LA", [grey, Image.new("L", grey.size, 255)]).convert("La")
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(grey.convert("RGB")))


def with_alpha(mode: str) -> Image.Image:
    """Pixels of which some are transparent, half or not at all."""
    image = picture(40, 30).convert(mode[:-1])
    image.putalpha(Image.fromarray(np.tile(np.array([0, 128, 255, 77, 3], np.uint8), (30, 8))))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_flattened_on_white(mode: str) -> None:
    """However it comes: a PIL image, premultiplied, an array, a file."""
    image = with_alpha(mode)
    assert image.mode == mode
    rgba = np.asarray(image.convert("RGBA"), np.float64)
    expected = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
    sources: list[Any] = [image, np.asarray(image.convert("RGBA"))]
    sources += [encoded(image.convert("RGBA"), file_format) for file_format in ("PNG", "TIFF")]
    for source in sources:
        seen = np.asarray(load_image(source), np.float64)
        assert np.abs(seen - expected).max() <= 1
        np.testing.assert_array_equal(seen[:, 0::5], 255)
        np.testing.assert_array_equal(seen[:, 2::5], rgba[:, 2::5, :3])
    if mode != "PA":
        premultiplied = image.convert({"RGBA": "RGBa", "LA": "La"}[mode])
        assert np.abs(np.asarray(load_image(premultiplied), np.float64) - expected)[:, 1::5].max() <= 3


@pytest.mark.parametrize(
    ("image", "transparent"),
    [
        (Image.fromarray(np.array([[7, 8, 9]], np.uint8)), 8),
        (Image.fromarray(np.array([[7 * 257, 8 * 257, 9 * 257]], np.uint16)), 8 * 257),
        (Image.fromarray(np.repeat(np.array([[7, 8, 9]], np.uint8)[..., None], 3, 2)), (8, 8, 8)),
        (Image.fromarray(np.repeat(np.array([[7, 8, 9]], np.uint8)[..., None], 3, 2)).quantize(3), "palette"),
    ],
)
def test_a_transparent_colour_is_white(image: Image.Image, transparent: Any) -> None:
    """PNG and GIF may name one colour, or an opacity for each of the palette."""
    if transparent == "palette":
        transparent = bytes(0 if image.getpalette()[3 * i] == 8 else 255 for i in range(3))
    data = encoded(image, "PNG", transparency=transparent)
    assert np.asarray(load_image(data))[0].tolist() == [[7] * 3, [255] * 3, [9] * 3]


def test_wide_greys_are_scaled() -> None:
    """16 bits by their range; integers and floats by the smallest usual one."""
    for dtype, grey, expected in [
        (np.uint16, [0, 128, 129, 257, 40000, 65535], [0, 0, 1, 1, 156, 255]),
        (np.uint16, [0, 0, 0, 0, 0, 255], [0, 0, 0, 0, 0, 1]),
        (np.int32, [-5, 0, 100, 200, 254, 255], [0, 0, 100, 200, 254, 255]),
        (np.int32, [-5, 0, 257, 25700, 256, 65535], [0, 0, 1, 100, 1, 255]),
        (np.int32, [0, 0, 2**30, 2**29, 1, 2**31 - 1], [0, 0, 128, 64, 0, 255]),
        (np.float32, [-1, 0, 0.5, 0.25, 0.001, 1], [0, 0, 128, 64, 0, 255]),
        (np.float32, [0, 1, 100.4, 100.5, 254, 255], [0, 1, 100, 100, 254, 255]),
        (np.float32, [0, 0, 257, 25700, 514, 65535], [0, 0, 1, 100, 2, 255]),
    ]:
        image = Image.fromarray(np.array([grey], dtype))
        sources = [image, encoded(image, "TIFF")] + ([encoded(image, "PNG")] if dtype == np.uint16 else [])
        for source in sources:
            assert np.asarray(load_image(source))[0].tolist() == [[value] * 3 for value in expected]
    for value in (np.nan, np.inf):
        with pytest.raises(InputError, match="pixels that are NaN or infinite"):
            load_image(Image.fromarray(np.array([[0, value]], np.float32)))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(file_format: str, orientation: int) -> None:
    """By what the standard says of the stored rows and columns: where the first of each is in the picture."""
    corner = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    stored = np.full((32, 48, 3), 255, np.uint8)
    stored[:8, :16] = 0  # at the first row and the first column, longer along the row
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(stored), file_format, exif=exif)
    expected = np.full((32, 48) if orientation < 5 else (48, 32), 255)
    height, width = (8, 16) if orientation < 5 else (16, 8)
    rows = slice(0, height) if corner[0] == "t" else slice(-height, None)
    columns = slice(0, width) if corner[1] == "l" else slice(-width, None)
    expected[rows, columns] = 0
    for source in (data, Image.open(io.BytesIO(data))):
        assert image_size(source) == expected.shape[::-1]
        loaded = load_image(source)
        assert loaded.size == expected.shape[::-1]
        assert np.abs(np.asarray(loaded.convert("L"), np.int32) - expected).mean() < 8


def test_damaged_exif_says_nothing() -> None:
    for value in (0, 9, 700):
        exif = Image.Exif()
        exif[0x0112] = value
        assert load_image(encoded(picture(40, 20), "JPEG", exif=exif)).size == (40, 20)
    assert load_image(encoded(picture(40, 20), "JPEG", exif=b"Exif\0\0II*\0\xff\xff")).size == (40, 20)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_is_taken(file_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "lime")]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 3
    red, green, blue = np.asarray(load_image(data)).reshape(-1, 3).mean(axis=0)
    assert red > 250
    assert max(green, blue) < 5


def test_the_source_is_left_as_it_is() -> None:
    image = picture(20, 20).convert("P")
    load_image(image)
    assert image.mode == "P"
    assert np.asarray(image).shape == (20, 20)
    rgb = picture(20, 20)
    before = np.asarray(rgb).copy()
    preprocess_image(load_image(rgb))
    np.testing.assert_array_equal(np.asarray(rgb), before)


# One source, many threads


def in_threads(load: Callable[[], Any], count: int = 8) -> list[Any]:
    """Results of as many threads that load at once."""
    together = threading.Barrier(count)

    def one(_: int) -> Any:
        together.wait()
        return load()

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_threads_share_an_image_that_is_not_decoded_yet(file_format: str) -> None:
    data = encoded(noise(400, 400), file_format)
    expected = np.asarray(load_image(data))
    for _ in range(8):
        shared = Image.open(io.BytesIO(data))
        for image in in_threads(lambda shared=shared: load_image(shared)):
            np.testing.assert_array_equal(np.asarray(image), expected)


def test_threads_share_an_open_file() -> None:
    class SlowFile(io.BytesIO):
        def seek(self, *args: int) -> int:
            place = super().seek(*args)
            time.sleep(0.01)
            return place

    shared = SlowFile(encoded(noise(40, 40), "PNG"))
    for image in in_threads(lambda: load_image(shared)):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(noise(40, 40)))


# Bad input


def closed(opened: Any) -> Any:
    opened.close()
    return opened


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "the file is empty; pass a whole one"),
        (b"\0" * 100, "in no format that Pillow reads; check that it is whole, or convert it to PNG"),
        (b"GIF89a", "in no format that Pillow reads"),
        (b"not an image at all", "in no format that Pillow reads"),
        ("/no/such/file.png", "the file does not exist; check the path"),
        (Path("/no/such/file.png"), "the file does not exist"),
        ("", "the file does not exist"),
        ("null\0byte.png", r"cannot be opened \(.*embedded null (byte|character).*\); check the path"),
        ("a" * 5000, r"cannot be opened \(File name too long\); check the path"),
        (FIXTURES, r"cannot be opened \(Is a directory\); check the path"),
        (None, "of type NoneType"),
        (3, "of type int"),
        ([[0, 1]], "of type list"),
        (io.BytesIO(b""), "the file is empty"),
        (io.StringIO("text"), "gives str, not bytes; open it in binary mode"),
        (closed(io.BytesIO(b"GIF89a")), r"cannot be read \(ValueError.*closed file.*; open it in binary mode"),
        (closed(Image.new("RGB", (4, 4))), r"Operation on closed image.*; pass an image that is not closed"),
        (np.zeros((4, 4, 3), np.float32), r"array of float32 \(4, 4, 3\)"),
        (np.zeros((3, 8, 8), np.uint8), r"array of uint8 \(3, 8, 8\)"),
        (np.zeros((4, 4, 2), np.uint8), r"expected uint8 \(height, width\), or .* with 1, 3 or 4 channels"),
        (np.zeros((0, 4, 3), np.uint8), r"array of uint8 \(0, 4, 3\)"),
        (np.zeros(4, np.uint8), r"array of uint8 \(4,\)"),
        (Image.new("RGB", (0, 5)), "0x5 pixels"),
    ],
)
def test_unusable_sources_are_named(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_image(source)


@pytest.mark.torch
def test_tensors_are_read_as_pixels() -> None:
    import torch

    rgb = np.asarray(picture(30, 20))
    rgba = np.asarray(with_alpha("RGBA"))
    np.testing.assert_array_equal(np.asarray(load_image(torch.tensor(rgb))), rgb)
    on_white = rgba[..., :3] * (rgba[..., 3:] / 255) + 255 - rgba[..., 3:]
    assert np.abs(np.asarray(load_image(torch.tensor(rgba)), np.float64) - on_white).max() <= 1
    with pytest.raises(InputError, match=r"array of float32 \(4, 4, 3\)"):
        load_image(torch.zeros((4, 4, 3), dtype=torch.bfloat16))
    with pytest.raises(InputError, match="the values make no array"):
        load_image(torch.zeros((4, 4, 3), dtype=torch.uint8, device="meta"))


@pytest.mark.parametrize("file_format", [*FORMATS, "AVIF"])
@pytest.mark.parametrize("part", [0.25, 0.75])
def test_truncated_files_are_refused(file_format: str, part: float, tmp_path: Path) -> None:
    data = encoded(noise(60, 40), file_format)
    data = data[: int(part * len(data))]
    path = tmp_path / "cut.png"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(InputError, match=r"(cannot be decoded|is in no format).*; check that it is whole"):
            load_image(source)


def test_a_truncated_image_opened_by_the_caller_is_refused() -> None:
    data = encoded(noise(60, 40), "PNG")
    with (
        Image.open(io.BytesIO(data[: len(data) // 2])) as image,
        pytest.raises(InputError, match=r"truncated.*; pass an image that is not closed, and whose file is whole"),
    ):
        load_image(image)  # decoded only here


def test_an_image_closed_before_it_was_decoded_is_refused(tmp_path: Path) -> None:
    noise(60, 40).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(InputError, match="pass an image that is not closed"):
        load_image(image)


def test_no_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives EPS to Ghostscript, however the file came here."""
    program, started = tmp_path / "gs", tmp_path / "started"
    program.write_text(f"#!/bin/sh\ntouch {started}\necho 10.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    data = encoded(noise(60, 40), "EPS")
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    with Image.open(path) as opened:
        for source in (data, path, io.BytesIO(data), opened):
            with pytest.raises(InputError, match=r"in the format EPS, which is not decoded here.*of PNG, JPEG, WEBP"):
                load_image(source)
    assert not started.exists()


def test_other_formats_are_refused_by_name() -> None:
    for file_format in ("PCX", "SGI", "ICNS"):
        with pytest.raises(InputError, match=f"in the format {file_format}, which is not decoded here"):
            load_image(encoded(picture(64, 64), file_format))
    opened = Image.open(io.BytesIO(encoded(picture(64, 64), "PCX")))
    with pytest.raises(InputError, match=r"format PCX, which is not decoded here; call its load\(\) before"):
        load_image(opened)
    opened.load()
    np.testing.assert_array_equal(np.asarray(load_image(opened)), np.asarray(picture(64, 64)))


@pytest.mark.parametrize("file_format", FORMATS)
def test_corrupt_files_give_an_image_or_an_input_error(file_format: str) -> None:
    """Changed bytes give some image or an InputError, never anything else."""
    data, rng = encoded(noise(30, 20), file_format), random.Random(0)
    for _ in range(200):
        corrupt = bytearray(data)
        for _ in range(rng.randint(1, 5)):
            corrupt[rng.randrange(rng.choice([60, len(data)]))] = rng.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd but readable files
            with contextlib.suppress(InputError):
                assert load_image(corrupt).mode == "RGB"


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is large, and holds nothing."""
    return encoded(Image.new("1", (1, 1)), "PNG").replace(
        b"IHDR" + (1).to_bytes(4, "big") * 2, b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big")
    )


def with_right_checksum(png: bytes) -> bytes:
    start = png.index(b"IHDR")
    return png[: start + 17] + zlib.crc32(png[start : start + 17]).to_bytes(4, "big") + png[start + 21 :]


@pytest.mark.parametrize("side", [9460, 12000, 20000, 2**31 - 1])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_by_their_header(side: int) -> None:
    """Between Pillow's limit and twice of it, where Pillow only warns, and above."""
    limit = Image.MAX_IMAGE_PIXELS
    data = with_right_checksum(bomb(side, side))
    with pytest.raises(InputError, match=r"too large|more than 89478485; shrink it"):
        load_image(data)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_images_beyond_max_pixels_are_refused() -> None:
    assert load_image(noise(50, 40), max_pixels=2000).size == (50, 40)
    for source in (noise(50, 41), encoded(noise(50, 41), "PNG"), np.asarray(noise(50, 41))):
        with pytest.raises(InputError, match=r"50x41 pixels, more than 2000; shrink it$"):
            load_image(source, max_pixels=2000)


@pytest.mark.parametrize(("width", "height"), [(5000, 50), (3, 1000), (1, 448), (16128, 200)])
def test_images_too_thin_are_refused(width: int, height: int) -> None:
    with pytest.raises(InputError, match=rf"has {width}x{height} pixels and would be scaled to \d+x\d+.* too thin"):
        preprocess_image(Image.new("RGB", (width, height)), dynamic_hd=1)
    with pytest.raises(InputError, match=r"too thin\. Crop it, or pad its shorter side"):
        count_image_tokens(width, height, dynamic_hd=1)


def test_an_image_that_scales_to_10_pixels_is_taken() -> None:
    assert preprocess_image(Image.new("RGB", (448, 10))).num_tokens == count_image_tokens(448, 10) == 273 + 1 * 16 + 1
    with pytest.raises(InputError, match="scaled to 448x9"):
        preprocess_image(Image.new("RGB", (448, 9)))


def test_unusable_arguments_are_named() -> None:
    with pytest.raises(InputError, match=r"mode L, not RGB; pass it through load_image"):
        preprocess_image(Image.new("L", (448, 448)))
    with pytest.raises(InputError, match="dynamic_hd is 0"):
        preprocess_image(noise(20, 20), dynamic_hd=0)
    for size in [(0, 5), (5, 0), (-1, 5)]:
        with pytest.raises(InputError, match="expected at least one"):
            count_image_tokens(*size)
