"""Encoder cache: each crop and each audio chunk is encoded once and kept on the device, evicted LRU."""

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
from phi4mm_jax.processing.batching import Row, clip_chunks
from phi4mm_jax.processing.images import SUB_SEPARATOR

BLOCK_SIZE = 64  # features; an input's features take as many whole blocks as they need
_NONE, _SUB_SEPARATOR, _GLOBAL_SEPARATOR = -1, -2, -3


@dataclass(frozen=True)
class EncoderInput:
    """Crop of an image or audio chunk: the unit that is encoded and cached."""

    kind: Literal["image", "audio"]
    arrays: tuple[np.ndarray, ...] = field(repr=False)  # one entry of an `ImageStack` or `AudioStack`
    num_features: int
    digest: bytes  # of the arrays

    @property
    def num_blocks(self) -> int:
        return math.ceil(self.num_features / BLOCK_SIZE)


@dataclass(frozen=True)
class MediaInputs:
    """Media of one prompt.

    Attributes:
        inputs: of the encoders.
        input_index: per token the input that its feature is of, or a separator, or none.
        feature_index: per token the index of its feature in that input.
        spans: for each medium its first token, one past its last, and its content hash.
    """

    inputs: tuple[EncoderInput, ...]
    input_index: np.ndarray
    feature_index: np.ndarray
    spans: tuple[tuple[int, int, bytes], ...]


Chunk = tuple[MediaInputs, int, int]  # a prompt's media, and its tokens from start to stop


