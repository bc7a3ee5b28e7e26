"""Video: a few frames of a clip, evenly spaced, which the model takes as that many images.

The model card (Phi-4-multimodal-instruct) names the limits: 64 frames at most, and the more there are, the less of each
is seen. Training knew 64 crops in a prompt; here the frames of a clip share them evenly, so 64 frames have one crop
each (and the global view, as any image), 16 have four. A clip then takes 34,880 tokens at most.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.containers import MissingPyAV, open_container
from phi4mm_jax.processing.images import (
    CROP_SIZE,
    MAX_CROPS,
    MAX_PIXELS,
    ImageSource,
    check_size,
    load_image,
    registered_suffixes,
    shrink,
)
from phi4mm_jax.processing.sources import Deadline, each, other_kind, plain
from phi4mm_jax.utils.checks import is_whole

MAX_FRAMES = 64
_CROPS = 64  # of all frames together
_PARALLEL_PIXELS = 1920 * 1088  # larger frames are decoded one at a time: each thread holds some

# What lies closer ahead is decoded on the way; beyond it, decoding from the key frame before is expected to be less.
_SEEK_SECONDS = 5
_EARLIER_SECONDS = (0, 10)  # some formats seek to what can only be decoded from the next key frame on

VideoSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Sequence[ImageSource]


@dataclass(frozen=True)
class Frame:
    """Image that is to have this many crops at most."""

    image: Image.Image
    max_crops: int


def video_frames(
    source: VideoSource, frames: int = MAX_FRAMES, max_crops: int | None = None, crop_size: int = CROP_SIZE
) -> list[Image.Image]:
    """Return evenly spaced frames, each from the middle of an equal part of the clip.

    A clip of fewer frames gives each of them once. Files are searched, not read as a whole. Frames are turned as a
    player turns them, and scaled down, as they are decoded, to what the model sees of them: memory is bounded by the
    frames that are kept, of 0.6 MB a crop, and one more at its full size.

    Args:
        source: a video file (a path, an open binary file or its bytes) in one of the formats of
            `phi4mm_jax.processing.containers`, for which PyAV must be installed; a folder of images, in the order of
            their names, numbers by their value; or a list of images in any form of `load_image`'s.
        frames: maximum number, 1 to 64.
        max_crops: maximum per frame; by default its share, `crops_per_frame`.
        crop_size: of the checkpoint, in pixels.

    Raises:
        InputError: `frames` is out of range; a file is missing, unreadable or without video, or has frames that are too
            large; decoding takes too long; a folder has no images.
    """
    check_frames(frames)
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):
        source = _images_in(Path(source))
    if isinstance(source, list | tuple):
        if not source:
            raise InputError("the video is an empty list; expected one image at least")
        chosen = [source[i] for i in evenly_spaced(len(source), frames)]
        crops = _crops_seen(max_crops, len(chosen))
        return list(each("frame", chosen, lambda image: shrink(load_image(image), crops, crop_size)))
    source = plain(source)
    if not isinstance(source, str | bytes):
        raise InputError(
            f"the video is of type {type(source).__name__}; expected a path, a file or its bytes, or a list of images"
        )
    start, length = _span(source)
    times = [start + length * (2 * i + 1) / (2 * frames) for i in range(frames)]
    images = _decode(source, times, _crops_seen(max_crops, frames), crop_size)
    if _crops_seen(max_crops, len(images)) > _crops_seen(max_crops, frames):
        # A clip of fewer frames than asked for, so that decoding it again is little: each is seen at a larger size.
        images = _decode(source, times, _crops_seen(max_crops, len(images)), crop_size)
    return images


def _crops_seen(max_crops: int | None, frames: int) -> int:
    return min(max_crops or crops_per_frame(frames), MAX_CROPS)


def _decode(source: str | bytes, times: Sequence[Fraction], crops: int, crop_size: int) -> list[Image.Image]:
    try:
        return list(_frames_at(source, times, crops, crop_size, seek=True))
    except _SeekError:
        return list(_frames_at(source, times, crops, crop_size, seek=False))


def check_frames(frames: Any) -> None:
    """Raise an InputError unless it is a whole number from 1 to 64."""
    if not is_whole(frames, 1, MAX_FRAMES):
        raise InputError(f"frames is {frames!r:.80}; expected 1 to {MAX_FRAMES}, which is what the model supports")


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return evenly spaced numbers from 0 to total - 1, each in the middle of its share; all, if there are no more."""
    return sorted({total * (2 * i + 1) // (2 * count) for i in range(count)})


def crops_per_frame(frames: int) -> int:
    """Return each frame's share of a clip's crops."""
    return max(1, _CROPS // frames)


def _images_in(folder: Path) -> list[Path]:
    known = registered_suffixes()
    paths = [p for p in folder.iterdir() if p.suffix.lower() in known and not p.name.startswith(".")]
    if not paths:
        raise InputError(f"the folder {str(folder)!r:.200} has no images; expected the frames of a video")
    return sorted(paths, key=_natural)


def _natural(path: Path) -> tuple[list[str | int], str]:
    """Return a key that sorts frame_2 before frame_10: texts and numbers alternate."""
    pieces = re.split(r"([0-9]+)", path.name)
    return [int(p) if i % 2 else p for i, p in enumerate(pieces)], path.name


# Files


class _SeekError(Exception):
    """Error of a file that cannot be entered in the middle."""


@contextmanager
def _opened(source: str | bytes) -> Iterator[tuple[Any, Any, Deadline]]:
    """Open the file; yield it, its video stream and the deadline. Its errors become InputErrors."""
    try:
        with open_container(source, "video", "pass a folder, or a list, of frames") as (container, deadline):
            stream: Any = container.streams.best("video")
            if stream is None:
                raise InputError("the file has no video; pass it as audio, or choose another")
            context = stream.codec_context
            if context.width * context.height == 0:
                raise InputError(f"the video's frames have no size, or more than {MAX_PIXELS} pixels; shrink it")
            check_size(context.width, context.height, MAX_PIXELS, "video")
            context.options = {"max_pixels": str(MAX_PIXELS)}  # where a frame is larger than the header says
            context.thread_type = "AUTO" if context.width * context.height <= _PARALLEL_PIXELS else "NONE"
            yield container, stream, deadline
    except MissingPyAV as error:
        other = other_kind(source, "video")
        raise error if other is None else InputError(f"the file has no video: {other}") from error
    except (InputError, MemoryError, _SeekError):
        raise
    except Exception as error:  # decoders raise errors of many types
        if (other := other_kind(source, "video")) is not None:
            raise InputError(f"the file has no video: {other}") from error
        raise InputError(
            f"the video cannot be read ({error!r:.200}); check that it is whole, or convert it to MP4"
        ) from error


def _span(source: str | bytes) -> tuple[Fraction, Fraction]:
    """Return when the video begins, and how long it is, in seconds."""
    with _opened(source) as (container, stream, _):
        start = (stream.start_time or 0) * stream.time_base
        if (stream.duration or 0) > 0:
            return start, stream.duration * stream.time_base
        if (container.duration or 0) > 0:
            return start, Fraction(container.duration, 1_000_000)
        # A recorder that was writing to a pipe did not know it.
        packets = [(p.pts, p.duration or 0) for p in container.demux(stream) if p.pts is not None]
        if not packets:
            raise InputError("the video has no times; convert it to MP4")
        first = min(pts for pts, _ in packets)
        return first * stream.time_base, (max(map(sum, packets)) - first) * stream.time_base


def _frames_at(
    source: str | bytes, times: Sequence[Fraction], crops: int, crop_size: int, *, seek: bool
) -> Iterator[Image.Image]:
    """Yield what a player shows at these times, which rise, at the size that is seen in so many crops; each frame once.

    Raises:
        _SeekError: seeking leads past a time.
    """
    with _opened(source) as (container, stream, deadline):
        frames = _timed_frames(container, stream, deadline)
        shown, after, given = None, next(frames, None), None
        if after is None:
            raise InputError("the video has no frames; check that it is whole")
        for time in times:
            if seek and after is not None and time - after[0] > _SEEK_SECONDS:
                frames, after = _seek(container, stream, time, deadline)
                shown = None
            while after is not None and after[0] <= time:
                shown, after = after, next(frames, None)
            chosen = shown or after
            if chosen is not None and chosen[0] != given:
                given, frame = chosen
                yield shrink(_upright(frame), crops, crop_size)


def _upright(frame: Any) -> Image.Image:
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _seek(
    container: Any, stream: Any, time: Fraction, deadline: Deadline
) -> tuple[Iterator[tuple[Fraction, Any]], tuple[Fraction, Any]]:
    """Seek to a key frame before a time; return the frames after it, and it."""
    for earlier in _EARLIER_SECONDS:
        try:
            container.seek(int((time - earlier) / stream.time_base), stream=stream)
        except Exception as error:
            raise _SeekError from error
        frames = _timed_frames(container, stream, deadline)
        first = next(frames, None)
        if first is not None and first[0] <= time:
            return frames, first
    raise _SeekError


def _timed_frames(container: Any, stream: Any, deadline: Deadline) -> Iterator[tuple[Fraction, Any]]:
    for packet in container.demux(stream):
        deadline.check()
        for frame in packet.decode():
            if frame.pts is None:
                raise InputError("the video has frames without a time; convert it to MP4")
            check_size(frame.width, frame.height, MAX_PIXELS, "video")
            yield frame.pts * frame.time_base, frame
