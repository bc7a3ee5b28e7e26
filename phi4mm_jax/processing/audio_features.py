"""Log-mel features of clips, 100 frames per second.

They are those of the original's front end, which runs at 16 kHz, and at 8 kHz on half of the spectrum. Any other rate
is resampled to 16 kHz. (The original does so at 32 and 48 kHz, with the same filter; all other rates it treats as if
they were 8 or 16 kHz, or refuses.)
"""

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from phi4mm_jax.errors import InputError
from phi4mm_jax.utils.checks import is_number

NUM_BANDS = 80
TIME_REDUCTION = 8  # frames per token

_RATE = 16000
_HALF_RATE = 8000  # the one other rate that has features of its own
_MIN_RATE, _MAX_RATE = 1000, 768_000  # outside it is a mistake, such as kHz for Hz

_HOP, _WINDOW = 0.010, 0.025  # seconds
_NUM_FFT = 512  # at 16 kHz
_TOP_HERTZ = 7690.0
_PRE_EMPHASIS = np.float32(0.97)
_FULL_SCALE = 32768.0
_MAX_SAMPLE = 2.0**31  # full scale of the widest integers; beyond it powers overflow float32

_FRAMES_PER_BLOCK = 256  # so that a block and its spectrum stay in the processor's cache
_SAMPLES_PER_BLOCK = 1 << 20

# These as the files of PyTorch's processors name them.
AUDIO_RATES = {"audio_compression_rate": TIME_REDUCTION, "audio_downsample_rate": 1, "audio_feat_stride": 1}
FEATURE_SETTINGS = {
    "feature_size": NUM_BANDS, "sampling_rate": _RATE, "hop_length": round(_HOP * _RATE), "n_fft": _NUM_FFT,
    "win_length": round(_WINDOW * _RATE), "preemphasis": round(float(_PRE_EMPHASIS), 6),
}  # fmt: skip


def log_mel(samples: Float[np.ndarray, " S"], rate: int) -> Float[np.ndarray, "F 80"]:
    """Return the logarithm of the power in 80 bands of equal width on the mel scale, float32, 100 frames per second.

    Frames of 25 ms every 10 ms, without padding; a rest that fills no frame is dropped. Each is pre-emphasised by
    itself (its first sample is its own predecessor), scaled to the range of 16-bit integers and weighted with a Hamming
    window. Powers are clipped at 1, so that silence is 0. At 8 kHz the bands above 4 kHz are 0.

    The steps and their precision are the original's: float32 up to the window, float64 in the transform.

    Args:
        samples: mono, floats of full scale 1.
        rate: in Hz.

    Raises:
        InputError: as `load_audio`, of samples and rates.
    """
    from scipy.sparse import csr_array  # scipy takes longer to import than all of this package

    rate = check_rate(rate)
    check_samples(samples, rate)
    samples = resample(samples, rate)
    own_rate = feature_rate(rate)
    window, hop = round(_WINDOW * own_rate), round(_HOP * own_rate)
    num_fft = _NUM_FFT * own_rate // _RATE
    num_bins = num_fft // 2 + (own_rate == _RATE)  # the original drops the highest bin at 8 kHz
    weights = np.hamming(window) * _FULL_SCALE
    # Sparse, since a bin lies in two bands at most. It is faster than BLAS, whose threads, on a machine that is busy
    # with other work, have been seen to cost a hundred times what they save.
    filters = csr_array(mel_filters()[:num_bins].T)

    features = np.empty((_count_frames(len(samples), own_rate), NUM_BANDS), np.float32)
    padded = np.zeros((_FRAMES_PER_BLOCK, num_fft))
    for start in range(0, len(features), _FRAMES_PER_BLOCK):
        out = features[start : start + _FRAMES_PER_BLOCK]
        piece = samples[start * hop : (start + len(out) - 1) * hop + window]
        # Within a frame, pre-emphasis is the difference in the whole signal; only the first sample is particular.
        first = piece[: len(out) * hop : hop]
        differences = piece[1:] - _PRE_EMPHASIS * piece[:-1]
        frames = padded[: len(out)]
        frames[:, 0] = (first - _PRE_EMPHASIS * first) * weights[0]
        rest = np.lib.stride_tricks.sliding_window_view(differences, window - 1)[::hop]
        np.multiply(rest, weights[1:], out=frames[:, 1:window])

        spectrum = np.fft.rfft(frames, axis=1)
        parts = spectrum.view(np.float64)  # real, imaginary, real, ...
        parts *= parts
        power = (parts[:, 0::2] + parts[:, 1::2]).astype(np.float32)
        bands = np.asarray(filters @ power[:, :num_bins].T)
        np.log(np.maximum(bands.T, np.float32(1)), out=out)
    return features


def num_frames(num_samples: int, rate: int) -> int:
    """Return the number of frames of a clip, `len(log_mel(...))`; 0 if it is shorter than a frame."""
    own_rate = feature_rate(rate)
    return _count_frames(_ceil_div(num_samples * own_rate, rate), own_rate)


def num_audio_tokens(frames: int) -> int:
    """Return the number of tokens of a clip of so many frames."""
    return _ceil_div(frames, TIME_REDUCTION)


def check_samples(samples: np.ndarray, rate: int) -> None:
    """Refuse samples that have no features, or none that are finite.

    Raises:
        InputError: they are no vector of floats, shorter than a frame of 25 ms, NaN, infinite or far out of scale.
    """
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise InputError(
            f"the audio clip has samples of {samples.dtype} {samples.shape}; "
            "expected floats (n,), as load_audio gives them"
        )
    check_length(len(samples), rate)
    check_scale(samples)


