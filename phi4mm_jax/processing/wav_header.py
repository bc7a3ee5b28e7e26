"""Lengths that WAV headers state, and the files whose writers did not know theirs."""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

# A WAV header states, before its writer knows the length: nothing, nearly all that the field holds, or a round number
# of such a size. A file that was cut off states its exact length.
MIN_UNKNOWN_32, MIN_UNKNOWN_64 = 0x7FFF0000, 2**62
_MIN_ROUND, _ROUND, _HEADER_BYTES = 2**28, (2**20, 10**6), 128


@dataclass(frozen=True)
class WavLength:
    """Length of a WAV file, as far as its header tells it.

    Attributes:
        patches: bytes to read instead, by where they are, if the length was not known when the header was written.
        is_cut_off: whether it holds less than it announces.
    """

    patches: dict[int, bytes]
    is_cut_off: bool


def wav_length(file: BinaryIO) -> WavLength | None:
    """Compare the length that a WAV or RF64 file announces with the one that it has; None for other files.

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
    """Yield the name, start and size of each chunk from here to the file's end."""
    while at + 8 <= end:
        file.seek(at)
        name, size = struct.unpack(f"{order}4sI", file.read(8))
        yield name, at + 8, size
        at += 8 + size + size % 2


def _compared(file: BinaryIO, order: str, start: int, size: int, wide: int | None, end: int) -> WavLength:
    """Judge the announced length of the samples that begin at `start`."""
    announced = size
    if wide is not None and size == 0xFFFFFFFF:
        file.seek(wide + 8)
        announced = struct.unpack("<Q", file.read(8))[0]
    present = end - start
    if announced == 0:
        unknown = present > 0 and not _are_chunks(file, start, end, order)
    else:
        largest = MIN_UNKNOWN_32 if wide is None else MIN_UNKNOWN_64
        unknown = announced > present and (announced >= largest or is_round(announced))
    if not unknown:
        return WavLength({}, announced > present * 1.01 + 1024)
    patches = {start - 4: struct.pack(f"{order}I", min(present, 0xFFFFFFFF)), 4: struct.pack(f"{order}I", end - 8)}
    if wide is not None:
        patches = {wide: struct.pack("<QQ", end - 8, present), start - 4: b"\xff" * 4}
    return WavLength(patches, False)


def is_round(size: int) -> bool:
    """Return whether a size is a placeholder: a round number of 256 MiB or more, give or take a header."""
    return size >= _MIN_ROUND and any((size + _HEADER_BYTES) % unit <= 2 * _HEADER_BYTES for unit in _ROUND)


def _are_chunks(file: BinaryIO, at: int, end: int, order: str) -> bool:
    """Return whether there are whole chunks from here to the file's end: then nothing of it is sound."""
    for name, start, size in _chunks_of(file, at, end, order):
        at = start + size + size % 2
        if not name.isascii() or not name.decode("ascii").isprintable():
            return False
    return at in (end, end + 1)


class PatchedFile:
    """Binary file of which some bytes, by their position, are read as others."""

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
