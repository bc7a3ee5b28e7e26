"""Batches: processed rows assembled into static shapes; everything that depends on sizes is decided here."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from phi4mm_jax.adapters import NO_ADAPTER, default_adapter
from phi4mm_jax.batch import NO_MEDIA, AudioStack, Batch, ImageStack
from phi4mm_jax.config import Phi4MMConfig, SpeechConfig, VisionConfig
from phi4mm_jax.processing.audio_features import num_audio_tokens
from phi4mm_jax.processing.images import SUB_SEPARATOR, ImageFeatures
from phi4mm_jax.processing.prompt import Kind, Media

# Short sequences are padded to this: smaller matmuls round in another order, and cost no less.
_MIN_LENGTH = 64
_HALO_TOKENS = 1  # before each chunk; a whole token, see `AudioStack`


class Row(NamedTuple):
    """Prompt with its media processed and its tokens counted."""

    tokens: np.ndarray  # int32 (T,), the media's placeholders repeated
    media: tuple[tuple[Media, int], ...]  # each medium with the position of its first token
    images: tuple[ImageFeatures, ...]
    clips: tuple[np.ndarray, ...]  # log-mel frames

    @property
    def adapter(self) -> int:
        """`Adapter.index` of the media's adapter, or `NO_ADAPTER`."""
        return _adapter_index(self.images, self.clips)


class Outline(NamedTuple):
    """Sizes of a `Row`, as the headers of its media state them."""

    tokens: np.ndarray  # int32 (T,), as in the row
    images: tuple[int, ...]  # tokens of each
    clips: tuple[int, ...]  # tokens of each
    crops: int  # of all images

    @property
    def adapter(self) -> int:
        """`Adapter.index` of the media's adapter, or `NO_ADAPTER`."""
        return _adapter_index(self.images, self.clips)


def _adapter_index(images: Sequence[Any], clips: Sequence[Any]) -> int:
    adapter = default_adapter(bool(images), bool(clips))
    return NO_ADAPTER if adapter is None else adapter.index


class BatchSizes(NamedTuple):
    """Sizes that determine the shapes of a batch, besides its number of rows."""

    length: int
    crops: int  # 0: the batch has no stack of crops
    chunks: int  # 0: the batch has no stack of chunks
    chunk_tokens: int  # the capacity of a chunk


def bucketed_sizes(rows: Sequence[Row], config: Phi4MMConfig, context: int) -> BatchSizes:
    """Return the sizes of a batch of these rows, padded to the longest, counts and lengths rounded up to buckets."""
    crops = sum(len(f.crops) for f in _unique_images(rows).values())
    counts = [num_audio_tokens(len(frames)) for frames, _ in _unique_clips(rows).values()]
    max_tokens = config.speech.chunk_tokens
    return BatchSizes(
        min(bucket(max(len(r.tokens) for r in rows), _MIN_LENGTH), context),
        bucket(crops) if crops else 0,
        bucket(sum(num_chunks(n, max_tokens) for n in counts)) if counts else 0,
        bucket(max((min(n, max_tokens) for n in counts), default=0), _MIN_LENGTH),
    )


def assemble(
    rows: Sequence[Sequence[Row]], sizes: BatchSizes, config: Phi4MMConfig, part: int = 0, parts: int = 1
) -> Batch:
    """Put processed rows together, in each row of the batch several after one another, or none: as its segments.

    Features that are the same object in several rows are stacked once.

    Args:
        rows: those of one row of the batch need the same adapter.
        sizes: all rows must fit into them.
        config: the model's.
        part, parts: the batch is this one of several that will be joined along the first axis of every array:
            `media` counts in the joined stacks.
    """
    all_rows = [r for row in rows for r in row]
    images, clips = _unique_images(all_rows), _unique_clips(all_rows)
    features = parts * sizes.crops * config.vision.features_per_crop
    image_stack, image_rows = _stack_images(list(images.values()), sizes, config.vision, part, features)
    first_chunk = features + (2 if sizes.crops else 0) + part * sizes.chunks * sizes.chunk_tokens
    audio_stack, clip_rows = _stack_clips(list(clips.values()), sizes, config.speech, first_chunk)
    at_images, at_clips = dict(zip(images, image_rows, strict=True)), dict(zip(clips, clip_rows, strict=True))
    shape = len(rows), sizes.length
    tokens = np.full(shape, config.pad_token_id, np.int32)
    media, segments = np.full(shape, NO_MEDIA, np.int32), np.zeros(shape, np.int32)
    lengths, adapters = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32)
    for b, row in enumerate(rows):
        for number, r in enumerate(row, 1):
            start, stop = lengths[b], lengths[b] + len(r.tokens)
            tokens[b, start:stop], segments[b, start:stop] = r.tokens, number
            adapters[b], lengths[b] = r.adapter, stop
            indices: dict[Kind, list[np.ndarray]] = {
                "image": [at_images[id(f)] for f in r.images],
                "audio": [at_clips[id(c), bool(r.images)] for c in r.clips],
            }
            for medium, first in r.media:
                index = indices[medium.kind][medium.index]
                media[b, start + first : start + first + len(index)] = index
    return Batch(tokens, lengths, adapters, media, image_stack, audio_stack, segments)


