"""Encoded media on the device: each crop and each chunk of a clip once, for as long as there is room."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from phi4mm_jax.batch import NO_MEDIA, AudioStack, ImageStack
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.processing.audio_features import num_audio_tokens
from phi4mm_jax.processing.images import SUB_SEPARATOR
from phi4mm_jax.processing.processor import Row, clip_chunks

_BLOCK = 64  # features; units are kept in as many blocks as they need
_GROUPS = (4, 1)  # units that are encoded at once
_NONE, _SUB_SEPARATOR, _GLOBAL_SEPARATOR = -1, -2, -3


@dataclass(frozen=True)
class Unit:
    """A crop or a chunk: what is encoded by itself."""

    kind: Literal["image", "audio"]
    arrays: tuple[np.ndarray, ...] = field(repr=False)  # one entry of an `ImageStack` or `AudioStack`
    features: int
    digest: bytes  # of the arrays


@dataclass(frozen=True)
class RowMedia:
    """The media of one prompt.

    Attributes:
        units: what has to be encoded.
        unit: for each token the unit that it takes a feature of, or a separator, or none.
        offset: which feature of the unit.
        spans: for each medium its first token, one past its last, and what tells it from all others.
    """

    units: tuple[Unit, ...]
    unit: np.ndarray
    offset: np.ndarray
    spans: tuple[tuple[int, int, bytes], ...]


def media_of(row: Row, config: Phi4MMConfig) -> RowMedia:
    units: list[Unit] = []
    unit = np.full(len(row.tokens), _NONE, np.int32)
    offset = np.zeros(len(row.tokens), np.int32)
    spans = []
    per_crop = config.vision.features_per_crop
    for medium, start in row.media:
        if medium.kind == "image":
            image = row.images[medium.index]
            own = [_unit("image", per_crop, c, m) for c, m in zip(image.crops, image.patch_mask, strict=True)]
            separator = np.where(image.layout == SUB_SEPARATOR, _SUB_SEPARATOR, _GLOBAL_SEPARATOR)
            numbers = np.where(image.layout >= 0, image.layout // per_crop + len(units), separator)
            offsets, extra = np.maximum(image.layout, 0) % per_crop, image.layout.tobytes()
        else:
            own = list(_chunks(row.clips[medium.index], bool(row.images), config))
            tokens = np.arange(num_audio_tokens(len(row.clips[medium.index])))
            most, extra = config.speech.chunk_tokens, b""
            numbers, offsets = tokens // most + len(units), tokens % most
        stop = start + len(numbers)
        unit[start:stop], offset[start:stop] = numbers, offsets
        digest = hashlib.blake2b(b"".join(u.digest for u in own) + extra, digest_size=16).digest()
        spans.append((start, stop, digest))
        units += own
    return RowMedia(tuple(units), unit, offset, tuple(spans))


def _unit(kind: Literal["image", "audio"], features: int, *arrays: Any) -> Unit:
    arrays = tuple(np.asarray(a) for a in arrays)
    state = hashlib.blake2b(kind.encode(), digest_size=16)
    for array in arrays:
        state.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return Unit(kind, arrays, features, state.digest())


def _chunks(frames: np.ndarray, with_images: bool, config: Phi4MMConfig) -> Iterator[Unit]:
    """A clip's chunks, each padded to one of a few lengths."""
    count = min(num_audio_tokens(len(frames)), config.speech.chunk_tokens)
    tokens = next(n for n in _lengths(config) if n >= count)
    for entry in clip_chunks(frames, with_images, tokens, config.speech):
        yield _unit("audio", tokens, *entry)


def every_stack(config: Phi4MMConfig) -> Iterator[tuple[ImageStack | AudioStack, int]]:
    """Zeros in every shape that is ever encoded, and how many features each gives."""
    vision, speech = config.vision, config.speech
    side, patches, reduction = vision.crop_size, vision.patches_per_side, speech.time_reduction
    for count in _GROUPS:
        if config.has_vision:
            crops = np.zeros((count, side, side, 3), np.float32)
            yield ImageStack(crops, np.zeros((count, patches, patches), bool)), count * vision.features_per_crop + 2
        number = np.zeros(count, np.int32)
        for tokens in _lengths(config) if config.has_speech else ():
            frames = np.zeros((count, reduction + tokens * reduction, speech.num_bands), np.float32)
            yield AudioStack(frames, number, number, number, number.astype(bool)), count * tokens


def _lengths(config: Phi4MMConfig) -> list[int]:
    """Tokens to which chunks are padded."""
    most = config.speech.chunk_tokens
    return sorted({n for n in (64, 128, 256) if n < most} | {most})


