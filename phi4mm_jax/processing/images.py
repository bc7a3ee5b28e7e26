"""Images: files to normalised crops, by dynamic HD (see the Phi-4-multimodal report, arXiv:2503.01743)."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from phi4mm_jax.errors import InputError

SUB_SEPARATOR, GLOBAL_SEPARATOR = -1, -2


@dataclass(frozen=True)
class ImageFeatures:
    crops: Float[np.ndarray, "C 448 448 3"]
    patch_mask: Bool[np.ndarray, "C 32 32"]
    layout: Int[np.ndarray, " T"]

    @property
    def num_tokens(self) -> int:
        return len(self.layout)


def load_image(source: Any) -> Image.Image:
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    if not isinstance(source, Image.Image):
        source = Image.open(source)
    return source.convert("RGB")


def grid(width, height, most, crop):
    w, h = -(-width // crop), -(-height // crop)
    if w * h <= most:
        return w, h
    ratio = width / height
    best, best_diff, area = (1, 1), float("inf"), width * height
    cells = sorted({(i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1) if 1 <= i * j <= most}, key=lambda x: x[0] * x[1])
    for i, j in cells:
        diff = abs(ratio - i / j)
        if diff < best_diff:
            best_diff, best = diff, (i, j)
        elif diff == best_diff and area > 0.5 * crop * crop * i * j:
            best = (i, j)
    return best


def preprocess_image(image, dynamic_hd=36, crop_size=448, patch_size=14) -> ImageFeatures:
    gw, gh = grid(*image.size, dynamic_hd, crop_size)
    W, H = gw * crop_size, gh * crop_size
    rw, rh = W / image.width, H / image.height
    if rw < rh:
        size, pw, ph = (W, int(image.height * rw)), 0, H - int(image.height * rw)
    else:
        size, pw, ph = (int(image.width * rh), H), W - int(image.width * rh), 0
    if min(size) < 10:
        raise InputError("too thin")
    pixels = np.full((H, W, 3), 255, np.uint8)
    pixels[: size[1], : size[0]] = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    x = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
    side = crop_size // patch_size
    mask = np.ones((gh * side, gw * side), bool)
    if pw >= patch_size:
        mask[:, -(pw // patch_size):] = False
    if ph >= patch_size:
        mask[-(ph // patch_size):] = False

    def taps(n, out):
        centre = (np.arange(out) + 0.5) * (n / out) - 0.5
        start = np.floor(centre).astype(int)
        t = (centre - start).astype(np.float32)
        a = -0.75
        def c1(x): return ((a + 2) * x - (a + 3)) * x * x + 1
        def c2(x): return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        w = np.stack([c2(t + 1), c1(t), c1(1 - t), c2(2 - t)], 1).astype(np.float32)
        return np.clip(start[:, None] + np.arange(-1, 3), 0, n - 1), w
    i, w = taps(H, crop_size)
    y = np.einsum("okwc,ok->owc", x[i], w)
    i, w = taps(W, crop_size)
    glob = np.einsum("hokc,ok->hoc", y[:, i], w)
    subs = x.reshape(gh, crop_size, gw, crop_size, 3).swapaxes(1, 2).reshape(-1, crop_size, crop_size, 3)
    masks = mask.reshape(gh, side, gw, side).swapaxes(1, 2).reshape(-1, side, side)
    crops = np.concatenate([glob[None], subs])
    patch_mask = np.concatenate([np.ones((1, side, side), bool), masks])
    half = side // 2
    ids = (1 + np.arange(gh * gw)[:, None] * 1) * half * half + np.arange(half * half)
    full = ids.reshape(gh, gw, half, half).swapaxes(1, 2).reshape(gh * half, gw * half)
    useful = mask[::2, ::2]
    full = full[: useful[:, 0].sum(), : useful[0].sum()]
    def sep(z): return np.concatenate([z, np.full((len(z), 1), SUB_SEPARATOR)], 1).ravel()
    layout = np.concatenate([sep(full), [GLOBAL_SEPARATOR], sep(np.arange(half * half).reshape(half, half))]).astype(np.int32)
    return ImageFeatures(crops, patch_mask, layout)
