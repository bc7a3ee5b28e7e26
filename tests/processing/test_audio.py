"""Audio against what the original makes of it, against the definition written out, and against bad input."""

import io
import math
import os
import struct
import sys
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import av
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import soundfile
from safetensors.numpy import load_file

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing import audio
from phi4mm_jax.processing.audio import load_audio, measure_audio
from phi4mm_jax.processing.audio_features import log_mel, mel_filters, num_audio_tokens, num_frames, resample

TINY = Path(__file__).parents[1] / "fixtures" / "ms_tiny"

# Features reach 29, where neighbouring float32 numbers are 1.9e-6 apart: it is what the last bit may differ by.
LAST_BIT = 1.95e-6


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    return load_file(TINY / "goldens.safetensors")


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def sound(rate: int, seconds: float = 2.0) -> np.ndarray:
    """A sound without anything above 4.5 kHz, the same at any rate: a gliding harmonic tone, a chirp and a noise of
    sinusoids, faded in and out."""
    t = np.arange(round(seconds * rate)) / rate
    rng = np.random.default_rng(0)
    glide = 2 * np.pi * (120 * t + 30 * t * t / seconds)
    x = 0.1 * np.sin(2 * np.pi * (300 * t + 2050 * t * t / seconds))
    for k in range(1, 26):
        x += 0.2 / math.sqrt(k) * np.sin(k * glide + rng.uniform(0, 2 * np.pi))
    for _ in range(300):
        phase = 2 * np.pi * (rng.uniform(60, 4500) * t + rng.uniform(0, 1))
        x += 0.003 * rng.standard_normal() * np.sin(phase)
    fade = np.minimum(t, seconds - t).clip(0, 0.1) / 0.1
    return (0.3 * x * (0.5 - 0.5 * np.cos(np.pi * fade))).astype(np.float32)


# The original's results


@pytest.mark.parametrize("index", range(5))
def test_features_are_golden(index: int, goldens: dict[str, np.ndarray]) -> None:
    """At 16 kHz, at 8 kHz (2), at 48 kHz (3); the last clip is thinned."""
    samples, rate = load_audio(TINY / "inputs" / f"audio_{index}.flac")
    features = log_mel(samples, rate)
    assert features.dtype == np.float32
    assert features.shape == (goldens[f"audio_{index}.frames"][0], 80)
    assert num_frames(len(samples), rate) == len(features)
    assert num_audio_tokens(len(features)) == goldens[f"audio_{index}.num_tokens"][0]
    expected = goldens[f"audio_{index}.features"]
    thinned = features[::16] if index == 4 else features
    np.testing.assert_allclose(thinned, expected, rtol=0, atol=LAST_BIT)


