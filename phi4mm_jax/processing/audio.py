"""Clips of audio: load, measure and check them, whatever they come as.

soundfile decodes, PyAV what soundfile does not know; `wav_header` mends the lengths that WAV files state, and
`audio_features` makes the model's input.
"""

import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
import soundfile
from jaxtyping import Float

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.audio_features import check_length, check_rate, check_samples
from phi4mm_jax.processing.containers import MissingPyAV, open_container
from phi4mm_jax.processing.sources import Deadline, open_file, other_kind, plain, to_array
from phi4mm_jax.processing.wav_header import (
    MIN_UNKNOWN_32,
    MIN_UNKNOWN_64,
    PatchedFile,
    WavLength,
    is_round,
    wav_length,
)

# Longer clips exceed the context: 131,072 tokens of 80 ms are 2.9 hours.
MAX_SECONDS = 3 * 3600
# At higher rates than 48 kHz the limit is lower: a file of a megabyte may hold hours of silence at any rate.
MAX_SAMPLES = MAX_SECONDS * 48000
_MAX_CHANNELS = 64

_SAMPLES_PER_BLOCK = 1 << 20
_UNKNOWN_LENGTH = 2**62  # libsndfile then says 2**63 - 1

AudioSource = tuple[Any, int] | str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO


def load_audio(source: AudioSource, max_seconds: float = MAX_SECONDS) -> tuple[Float[np.ndarray, " S"], int]:
    """Return the samples in [-1, 1), averaged over the channels, and the sampling rate in Hz.

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
    check_samples(samples, rate)
    return samples, rate


def stream_audio(source: AudioSource) -> Iterator[tuple[Float[np.ndarray, " S"], int]]:
    """Yield a clip's samples in blocks, each with the rate: what `load_audio` returns, however long, joined.

    A file is read as the blocks are asked for, so that hours take no memory.

    Raises:
        InputError: as `load_audio`, but that clips may be short, and long.
    """
    match plain(source):
        case tuple(clip):
            yield _from_samples(clip, math.inf)
        case (str() | bytes()) as file:
            yield from _file_blocks(file, timed_by_block=True)
        case _:
            raise _unknown(source)


def announced_seconds(source: AudioSource) -> float | None:
    """Return a clip's length as its header states or estimates it; None where it does not, or cannot be read."""
    try:
        match plain(source):
            case tuple(clip):
                samples, rate = _check_clip(clip, math.inf)
                return len(samples) / rate
            case (str() | bytes()) as file:
                return _header_seconds(file)
    except Exception:  # of many types, where a header is malformed; reading will say it
        return None


def measure_audio(source: AudioSource, max_seconds: float = MAX_SECONDS) -> tuple[int, int]:
    """Return the number of samples and the rate in Hz of what `load_audio` loads, mostly from its header alone.

    The header does not tell, or not exactly, in MP3, in files that are left to PyAV, and in FLAC that was written to a
    pipe: these are decoded.

    Raises:
        InputError: a file is missing or unreadable; the rate is impossible; the clip is shorter than a frame of 25 ms,
            or too long. What only decoding shows, such as NaN or a damaged block, is not found here.
    """
    match plain(source):
        case tuple(clip):
            samples, rate = _check_clip(clip, max_seconds)
            num_samples = len(samples)
        case (str() | bytes()) as file:
            num_samples, rate = _measure_file(file, max_seconds)
        case _:
            raise _unknown(source)
    check_length(num_samples, rate)
    return num_samples, rate


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
    if num_samples > MAX_SAMPLES and max_seconds < math.inf:
        raise InputError(
            f"the audio clip has more than {MAX_SAMPLES} samples at {rate} Hz; resample it to 16 kHz, or cut it"
        )


def _from_samples(source: tuple, max_seconds: float) -> tuple[Float[np.ndarray, " S"], int]:
    samples, rate = _check_clip(source, max_seconds)
    return _mono(_as_float(samples)), rate


