"""Pages as pictures, in many fonts, sizes, colours, and with noise."""

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from phi4mm_jax.errors import InputError
from train.tiny.content import BAR, BLANK, Page, Split

_FOLDERS = Path("/usr/share/fonts")
# Families by the beginnings of their files' names. No held-out one descends from one of the others, as Hack does from
# DejaVu and Carlito from Lato, which are therefore not among them.
HELD_OUT = ("Cabin-", "C059-", "Caladea-", "OpenSans-", "P052-", "JetBrainsMono-")
TRAINED = (
    "Andika-", "Anonymous Pro", "Arimo-", "B612-", "B612Mono-", "Cantarell-", "Carlito-", "Comfortaa-", "Courier Prime",
    "Cousine-", "DejaVuSans", "DejaVuSerif", "FantasqueSansMono-", "FiraCode-", "FreeMono", "FreeSans", "FreeSerif",
    "GFSDidot", "Gentium-", "Go-Mono", "Go-Regular", "Hermit-", "Inconsolata", "Inter-", "LiberationMono-",
    "LiberationSans", "LiberationSerif-", "LinBiolinum_R", "LinLibertine_R", "Monoid-", "Mplus1-", "Mplus1Code-",
    "NimbusMonoPS-", "NimbusRoman-", "NimbusSans-", "NotoMono-", "NotoSansMono-", "Oxygen-Sans", "OxygenMono-",
    "Quicksand-", "Roboto-", "RobotoSlab-", "Tinos-", "URWBookman-", "agave-", "mononoki-",
)  # fmt: skip
_HARD_TO_READ = ("Thin", "Hairline", "Light", "light", "Black", "Cond", "Narrow", "Math", "Display")
PACKAGES = (
    "fonts-dejavu-core fonts-dejavu-extra fonts-liberation fonts-freefont-ttf fonts-urw-base35 fonts-lato "
    "fonts-roboto-unhinted fonts-open-sans fonts-cantarell fonts-crosextra-carlito fonts-crosextra-caladea "
    "fonts-inconsolata fonts-hack fonts-firacode fonts-linuxlibertine fonts-quicksand fonts-comfortaa fonts-croscore "
    "fonts-cabin fonts-gfs-didot fonts-noto-mono fonts-jetbrains-mono fonts-sil-andika fonts-anonymous-pro fonts-b612 "
    "fonts-courier-prime fonts-fantasque-sans fonts-sil-gentium fonts-go fonts-hermit fonts-inter fonts-monoid "
    "fonts-mplus fonts-oxygen fonts-roboto-slab fonts-agave fonts-mononoki"
)


@lru_cache
def fonts_of(split: Split) -> list[Path]:
    """Return the files of a split's fonts, each once by its name.

    Raises:
        InputError: a family is not installed.
    """
    families = HELD_OUT if split == "held" else TRAINED
    files = sorted({path.name: path for kind in ("ttf", "otf") for path in _FOLDERS.rglob(f"*.{kind}")}.items())
    found = []
    for family in families:
        of_family = [p for name, p in files if name.startswith(family) and not any(s in name for s in _HARD_TO_READ)]
        if not of_family:
            raise InputError(f"no font of the family {family.rstrip('-_')} is installed; apt-get install {PACKAGES}")
        found += of_family[:: max(1, len(of_family) // 4)][:5]
    return found


@lru_cache(1024)
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def draw(rng: np.random.Generator, page: Page, fonts: Sequence[Path]) -> Image.Image:
    """Draw a page with a character in the middle of each cell, give or take a little."""
    cell = int(rng.integers(23, 29))
    height, width = len(page.rows) * cell, len(page.rows[0]) * cell
    paper, ink, bar = _colours(rng)
    image = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(image)
    font = _font(fonts[int(rng.integers(len(fonts)))], round(cell * rng.uniform(0.85, 1.05)))
    dx, dy, thick = *rng.uniform(-0.05, 0.05, 2), rng.uniform(0.5, 0.8)
    for y, row in enumerate(page.rows):
        for x, character in enumerate(row):
            left, top = x * cell, y * cell
            if character == BAR:
                pen.rectangle((left, top + cell * (1 - thick) / 2, left + cell, top + cell * (1 + thick) / 2), fill=bar)
            elif character != BLANK:
                place = left + cell * (0.5 + dx + rng.uniform(-0.03, 0.03)), top + cell * (0.74 + dy)
                pen.text(place, character, ink, font, anchor="ms")
    return _worn(rng, image, paper)


def _colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Draw the colours of paper, ink and bars. Most papers are light; ink is far from paper."""
    light, dark = rng.integers(195, 256, 3), rng.integers(0, 70, 3)
    paper, ink = (light, dark) if rng.random() < 0.75 else (dark, light)
    bar = (0.35 * paper + 0.65 * rng.integers(40, 216, 3) * (1 if paper[0] > 128 else 1.15)).clip(0, 255)
    return tuple(map(int, paper)), tuple(map(int, ink)), tuple(map(int, bar))


def _worn(rng: np.random.Generator, image: Image.Image, paper: tuple[int, ...]) -> Image.Image:
    """Degrade a page: half are turned by up to 0.4 degrees, half blurred a little, all with noise."""
    if rng.random() < 0.5:
        image = image.rotate(rng.uniform(-0.4, 0.4), Image.Resampling.BILINEAR, fillcolor=paper)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.5)))
    pixels = np.asarray(image, np.float32) + rng.normal(0, rng.uniform(0, 8), (image.height, image.width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def as_jpeg(rng: np.random.Generator, image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(75, 95)))
    return file.getvalue()
