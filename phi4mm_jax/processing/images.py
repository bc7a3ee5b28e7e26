"""Images: from files to normalised crops, and which of their features each image token takes.

The scheme is the "dynamic HD" of the Phi-4-multimodal report (arXiv:2503.01743). An image is scaled into a grid of
square crops; the right or the bottom of the grid, where the image does not reach, is white and masked. Before these
crops comes the global view: the whole grid, scaled to a single crop.
"""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.sources import exclusive, open_file, other_kind, plain
from phi4mm_jax.utils.checks import is_whole

# What `ImageFeatures.layout` holds for tokens that are no feature of a crop.
SUB_SEPARATOR = -1  # ends a row of features
GLOBAL_SEPARATOR = -2  # stands between the sub-crops and the global view

# As many as Pillow takes without a warning: 256 MiB of RGB. The model sees 36 crops at most, a twelfth of it.
MAX_PIXELS = 89_478_485

# Formats, by Pillow's names, that are decoded within this process, by well-kept decoders. Others start programs (EPS),
# are documents, or are seen by nobody who would find their faults. HEIF is there once pillow-heif is registered.
FORMATS = (
    "PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM", "TGA", "ICO", "JPEG2000", "AVIF", "QOI", "HEIF",
)  # fmt: skip

MAX_CROPS, CROP_SIZE, PATCH_SIZE = 36, 448, 14  # of the release: sub-crops of an image, and pixels
_MIN_SIDE = 10  # pixels of the scaled image, as in the original
_WHITE = 255

# What shows an image upright, by its EXIF orientation; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)

Result = TypeVar("Result")
ImageSource = Image.Image | str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | np.ndarray


@dataclass(frozen=True)
class ImageFeatures:
    """Image as the vision tower takes it, and as the decoder will see it."""

    crops: Float[np.ndarray, "C 448 448 3"]  # the global view, within 1.9 of 0, then the sub-crops by row, within 1
    patch_mask: Bool[np.ndarray, "C 32 32"]  # False: padding
    layout: Int[np.ndarray, " T"]  # for each token a row of the (C * 256) pooled features, or a separator

    @property
    def num_tokens(self) -> int:
        """Number of tokens, separators included."""
        return len(self.layout)


class _Grid(NamedTuple):
    """Placement of an image in its grid of crops."""

    columns: int
    rows: int
    width: int  # of the scaled image, in pixels; it fills the grid in one direction at least
    height: int
    valid_columns: int  # of patches, in the whole grid
    valid_rows: int

    @property
    def useful(self) -> tuple[int, int]:
        """Rows and columns of pooled features (2x2 patches) that are kept: those whose first patch is valid."""
        return math.ceil(self.valid_rows / 2), math.ceil(self.valid_columns / 2)


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image and convert it to RGB as it looks: a picture without the following is that of Pillow's
    `convert("RGB")`, to the last bit.

    An EXIF orientation is applied. Transparency is flattened on white. Greys of 16 bits are scaled by their full range.
    Those of 32 bits and of floats, whose full range no file tells, are scaled by the smallest of 1 (floats alone), 255,
    65535 and 2**31 - 1 that holds their largest pixel; below 0 is black. Of a file with several frames it is the first.

    Args:
        source: a PIL image; a path, an open binary file or the bytes of one, in any format of Pillow's; or an array or
            a tensor of uint8: (H, W, 3), with transparency (H, W, 4), grey (H, W, 1) or (H, W).
        max_pixels: images with more are refused, before anything is decoded. (Pillow by itself warns above its
            `Image.MAX_IMAGE_PIXELS`, and refuses above twice as many.)

    Raises:
        InputError: a file is missing, empty, truncated or of an unknown format; an image is too large; the source is
            nothing of the above.
    """
    return _opened(source, lambda image: _to_rgb(image, max_pixels))


def image_size(source: ImageSource, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of what `load_image` loads, from a file's header alone.

    Raises:
        InputError: as `load_image`, but for what only decoding shows.
    """
    return _opened(source, lambda image: _oriented_size(image, max_pixels))


