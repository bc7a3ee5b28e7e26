"""Audio: from clips to log-mel features at 100 frames a second.

The features are those of the original's front end, which runs at 16 kHz, and at 8 kHz on half of the spectrum. Any
other rate is resampled to 16 kHz. (The original does so at 32 and 48 kHz, with the same filter; all other rates it
treats as if they were 8 or 16 kHz, or refuses.)
"""

import functools
import itertools
import math
import numbers
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import soundfile
from jaxtyping import Float

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.containers import open_container
from phi4mm_jax.processing.sources import Deadline, open_file, plain, to_array

NUM_BANDS = 80
TIME_REDUCTION = 8  # frames a token

# Longer clips exceed the context: 131,072 tokens of 80 ms are 2.9 hours.
MAX_SECONDS = 3 * 3600
# At higher rates than 48 kHz the limit is lower: a file of a megabyte may hold hours of silence at any rate.
_MAX_SAMPLES = MAX_SECONDS * 48000

_RATE = 16000
_HALF_RATE = 8000  # the one other rate that has features of its own
_LEAST_RATE, _LARGEST_RATE = 1000, 768_000  # outside it is a mistake, such as kHz for Hz
_MAX_CHANNELS = 64

_HOP, _WINDOW = 0.010, 0.025  # seconds
_NUM_FFT = 512  # at 16 kHz
_TOP_HERTZ = 7690.0
_PRE_EMPHASIS = np.float32(0.97)
_FULL_SCALE = 32768.0
_LARGEST_SAMPLE = 2.0**31  # full scale of the widest integers; beyond it powers overflow float32

_FRAMES_AT_ONCE = 256  # so that a block and its spectrum stay in the processor's cache
_SAMPLES_AT_ONCE = 1 << 20
_UNKNOWN_LENGTH = 2**62  # libsndfile then says 2**63 - 1

# What a WAV header says before its writer knows the length: nothing, nearly all that the field holds, or a round number
# of such a size. A file that was cut off says its exact length.
_NEARLY_ALL = 0x7FFF0000
_LEAST_ROUND, _ROUND, _HEADER_BYTES = 2**28, (2**20, 10**6), 128

# These as the files of PyTorch's processors name them.
AUDIO_RATES = {"audio_compression_rate": TIME_REDUCTION, "audio_downsample_rate": 1, "audio_feat_stride": 1}
FEATURE_SETTINGS = {
    "feature_size": NUM_BANDS, "sampling_rate": _RATE, "hop_length": round(_HOP * _RATE), "n_fft": _NUM_FFT,
    "win_length": round(_WINDOW * _RATE), "preemphasis": round(float(_PRE_EMPHASIS), 6),
}  # fmt: skip

AudioSource = tuple[Any, int] | str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO


def load_audio(source: AudioSource, max_seconds: float = MAX_SECONDS) -> tuple[Float[np.ndarray, " S"], int]:
    """Samples in [-1, 1), of several channels the mean, and the sampling rate in Hz.

    Args:
        source: a path, an open binary file or the bytes of one, or (samples, rate). Files are opened by soundfile, and
            what it does not know (m4a, webm, ...) by PyAV, if it is installed, in the formats of
            `phi4mm_jax.processing.containers`. (Not by librosa, which for such files has audioread start ffmpeg: it
            would follow playlists to other files and to the network.) A WAV file whose header was written before its
            length was known is read to its end. Samples are an array, a tensor or a list of shape (n,), or of two axes
            of which the shorter one is the channels (the second, if they are equal). Floats, bfloat16 and float16 among
            them, are taken as they are, also outside of [-1, 1]; int8, int16 and int32 are divided by their full scale
            (2**7, 2**15, 2**31); uint8 is centred at 128.
        max_seconds: longer clips are refused, files before they are read to their end.

    Raises:
        InputError: a file is missing, unreadable or cut off (which WAV, RF64, W64, AIFF, AU, FLAC, Ogg and MP4 tell,
            and MP3 of a variable bit rate); samples are NaN, infinite or of an unsuitable type or shape; the rate is
            impossible; the clip is shorter than a frame of 25 ms, or too long.
    """
    match plain(source):
        case tuple(clip):
            samples, rate = _from_samples(clip, max_seconds)
        case (str() | bytes()) as file:
            samples, rate = _from_file(file, max_seconds)
        case _:
            raise _unknown(source)
    _check(samples, rate)
    return samples, rate