def features_by_definition(samples: np.ndarray, rate: int) -> np.ndarray:
    """What the original computes at 8, 16, 32 and 48 kHz, one frame, band and bin after the other."""
    assert rate in (8000, 16000, 32000, 48000)
    wave = samples.astype(np.float64)
    if rate > 16000:
        wave = scipy.signal.resample_poly(wave, 1, rate // 16000)
        rate = 16000
    size, step, num_fft = (400, 160, 512) if rate == 16000 else (200, 80, 256)
    filters = filters_by_definition()
    rows = []
    for start in range(0, len(wave) - size + 1, step):
        frame = wave[start : start + size].astype(np.float32)
        before = np.concatenate([frame[:1], frame[:-1]])
        frame = (frame - 0.97 * before) * 32768
        spectrum = np.fft.rfft(np.hamming(size) * frame, n=num_fft).astype(np.complex64)
        if rate == 8000:
            spectrum = np.concatenate([spectrum[:-1], np.zeros(129, np.complex64)])
        power = np.abs(spectrum) ** 2
        rows.append([math.log(max(float(np.dot(power, filters[band])), 1.0)) for band in range(80)])
    return np.array(rows)


def filters_by_definition() -> np.ndarray:
    """(80, 257): triangles over the mel scale."""

    def mel(hertz: float) -> float:
        return 1127.0 * math.log(1.0 + hertz / 700.0)

    def bin_of(hertz: float) -> int:
        return int(hertz * 512 / 16000 + 0.5)

    width = mel(7690.0) / 81
    filters = np.zeros((80, 257))
    for band in range(80):
        left, centre, right = band * width, (band + 1) * width, (band + 2) * width
        for k in range(bin_of(0.0) + 1, bin_of(7690.0)):
            here = mel(k * 16000 / 512)
            if left < here <= centre:
                filters[band, k] = (here - left) / width
            elif centre < here < right:
                filters[band, k] = (right - here) / width
    return filters


@pytest.mark.parametrize("rate", [8000, 16000, 32000, 48000])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_features_are_those_of_the_definition(rate: int, scale: float) -> None:
    """Loud, and so soft that many bands are clipped."""
    for samples in (noise(rate // 2 + 77) * np.float32(scale), sound(rate, 0.6) * np.float32(scale)):
        features, expected = log_mel(samples, rate), features_by_definition(samples, rate)
        np.testing.assert_allclose(features, expected, rtol=0, atol=3e-6)
        assert (expected == 0).any() == (scale < 1 or rate == 8000)


def test_mel_filters_are_those_of_the_definition() -> None:
    filters = mel_filters()
    np.testing.assert_allclose(filters.T, filters_by_definition(), rtol=0, atol=6e-8)
    # Neighbouring triangles add up to one, from the first band's centre (22 Hz) to the last band's (7428 Hz).
    np.testing.assert_allclose(filters[1:238].sum(axis=1), 1, rtol=0, atol=2e-7)
    assert (np.count_nonzero(filters, axis=1) <= 2).all()
    assert not filters[0].any()
    assert not filters[246:].any()
    assert filters.dtype == np.float32


@pytest.mark.torch
@pytest.mark.parametrize("num_samples", [400, 559, 560, 16000, 16123, 100_000])
def test_features_are_those_of_transformers_below_its_highest_band(num_samples: int) -> None:
    """One clip at a time (its batches keep frames that no clip fills)."""
    from transformers import Phi4MultimodalFeatureExtractor

    extractor = Phi4MultimodalFeatureExtractor()
    samples = noise(num_samples)
    features = log_mel(samples, 16000)
    theirs = np.asarray(extractor(samples, sampling_rate=16000)["audio_input_features"])[0]
    assert features.shape == theirs.shape
    # It weights one bin more, 246 in the highest band, with 0.01.
    np.testing.assert_allclose(features[:, :79], theirs[:, :79], rtol=0, atol=LAST_BIT)
    assert 0 < np.abs(features[:, 79] - theirs[:, 79]).max() < 0.05
    extractor.mel_filters[246] = 0
    theirs = np.asarray(extractor(samples, sampling_rate=16000)["audio_input_features"])[0]
    np.testing.assert_allclose(features, theirs, rtol=0, atol=LAST_BIT)


@pytest.mark.torch
@pytest.mark.parametrize("silent", [480, 1600, 16000])
def test_features_of_digital_silence_and_speech_are_those_of_transformers(silent: int) -> None:
    """Before, within and behind sound: the floor of the logarithm, and frames that are silent in part."""
    from transformers import Phi4MultimodalFeatureExtractor

    extractor = Phi4MultimodalFeatureExtractor()
    extractor.mel_filters[246] = 0  # as above
    rest = np.zeros(silent, np.float32)
    samples = np.concatenate([rest, noise(8000), rest, noise(7077) / 100, rest])
    theirs = np.asarray(extractor(samples, sampling_rate=16000)["audio_input_features"])[0]
    np.testing.assert_allclose(log_mel(samples, 16000), theirs, rtol=0, atol=LAST_BIT)
    assert not theirs[: silent // 160 - 2].any()


@pytest.mark.torch
def test_the_highest_band_is_the_originals_and_not_transformers() -> None:
    """A tone where its extractor has a bin more moves its highest band, and no other; ours is the original's."""
    from transformers import Phi4MultimodalFeatureExtractor

    extractor = Phi4MultimodalFeatureExtractor()
    t = np.arange(40 * 16000) / 16000
    samples = (0.5 * np.sin(2 * np.pi * 7700 * t)).astype(np.float32) + noise(len(t)) / 10
    features = log_mel(samples, 16000)
    difference = np.abs(features - np.asarray(extractor(samples, sampling_rate=16000)["audio_input_features"])[0])
    assert difference[:, :79].max() < LAST_BIT
    assert 0.3 < difference[:, 79].max() < 0.5
    part = features_by_definition(samples[:16000], 16000)
    np.testing.assert_allclose(features[: len(part)], part, rtol=0, atol=3e-6)


def test_silence_is_zero() -> None:
    assert not log_mel(np.zeros(16000, np.float32), 16000).any()


def test_half_rate_has_no_upper_bands() -> None:
    features = log_mel(noise(8000), 8000)
    assert (features[:, :60] > 1).all()
    assert not features[:, 63:].any()


def test_long_clips_are_computed_by_blocks() -> None:
    """Frames do not depend on the block they are in, and memory is bounded by that of the results."""
    samples = noise(16000 * 300)
    tracemalloc.start()
    features = log_mel(samples, 16000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < features.nbytes + 10e6
    for start in (0, 255, 256, 257, 10_000, len(features) - 30):
        part = log_mel(samples[start * 160 : (start + 29) * 160 + 400], 16000)
        np.testing.assert_allclose(features[start : start + 30], part, rtol=0, atol=LAST_BIT)


# Rates


RATES = [11025, 12000, 22050, 24000, 32000, 44100, 48000, 96000, 37123]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("kind", ["float", "int16", "stereo"])
def test_any_rate_gives_the_features_of_16_khz(rate: int, kind: str) -> None:
    """One sound, rendered at each rate.

    The filter of `resample_poly` ripples by 0.2% in amplitude in its pass band, which for 11.025 kHz ends at 4.6 kHz,
    and leaves 54 dB below the level of what it must remove, that is 12.4 in the logarithm of the power. So bands within
    9 of the frame's strongest must agree, unless they are as weak as the rounding to 16 bits, which is 5 at most; a
    band above 15 is moved by less than 0.02. Measured: 1.6e-3 in the mean and 0.018 at most.
    """
    expected = log_mel(sound(16000), 16000)
    samples: np.ndarray = sound(rate)
    if kind == "int16":
        samples = np.round(samples * 32768).astype(np.int16)
    elif kind == "stereo":
        side = noise(len(samples))
        samples = np.stack([samples + side, samples - side], 1)
    features = log_mel(*load_audio((samples, rate)))
    assert abs(len(features) - len(expected)) <= 1
    both = min(len(features), len(expected))
    features, expected = features[:both], expected[:both]
    strong = (expected > expected.max(axis=1, keepdims=True) - 9) & (expected > 15)
    assert strong.mean() > 0.7
    difference = np.abs(features - expected)[strong]
    assert difference.mean() < 2e-3
    assert difference.max() < 0.025


@pytest.mark.parametrize("rate", [11025, 12000, 22050, 24000, 44100])
def test_a_wrong_rate_gives_other_features(rate: int) -> None:
    """As the bounds above would show: taken for 16 kHz, as by the original, features are far off."""
    expected, features = log_mel(sound(16000), 16000), log_mel(sound(rate), 16000)
    both = min(len(features), len(expected))
    assert np.abs(features[:both] - expected[:both]).mean() > 1


@pytest.mark.parametrize("rate", [4000, 6000, 7999])
def test_low_rates_are_resampled_too(rate: int) -> None:
    """A tone of 1 kHz, in the bands around it, and nothing far above."""

    def tone(rate: int) -> np.ndarray:
        return (0.1 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate)).astype(np.float32)

    features, expected = log_mel(tone(rate), rate)[5:-5], log_mel(tone(16000), 16000)[5:-5]
    assert set(expected.argmax(axis=1)) == {28}
    np.testing.assert_allclose(features[:, 26:30], expected[:, 26:30], rtol=0, atol=0.01)
    assert (expected.max() - features[:, 65:]).min() > 12


@pytest.mark.parametrize("rate", [11025, 44100, 48000, 37123])
def test_resampling_by_blocks_is_that_of_the_whole(rate: int) -> None:
    for num_samples in (1500, 100_000, 148_492):
        samples = noise(num_samples)
        divisor = math.gcd(rate, 16000)
        whole = scipy.signal.resample_poly(samples.astype(np.float64), 16000 // divisor, rate // divisor)
        np.testing.assert_array_equal(resample(samples, rate, block=20_000), whole.astype(np.float32))


def test_resampling_holds_one_block_beside_its_result() -> None:
    samples = noise(44100 * 300)
    tracemalloc.start()
    features = log_mel(samples, 44100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < features.nbytes + 300 * 16000 * 4 + 50e6


@pytest.mark.parametrize("rate", [8000, 16000, 48000, 44100, 11025, 7999])
def test_num_frames_counts_the_features(rate: int) -> None:
    rng = np.random.default_rng(rate)
    least = math.ceil(0.0251 * rate)
    for num_samples in [least, *rng.integers(least, rate // 2, 40).tolist()]:
        assert num_frames(num_samples, rate) == len(log_mel(noise(num_samples), rate))
    assert num_frames(0, rate) == 0
    assert num_frames(int(0.0249 * rate), rate) == 0


def test_num_frames_of_long_clips_is_exact() -> None:
    """A rest that fills no frame, after days of audio, where floating point would round it away."""
    frames = 10**9
    assert num_frames(400 + 160 * (frames - 1), 16000) == frames
    assert num_frames(400 + 160 * (frames - 1) - 1, 16000) == frames - 1
    assert num_frames(3 * (400 + 160 * (frames - 1)) - 2, 48000) == frames
    assert num_frames(3 * (400 + 160 * (frames - 1)) - 3, 48000) == frames - 1


def test_eight_frames_give_a_token() -> None:
    assert [num_audio_tokens(n) for n in (1, 7, 8, 9, 16, 17, 4298)] == [1, 1, 1, 2, 2, 3, 538]


# Samples


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, ">i2"])
def test_integers_are_scaled(dtype: Any) -> None:
    info = np.iinfo(dtype)
    values = np.random.default_rng(0).integers(info.min, info.max, 1000, dtype=np.int64, endpoint=True)
    values[:2] = info.min, info.max
    samples, rate = load_audio((values.astype(dtype), 16000))
    assert (samples.dtype, rate) == (np.float32, 16000)
    np.testing.assert_array_equal(samples, (values / -info.min).astype(np.float32))
    assert samples[0] == -1


def test_unsigned_bytes_are_centred() -> None:
    values = np.resize(np.array([0, 64, 128, 255], np.uint8), 1000)
    samples, _ = load_audio((values, 16000))
    assert samples[:4].tolist() == [-1, -0.5, 0, 127 / 128]


def test_int16_equals_its_float_version() -> None:
    values = np.round(sound(16000) * 32768).astype(np.int16)
    as_float = values.astype(np.float64) / 32768
    expected = log_mel(*load_audio((values, 16000)))
    for samples in (as_float, as_float.astype(np.float32), as_float.tolist(), tuple(as_float)):
        np.testing.assert_array_equal(log_mel(*load_audio((samples, 16000))), expected)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_narrow_floats_and_tensors_are_read_as_float32(dtype: str) -> None:
    import torch

    tensor = torch.tensor(noise(8000)).to(getattr(torch, dtype))
    array = jnp.asarray(noise(8000), dtype)
    expected = tensor.float().numpy()
    for samples in (tensor, tensor.clone().requires_grad_(), array, np.asarray(array), torch.stack([tensor, tensor])):
        given, _ = load_audio((samples, 16000))
        assert given.dtype == np.float32
        np.testing.assert_array_equal(given, expected)
    shorts = torch.tensor([0, 16384, -32768] * 200, dtype=torch.int16)
    assert load_audio((shorts, 16000))[0][:3].tolist() == [0, 0.5, -1]


def test_channels_are_averaged_whichever_axis_they_are() -> None:
    """The shorter axis is the channels, in either order; of equal axes the second."""
    x = np.random.default_rng(0).uniform(-1, 1, (3, 2000)).astype(np.float32)
    mean = x.mean(axis=0)
    for samples in (x, x.T, np.asfortranarray(x), x.astype(np.float64).T):
        np.testing.assert_allclose(load_audio((samples, 16000))[0], mean, rtol=0, atol=6e-8)
    np.testing.assert_array_equal(load_audio((x[:1], 16000))[0], x[0])
    np.testing.assert_array_equal(load_audio((x[:1].T, 16000))[0], x[0])
    pair = np.round(x[:2] * 32767).astype(np.int16)
    expected = (pair[0].astype(np.float32) + pair[1].astype(np.float32)) / 65536
    np.testing.assert_array_equal(load_audio((pair, 16000))[0], expected)


def test_floats_beyond_full_scale_are_taken_as_they_are() -> None:
    x = noise(4000) * 32768  # 16-bit values in floats: 32768 squared louder, and nothing is guessed
    samples, _ = load_audio((x, 16000))
    np.testing.assert_array_equal(samples, x)
    difference = log_mel(samples, 16000) - log_mel(x / 32768, 16000)
    np.testing.assert_allclose(difference, 2 * math.log(32768), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rate", [16000, 16000.0, np.int64(16000), np.float32(16000)])
def test_rates_are_whole_numbers(rate: Any) -> None:
    _, given = load_audio((noise(400), rate))
    assert given == 16000
    assert type(given) is int
    np.testing.assert_array_equal(log_mel(noise(4000), rate), log_mel(noise(4000), 16000))


def test_the_source_is_left_as_it_is() -> None:
    x = noise(16000)
    before = x.copy()
    log_mel(*load_audio((x, 44100)))
    log_mel(*load_audio((x, 16000)))
    np.testing.assert_array_equal(x, before)


# Files


def encoded(samples: np.ndarray, rate: int, file_format: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=file_format, subtype=subtype)
    return buffer.getvalue()


LOSSLESS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("AIFF", "PCM_16"),
    ("AU", "PCM_16"),
    ("CAF", "PCM_16"),
    ("W64", "PCM_16"),
    ("RF64", "PCM_16"),
]
LOSSY = [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None), ("WAV", "ULAW")]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("file_format", "subtype"), LOSSLESS)
def test_lossless_files_keep_every_sample(file_format: str, subtype: str, channels: int, tmp_path: Path) -> None:
    x = np.round(sound(16000) * 32768) / 32768  # 16 bits hold it
    x = np.stack([x, x[::-1]], 1) if channels == 2 else x
    data = encoded(x, 24000, file_format, subtype)
    path = tmp_path / "clip.bin"  # known by its content, not by its name
    path.write_bytes(data)
    expected = x.mean(axis=1) if channels == 2 else x
    file = io.BytesIO(data)
    with path.open("rb") as opened:
        for source in (data, bytearray(data), memoryview(data), path, str(path), file, file, opened, opened):
            samples, rate = load_audio(source)
            assert rate == 24000
            np.testing.assert_array_equal(samples, expected.astype(np.float32))


@pytest.mark.parametrize(("file_format", "subtype"), LOSSY)
def test_lossy_files_sound_alike(file_format: str, subtype: str | None, tmp_path: Path) -> None:
    x = sound(16000)
    data = encoded(x, 16000, file_format, subtype)
    path = tmp_path / "clip.bin"
    path.write_bytes(data)
    samples, rate = load_audio(data)
    assert rate == 16000
    assert len(samples) == len(x)
    assert np.corrcoef(samples, x)[0, 1] > 0.98
    np.testing.assert_array_equal(load_audio(path)[0], samples)


def test_long_files_are_read_by_blocks() -> None:
    x = np.round(noise(2 * (1 << 20) + 3) * 32768) / 32768  # three blocks
    data = encoded(np.stack([x, x], 1), 16000, "FLAC", "PCM_16")
    np.testing.assert_array_equal(load_audio(data)[0], x.astype(np.float32))


def test_flac_of_unknown_length_is_read_to_its_end() -> None:
    """An encoder that writes to a pipe leaves the 36 bits of the length 0."""
    data = bytearray(encoded(noise(50_000), 16000, "FLAC"))
    expected, _ = load_audio(bytes(data))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    np.testing.assert_array_equal(load_audio(bytes(data))[0], expected)


def wav(
    samples: np.ndarray, size: int | None = None, before: bytes = b"", after: bytes = b"", magic: str = "RIFF"
) -> bytes:
    """A file written by hand: int16 at 16 kHz, its size as announced, chunks before and behind its samples."""
    order = ">" if magic == "RIFX" else "<"
    data = samples.astype(f"{order}i2").tobytes()
    form = struct.pack(f"{order}4sIHHIIHH", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16)
    body = before + form + struct.pack(f"{order}4sI", b"data", len(data) if size is None else size) + data + after
    whole = len(body) + 4 if size is None else min(size + 36, 0xFFFFFFFF)
    return magic.encode() + struct.pack(f"{order}I", whole) + b"WAVE" + body


LIST = b"LIST" + (5).to_bytes(4, "little") + b"INFO?" + b"\0"  # of an odd size, and so padded
UNKNOWN_SIZES = [
    0,
    2**28,
    2**30,
    2**30 - 44,
    10**9,
    2 * 10**9,
    0x7FFFFFFF - 36,
    0x7FFFFFFF,
    2**31,
    0xFFFFFFDB,
    0xFFFFFFFF,
]


@pytest.mark.parametrize("size", UNKNOWN_SIZES)
def test_wav_of_unknown_length_is_read_to_its_end(size: int, tmp_path: Path) -> None:
    """Read to its end, whatever comes before the samples."""
    values = np.round(noise(5000) * 32768).astype(np.int16)
    path = tmp_path / "clip"
    for before in (b"", LIST):
        for magic in ("RIFF", "RIFX") if not before else ("RIFF",):
            data = wav(values, size, before, magic=magic)
            path.write_bytes(data)
            for source in (data, path):
                np.testing.assert_array_equal(load_audio(source)[0], values / np.float32(32768))
                assert measure_audio(source) == (5000, 16000)


@pytest.mark.parametrize("size", [0, 2**30, 2**62, 2**63 - 1])
def test_rf64_of_unknown_length_is_read_to_its_end(size: int) -> None:
    values = np.round(noise(5000) * 32768).astype(np.int16)
    sizes = struct.pack("<4sIQQQI", b"ds64", 28, min(size + 72, 2**63 - 1), size, size // 2, 0)
    data = wav(values, 0xFFFFFFFF, sizes, magic="RF64")
    np.testing.assert_array_equal(load_audio(data)[0], values / np.float32(32768))
    assert measure_audio(data) == (5000, 16000)


@pytest.mark.parametrize("size", [12_000, 40_000, 123_456_789, 2**30 + 5000, 1_234_567_890])
def test_wav_that_is_cut_off_is_refused(size: int) -> None:
    """It announces the exact size that it had."""
    with pytest.raises(InputError, match="cut off: it holds less than it announces"):
        load_audio(wav(noise(5000) * 32768, size))


def test_wav_of_no_samples_is_refused() -> None:
    """A length of 0 is true where chunks follow to the file's end: they are no sound."""
    with pytest.raises(InputError, match="has 0 samples"):
        load_audio(wav(noise(0), after=LIST * 400))


@pytest.mark.parametrize(("file_format", "at"), [("W64", 16), ("RF64", 20)])
def test_sizes_beyond_4_gib_are_read_from_64_bits(file_format: str, at: int) -> None:
    """The whole file's size is in 64 bits: a cut file may announce more than 32 hold, an unknown size is near 2**63."""
    data = bytearray(encoded(noise(5000), 16000, file_format, "PCM_16"))
    expected, _ = load_audio(bytes(data))
    data[at : at + 8] = (2**63 - 1).to_bytes(8, "little")
    np.testing.assert_array_equal(load_audio(bytes(data))[0], expected)
    data[at : at + 8] = (5 << 30).to_bytes(8, "little")
    with pytest.raises(InputError, match="cut off"):
        load_audio(bytes(data))


def test_wav_whose_header_counts_itself_in_is_read() -> None:
    data = bytearray(encoded(noise(5000), 16000, "WAV"))
    data[40:44] = len(data).to_bytes(4, "little")
    assert len(load_audio(bytes(data))[0]) == 5000


def test_mp3_without_a_length_is_read_to_its_end() -> None:
    """Cut out of a stream, without the first frame, which tells the length: libsndfile estimates it, too long."""
    x = np.concatenate([np.zeros(80_000), sound(16000)]).astype(np.float32)
    data = encoded(x, 16000, "MP3")
    stream = data[data.index(b"\xff\xf3", 100) :]
    with soundfile.SoundFile(io.BytesIO(stream)) as file:
        assert file.frames > 1.2 * len(x)
    assert abs(len(load_audio(stream)[0]) - len(x)) < 2000


def in_container(samples: np.ndarray, rate: int, container: str, codec: str) -> bytes:
    """Samples (n, channels) of 16 bits, encoded by FFmpeg."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        layout = {1: "mono", 2: "stereo", 3: "2.1"}[samples.shape[1]]
        stream: Any = file.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.reshape(1, -1)), format="s16", layout=layout)
        frame.sample_rate = rate
        resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate, frame_size=1024)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(piece))
        file.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_pyav_opens_what_soundfile_cannot(channels: int, as_bytes: bool, tmp_path: Path) -> None:
    """ALAC in MP4 is lossless."""
    x = np.round(noise(20_000 * channels).reshape(-1, channels) * 32768).astype(np.int16)
    path = tmp_path / "http:clip|1.bin"  # known by its content; a name is not a URL
    path.write_bytes(in_container(x, 22050, "ipod", "alac"))
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.info(path)
    source = path.read_bytes() if as_bytes else path
    samples, rate = load_audio(source)
    assert rate == 22050
    np.testing.assert_allclose(samples, x.mean(axis=1) / 32768, rtol=0, atol=3e-8)
    assert measure_audio(source) == (20_000, 22050)


@pytest.mark.parametrize(
    ("container", "codec"), [("ipod", "aac"), ("adts", "aac"), ("webm", "libopus"), ("mp4", "aac")]
)
def test_lossy_containers_sound_alike(container: str, codec: str) -> None:
    x = np.round(sound(48000) * 32768).astype(np.int16)[:, None]
    samples, rate = load_audio(in_container(x, 48000, container, codec))
    assert rate == 48000
    delay = 1024 if codec == "aac" else 0  # the encoder's, which is not told here
    assert abs(len(samples) - delay - len(x)) < 2048
    both = min(len(samples) - delay, len(x))
    assert np.corrcoef(samples[delay : delay + both], x[:both, 0])[0, 1] > 0.98


@pytest.mark.parametrize(
    ("container", "codec", "message"),
    [("ipod", "aac", "cannot be read"), ("webm", "libopus", "is cut off: it holds less than it announces")],
)
def test_a_container_that_is_cut_off_is_refused(container: str, codec: str, message: str) -> None:
    x = np.round(sound(48000, 8.0) * 32768).astype(np.int16)[:, None]
    data = in_container(x, 48000, container, codec)
    assert abs(len(load_audio(data)[0]) - len(x)) < 2048
    with pytest.raises(InputError, match=f"the audio clip {message}"):
        load_audio(data[: int(0.7 * len(data))])


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{path}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{path}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n",
    ],
)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_nothing_else_is_opened_or_started(
    text: str, as_bytes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A playlist must not lead to another file, and no program decodes it."""
    (tmp_path / "clip.aac").write_bytes(in_container(np.zeros((8000, 1), np.int16), 16000, "adts", "aac"))
    playlist, started = tmp_path / "list.m3u8", tmp_path / "started"
    playlist.write_text(text.format(path=tmp_path / "clip.aac"))
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(InputError, match="the audio clip cannot be read"):
        load_audio(playlist.read_bytes() if as_bytes else playlist)
    assert not started.exists()


def test_missing_pyav_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    data = in_container(np.zeros((8000, 1), np.int16), 16000, "ipod", "alac")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"needs PyAV: pip install '\.\[video\]'; or pass WAV, FLAC"):
        load_audio(data)


# Bad input


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "of type NoneType"),
        (noise(16000), r"of type ndarray; expected \(samples, sampling_rate\)"),
        ([noise(16000), 16000], "of type list"),
        (16000, "of type int"),
        ((), "tuple of 0"),
        ((noise(16000),), "tuple of 1"),
        ((noise(16000), 16000, 1), "tuple of 3"),
        ((None, 16000), r"shape \(\)"),
        ((0.5, 16000), r"shape \(\)"),
        (([], 16000), r"shape \(0,\)"),
        ((np.zeros((0, 2)), 16000), r"shape \(0, 2\)"),
        ((np.zeros((2, 2, 9000)), 16000), r"shape \(2, 2, 9000\)"),
        (([[0.0], [0.0, 1.0]], 16000), "the values make no array"),
        ((np.zeros((100, 16000)), 16000), "100 channels, more than 64; pass one clip, not a batch"),
        ((np.zeros(16000, np.int64), 16000), "samples of int64, whose full scale is not known"),
        (([0] * 16000, 16000), "samples of int64"),
        ((np.zeros(16000, np.uint16), 16000), "samples of uint16"),
        ((np.zeros(16000, bool), 16000), "samples of bool"),
        ((np.zeros(16000, complex), 16000), "samples of complex128"),
        ((["a"] * 16000, 16000), "samples of <U1"),
        ((noise(16000), 0), "sampling rate 0; expected a whole number of Hz from 1000 to 768000"),
        ((noise(16000), -16000), "sampling rate -16000"),
        ((noise(16000), 16), "sampling rate 16; expected"),
        ((noise(16000), 10**400), "sampling rate 1000"),
        ((noise(16000), 1e9), "sampling rate 1000000000.0"),
        ((noise(16000), 22050.5), "sampling rate 22050.5"),
        ((noise(16000), math.nan), "sampling rate nan"),
        ((noise(16000), math.inf), "sampling rate inf"),
        ((noise(16000), None), "sampling rate None"),
        ((noise(16000), "16000"), "sampling rate '16000'"),
        ((noise(16000), True), "sampling rate True"),
        ((noise(399), 16000), r"399 samples at 16000 Hz, 24\.9 ms; it needs 25 ms at least\. Pad it with silence"),
        ((noise(199), 8000), "199 samples at 8000 Hz"),
        ((noise(1197), 48000), "1197 samples at 48000 Hz"),
        ((np.full(16000, np.nan), 16000), "NaN or infinite"),
        ((np.append(noise(16000), np.inf), 16000), "NaN or infinite"),
        ((np.append(noise(16000), -np.inf), 16000), "NaN or infinite"),
        ((np.append(noise(16000), np.nan), 16000), "NaN or infinite"),
        ((np.append(noise(16000), 1e10), 16000), r"magnitude 1e\+10; expected floats of full scale 1"),
        ((np.append(noise(16000).astype(float), 1e300), 16000), "NaN or infinite"),
        (b"", "the file is empty; pass a whole one"),
        (io.StringIO("text"), "gives str, not bytes; open it in binary mode"),
        (b"RIFF", "the audio clip cannot be read"),
        (b"not audio at all", r"cannot be read.*Pass a whole audio file in a known format"),
        (bytes(1000), "the audio clip cannot be read"),
        ("/no/such/file.wav", "the file does not exist; check the path"),
        (Path("/no/such/file.wav"), "the file does not exist"),
        ("", "the file does not exist"),
        ("null\0byte.wav", r"cannot be opened \(.*embedded null (byte|character).*\); check the path"),
        ("a" * 5000, r"cannot be opened \(File name too long\); check the path"),
        (TINY, r"cannot be opened \(Is a directory\); check the path"),
        (TINY / "config.json", "the audio clip cannot be read"),
    ],
)
def test_unusable_sources_are_named(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_audio(source)


@pytest.mark.torch
def test_tensors_without_values_are_refused() -> None:
    import torch

    with pytest.raises(InputError, match="the values make no array"):
        load_audio((torch.zeros(16000, device="meta"), 16000))


def test_the_shortest_clip_gives_one_frame() -> None:
    for num_samples, rate in [(400, 16000), (200, 8000), (1198, 48000), (1102, 44100)]:
        assert log_mel(*load_audio((noise(num_samples), rate))).shape == (1, 80)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("file_format", "subtype"), [*LOSSLESS, ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)])