def _opened(source: ImageSource, use: Callable[[Image.Image], Result]) -> Result:
    """Return `use` of the image, whose pixels are not decoded yet; decoders' errors become InputErrors."""
    source = plain(source)
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    if not isinstance(source, Image.Image | str | bytes):
        expected = "expected a PIL image, a path, a file or its bytes, or a uint8 array"
        raise InputError(f"the image is of type {type(source).__name__}; {expected}")
    remedy = "check that it is whole, or convert it to PNG"
    try:
        if isinstance(source, Image.Image):
            remedy = "pass an image that is not closed, and whose file is whole"
            with exclusive(source):
                _check_format(source)
                return use(source)
        with open_file(source) as file, Image.open(file, formats=_formats()) as image:
            return use(image)
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"the image is too large: {error}; shrink it") from error
    except UnidentifiedImageError:
        refused = [] if isinstance(source, Image.Image) else _refused(source)
        what = f"in the format {refused[0]}, which is not decoded here" if refused else "in no format that Pillow reads"
        if not isinstance(source, Image.Image) and (other := other_kind(source, "image")) is not None:
            raise InputError(f"the file is {what}: {other}") from None
        raise InputError(f"the file is {what}; {remedy}. {_expected()}") from None
    except Exception as error:  # decoders raise errors of any type
        raise InputError(f"the image cannot be decoded ({error!r:.200}); {remedy}") from error


def _formats() -> list[str]:
    """Return the allowed formats that this Pillow reads."""
    Image.init()  # registers all of them, once
    return [name for name in FORMATS if name in Image.OPEN]


def registered_suffixes() -> set[str]:
    """Endings of the names of files in allowed formats, such as ".png"."""
    formats = _formats()
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


def _expected() -> str:
    return f"Expected is one of {', '.join(_formats())}"


def _refused(source: str | bytes) -> list[str]:
    """Formats of Pillow's, of those that are not allowed, in which a file may be by its beginning."""
    with open_file(source) as file:
        start = file.read(16).ljust(16)
    others = {name: accepts for name, (_, accepts) in Image.OPEN.items() if name not in FORMATS and accepts is not None}
    return [name for name, accepts in others.items() if accepts(start) is True]


def _check_format(image: Image.Image) -> None:
    """Refuse an image that its caller opened, but that nobody has decoded yet, if its format is not allowed."""
    # MPO is JPEG with more pictures behind it.
    if getattr(image, "tile", None) and image.format not in (None, "MPO", *FORMATS):
        raise InputError(
            f"the image is in the format {image.format}, which is not decoded here; call its load() before, if you "
            f"trust it. {_expected()}"
        )


def shrink(image: Image.Image, max_crops: int, crop_size: int) -> Image.Image:
    """Scale an image that is larger to the size at which it is seen in so many crops: `preprocess_image` then gives the
    same. What is refused later stays as it is."""
    try:
        grid = _lay_out(*image.size, max_crops, crop_size, crop_size)  # whose scaled size no patches change
    except InputError:
        return image
    if grid.width >= image.width and grid.height >= image.height:
        return image
    return image.resize((grid.width, grid.height), Image.Resampling.BILINEAR)