def _stack_images(
    images: Sequence[ImageFeatures], sizes: BatchSizes, vision: VisionConfig, part: int, separators: int
) -> tuple[ImageStack | None, list[np.ndarray]]:
    """Return the stack of all crops, and for each image the rows of the features that its tokens take.

    The separators' rows come after all crops'.
    """
    if not sizes.crops:
        return None, []
    side = vision.crop_size
    crops = np.zeros((sizes.crops, side, side, 3), np.float32)
    mask = np.zeros((sizes.crops, vision.patches_per_side, vision.patches_per_side), bool)
    rows, start = [], 0
    for f in images:
        stop = start + len(f.crops)
        crops[start:stop], mask[start:stop] = f.crops, f.patch_mask
        separator = np.where(f.layout == SUB_SEPARATOR, separators, separators + 1)
        first = (part * sizes.crops + start) * vision.features_per_crop
        rows.append(np.where(f.layout >= 0, f.layout + first, separator))
        start = stop
    return ImageStack(crops, mask), rows


def _stack_clips(
    clips: Sequence[tuple[np.ndarray, bool]], sizes: BatchSizes, speech: SpeechConfig, offset: int
) -> tuple[AudioStack | None, list[np.ndarray]]:
    """Return the stack of all chunks, and for each clip the rows of the features, from `offset`, that it takes."""
    if not sizes.chunks:
        return None, []
    chunk = sizes.chunk_tokens
    shape = sizes.chunks, (_HALO_TOKENS + chunk) * speech.time_reduction, speech.num_bands
    scalars = (np.zeros(sizes.chunks, np.int32) for _ in ("first", "last", "attended"))
    stack = AudioStack(np.zeros(shape, np.float32), *scalars, with_images=np.zeros(sizes.chunks, bool))
    rows, start = [], 0
    for frames, with_images in clips:
        tokens = np.arange(num_audio_tokens(len(frames)))
        rows.append(offset + (start + tokens // speech.chunk_tokens) * chunk + tokens % speech.chunk_tokens)
        for entry in clip_chunks(frames, with_images, chunk, speech):
            for stacked, value in zip(stack, entry, strict=True):
                stacked[start] = value
            start += 1
    return stack, rows


def _unique_images(rows: Sequence[Row]) -> dict[int, ImageFeatures]:
    return {id(f): f for r in rows for f in r.images}


def _unique_clips(rows: Sequence[Row]) -> dict[tuple[int, bool], tuple[np.ndarray, bool]]:
    """Return the clips, and whether images are with them, which decides on their projector."""
    return {(id(c), bool(r.images)): (c, bool(r.images)) for r in rows for c in r.clips}


def num_chunks(tokens: int, max_tokens: int) -> int:
    """Return the number of audio chunks of a clip with this many tokens."""
    return math.ceil(tokens / max_tokens)


def clip_chunks(frames: np.ndarray, with_images: bool, tokens: int, speech: SpeechConfig) -> Iterator[AudioStack]:
    """Yield a clip's entries of an `AudioStack`, each with room for this many tokens."""
    reduction, max_tokens = speech.time_reduction, speech.chunk_tokens
    halo, count = _HALO_TOKENS * reduction, num_audio_tokens(len(frames))
    for start in range(0, len(frames), max_tokens * reduction):
        before = min(start, halo)
        piece = frames[start - before : start + max_tokens * reduction]
        first, last = halo - before, halo - before + len(piece)
        padded = np.zeros((halo + tokens * reduction, speech.num_bands), np.float32)
        padded[first:last] = piece
        # A clip that is cut attends to the zeros that fill its last chunk, as the original does.
        attended = count if count <= max_tokens else max_tokens
        yield AudioStack(padded, *(np.int32(n) for n in (first, last, attended)), with_images=np.bool_(with_images))


def bucket(n: int, min_size: int = 1) -> int:
    """Return the next size of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: four per power of two, at most
    1/4 more."""
    n = max(n, min_size)
    step = 1 << max((n - 1).bit_length() - 3, 0)
    return -(-n // step) * step