class EncoderCache:
    """A table of features on the device, and what lies where in it.

    Args:
        encode: (table, stack, rows of the table for its features) -> table; see `Programs.encode`.
        table: (64 * blocks, D); the first block has the two separators.
    """

    def __init__(self, encode: Callable[..., Any], table: Any):
        self.table = table
        self._encode = encode
        self._free = list(range(1, len(table) // _BLOCK))[::-1]
        self._blocks: OrderedDict[bytes, list[int]] = OrderedDict()  # the longest unused first

    @property
    def capacity(self) -> int:
        return len(self.table) // _BLOCK - 1

    def warm_up(self, stack: ImageStack | AudioStack, features: int) -> None:
        """Encode a stack, and keep nothing of it."""
        self.table = self._encode(self.table, stack, np.full(features, len(self.table), np.int32))  # out of range

    def fit(self, media: RowMedia, start: int, stop: int) -> int:
        """How far from `start` on, at most to `stop`, the tokens' units fit into the table together."""
        numbers, first = np.unique(media.unit[start:stop], return_index=True)
        room = self.capacity
        for at, number in sorted(zip(first.tolist(), numbers.tolist(), strict=True)):
            room -= _blocks(media.units[number]) if number >= 0 else 0
            if room < 0:
                return start + at
        return stop

    def fits(self, media: Sequence[tuple[RowMedia, int, int]]) -> bool:
        """Whether the units of all these tokens fit together."""
        return sum(map(_blocks, _units(media).values())) <= self.capacity

    def rows(self, media: Sequence[tuple[RowMedia, int, int]]) -> list[np.ndarray]:
        """For each prompt's tokens from start to stop the rows of the table; encodes what is not there."""
        needed = _units(media)
        for digest in needed.keys() & self._blocks.keys():
            self._blocks.move_to_end(digest)
        self._add([unit for digest, unit in needed.items() if digest not in self._blocks], needed)
        return [self._index(m, start, stop) for m, start, stop in media]

    def _index(self, media: RowMedia, start: int, stop: int) -> np.ndarray:
        unit, offset = media.unit[start:stop], media.offset[start:stop]
        index = np.full(len(unit), NO_MEDIA, np.int32)  # none where a chunk begins behind the prompt
        index[unit == _SUB_SEPARATOR], index[unit == _GLOBAL_SEPARATOR] = 0, 1
        for number in np.unique(unit[unit >= 0]).tolist():
            blocks = np.asarray(self._blocks[media.units[number].digest])
            at = offset[unit == number]
            index[unit == number] = blocks[at // _BLOCK] * _BLOCK + at % _BLOCK
        return index

    def _add(self, units: Sequence[Unit], pinned: Collection[bytes]) -> None:
        alike: dict[tuple, list[Unit]] = {}
        for unit in units:
            alike.setdefault((unit.kind, unit.features), []).append(unit)
        for (kind, _), waiting in alike.items():
            while waiting:
                size = next(n for n in _GROUPS if n <= len(waiting))
                group, waiting = waiting[:size], waiting[size:]
                rows = np.concatenate([self._place(unit, pinned) for unit in group])
                stacked = (np.stack(arrays) for arrays in zip(*(u.arrays for u in group), strict=True))
                if kind == "image":
                    stack, rows = ImageStack(*stacked), np.concatenate([rows, [0, 1]])
                else:
                    stack = AudioStack(*stacked)
                self.table = self._encode(self.table, stack, rows.astype(np.int32))

    def _place(self, unit: Unit, pinned: Collection[bytes]) -> np.ndarray:
        """Rows for a unit's features, where need be those of the units that were not used for longest."""
        count = _blocks(unit)
        while len(self._free) < count:
            oldest = next(digest for digest in self._blocks if digest not in pinned)
            self._free += self._blocks.pop(oldest)
        blocks = [self._free.pop() for _ in range(count)]
        self._blocks[unit.digest] = blocks
        rows = np.concatenate([np.arange(b * _BLOCK, (b + 1) * _BLOCK) for b in blocks])
        return rows[: unit.features]


def _units(media: Iterable[tuple[RowMedia, int, int]]) -> dict[bytes, Unit]:
    """The units of these prompts' tokens from start to stop."""
    return {
        m.units[n].digest: m.units[n]
        for m, start, stop in media
        for n in np.unique(m.unit[start:stop]).tolist()
        if n >= 0
    }


def _blocks(unit: Unit) -> int:
    return math.ceil(unit.features / _BLOCK)
