"""What an image or a clip costs, known before it is decoded; the cap on crops; what exceeds the context."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from helpers.paths import FIXTURES, TINY
from PIL import Image

from phi4mm_jax import ContextLengthError, InputError, MediaError
from phi4mm_jax.engine import EngineConfig, Request
from phi4mm_jax.processing import processor
from phi4mm_jax.processing.batching import bucket
from phi4mm_jax.processing.images import choose_grid
from phi4mm_jax.processing.processor import Processor

IMAGES = sorted([*(FIXTURES / "ms_prep" / "inputs").glob("*.png"), *(TINY / "inputs").glob("*.png")])
CLIPS = sorted((TINY / "inputs").glob("*.flac"))
SEE, HEAR = "<|user|><|image_1|>x<|end|><|assistant|>", "<|user|><|audio_1|>x<|end|><|assistant|>"


def image_tokens(p: Processor, image: Any, max_crops: int | None = None) -> int:
    row = p.row(SEE, [image], max_crops=max_crops)
    assert (row.tokens == p.config.image_token_id).sum() == row.images[0].num_tokens
    return row.images[0].num_tokens


def audio_tokens(p: Processor, clip: Any) -> int:
    return int((p.row(HEAR, audios=[clip]).tokens == p.config.audio_token_id).sum())


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def sound(num_samples: int, rate: int, file_format: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, num_samples)
    soundfile.write(buffer, samples, rate, format=file_format, subtype=subtype)
    return buffer.getvalue()


# Buckets

BUCKETS = [1, 2, 3, *(m << k for k in range(16) for m in (4, 5, 6, 7)), 1 << 18]  # by hand; the context is 1 << 17


def test_lengths_are_rounded_up_by_a_quarter_at_most():
    assert BUCKETS[:20] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    lengths = np.arange(1, (1 << 17) + 1)
    found = np.asarray([bucket(n) for n in lengths.tolist()])
    np.testing.assert_array_equal(found, np.asarray(BUCKETS)[np.searchsorted(BUCKETS, lengths)])
    assert ((found - lengths) / lengths).max() < 0.25
    assert (found >= lengths).all()
    assert [bucket(n, 64) for n in (1, 63, 64, 65)] == [64, 64, 64, 80]


@pytest.mark.parametrize(("tokens", "length"), [(3, 64), (64, 64), (65, 80), (97, 112), (257, 320)])
def test_batches_have_the_length_of_a_bucket(tiny, tokens, length):
    batch = tiny.process(["<|tag|>" * 2, "<|tag|>" * tokens])
    assert batch.lengths.tolist() == [2, tokens]
    assert batch.tokens.shape == (2, length)


# Counts


@pytest.mark.parametrize("path", IMAGES, ids=lambda p: p.stem)
def test_image_tokens_are_counted_from_any_source(tiny, path: Path):
    for max_crops in (None, 3):
        expected = image_tokens(tiny.processor, path, max_crops)
        data = path.read_bytes()
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        with Image.open(path) as opened, path.open("rb") as file:
            for source in (path, str(path), data, url, path.absolute().as_uri(), file, opened, np.asarray(opened)):
                assert tiny.processor.count_image_tokens(source, max_crops) == expected


@pytest.mark.parametrize("path", CLIPS, ids=lambda p: p.stem)
def test_audio_tokens_are_counted_from_any_source(tiny, path: Path):
    expected = audio_tokens(tiny.processor, path)
    for source in (path, str(path), path.read_bytes(), path.absolute().as_uri(), soundfile.read(path)):
        assert tiny.processor.count_audio_tokens(source) == expected


def test_image_tokens_are_counted_at_any_size(tiny):
    rng = np.random.default_rng(5)
    for _ in range(12):
        width, height = map(int, np.exp(rng.uniform(np.log(30), np.log(1500), 2)))
        max_crops = int(rng.integers(1, 10))
        image = Image.new("RGB", (width, height))
        expected = image_tokens(tiny.processor, image, max_crops)
        assert tiny.processor.count_image_tokens(encoded(image, "PNG"), max_crops) == expected, (width, height)


@pytest.mark.parametrize(
    ("file_format", "options"),
    [("JPEG", {}), ("GIF", {}), ("WEBP", {}), ("TIFF", {}), ("ICO", {"sizes": [(120, 60)]}), ("BMP", {}), ("PPM", {}),
     ("JPEG", {"exif": "turned"}), ("TIFF", {"exif": "turned"}), ("PNG", {"exif": "turned"})],
)  # fmt: skip
def test_orientation_counts_in_every_format(tiny, file_format: str, options: dict[str, Any]):
    """An orientation in the header turns the pixels of some formats as they are decoded."""
    image = Image.new("RGB", (120, 60))
    if "exif" in options:
        options = {"exif": image.getexif()}
        options["exif"][0x0112] = 6
    data = encoded(image, file_format, **options)
    assert tiny.processor.count_image_tokens(data) == image_tokens(tiny.processor, data)


def test_audio_tokens_are_counted_at_any_length_and_rate(tiny):
    rng = np.random.default_rng(6)
    for rate in (8000, 11025, 16000, 22050, 44100, 48000):
        for file_format, subtype in (("WAV", "PCM_16"), ("FLAC", None), ("OGG", "VORBIS"), ("MP3", None)):
            data = sound(int(rng.integers(rate // 10, 3 * rate)), rate, file_format, subtype)
            assert tiny.processor.count_audio_tokens(data) == audio_tokens(tiny.processor, data), (rate, file_format)
        stereo = rng.integers(-99, 99, (2, int(rng.integers(rate // 10, 3 * rate)))).astype(np.int16), rate
        assert tiny.processor.count_audio_tokens(stereo) == audio_tokens(tiny.processor, stereo)


def test_clips_whose_headers_lack_the_length_are_decoded(tiny):
    flac = bytearray(sound(50_000, 16000, "FLAC"))
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    mp3 = sound(80_000, 16000, "MP3")
    mp3 = mp3[mp3.index(b"\xff\xf3", 100) :]
    for data in (bytes(flac), mp3):
        assert tiny.processor.count_audio_tokens(data) == audio_tokens(tiny.processor, data)


def test_counting_decodes_nothing(tiny):
    """What only decoding shows, such as damage behind the header, does not matter."""
    png = encoded(Image.new("RGB", (5000, 4000)), "PNG")
    expected = tiny.processor.count_image_tokens(png)
    assert tiny.processor.count_image_tokens(png[:100]) == expected
    flac = sound(16_000, 16000, "FLAC")
    flac = flac[: len(flac) // 2] + bytes(len(flac) - len(flac) // 2)
    wav = sound(16_000, 16000, "WAV", "FLOAT")
    wav = wav[:-4] + np.float32("nan").tobytes()
    for clip in (flac, wav):
        assert tiny.processor.count_audio_tokens(clip) == 13
        with pytest.raises(InputError, match=r"damaged|NaN"):
            tiny.processor.row(HEAR, audios=[clip])


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (lambda p: p.count_image_tokens("nowhere.png"), "does not exist"),
        (lambda p: p.count_image_tokens(b"no image"), "in no format that Pillow reads"),
        (lambda p: p.count_image_tokens(Image.new("RGB", (9000, 2))), "too thin"),
        (lambda p: p.count_image_tokens("https://a.b/c.png"), "nothing is downloaded"),
        (lambda p: p.count_image_tokens(IMAGES[0], 0), "max_crops is 0"),
        (lambda p: p.count_image_tokens(7), "of type int"),
        (lambda p: p.count_audio_tokens("nowhere.wav"), "does not exist"),
        (lambda p: p.count_audio_tokens(b"no audio"), "cannot be read"),
        (lambda p: p.count_audio_tokens(sound(300, 16000, "WAV")), "300 samples at 16000 Hz, 18.8 ms"),
        (lambda p: p.count_audio_tokens((np.zeros(9), 16)), "sampling rate 16"),
        (lambda p: p.count_audio_tokens((np.zeros((4, 70_000)), 6)), "sampling rate 6"),
        (lambda p: p.count_audio_tokens(7), "of type int"),
    ],
)
def test_what_cannot_be_counted_is_named(tiny, count, message: str):
    with pytest.raises(InputError, match=message):
        count(tiny.processor)


@pytest.mark.parametrize("media", [([["nowhere.png"]], None), (None, [[b"no audio"]])])
def test_media_errors_name_prompt_and_medium(tiny, media):
    with pytest.raises(MediaError, match=r"^prompt 0: (image|audio) 1 \("):
        tiny.process([SEE if media[0] else HEAR], *media)


def test_a_wrong_number_of_media_is_no_media_error(tiny):
    with pytest.raises(InputError, match=r"^prompt 0: prompt has 0 image placeholder") as error:
        tiny.process(["x"], [["nowhere.png"]])
    assert type(error.value) is InputError


# The cap on crops


def test_max_crops_cuts_as_dynamic_hd(tiny):
    p = tiny.processor
    for size in ((1000, 700), (900, 1400)):
        pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
        for most in (1, 2, 5):
            capped = Processor(p.config, p.tokenizer, most, p.context).row(SEE, [pixels])
            row = p.row(SEE, [pixels], max_crops=most)
            columns, rows = choose_grid(*size, most)
            assert len(row.images[0].crops) == 1 + columns * rows <= 1 + most
            np.testing.assert_array_equal(row.tokens, capped.tokens)
            np.testing.assert_array_equal(row.images[0].crops, capped.images[0].crops)
            np.testing.assert_array_equal(row.images[0].layout, capped.images[0].layout)
        whole = p.row(SEE, [pixels])
        assert len(whole.images[0].crops) > 6
        np.testing.assert_array_equal(p.row(SEE, [pixels], max_crops=100).tokens, whole.tokens)


@pytest.mark.slow
def test_max_crops_reaches_process_generate_and_requests(tiny):
    image = Image.new("RGB", (1000, 700), "red")
    expected = len(tiny.processor.row(SEE, [image], max_crops=1).tokens)
    assert expected < len(tiny.processor.row(SEE, [image]).tokens)
    assert tiny.process([SEE], [[image]], max_crops=1).lengths[0] == expected
    (answer,) = tiny.generate([SEE], [[image]], max_new_tokens=2, max_crops=1)
    assert answer.prompt_tokens == expected
    engine = tiny.engine(EngineConfig(slots=1, cache_tokens=1024))
    ((_, completion),) = engine.run([Request(SEE, [image], max_new_tokens=2, max_crops=1)])
    assert completion == answer


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4"])
def test_bad_max_crops_are_named(tiny, value: Any):
    for call in (lambda: tiny.process([SEE], [[IMAGES[0]]], max_crops=value), lambda: Request(SEE, max_crops=value)):
        with pytest.raises(InputError, match=f"max_crops is {value!r}; expected the largest number of crops"):
            call()


# The context


def test_what_exceeds_the_context_is_counted_and_not_decoded(tiny, monkeypatch: pytest.MonkeyPatch):
    """The error has the counts; nothing was scaled, cut or transformed for it."""
    p = tiny.processor
    prompt = "<|user|><|image_1|><|image_2|><|audio_1|>What?<|end|><|assistant|>"
    media = [Image.new("RGB", (448, 448)), Image.new("RGB", (448, 224))], [CLIPS[0]]
    row = p.row(prompt, *media)
    clip = p.count_audio_tokens(CLIPS[0])
    images = [f.num_tokens for f in row.images]
    assert images == [545, 273 + 8 * 17]
    Processor(p.config, p.tokenizer, 36, len(row.tokens)).row(prompt, *media)
    small = Processor(p.config, p.tokenizer, 36, len(row.tokens) - 1)
    monkeypatch.setattr(processor, "preprocess_image", None)
    monkeypatch.setattr(processor, "log_mel", None)
    with pytest.raises(ContextLengthError) as error:
        small.row(prompt, *media)
    text = len(row.tokens) - sum(images) - clip
    assert str(error.value) == (
        f"the prompt has {len(row.tokens)} tokens (text: {text}, image 1: 545, image 2: 409, audio 1: {clip}), more "
        f"than the context of {len(row.tokens) - 1}; shorten the text, give fewer or shorter media, or cap the crops "
        "with max_crops"
    )