def media_inputs(row: Row, config: Phi4MMConfig) -> MediaInputs:
    """Cut a prompt's media into inputs of the encoders, and map its tokens to their features."""
    inputs: list[EncoderInput] = []
    input_index = np.full(len(row.tokens), _NONE, np.int32)
    feature_index = np.zeros(len(row.tokens), np.int32)
    spans = []
    per_crop = config.vision.features_per_crop
    for medium, start in row.media:
        if medium.kind == "image":
            image = row.images[medium.index]
            own = [_input("image", per_crop, c, m) for c, m in zip(image.crops, image.patch_mask, strict=True)]
            separator = np.where(image.layout == SUB_SEPARATOR, _SUB_SEPARATOR, _GLOBAL_SEPARATOR)
            numbers = np.where(image.layout >= 0, image.layout // per_crop + len(inputs), separator)
            features, extra = np.maximum(image.layout, 0) % per_crop, image.layout.tobytes()
        else:
            own = list(_audio_chunks(row.clips[medium.index], bool(row.images), config))
            tokens = np.arange(num_audio_tokens(len(row.clips[medium.index])))
            per_chunk, extra = config.speech.chunk_tokens, b""
            numbers, features = tokens // per_chunk + len(inputs), tokens % per_chunk
        stop = start + len(numbers)
        input_index[start:stop], feature_index[start:stop] = numbers, features
        digest = hashlib.blake2b(b"".join(x.digest for x in own) + extra, digest_size=16).digest()
        spans.append((start, stop, digest))
        inputs += own
    return MediaInputs(tuple(inputs), input_index, feature_index, tuple(spans))


def _input(kind: Literal["image", "audio"], num_features: int, *arrays: Any) -> EncoderInput:
    arrays = tuple(np.asarray(a) for a in arrays)
    state = hashlib.blake2b(kind.encode(), digest_size=16)
    for array in arrays:
        state.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return EncoderInput(kind, arrays, num_features, state.digest())


def _audio_chunks(frames: np.ndarray, with_images: bool, config: Phi4MMConfig) -> Iterator[EncoderInput]:
    """Yield a clip's chunks, each padded to one of a few lengths."""
    count = min(num_audio_tokens(len(frames)), config.speech.chunk_tokens)
    tokens = next(n for n in _chunk_lengths(config) if n >= count)
    for entry in clip_chunks(frames, with_images, tokens, config.speech):
        yield _input("audio", tokens, *entry)


def group_sizes(devices: int) -> list[int]:
    """Numbers of inputs that are encoded at once, the largest first: as many on each of the devices."""
    return sorted({math.ceil(n / devices) * devices for n in (4, 1)}, reverse=True)


def warm_up_stacks(config: Phi4MMConfig, sizes: Sequence[int]) -> Iterator[tuple[ImageStack | AudioStack, int]]:
    """Yield zeros in every shape that is ever encoded, and their number of features."""
    vision, speech = config.vision, config.speech
    side, patches, reduction = vision.crop_size, vision.patches_per_side, speech.time_reduction
    for count in sizes:
        if config.has_vision:
            crops = np.zeros((count, side, side, 3), np.float32)
            yield ImageStack(crops, np.zeros((count, patches, patches), bool)), count * vision.features_per_crop + 2
        number = np.zeros(count, np.int32)
        for tokens in _chunk_lengths(config) if config.has_speech else ():
            frames = np.zeros((count, reduction + tokens * reduction, speech.num_bands), np.float32)
            yield AudioStack(frames, number, number, number, number.astype(bool)), count * tokens


def _chunk_lengths(config: Phi4MMConfig) -> list[int]:
    """Return the token counts that audio chunks are padded to."""
    whole = config.speech.chunk_tokens
    return sorted({n for n in (64, 128, 256) if n < whole} | {whole})


class EncoderCache:
    """Table of features on the device, in blocks of 64, with the inputs that they were encoded from.

    Args:
        encode: (table, stack, rows of the table for its features) -> table; see `Programs.encode`.
        table: (64 * blocks, D); the first block has the two separators.
        group_sizes: numbers of inputs that are encoded at once; fewer than the smallest are padded to it.
    """

    def __init__(self, encode: Callable[..., Any], table: Any, group_sizes: Sequence[int]):
        self.table = table
        self.group_sizes = group_sizes
        self.num_encoded = 0  # inputs, since the start
        self._encode = encode
        self._free = list(range(1, len(table) // BLOCK_SIZE))[::-1]
        self._blocks: OrderedDict[bytes, list[int]] = OrderedDict()  # by the inputs' digests, least recently used first

    @property
    def capacity(self) -> int:
        """Number of blocks for inputs."""
        return len(self.table) // BLOCK_SIZE - 1

    def warm_up(self, stack: ImageStack | AudioStack, num_features: int) -> None:
        """Encode a stack and keep none of its features."""
        self.table = self._encode(self.table, stack, np.full(num_features, len(self.table), np.int32))  # out of range

    def max_stop(self, media: MediaInputs, start: int, stop: int) -> int:
        """Return the end, `stop` at most, of the longest run of tokens from `start` whose inputs fit into the table."""
        if sum(x.num_blocks for x in media.inputs) <= self.capacity:
            return stop
        numbers, first = np.unique(media.input_index[start:stop], return_index=True)
        room = self.capacity
        for at, number in sorted(zip(first.tolist(), numbers.tolist(), strict=True)):
            room -= media.inputs[number].num_blocks if number >= 0 else 0
            if room < 0:
                return start + at
        return stop

    def fits(self, chunks: Sequence[Chunk]) -> bool:
        """Return whether the inputs of all these tokens fit into the table together."""
        return sum(x.num_blocks for x in _inputs_of(chunks).values()) <= self.capacity

    def lookup_or_encode(self, chunks: Sequence[Chunk]) -> list[np.ndarray]:
        """Return the table rows of each chunk's tokens, `NO_MEDIA` for text; encode inputs that are missing."""
        needed = _inputs_of(chunks)
        for digest in needed.keys() & self._blocks.keys():
            self._blocks.move_to_end(digest)
        self._encode_all([x for digest, x in needed.items() if digest not in self._blocks], needed)
        return [self._rows(*chunk) for chunk in chunks]

    def _rows(self, media: MediaInputs, start: int, stop: int) -> np.ndarray:
        inputs, features = media.input_index[start:stop], media.feature_index[start:stop]
        rows = np.full(len(inputs), NO_MEDIA, np.int32)  # empty where a chunk begins behind the prompt
        rows[inputs == _SUB_SEPARATOR], rows[inputs == _GLOBAL_SEPARATOR] = 0, 1
        for number in np.unique(inputs[inputs >= 0]).tolist():
            blocks = np.asarray(self._blocks[media.inputs[number].digest])
            at = features[inputs == number]
            rows[inputs == number] = blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        return rows

    def _encode_all(self, inputs: Sequence[EncoderInput], pinned: Collection[bytes]) -> None:
        by_shape: dict[tuple, list[EncoderInput]] = {}
        for x in inputs:
            by_shape.setdefault((x.kind, x.num_features), []).append(x)
        for (kind, _), waiting in by_shape.items():
            while waiting:
                size = next((n for n in self.group_sizes if n <= len(waiting)), self.group_sizes[-1])
                group, waiting = waiting[:size], waiting[size:]
                missing = size - len(group)
                nowhere = np.full(missing * group[0].num_features, len(self.table))  # out of range: dropped
                rows = np.concatenate([*(self._allocate(x, pinned) for x in group), nowhere])
                padded = [*group, *group[:1] * missing]
                stacked = (np.stack(arrays) for arrays in zip(*(x.arrays for x in padded), strict=True))
                if kind == "image":
                    stack, rows = ImageStack(*stacked), np.concatenate([rows, [0, 1]])
                else:
                    stack = AudioStack(*stacked)
                self.table = self._encode(self.table, stack, rows.astype(np.int32))
                self.num_encoded += len(group)

    def _allocate(self, x: EncoderInput, pinned: Collection[bytes]) -> np.ndarray:
        """Return rows for an input's features; evict LRU inputs if need be, except pinned ones."""
        while len(self._free) < x.num_blocks:
            oldest = next(digest for digest in self._blocks if digest not in pinned)
            self._free += self._blocks.pop(oldest)
        blocks = [self._free.pop() for _ in range(x.num_blocks)]
        self._blocks[x.digest] = blocks
        rows = np.concatenate([np.arange(b * BLOCK_SIZE, (b + 1) * BLOCK_SIZE) for b in blocks])
        return rows[: x.num_features]


def _inputs_of(chunks: Iterable[Chunk]) -> dict[bytes, EncoderInput]:
    """Return the inputs of these tokens, by digest."""
    return {
        media.inputs[n].digest: media.inputs[n]
        for media, start, stop in chunks
        for n in np.unique(media.input_index[start:stop]).tolist()
        if n >= 0
    }
