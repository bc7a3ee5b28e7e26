"""What the small model learns from: the sets differ, and text that stands for media is what the media show."""

from pathlib import Path

import matplotlib
import numpy as np

from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.processing.processor import Processor
from train.tiny import content, pictures, speech

MODEL = Path(__file__).parent.parent / "assets" / "tiny"
NEW_FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "cmmi10.ttf")


def test_fonts_and_voices_of_the_sets_differ():
    assert not set(speech.TRAINED) & set(speech.HELD_OUT)
    assert not [a for a in pictures.HELD_OUT if any(a.startswith(b) or b.startswith(a) for b in pictures.TRAINED)]


def test_a_page_has_a_token_a_cell():
    """Whatever its size in pixels, a picture has the tokens that the page has as text."""
    rng, processor = np.random.default_rng(0), Processor.from_folder(MODEL, Phi4MMConfig.from_folder(MODEL))
    shapes = set()
    for _ in range(40):
        page = content.page(rng, "train", "lines")
        picture = pictures.draw(rng, page, (NEW_FONT,))
        assert processor.count_image_tokens(picture) == len(content.page_as_text(page))
        shapes.add((len(page.rows), len(page.rows[0])))
    assert len(shapes) == 5


def test_pages_and_clips_as_text_are_what_they_show():
    rng = np.random.default_rng(0)
    for _ in range(50):
        page = content.page(rng, "train", "lines")
        crops = content.crops(page)
        whole = content.page_as_text(page)
        sub, _, view = whole.partition(content.GLOBAL)
        assert " ".join(sub.split()) == page.text
        assert len(view) == content.SIDE * (content.SIDE + 1)
        assert len(whole) == sum(map(len, crops)) + sub.count("\n") + 1 + content.SIDE
        spoken = content.spoken(rng, "train")
        frames = content.clip_as_text(rng, spoken)
        collapsed = "".join(a for a, b in zip(frames, content.PAUSE + frames, strict=False) if a != b)
        assert collapsed.replace(content.PAUSE, "") == spoken