def preprocess_image(
    image: Image.Image, dynamic_hd: int = MAX_CROPS, crop_size: int = CROP_SIZE, patch_size: int = PATCH_SIZE
) -> ImageFeatures:
    """Scale an image into its grid, and cut it into crops.

    Scaling is Pillow's bilinear filter, as in the original; pixels become (x / 255 - 0.5) / 0.5.

    Args:
        image: RGB, from `load_image`.
        dynamic_hd: the largest number of sub-crops; the global view is one more.
        crop_size, patch_size: in pixels.

    Raises:
        InputError: an image that is not RGB, or too thin: scaled into the grid, a side would be under 10 pixels.
    """
    if image.mode != "RGB":
        raise InputError(f"the image is of mode {image.mode}, not RGB; pass it through load_image")
    grid = _lay_out(*image.size, dynamic_hd, crop_size, patch_size)
    pixels = _fill(image, grid, crop_size)
    count = 1 + grid.rows * grid.columns

    crops = np.empty((count, crop_size, crop_size, 3), np.float32)
    crops[0] = _shrink(_shrink(pixels, grid.rows, axis=0), grid.columns, axis=1)
    crops[1:] = _cut(pixels, grid.rows, grid.columns)
    for crop in crops:  # one at a time: a crop stays in the processor's cache
        _normalise(crop)

    side = crop_size // patch_size
    mask = np.zeros((grid.rows * side, grid.columns * side), bool)
    mask[: grid.valid_rows, : grid.valid_columns] = True
    patch_mask = np.concatenate([np.ones((1, side, side), bool), _cut(mask, grid.rows, grid.columns)])
    return ImageFeatures(crops, patch_mask, _token_layout(grid, side // 2))


def count_image_tokens(
    width: int, height: int, dynamic_hd: int = MAX_CROPS, crop_size: int = CROP_SIZE, patch_size: int = PATCH_SIZE
) -> int:
    """Return the number of tokens of an image of this size: `preprocess_image(...).num_tokens`, without the pixels.

    Raises:
        InputError: as `preprocess_image`.
    """
    rows, columns = _lay_out(width, height, dynamic_hd, crop_size, patch_size).useful
    side = crop_size // patch_size // 2
    return rows * (columns + 1) + 1 + side * (side + 1)


def count_crops(width: int, height: int, dynamic_hd: int = MAX_CROPS, crop_size: int = CROP_SIZE) -> int:
    """Return the number of crops of an image of this size, the global view among them."""
    columns, rows = choose_grid(width, height, dynamic_hd, crop_size)
    return 1 + columns * rows


def check_max_crops(name: str, value: Any) -> None:
    """Raise an InputError that begins with the name, unless the value is a positive whole number."""
    if not is_whole(value, 1):
        raise InputError(f"{name} is {value!r:.80}; expected the largest number of crops, at least 1")


def choose_grid(width: int, height: int, dynamic_hd: int = MAX_CROPS, crop_size: int = CROP_SIZE) -> tuple[int, int]:
    """Columns and rows of the grid of crops.

    As many as cover the image at its own size. If these are more than `dynamic_hd`: the grid whose aspect ratio is
    closest to the image's; among equals (1x1, 2x2, ...) the largest of which the image would fill more than half.
    """
    columns, rows = math.ceil(width / crop_size), math.ceil(height / crop_size)
    if columns * rows <= dynamic_hd:
        return columns, rows
    ratio = width / height
    best, min_difference = (1, 1), math.inf
    for columns, rows in _grids(dynamic_hd):
        difference = abs(ratio - columns / rows)
        fills_half = width * height > 0.5 * crop_size * crop_size * columns * rows
        if difference < min_difference or (difference == min_difference and fills_half):
            best, min_difference = (columns, rows), difference
    return best


@functools.cache
def _grids(max_crops: int) -> list[tuple[int, int]]:
    """Return all grids of up to so many crops, by their number."""
    return sorted(
        ((i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops // i + 1)),
        key=lambda grid: grid[0] * grid[1],
    )


def _lay_out(width: int, height: int, dynamic_hd: int, crop_size: int, patch_size: int) -> _Grid:
    if width < 1 or height < 1:
        raise InputError(f"the image has {width}x{height} pixels; expected at least one")
    check_max_crops("dynamic_hd", dynamic_hd)
    columns, rows = choose_grid(width, height, dynamic_hd, crop_size)
    full_width, full_height = columns * crop_size, rows * crop_size
    scale_x, scale_y = full_width / width, full_height / height
    scaled = (full_width, int(height * scale_x)) if scale_x < scale_y else (int(width * scale_y), full_height)
    if min(scaled) < _MIN_SIDE:
        raise InputError(
            f"the image has {width}x{height} pixels and would be scaled to {scaled[0]}x{scaled[1]}, but no side may be "
            f"under {_MIN_SIDE}: it is too thin. Crop it, or pad its shorter side"
        )
    side = crop_size // patch_size
    valid_columns = columns * side - (full_width - scaled[0]) // patch_size
    valid_rows = rows * side - (full_height - scaled[1]) // patch_size
    return _Grid(columns, rows, *scaled, valid_columns, valid_rows)


def _fill(image: Image.Image, grid: _Grid, crop_size: int) -> UInt8[np.ndarray, "H W 3"]:
    """Return the grid's pixels: the scaled image at the top left, white elsewhere."""
    pixels = np.empty((grid.rows * crop_size, grid.columns * crop_size, 3), np.uint8)
    pixels[: grid.height, : grid.width] = np.asarray(image.resize((grid.width, grid.height), Image.Resampling.BILINEAR))
    pixels[grid.height :] = _WHITE
    pixels[:, grid.width :] = _WHITE
    return pixels


def _cut(array: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Cut (rows * h, columns * w, ...) into (rows * columns, h, w, ...), row by row."""
    height, width = array.shape[0] // rows, array.shape[1] // columns
    tiles = array.reshape(rows, height, columns, width, *array.shape[2:]).swapaxes(1, 2)
    return tiles.reshape(rows * columns, height, width, *array.shape[2:])


def _shrink(pixels: np.ndarray, factor: int, axis: int) -> np.ndarray:
    """Scale an axis down by a whole factor, as torch's bicubic interpolation does without antialiasing.

    The centre of an output pixel falls on that of an input pixel if the factor is odd, and otherwise half-way between
    two. There the four weights of the cubic kernel (a = -0.75) are -3/32, 19/32, 19/32, -3/32. Over 8-bit pixels they
    make no rounding errors in float32, in both directions one after the other; values overshoot 0..255, and stay so.
    """
    length = pixels.shape[axis]

    def every(first: int) -> np.ndarray:
        """Return the pixels first, first + factor, ...; the borders are repeated."""
        return pixels.take(np.arange(first, length + first, factor).clip(0, length - 1), axis)

    if factor % 2:
        return every(factor // 2)
    middle = factor // 2
    near = every(middle - 1).astype(np.float32)
    near += every(middle)
    far = every(middle - 2).astype(np.float32)
    far += every(middle + 1)
    near *= np.float32(19 / 32)
    far *= np.float32(3 / 32)
    near -= far
    return near


def _normalise(x: Float[np.ndarray, "..."]) -> None:
    """Replace x by (x / 255 - 0.5) / 0.5, with torchvision's rounding."""
    x /= np.float32(255)
    x -= np.float32(0.5)
    x *= np.float32(2)


def _token_layout(grid: _Grid, side: int) -> Int[np.ndarray, " T"]:
    """Return which feature each token is; crops have (side, side) features after pooling."""
    ids = np.arange((1 + grid.rows * grid.columns) * side * side, dtype=np.int32).reshape(-1, side, side)
    whole, sub_crops = ids[0], ids[1:]
    rows, columns = grid.useful
    sub_crops = sub_crops.reshape(grid.rows, grid.columns, side, side).swapaxes(1, 2)
    sub_crops = sub_crops.reshape(grid.rows * side, grid.columns * side)[:rows, :columns]
    return np.concatenate([_end_rows(sub_crops), np.full(1, GLOBAL_SEPARATOR, np.int32), _end_rows(whole)])


def _end_rows(ids: Int[np.ndarray, "H W"]) -> Int[np.ndarray, " T"]:
    return np.pad(ids, ((0, 0), (0, 1)), constant_values=SUB_SEPARATOR).ravel()


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS, what: str = "image") -> tuple[int, int]:
    """Width and height, of which there is at least one pixel and no more than so many.

    Raises:
        InputError: otherwise.
    """
    if width * height > max_pixels:
        raise InputError(f"the {what} has {width}x{height} pixels, more than {max_pixels}; shrink it")
    if width * height == 0:
        raise InputError(f"the {what} has {width}x{height} pixels; expected at least one")
    return width, height


def _to_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    check_size(*image.size, max_pixels)
    turn = _TURNS.get(_orientation(image))  # before decoding, as for its size
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        rgb = _on_white(_grey(image)) if "transparency" in image.info else _grey(image).convert("RGB")
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgb = _on_white(image.convert("LA") if image.mode == "La" else image)
    else:
        rgb = image.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def _oriented_size(image: Image.Image, max_pixels: int) -> tuple[int, int]:
    width, height = check_size(*image.size, max_pixels)
    return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, which is still to be applied."""
    if image.format == "TIFF" and getattr(image, "tile", None):
        return 1  # Pillow applies it as it decodes; the size is that after it
    try:
        # The base class's: that of PNG would decode the image to look behind it.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # EXIF that is damaged says nothing
        return 1
    return value if value in _TURNS else 1


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits, scaled to 8: L, or LA where the file names a grey that is transparent.

    Raises:
        InputError: a pixel is NaN or infinite.
    """
    pixels = np.asarray(image)
    if image.mode.startswith("I;16"):
        full = 65535
    else:
        peak = float(pixels.max())
        if not np.isfinite(pixels).all():
            raise InputError("the image has pixels that are NaN or infinite; repair it")
        full = next(n for n in (1, 255, 65535, 2**31 - 1, math.inf) if peak <= n and (n > 1 or image.mode == "F"))
        if full == math.inf:
            raise InputError(f"the image has pixels of {peak:g}, beyond the largest scale of 2**31 - 1; rescale it")
    if full == 255:  # as Pillow has it
        return image.convert("L")
    grey = np.floor(pixels.clip(0, full) * (255 / full) + 0.5).astype(np.uint8)
    if "transparency" not in image.info:
        return Image.fromarray(grey)
    opaque = np.where(pixels == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", [Image.fromarray(grey), Image.fromarray(opaque)])


def _from_array(array: np.ndarray) -> Image.Image:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not is_image or not array.size:
        channels_first, floats = array.ndim == 3 and array.shape[0] <= 4 < array.shape[2], array.dtype.kind == "f"
        remedy = "; put channels last: permute(1, 2, 0)" * channels_first + "; multiply by 255, round to uint8" * floats
        raise InputError(
            f"the image is an array of {array.dtype} {array.shape}; expected uint8 (height, width), or (height, width, "
            f"channels) with 1, 3 or 4 channels{remedy}"
        )
    array = array[:, :, 0] if array.shape[2:] == (1,) else array
    return Image.fromarray(np.ascontiguousarray(array))
