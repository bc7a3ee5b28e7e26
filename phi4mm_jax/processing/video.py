"""Video: a few frames of a clip, evenly spaced, which the model takes as that many images.

The model card (Phi-4-multimodal-instruct) names the limits: 64 frames at most, and the more there are, the less of each
is seen. Training knew 64 crops in a prompt; here the frames of a clip share them evenly, so 64 frames have one crop
each (and the global view, as any image), 16 have four. A clip then takes 34,880 tokens at most.
"""

import io
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
from phi4mm_jax.processing.images import ImageSource, load_image
from phi4mm_jax.processing.sources import each, plain

MAX_FRAMES = 64
_CROPS = 64  # of all frames together

# What lies closer ahead is decoded on the way; beyond it, decoding from the key frame before is expected to be less.
_SEEK_SECONDS = 5
_EARLIER_SECONDS = (0, 10)  # some formats seek to what can only be decoded from the next key frame on

VideoSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Sequence[ImageSource]


@dataclass(frozen=True)
class Frame:
    """An image that is to have this many crops at most."""

    image: Image.Image
    max_crops: int


def video_frames(source: VideoSource, frames: int = MAX_FRAMES) -> list[Image.Image]:
    """Evenly spaced frames: of so many equal parts of the clip, what is shown in the middle of each.

    A clip of fewer frames gives each of them once. Files are searched, not read as a whole: what is in memory at once
    are the chosen frames, of 3 bytes a pixel. Frames are turned as a player turns them.

    Args:
        source: a video file (a path, an open binary file or its bytes), for which PyAV must be installed; a folder of
            images, in the order of their names, numbers by their value; or a list of images in any form of
            `load_image`'s.
        frames: how many at most, 1 to 64.

    Raises:
        InputError: `frames` is out of range; a file is missing, unreadable or without video; a folder has no images.
    """
    check_frames(frames)
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):
        source = _images_in(Path(source))
    if isinstance(source, list | tuple):
        if not source:
            raise InputError("the video is an empty list; expected one image at least")
        return list(each("frame", [source[i] for i in evenly_spaced(len(source), frames)], load_image))
    source = plain(source)
    if not isinstance(source, str | bytes):
        raise InputError(
            f"the video is of type {type(source).__name__}; expected a path, a file or its bytes, or a list of images"
        )
    start, length = _span(source)
    times = [start + length * (2 * i + 1) / (2 * frames) for i in range(frames)]
    try:
        return list(_shown_at(source, times, seek=True))
    except _SeekError:
        return list(_shown_at(source, times, seek=False))


def check_frames(frames: Any) -> None:
    """Raises an InputError unless it is 1 to 64."""
    if not isinstance(frames, int) or isinstance(frames, bool) or not 1 <= frames <= MAX_FRAMES:
        raise InputError(f"frames is {frames!r:.80}; expected 1 to {MAX_FRAMES}, which is what the model supports")


def evenly_spaced(total: int, count: int) -> list[int]:
    """So many of the numbers 0 to total - 1, each in the middle of its equal share; all, if there are no more."""
    return sorted({total * (2 * i + 1) // (2 * count) for i in range(count)})


def crops_per_frame(frames: int) -> int:
    """The share of each of so many frames in the crops of a clip."""
    return max(1, _CROPS // frames)


def video_placeholders(frames: int, first: int = 1) -> str:
    """The frames' placeholders in a raw prompt, where they are the images from number `first` on.

    With it go the frames in `images`, and `max_crops=crops_per_frame(frames)`; in a chat, a part of type video does all
    of this by itself.
    """
    return "".join(f"<|image_{n}|>" for n in range(first, first + frames))


def _images_in(folder: Path) -> list[Path]:
    known = Image.registered_extensions()
    paths = [p for p in folder.iterdir() if p.suffix.lower() in known and not p.name.startswith(".")]
    if not paths:
        raise InputError(f"the folder {str(folder)!r:.200} has no images; expected the frames of a video")
    return sorted(paths, key=_natural)


def _natural(path: Path) -> tuple[list[str | int], str]:
    """frame_2 before frame_10: texts and numbers take turns."""
    pieces = re.split(r"([0-9]+)", path.name)
    return [int(p) if i % 2 else p for i, p in enumerate(pieces)], path.name


# Files


class _SeekError(Exception):
    """The file cannot be entered in the middle."""


@contextmanager
def _opened(source: str | bytes) -> Iterator[tuple[Any, Any]]:
    """The file and its video stream; what goes wrong with it becomes an InputError."""
    try:
        import av
    except ImportError:
        raise InputError(
            "video files need PyAV: pip install 'phi4mm-jax[video]'; or pass a folder, or a list, of frames"
        ) from None
    # A playlist must not lead to the network, and one that came as bytes to no file either.
    if isinstance(source, bytes):
        file, protocols = io.BytesIO(source), "none"
    else:
        file, protocols = f"file:{os.path.abspath(source)}", "file"
    try:
        with av.open(file, options={"protocol_whitelist": protocols}) as container:
            stream: Any = container.streams.best("video")
            if stream is None:
                raise InputError("the file has no video; pass it as audio, or choose another")
            stream.thread_type = "AUTO"
            yield container, stream
    except (InputError, MemoryError, _SeekError):
        raise
    except Exception as error:  # decoders raise errors of many types
        raise InputError(
            f"the video cannot be read ({error!r:.200}); check that it is whole, or convert it to MP4"
        ) from error


def _span(source: str | bytes) -> tuple[Fraction, Fraction]:
    """When the video begins, and how long it is, in seconds."""
    with _opened(source) as (container, stream):
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


def _shown_at(source: str | bytes, times: Sequence[Fraction], *, seek: bool) -> Iterator[Image.Image]:
    """What a player shows at these times, which rise; each frame once.

    Raises:
        _SeekError: seeking leads past a time.
    """
    with _opened(source) as (container, stream):
        frames = _timed(container, stream)
        shown, after, given = None, next(frames, None), None
        if after is None:
            raise InputError("the video has no frames; check that it is whole")
        for time in times:
            if seek and after is not None and time - after[0] > _SEEK_SECONDS:
                frames, after = _jump(container, stream, time)
                shown = None
            while after is not None and after[0] <= time:
                shown, after = after, next(frames, None)
            chosen = shown or after
            if chosen is not None and chosen[0] != given:
                given, frame = chosen
                image = frame.to_image()
                yield image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _jump(container: Any, stream: Any, time: Fraction) -> tuple[Iterator[tuple[Fraction, Any]], tuple[Fraction, Any]]:
    """Frames from a key frame before a time on: the rest, and the first."""
    for earlier in _EARLIER_SECONDS:
        try:
            container.seek(int((time - earlier) / stream.time_base), stream=stream)
        except Exception as error:
            raise _SeekError from error
        frames = _timed(container, stream)
        first = next(frames, None)
        if first is not None and first[0] <= time:
            return frames, first
    raise _SeekError


def _timed(container: Any, stream: Any) -> Iterator[tuple[Fraction, Any]]:
    for frame in container.decode(stream):
        if frame.pts is None:
            raise InputError("the video has frames without a time; convert it to MP4")
        yield frame.pts * frame.time_base, frame
