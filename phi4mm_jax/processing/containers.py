"""Files of sound and moving pictures (MP4, WebM, ...), demuxed and decoded by FFmpeg within this process (PyAV).

FFmpeg knows formats that name other files or addresses (playlists, concatenations, sessions), and protocols to follow
them. A medium may come from anybody, so only containers that hold their streams themselves are opened, from an open
file, and no protocol is allowed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.images import MAX_PIXELS
from phi4mm_jax.processing.sources import Deadline, open_file

# Names of FFmpeg's demuxers. None reads another file than the one that it is given.
FORMATS = (
    "aac", "ac3", "aiff", "amr", "amrnb", "amrwb", "ape", "asf", "au", "avi", "dts", "eac3", "flac", "flv",
    "gif", "ivf", "m4v", "matroska", "mov", "mp3", "mpeg", "mpegts", "mxf", "nut", "ogg", "rm", "tta", "w64", "wav",
    "wv",
)  # fmt: skip


class MissingPyAV(InputError):
    """File that only PyAV opens, which is not installed."""


@contextmanager
def open_container(
    source: str | bytes, what: str, advice: str, deadline: Deadline | None = None
) -> Iterator[tuple[Any, Deadline]]:
    """Open a file in one of `FORMATS`, as PyAV opens it, and the deadline of its decoding.

    Args:
        source: a path or the bytes of a file.
        what: "video" or "audio clip", for errors.
        advice: what to pass instead where PyAV is not installed.
        deadline: of the decoding; by default `MAX_DECODE_SECONDS` from now on.

    Raises:
        MissingPyAV: PyAV is not installed.
        Exception: of PyAV, of many types, here and in the body.
    """
    try:
        import av
    except ImportError:
        raise MissingPyAV(f"the {what} needs PyAV: pip install '.[video]'; or {advice}") from None
    deadline = Deadline(what) if deadline is None else deadline
    options = {
        "protocol_whitelist": "none",
        "format_whitelist": ",".join(FORMATS),
        "max_pixels": str(MAX_PIXELS),  # of a frame, before it is decoded
    }
    with open_file(source) as file, av.open(_Reader(file, deadline), options=options) as container:
        yield container, deadline


class _Reader:
    """Binary file that is read until the deadline."""

    def __init__(self, file: BinaryIO, deadline: Deadline):
        self._deadline, self._file = deadline, file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        self._deadline.check()
        return self._file.read(size)