def _check_clip(source: tuple, max_seconds: float) -> tuple[np.ndarray, int]:
    """Return the samples as they are, with the channels, if they have an axis, last, and the rate."""
    if len(source) != 2:
        raise InputError(f"the audio clip is a tuple of {len(source)}; expected (samples, sampling_rate)")
    rate = check_rate(source[1])
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
    """Convert samples to full scale 1."""
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
    pieces, count, rate = [], 0, 0
    for piece, rate in _file_blocks(source):
        pieces.append(piece)
        count += len(piece)
        _check_duration(count, rate, max_seconds)
    return np.concatenate(pieces), rate


def _file_blocks(source: str | bytes, timed_by_block: bool = False) -> Iterator[tuple[Float[np.ndarray, " S"], int]]:
    """Yield a file's samples, as one channel, with the rate; one block at least, which may be empty.

    Args:
        timed_by_block: limit the time of each block, not of all, during which the caller may do other work.
    """
    deadline = Deadline("audio clip")
    for block in _decoded_blocks(source, deadline):
        yield block
        if timed_by_block:
            deadline.restart()


def _decoded_blocks(source: str | bytes, deadline: Deadline) -> Iterator[tuple[Float[np.ndarray, " S"], int]]:
    with open_file(source) as opened:
        length = wav_length(opened)
        try:
            file = _open_sound(opened, length)
        except Exception as error:  # of many types, where a header is malformed
            cause = error
        else:
            with file:
                yield from _stream_blocks(file, length, deadline)
            return
    yield from _container_blocks(source, deadline, cause)