def check_scale(samples: Float[np.ndarray, " S"]) -> None:
    """Refuse samples that are NaN, infinite or far out of scale, by an InputError."""
    peak = max(-float(samples.min()), float(samples.max()))  # NaN if any sample is
    if not peak <= _MAX_SAMPLE:
        cause = f"samples of magnitude {peak:g}" if math.isfinite(peak) else "samples that are NaN or infinite"
        raise InputError(f"the audio clip has {cause}; expected floats of full scale 1. Repair or rescale it")


def check_length(num_samples: int, rate: int) -> None:
    """Refuse a clip that is shorter than a frame of 25 ms, by an InputError."""
    if num_frames(num_samples, rate) == 0:
        raise InputError(
            f"the audio clip has {num_samples} samples at {rate} Hz, {1000 * num_samples / rate:.1f} ms; "
            "it needs 25 ms at least. Pad it with silence, or leave it out"
        )


def check_rate(rate: Any) -> int:
    """Return the sampling rate as an int, in Hz.

    Raises:
        InputError: it is not a whole number, or impossible.
    """
    value: Any = rate if is_number(rate) else math.nan
    if not (_MIN_RATE <= value <= _MAX_RATE and float(value).is_integer()):
        raise InputError(
            f"the audio clip has the sampling rate {rate!r:.80}; "
            f"expected a whole number of Hz from {_MIN_RATE} to {_MAX_RATE}"
        )
    return int(value)


def feature_rate(rate: int) -> int:
    """Return the rate in Hz at which features are made of a clip: 8000 of one at 8000, else 16000."""
    return _HALF_RATE if rate == _HALF_RATE else _RATE


def _count_frames(num_samples: int, own_rate: int) -> int:
    window, hop = round(_WINDOW * own_rate), round(_HOP * own_rate)
    return max(0, (num_samples - window) // hop + 1)


@functools.cache
def mel_filters() -> Float[np.ndarray, "257 80"]:
    """Weights of the FFT's bins in the bands.

    Triangles in mel = 1127 ln(1 + Hz / 700), each from the centre of the band below to that of the band above; bins
    that round to 0 Hz or to the upper end have no weight.
    """

    def mel(hertz: Any) -> Any:
        return 1127 * np.log1p(hertz / 700)

    bin_hertz = _RATE / _NUM_FFT
    bins = mel(np.arange(_NUM_FFT // 2 + 1) * bin_hertz)[:, None]
    edges = np.linspace(0, mel(_TOP_HERTZ), NUM_BANDS + 2)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    weights = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clip(0)
    weights[0] = 0
    weights[round(_TOP_HERTZ / bin_hertz) :] = 0
    weights = weights.astype(np.float32)
    weights.flags.writeable = False
    return weights


def resample(samples: Float[np.ndarray, " S"], rate: int, block: int = _SAMPLES_PER_BLOCK) -> Float[np.ndarray, " R"]:
    """Resample to the rate of the features by scipy's polyphase filter, in float64.

    It goes by blocks of about `block` samples, so that only the result takes memory.
    """
    up, down = _reduced(feature_rate(rate), rate)
    if up == down:
        return samples.astype(np.float32, copy=False)
    resampled, done = np.empty(_ceil_div(len(samples) * up, down), np.float32), 0
    step = down * _ceil_div(block, down)
    pieces = (samples[start : start + step] for start in range(0, len(samples), step))
    for piece in resample_blocks(pieces, rate, block):
        resampled[done : done + len(piece)] = piece
        done += len(piece)
    return resampled


def resample_blocks(
    blocks: Iterable[Float[np.ndarray, " S"]], rate: int, block: int = _SAMPLES_PER_BLOCK
) -> Iterator[Float[np.ndarray, " R"]]:
    """Yield what `resample` makes of the blocks, joined, about `block` samples of them at a time."""
    up, down = _reduced(feature_rate(rate), rate)
    if up == down:
        yield from (samples.astype(np.float32, copy=False) for samples in blocks)
        return
    from scipy.signal import resample_poly

    taps = _low_pass(up, down)
    # A step begins at a multiple of `down`, so that its outputs fall on those of the whole. It takes as many samples
    # more on both sides as the filter reaches.
    margin = down * _ceil_div(len(taps) // 2 + 1, up * down)
    step = down * _ceil_div(block, down)
    kept, before = np.zeros(0), 0  # `before`: of the samples that are kept those whose outputs are out

    def outputs(piece: np.ndarray, count: int) -> np.ndarray:
        skip = before // down * up
        return resample_poly(piece, up, down, window=taps)[skip : skip + count].astype(np.float32)

    for samples in blocks:
        kept = np.concatenate([kept, samples.astype(np.float64)])
        while len(kept) >= before + step + margin:
            yield outputs(kept[: before + step + margin], step // down * up)
            now = min(before + step, margin)
            kept, before = kept[before + step - now :], now
    if len(kept) > before:
        yield outputs(kept, _ceil_div((len(kept) - before) * up, down))


def _ceil_div(n: int, divisor: int) -> int:
    return -(-n // divisor)


def _reduced(up: int, down: int) -> tuple[int, int]:
    divisor = math.gcd(up, down)
    return up // divisor, down // divisor


@functools.lru_cache(maxsize=4)
def _low_pass(up: int, down: int) -> np.ndarray:
    """Return the filter that `scipy.signal.resample_poly` designs by itself, each time anew."""
    from scipy.signal import firwin

    window: Any = ("kaiser", 5.0)
    return np.asarray(firwin(20 * max(up, down) + 1, 1 / max(up, down), window=window))