def measure_audio(source: AudioSource, max_seconds: float = MAX_SECONDS) -> tuple[int, int]:
    """The number of samples and the sampling rate in Hz of what `load_audio` loads, mostly from a file's header alone.

    The header does not tell, or not exactly, in MP3, in files that are left to PyAV, and in FLAC that was written to a
    pipe: these are decoded.

    Raises:
        InputError: a file is missing or unreadable; the rate is impossible; the clip is shorter than a frame of 25 ms,
            or too long. What only decoding shows, such as NaN or a damaged block, is not found here.
    """
    match plain(source):
        case tuple(clip):
            samples, rate = _clip(clip, max_seconds)
            num_samples = len(samples)
        case (str() | bytes()) as file:
            num_samples, rate = _measure_file(file, max_seconds)
        case _:
            raise _unknown(source)
    _check_length(num_samples, rate)
    return num_samples, rate


def log_mel(samples: Float[np.ndarray, " S"], rate: int) -> Float[np.ndarray, "F 80"]:
    """The logarithm of the power in 80 bands of equal width on the mel scale, float32, 100 frames a second.

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

    rate = _check_rate(rate)
    _check(samples, rate)
    samples = _at_feature_rate(samples, rate)
    own_rate = _feature_rate(rate)
    window, hop = round(_WINDOW * own_rate), round(_HOP * own_rate)
    num_fft = _NUM_FFT * own_rate // _RATE
    num_bins = num_fft // 2 + (own_rate == _RATE)  # the original drops the highest bin at 8 kHz
    weights = np.hamming(window) * _FULL_SCALE
    # Sparse, since a bin lies in two bands at most. It is faster than BLAS, whose threads, on a machine that is busy
    # with other work, have been seen to cost a hundred times what they save.
    filters = csr_array(_mel_filters()[:num_bins].T)

    features = np.empty((_count_frames(len(samples), own_rate), NUM_BANDS), np.float32)
    padded = np.zeros((_FRAMES_AT_ONCE, num_fft))
    for start in range(0, len(features), _FRAMES_AT_ONCE):
        out = features[start : start + _FRAMES_AT_ONCE]
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
    """The frames of a clip: `len(log_mel(...))`, without the samples; 0 if it is shorter than a frame."""
    own_rate = _feature_rate(rate)
    return _count_frames(_ceil_div(num_samples * own_rate, rate), own_rate)


def num_audio_tokens(frames: int) -> int:
    """The tokens of a clip of so many frames."""
    return _ceil_div(frames, TIME_REDUCTION)


# Features


def _feature_rate(rate: int) -> int:
    return _HALF_RATE if rate == _HALF_RATE else _RATE


def _count_frames(num_samples: int, own_rate: int) -> int:
    window, hop = round(_WINDOW * own_rate), round(_HOP * own_rate)
    return max(0, (num_samples - window) // hop + 1)


@functools.cache
def _mel_filters() -> Float[np.ndarray, "257 80"]:
    """The weights of the FFT's bins in the bands: triangles in mel = 1127 ln(1 + Hz / 700), each from the centre of the
    band below to that of the band above; bins that round to 0 Hz or to the upper end have no weight."""

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


def _at_feature_rate(samples: Float[np.ndarray, " S"], rate: int) -> Float[np.ndarray, " S"]:
    """Resampled by scipy's polyphase filter, in float64; block by block, so that only the result takes memory."""
    up, down = _reduced(_feature_rate(rate), rate)
    if up == down:
        return samples.astype(np.float32, copy=False)
    from scipy.signal import resample_poly

    taps = _low_pass(up, down)
    # A block begins at a multiple of `down`, so that its outputs fall on those of the whole. It takes as many samples
    # more on both sides as the filter reaches.
    margin = down * _ceil_div(len(taps) // 2 + 1, up * down)
    step = down * _ceil_div(_SAMPLES_AT_ONCE, down)
    resampled = np.empty(_ceil_div(len(samples) * up, down), np.float32)
    for start in range(0, len(samples), step):
        before = min(start, margin)
        piece = samples[start - before : start + step + margin].astype(np.float64)
        out = resampled[start // down * up : (start + step) // down * up]
        skip = before // down * up
        out[:] = resample_poly(piece, up, down, window=taps)[skip : skip + len(out)]
    return resampled


def _ceil_div(n: int, divisor: int) -> int:
    return -(-n // divisor)


def _reduced(up: int, down: int) -> tuple[int, int]:
    divisor = math.gcd(up, down)
    return up // divisor, down // divisor


@functools.lru_cache(maxsize=4)
def _low_pass(up: int, down: int) -> np.ndarray:
    """The filter that `scipy.signal.resample_poly` designs by itself, each time anew."""
    from scipy.signal import firwin

    window: Any = ("kaiser", 5.0)
    return np.asarray(firwin(20 * max(up, down) + 1, 1 / max(up, down), window=window))


# Clips


def _check(samples: np.ndarray, rate: int) -> None:
    """Refuse what has no features, or none that are finite."""
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise InputError(
            f"the audio clip has samples of {samples.dtype} {samples.shape}; "
            "expected floats (n,), as load_audio gives them"
        )
    _check_length(len(samples), rate)
    peak = max(-float(samples.min()), float(samples.max()))  # NaN if any sample is
    if not peak <= _LARGEST_SAMPLE:
        cause = f"samples of magnitude {peak:g}" if math.isfinite(peak) else "samples that are NaN or infinite"
        raise InputError(f"the audio clip has {cause}; expected floats of full scale 1. Repair or rescale it")


def _check_length(num_samples: int, rate: int) -> None:
    if num_frames(num_samples, rate) == 0:
        raise InputError(
            f"the audio clip has {num_samples} samples at {rate} Hz, {1000 * num_samples / rate:.1f} ms; "
            "it needs 25 ms at least. Pad it with silence, or leave it out"
        )


def _check_rate(rate: Any) -> int:
    value: Any = rate if isinstance(rate, numbers.Real) and not isinstance(rate, bool) else math.nan
    if not (_LEAST_RATE <= value <= _LARGEST_RATE and float(value).is_integer()):
        raise InputError(
            f"the audio clip has the sampling rate {rate!r:.80}; "
            f"expected a whole number of Hz from {_LEAST_RATE} to {_LARGEST_RATE}"
        )
    return int(value)


def _unknown(source: Any) -> InputError:
    return InputError(
        f"the audio clip is of type {type(source).__name__}; "
        "expected (samples, sampling_rate), a path, a file or its bytes"
    )


def _check_channels(channels: int) -> None:
    if channels > _MAX_CHANNELS:
        raise InputError(
            f"the audio clip has {channels} channels, more than {_MAX_CHANNELS}; pass one clip, not a batch or features"
        )


def _check_duration(num_samples: int, rate: int, max_seconds: float) -> None:
    if num_samples > rate * max_seconds:
        raise InputError(f"the audio clip is longer than {max_seconds:g} seconds; cut it into several")
    if num_samples > _MAX_SAMPLES:
        raise InputError(
            f"the audio clip has more than {_MAX_SAMPLES} samples at {rate} Hz; resample it to 16 kHz, or cut it"
        )


def _from_samples(source: tuple, max_seconds: float) -> tuple[Float[np.ndarray, " S"], int]:
    samples, rate = _clip(source, max_seconds)
    return _mono(_as_float(samples)), rate


def _clip(source: tuple, max_seconds: float) -> tuple[np.ndarray, int]:
    """Samples as they are, with the channels, if they have an axis, last."""
    if len(source) != 2:
        raise InputError(f"the audio clip is a tuple of {len(source)}; expected (samples, sampling_rate)")
    rate = _check_rate(source[1])
    samples = to_array(source[0])
    if samples.ndim not in (1, 2) or not samples.size:
        raise InputError(
            f"the audio clip has samples of shape {samples.shape}; expected (n,), (n, channels) or (channels, n)"
        )
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T
    _check_duration(len(samples), rate, max_seconds)
    return samples, rate


def _as_float(samples: np.ndarray) -> np.ndarray:
    """Samples with full scale 1."""
    if samples.dtype.kind == "f" or samples.dtype.name == "bfloat16":
        return samples.astype(np.promote_types(samples.dtype, np.float32), copy=False)
    match samples.dtype.name:
        case "int8" | "int16" | "int32":
            return samples.astype(np.float32) / np.float32(2 ** (8 * samples.dtype.itemsize - 1))
        case "uint8":
            return (samples.astype(np.float32) - np.float32(128)) / np.float32(128)
    raise InputError(
        f"the audio clip has samples of {samples.dtype}, whose full scale is not known; "
        "expected floats in [-1, 1], int16, int32, int8 or uint8"
    )


def _mono(samples: Float[np.ndarray, "S C"] | Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, which is refused later
        if samples.ndim == 2:
            _check_channels(samples.shape[1])
            total = samples[:, 0].copy()
            for channel in samples.T[1:]:  # several times faster than numpy's mean over a short axis
                total += channel
            samples = total / samples.dtype.type(samples.shape[1])
        return samples.astype(np.float32, copy=False)


# Files


def _from_file(source: str | bytes, max_seconds: float) -> tuple[Float[np.ndarray, " S"], int]:
    deadline = Deadline("audio clip")
    with open_file(source) as opened:
        length = _wav_length(opened)
        try:
            file = _stream(opened, length)
        except Exception as error:  # of many types, where a header is malformed
            return _from_container(source, max_seconds, error)
        with file:
            rate = _check_rate(file.samplerate)
            _check_channels(file.channels)
            try:
                samples = _join(_blocks(file, deadline), rate, max_seconds)
            except soundfile.SoundFileError as error:
                raise InputError("the audio clip is damaged or cut off; pass a whole audio file") from error
            told = length is not None and length.patches  # then libsndfile's log is of the patches
            if (length is not None and length.is_cut_off) or (not told and _is_cut_off(file, len(samples))):
                raise InputError("the audio clip is cut off: it holds less than it announces; pass a whole audio file")
    return samples, rate


def _measure_file(source: str | bytes, max_seconds: float) -> tuple[int, int]:
    with open_file(source) as opened:
        length = _wav_length(opened)
        try:
            header = _stream(opened, length)
            header.close()
        except Exception:  # of many types, where a header is malformed
            header = None
    if header is None or header.format == "MP3" or header.frames > _UNKNOWN_LENGTH:
        samples, rate = _from_file(source, max_seconds)
        return len(samples), rate
    rate = _check_rate(header.samplerate)
    _check_channels(header.channels)
    _check_duration(header.frames, rate, max_seconds)
    return header.frames, rate


def _stream(opened: BinaryIO, length: "_WavLength | None") -> "_Stream":
    file: Any = opened if length is None else _Mended(opened, length.patches)
    return _Stream(file)


@dataclass(frozen=True)
class _WavLength:
    """What a WAV file's header says about its length.

    Attributes:
        patches: bytes to read instead, by where they are, if the length was not known when the header was written.
        is_cut_off: whether it holds less than it announces.
    """

    patches: dict[int, bytes]
    is_cut_off: bool


def _wav_length(file: BinaryIO) -> _WavLength | None:
    """The length that a WAV or RF64 file announces, beside the one that it has; None for other files.

    A length is taken as unknown, and the file read to its end, if it is 0 with something other than chunks behind it,
    or reaches beyond the file's end and is 0x7FFF0000 or more (in 64 bits 2**62), or a round number (within 128 bytes
    of a multiple of 2**20 or of 10**6) from 2**28 on. Any other length beyond the end, by more than 1 % and a kilobyte
    (some programs count the header in), is that of a file that was cut off.
    """
    try:
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        magic = file.read(12)
        if magic[:4] not in (b"RIFF", b"RIFX", b"RF64") or magic[8:] != b"WAVE":
            return None
        order = ">" if magic[:4] == b"RIFX" else "<"
        at, wide = 12, None  # `wide`: where the 64-bit sizes are
        for name, start, size in _chunks_of(file, at, end, order):
            if name == b"ds64" and size >= 24:
                wide = start
            if name == b"data":
                return _compared(file, order, start, size, wide, end)
        return None
    finally:
        file.seek(0)


def _chunks_of(file: BinaryIO, at: int, end: int, order: str) -> Iterator[tuple[bytes, int, int]]:
    """The name, start and size of each chunk from here to the file's end."""
    while at + 8 <= end:
        file.seek(at)
        name, size = struct.unpack(f"{order}4sI", file.read(8))
        yield name, at + 8, size
        at += 8 + size + size % 2


def _compared(file: BinaryIO, order: str, start: int, size: int, wide: int | None, end: int) -> _WavLength:
    """The length of the samples that begin at `start`."""
    announced = size
    if wide is not None and size == 0xFFFFFFFF:
        file.seek(wide + 8)
        announced = struct.unpack("<Q", file.read(8))[0]
    present = end - start
    if announced == 0:
        unknown = present > 0 and not _are_chunks(file, start, end, order)
    else:
        largest = _NEARLY_ALL if wide is None else 2**62
        unknown = announced > present and (announced >= largest or _is_round(announced))
    if not unknown:
        return _WavLength({}, announced > present * 1.01 + 1024)
    patches = {start - 4: struct.pack(f"{order}I", min(present, 0xFFFFFFFF)), 4: struct.pack(f"{order}I", end - 8)}
    if wide is not None:
        patches = {wide: struct.pack("<QQ", end - 8, present), start - 4: b"\xff" * 4}
    return _WavLength(patches, False)


def _is_round(size: int) -> bool:
    return size >= _LEAST_ROUND and any((size + _HEADER_BYTES) % unit <= 2 * _HEADER_BYTES for unit in _ROUND)


def _are_chunks(file: BinaryIO, at: int, end: int, order: str) -> bool:
    """Whether there are whole chunks from here to the file's end: then nothing of it is sound."""
    for name, start, size in _chunks_of(file, at, end, order):
        at = start + size + size % 2
        if not name.isascii() or not name.decode("ascii").isprintable():
            return False
    return at in (end, end + 1)


class _Mended:
    """A file of which some bytes are read as others."""

    def __init__(self, file: BinaryIO, patches: dict[int, bytes]):
        self._file, self._patches = file, patches
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        start = self._file.tell()
        data = bytearray(self._file.read(size))
        for at, patch in self._patches.items():
            for i, value in enumerate(patch, at - start):
                if 0 <= i < len(data):
                    data[i] = value
        return bytes(data)


class _Stream(soundfile.SoundFile):
    """Read from the beginning to the end only. soundfile would seek as it reads, and fail where a FLAC file's header
    lacks the length, which an encoder that writes to a pipe does not know."""

    def seekable(self) -> bool:
        return False


def _blocks(file: soundfile.SoundFile, deadline: Deadline) -> Iterator[Float[np.ndarray, "S C"]]:
    while len(block := file.read(_SAMPLES_AT_ONCE, "float32", always_2d=True)):
        deadline.check()
        yield block


def _join(blocks: Iterable[np.ndarray], rate: int, max_seconds: float) -> Float[np.ndarray, " S"]:
    """All blocks as one channel."""
    pieces, count = [], 0
    for block in blocks:
        pieces.append(_mono(block))
        count += len(block)
        _check_duration(count, rate, max_seconds)
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def _is_cut_off(file: soundfile.SoundFile, num_read: int) -> bool:
    """Whether a file ends before its end, as far as libsndfile's log of the headers tells.

    The length in a header may be a little wrong (some programs count the header in), and it means nothing where the
    writer did not know it; such headers say 2 GiB or more, or where they have 64 bits, nearly all of what these hold.
    """
    log = file.extra_info
    match file.format:
        case "OGG":
            return "Junk after the last page" in log  # part of one more
        case "MP3":  # only with a variable bit rate is the length told; otherwise it is estimated
            return re.search(r"bitrate mode *: variable", log) is not None and num_read < 0.99 * file.frames
    sizes = re.search(r"(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)", log)
    if sizes is None:
        return False
    announced, present = int(sizes[1]), int(sizes[2])
    if file.format == "WAV" and _is_round(announced):
        return False
    unknown = 2**62 if file.format in ("W64", "RF64") else _NEARLY_ALL
    return present * 1.01 + 1024 < announced < unknown


def _from_container(source: str | bytes, max_seconds: float, cause: Exception) -> tuple[Float[np.ndarray, " S"], int]:
    """What soundfile cannot open, by PyAV."""
    try:
        with open_container(source, "audio clip", "pass WAV, FLAC, Ogg or MP3") as (container, deadline):
            stream = container.streams.best("audio")
            if stream is None:
                raise InputError("the file has no audio; choose another")
            frames = _decoded(container, stream, deadline)
            first = next(frames, None)
            if first is None:
                raise InputError("the file has no audio; check that it is whole")
            rate = _check_rate(first.sample_rate)
            samples = _join(_frame_samples(first, frames), rate, max_seconds)
            announced = _announced_seconds(container, stream)
            if announced is not None and announced > 1.01 * len(samples) / rate + 0.5:
                raise InputError("the audio clip is cut off: it holds less than it announces; pass a whole audio file")
            return samples, rate
    except (InputError, MemoryError) as error:
        if "PyAV" not in str(error):
            raise
        failure: Exception = error
    except Exception as error:  # decoders raise errors of many types
        failure = error
    told = str(failure) if isinstance(failure, InputError) else f"PyAV: {failure!r:.200}"
    raise InputError(
        f"the audio clip cannot be read (soundfile: {getattr(cause, 'error_string', cause)!r:.200}; {told}). "
        "Pass a whole audio file in a known format, such as WAV, FLAC, Ogg, MP3 or, with PyAV, M4A"
    ) from failure


def _decoded(container: Any, stream: Any, deadline: Deadline) -> Iterator[Any]:
    for packet in container.demux(stream):
        deadline.check()
        yield from packet.decode()


def _frame_samples(first: Any, rest: Iterable[Any]) -> Iterator[Float[np.ndarray, "S C"]]:
    """Floats of full scale 1."""
    import av

    _check_channels(first.layout.nb_channels)
    resampler = av.AudioResampler(format="fltp", layout=first.layout, rate=first.sample_rate)
    for frame in itertools.chain([first], rest):
        for converted in resampler.resample(frame):
            yield converted.to_ndarray().T


def _announced_seconds(container: Any, stream: Any) -> float | None:
    """How long the header of MP4, or of Matroska with nothing else in it, says that the clip is; others estimate."""
    if container.format.name.startswith("mov,") and stream.duration:
        return float(stream.duration * stream.time_base)
    if "matroska" in container.format.name and len(container.streams) == 1 and container.duration:
        return container.duration / 1_000_000
    return None