def test_truncated_files_are_refused(file_format: str, subtype: str | None, part: float, tmp_path: Path) -> None:
    data = encoded(sound(16000, 4.0), 16000, file_format, subtype)
    data = data[: int(part * len(data))]
    path = tmp_path / "cut"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(InputError, match=r"the audio clip (is cut off|is damaged or cut off|cannot be read)"):
            load_audio(source)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # soundfile's, on seeking before 0
def test_corrupt_files_give_a_clip_or_an_input_error() -> None:
    """Changed bytes give some clip or an InputError, never anything else."""
    rng = np.random.default_rng(0)
    for file_format, subtype in [*LOSSLESS, *LOSSY]:
        data = encoded(noise(3000), 16000, file_format, subtype)
        for _ in range(40):
            corrupt = bytearray(data)
            for _ in range(rng.integers(1, 6)):
                corrupt[rng.integers(rng.choice([60, len(data)]))] = rng.integers(256)
            try:
                samples, rate = load_audio(corrupt)
            except InputError:
                continue
            assert np.isfinite(log_mel(samples, rate)).all()


def test_nan_in_a_file_is_refused(tmp_path: Path) -> None:
    x = noise(16000)
    x[500] = np.nan
    path = tmp_path / "nan.wav"
    soundfile.write(path, x, 16000, subtype="FLOAT")
    with pytest.raises(InputError, match="samples that are NaN"):
        load_audio(path)