def _stream_blocks(
    file: soundfile.SoundFile, length: WavLength | None, deadline: Deadline
) -> Iterator[tuple[Float[np.ndarray, " S"], int]]:
    rate = check_rate(file.samplerate)
    _check_channels(file.channels)
    count = 0
    while True:
        try:
            block = file.read(_SAMPLES_PER_BLOCK, "float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise InputError("the audio clip is damaged or cut off; pass a whole audio file") from error
        if not len(block) and count:
            break
        deadline.check()
        count += len(block)
        yield _mono(block), rate
        if not len(block):
            break
    is_patched = length is not None and length.patches  # then libsndfile's log is of the patches
    if (length is not None and length.is_cut_off) or (not is_patched and _is_cut_off(file, count)):
        raise InputError("the audio clip is cut off: it holds less than it announces; pass a whole audio file")


def _header_seconds(source: str | bytes) -> float | None:
    header = _read_header(source)
    if header is not None:
        return None if header.frames > _UNKNOWN_LENGTH else header.frames / header.samplerate
    with open_container(source, "audio clip", "pass WAV, FLAC, Ogg or MP3") as (container, _):
        return container.duration / 1_000_000 if container.duration else None


def _measure_file(source: str | bytes, max_seconds: float) -> tuple[int, int]:
    header = _read_header(source)
    if header is None or header.format == "MP3" or header.frames > _UNKNOWN_LENGTH:
        samples, rate = _from_file(source, max_seconds)
        return len(samples), rate
    rate = check_rate(header.samplerate)
    _check_channels(header.channels)
    _check_duration(header.frames, rate, max_seconds)
    return header.frames, rate


def _read_header(source: str | bytes) -> "_Stream | None":
    """Return the closed file, with what its header states; None for one that soundfile does not open."""
    with open_file(source) as opened:
        try:
            header = _open_sound(opened, wav_length(opened))
            header.close()
        except Exception:  # of many types, where a header is malformed
            return None
    return header


def _open_sound(opened: BinaryIO, length: WavLength | None) -> "_Stream":
    file: Any = opened if length is None else PatchedFile(opened, length.patches)
    return _Stream(file)


class _Stream(soundfile.SoundFile):
    """Audio file that is read from the beginning to the end only.

    soundfile would seek as it reads, and fail where a FLAC file's header
    lacks the length, which an encoder that writes to a pipe does not know."""

    def seekable(self) -> bool:
        return False


def _is_cut_off(file: soundfile.SoundFile, num_read: int) -> bool:
    """Return whether a file was cut off, as far as libsndfile's log of the headers tells.

    The length in a header may be a little wrong (some programs count the header in), and it means nothing where the
    writer did not know it; such headers say 2 GiB or more, or where they have 64 bits, nearly all of what these hold.
    """
    log = file.extra_info
    match file.format:
        case "OGG":
            return "Junk after the last page" in log  # part of one more
        case "MP3":  # only with a variable bit rate does it state the length; otherwise it is estimated
            return re.search(r"bitrate mode *: variable", log) is not None and num_read < 0.99 * file.frames
    sizes = re.search(r"(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)", log)
    if sizes is None:
        return False
    announced, present = int(sizes[1]), int(sizes[2])
    if file.format == "WAV" and is_round(announced):
        return False
    unknown = MIN_UNKNOWN_64 if file.format in ("W64", "RF64") else MIN_UNKNOWN_32
    return present * 1.01 + 1024 < announced < unknown


def _container_blocks(
    source: str | bytes, deadline: Deadline, cause: Exception
) -> Iterator[tuple[Float[np.ndarray, " S"], int]]:
    """Decode by PyAV what soundfile cannot open, for the `cause` given."""
    if (other := other_kind(source, "audio", "video")) is not None:
        raise InputError(f"the file has no audio: {other}") from cause
    try:
        with open_container(source, "audio clip", "pass WAV, FLAC, Ogg or MP3", deadline) as (container, _):
            stream = container.streams.best("audio")
            if stream is None:
                raise InputError("the file has no audio; choose another")
            frames = _decode(container, stream, deadline)
            first = next(frames, None)
            if first is None:
                raise InputError("the file has no audio; check that it is whole")
            rate, count = check_rate(first.sample_rate), 0
            for samples in _frame_samples(first, frames):
                count += len(samples)
                yield _mono(samples), rate
            announced = _stated_seconds(container, stream)
            if announced is not None and announced > 1.01 * count / rate + 0.5:
                raise InputError("the audio clip is cut off: it holds less than it announces; pass a whole audio file")
            return
    except MissingPyAV as error:
        failure: Exception = error
    except (InputError, MemoryError):
        raise
    except Exception as error:  # decoders raise errors of many types
        failure = error
    reason = str(failure) if isinstance(failure, InputError) else f"PyAV: {failure!r:.200}"
    raise InputError(
        f"the audio clip cannot be read (soundfile: {getattr(cause, 'error_string', cause)!r:.200}; {reason}). "
        "Pass a whole audio file in a known format, such as WAV, FLAC, Ogg, MP3 or, with PyAV, M4A"
    ) from failure


def _decode(container: Any, stream: Any, deadline: Deadline) -> Iterator[Any]:
    for packet in container.demux(stream):
        deadline.check()
        yield from packet.decode()


def _frame_samples(first: Any, rest: Iterable[Any]) -> Iterator[Float[np.ndarray, "S C"]]:
    """Yield the frames' samples, of full scale 1."""
    import av

    _check_channels(first.layout.nb_channels)
    resampler = av.AudioResampler(format="fltp", layout=first.layout, rate=first.sample_rate)
    for frame in itertools.chain([first], rest):
        for converted in resampler.resample(frame):
            yield converted.to_ndarray().T


def _stated_seconds(container: Any, stream: Any) -> float | None:
    """Return the length that the header of MP4, or of Matroska with one stream, states; others estimate: None."""
    if container.format.name.startswith("mov,") and stream.duration:
        return float(stream.duration * stream.time_base)
    if "matroska" in container.format.name and len(container.streams) == 1 and container.duration:
        return container.duration / 1_000_000
    return None