def test_files_shorter_than_a_frame_are_refused(tmp_path: Path) -> None:
    for num_samples in (0, 399):
        path = tmp_path / "short.wav"
        soundfile.write(path, noise(num_samples), 16000)
        with pytest.raises(InputError, match=f"has {num_samples} samples at 16000 Hz"):
            load_audio(path)


def test_long_clips_are_refused() -> None:
    x = noise(32_000)
    for source in ((x, 16000), encoded(x, 16000, "WAV"), encoded(x, 16000, "FLAC")):
        assert len(load_audio(source, max_seconds=2)[0]) == 32_000
        with pytest.raises(InputError, match=r"longer than 1\.9 seconds; cut it into several$"):
            load_audio(source, max_seconds=1.9)


def test_a_decompression_bomb_is_refused_while_it_is_read() -> None:
    """10 hours of silence in a megabyte: refused as soon as 3 hours are read."""
    part = encoded(np.zeros(4096 * 9000, np.float32), 16000, "FLAC")
    assert len(part) < 300_000
    with pytest.raises(InputError, match="longer than 600 seconds"):
        load_audio(part, max_seconds=600)


def test_samples_at_high_rates_are_bounded() -> None:
    """A clip of an allowed length whose samples would take 25 GB."""
    part = encoded(np.zeros(4096 * 2000, np.float32), 192_000, "FLAC")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio, "MAX_SAMPLES", 4096 * 1000)
        with pytest.raises(InputError, match=r"more than 4096000 samples at 192000 Hz; resample it to 16 kHz"):
            load_audio(part)


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (np.zeros(16000, np.int16), 16000, r"samples of int16 \(16000,\); expected floats \(n,\), as load_audio"),
        (np.zeros((16000, 2), np.float32), 16000, r"samples of float32 \(16000, 2\)"),
        (np.zeros(16000, np.float32), 0, "sampling rate 0"),
        (np.zeros(399, np.float32), 16000, "399 samples"),
        (np.zeros(0, np.float32), 16000, "0 samples"),
        (np.full(16000, np.nan, np.float32), 16000, "NaN"),
    ],
)
def test_log_mel_checks_its_input(samples: np.ndarray, rate: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        log_mel(samples, rate)


def test_odd_samples_cause_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (np.zeros(800, np.float32), noise(5000), noise(5000).astype(np.float16), np.full(5000, 2.0**31)):
            assert np.isfinite(log_mel(*load_audio((x, 22050)))).all()
        with pytest.raises(InputError):
            load_audio((np.full(5000, 1e300), 16000))


def test_lines_of_json_are_named_before_what_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match="the file has no audio: it is a file of JSON; give a medium itself"):
        load_audio(b'{"messages": []}\n')
