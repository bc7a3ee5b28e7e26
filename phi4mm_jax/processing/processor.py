"""Processor: prompts, images and audio become rows, and rows the static-shaped `Batch`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from phi4mm_jax.adapters import ADAPTERS, default_adapter
from phi4mm_jax.batch import Batch
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.errors import ContextLengthError, InputError
from phi4mm_jax.processing.audio import load_audio, measure_audio
from phi4mm_jax.processing.audio_features import (
    log_mel,
    num_audio_tokens,
    num_frames,
)
from phi4mm_jax.processing.batching import Outline, Row, assemble, bucketed_sizes
from phi4mm_jax.processing.chat import parse_prompt
from phi4mm_jax.processing.images import (
    ImageSource,
    check_max_crops,
    count_crops,
    count_image_tokens,
    image_size,
    load_image,
    preprocess_image,
)
from phi4mm_jax.processing.processor_files import check_processing, read_context, read_dynamic_hd
from phi4mm_jax.processing.prompt import Media, Prompt, Tokens, given_media
from phi4mm_jax.processing.sources import each
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.processing.video import Frame

PromptLike = str | Sequence[Mapping[str, Any]]


class Processor:
    """Prompts to batches; holds the tokenizer and the checkpoint's processing settings.

    Attributes:
        context: tokens of the longest sequence.
        merged: the adapter that is part of the weights: other prompts than its own are refused.
    """

    def __init__(
        self, config: Phi4MMConfig, tokenizer: Tokenizer, dynamic_hd: int, context: int, merged: str | None = None
    ):
        self.config, self.tokenizer, self.dynamic_hd, self.context = config, tokenizer, dynamic_hd, context
        self.merged = merged

    @classmethod
    def from_folder(cls, folder: str | Path, config: Phi4MMConfig) -> "Processor":
        """Read the tokenizer's and the processor's files of a checkpoint.

        Raises:
            CheckpointError: a file is missing or unusable.
        """
        folder = Path(folder)
        check_processing(folder, config)
        return cls(config, Tokenizer.from_folder(folder), read_dynamic_hd(folder), read_context(folder, config))

    def __call__(
        self,
        prompts: Sequence[PromptLike],
        images: Sequence[Sequence[Any] | None] | None = None,
        audios: Sequence[Sequence[Any] | None] | None = None,
        max_crops: int | None = None,
        *,
        continue_final_message: bool = False,
    ) -> Batch:
        """Process one prompt a row.

        Args:
            prompts: a list of raw strings with placeholders, or of lists of chat messages.
            images: for each row the list of its images. An image is a PIL image; a path, a URL (`data:` or `file:`), an
                open binary file or the bytes of one; or a uint8 array or tensor (H, W), (H, W, 1), (H, W, 3) or
                (H, W, 4).
            audios: for each row the list of its clips. A clip is a path, a URL, an open binary file or the bytes of
                one; or (samples, sampling rate in Hz) with an array, tensor or list of floats of full scale 1 or of
                integers of 8 (uint8 is centred at 128), 16 or 32 bits: (n,), (n, channels) or (channels, n).
            max_crops: the largest number of crops of an image, besides its global view, up to the checkpoint's (36).
                Frames of a video part have their own.
            continue_final_message: the last message of each chat, the assistant's, is the beginning of its answer.

        Raises:
            InputError: anything that cannot be processed; it names the row. A MediaError names the medium by its number
                in the row as well.
        """
        rows = self.rows(prompts, images, audios, max_crops, continue_final_message=continue_final_message)
        return self.batch(rows)

    def rows(
        self,
        prompts: Sequence[PromptLike],
        images: Sequence[Sequence[Any] | None] | None = None,
        audios: Sequence[Sequence[Any] | None] | None = None,
        max_crops: int | None = None,
        *,
        continue_final_message: bool = False,
        adapter: str | None = None,
    ) -> list[Row]:
        """Process the prompts, each by itself; as in `__call__`, and as in `row`."""
        is_list = isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes)
        if not is_list or not prompts or isinstance(prompts[0], Mapping):
            one = "; this is one chat: put it into a list" if is_list and prompts else ""
            raise InputError(
                f"prompts must be a non-empty list with one entry per row{one or '; put a single prompt into a list'}"
            )
        rows = []
        for i, prompt in enumerate(prompts):
            try:
                media = _row_media(images, i, prompts, "images"), _row_media(audios, i, prompts, "audios")
                rows.append(self.row(prompt, *media, max_crops, continue_final_message, adapter))
            except InputError as error:
                raise type(error)(f"prompt {i}: {error}") from error
        return rows

    def row(
        self,
        prompt: PromptLike,
        images: Sequence[Any] = (),
        audios: Sequence[Any] = (),
        max_crops: int | None = None,
        continue_final_message: bool = False,
        adapter: str | None = None,
    ) -> Row:
        """Process one prompt by itself.

        Args:
            adapter: the one that will be used, whatever the media; by default that of the media, which the checkpoint
                must have.

        Raises:
            InputError: as in `__call__`, and when the prompt is empty.
            ContextLengthError: the prompt is longer than the context.
        """
        parsed = parse_prompt(
            prompt, self.tokenizer, images, audios, continue_final_message=continue_final_message,
            crop_size=self.config.vision.crop_size,
        )  # fmt: skip
        return self.row_of(parsed, max_crops, adapter)

    def row_of(self, prompt: Prompt, max_crops: int | None = None, adapter: str | None = None) -> Row:
        """Process one prompt that is parsed already, as `row` does."""
        _check_media(self.config, self.merged, bool(prompt.images), bool(prompt.audios), adapter)
        vision, limit = self.config.vision, self._dynamic_hd(max_crops)
        # Counted before they are scaled and cut: what does not fit costs no more than loading.
        loaded = each("image", prompt.images, lambda image: self._load_image(image, limit))
        clips = each("audio", prompt.audios, load_audio)
        counts = {
            "image": [self._tokens_of_size(*image.size, crops) for image, crops in loaded],
            "audio": [num_audio_tokens(num_frames(len(samples), rate)) for samples, rate in clips],
        }
        tokens, media = self._tokens(prompt, counts)
        features = (preprocess_image(image, crops, vision.crop_size, vision.patch_size) for image, crops in loaded)
        return Row(tokens, media, tuple(features), tuple(log_mel(*clip) for clip in clips))

    def outline(self, prompt: Prompt, max_crops: int | None = None) -> Outline:
        """Return the sizes of what `row_of` will give, without decoding the media.

        (Few formats of audio have to be decoded, see `measure_audio`, and videos are when they are parsed.)

        Raises:
            InputError: as `row_of`, but for what only decoding shows.
        """
        _check_media(self.config, self.merged, bool(prompt.images), bool(prompt.audios))
        vision, limit = self.config.vision, self._dynamic_hd(max_crops)
        sizes = each("image", prompt.images, lambda image: self._image_size(image, limit))
        counts = {
            "image": [self._tokens_of_size(*size) for size in sizes],
            "audio": each("audio", prompt.audios, lambda clip: num_audio_tokens(num_frames(*measure_audio(clip)))),
        }
        tokens, _ = self._tokens(prompt, counts)
        crops = sum(count_crops(*size, vision.crop_size) for size in sizes)
        return Outline(tokens, tuple(counts["image"]), tuple(counts["audio"]), crops)

    def count_image_tokens(self, image: ImageSource, max_crops: int | None = None) -> int:
        """Return the number of tokens of an image, in any form that `__call__` takes, by its size alone.

        Raises:
            InputError: it cannot be opened, or would be refused by its size.
        """
        (source,) = given_media("image", [image])
        return self._tokens_of_size(*image_size(source), self._dynamic_hd(max_crops))

    def count_audio_tokens(self, clip: Any) -> int:
        """Return the number of tokens of a clip, in any form that `__call__` takes, by its header.

        Few formats have to be decoded, see `measure_audio`.

        Raises:
            InputError: it cannot be opened, or would be refused by its length.
        """
        (source,) = given_media("audio", [clip])
        return num_audio_tokens(num_frames(*measure_audio(source)))

    def _dynamic_hd(self, max_crops: int | None) -> int:
        if max_crops is None:
            return self.dynamic_hd
        check_max_crops("max_crops", max_crops)
        return min(max_crops, self.dynamic_hd)

    def _tokens_of_size(self, width: int, height: int, max_crops: int) -> int:
        vision = self.config.vision
        return count_image_tokens(width, height, max_crops, vision.crop_size, vision.patch_size)

    def _image_size(self, source: Any, max_crops: int) -> tuple[int, int, int]:
        """Return width and height of an image, and how many crops it may have."""
        source, max_crops = self._unwrap_frame(source, max_crops)
        return *image_size(source), max_crops

    def _unwrap_frame(self, source: Any, max_crops: int) -> tuple[Any, int]:
        return (source.image, self._dynamic_hd(source.max_crops)) if isinstance(source, Frame) else (source, max_crops)

    def _load_image(self, source: Any, max_crops: int) -> tuple[Image.Image, int]:
        """Load an image, with how many crops it may have; refuse one that is too thin."""
        source, max_crops = self._unwrap_frame(source, max_crops)
        image = load_image(source)
        self._tokens_of_size(*image.size, max_crops)
        return image, max_crops

    def _tokens(
        self, prompt: Prompt, counts: Mapping[str, Sequence[int]]
    ) -> tuple[np.ndarray, tuple[tuple[Media, int], ...]]:
        """Return the token ids (T,) with placeholders repeated, and where each medium begins; refuse too many."""
        ids = {"image": self.config.image_token_id, "audio": self.config.audio_token_id}
        # Encoded with one token a medium, so that long media cost nothing; then each is repeated in place.
        pieces: list[str | int | tuple[int, ...]] = []
        waiting: list[Media | None] = []  # for each placeholder the medium it stands for; drawn ones are just tokens
        for p in prompt.pieces:
            if isinstance(p, Media):
                pieces.append(ids[p.kind])
                waiting.append(p)
            elif isinstance(p, Tokens):
                pieces.append(p.ids)
                waiting += [None for token in p.ids if token in ids.values()]
            else:
                pieces.append(p)
                waiting += [None] if p in ids.values() else []
        waiting.reverse()
        tokens, media = [], []
        for token in self.tokenizer.encode_pieces(pieces):
            medium = waiting.pop() if token in ids.values() else None
            if medium is not None:
                media.append((medium, len(tokens)))
                tokens += [token] * counts[medium.kind][medium.index]
            else:
                tokens.append(token)
        _check_context(len(tokens), counts, self.context)
        return np.asarray(tokens, np.int32), tuple(media)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Put processed rows together, each padded to the longest; counts and lengths are rounded up to buckets."""
        sizes = bucketed_sizes(rows, self.config, self.context)
        return assemble([[row] for row in rows], sizes, self.config)._replace(segments=None)


def _check_media(
    config: Phi4MMConfig, merged: str | None, has_images: bool, has_clips: bool, adapter: str | None = None
) -> None:
    """Refuse media that the checkpoint cannot take. `merged` as in `Processor`, `adapter` as in its `row`."""
    for has_media, has_tower, media, tower in (
        (has_images, config.has_vision, "images", "vision tower"),
        (has_clips, config.has_speech, "clips", "speech encoder"),
    ):
        if has_media and not has_tower:
            raise InputError(
                f"the prompt has {media}, but this checkpoint has no {tower}; leave them out, or use a checkpoint "
                "with it"
            )
    default = default_adapter(has_images, has_clips)
    if merged is not None:
        needed = "no adapter" if default is None else f"the {default.name} adapter"
        own = ADAPTERS[merged]
        if default != (None if own.media is None else own):
            raise InputError(
                f"the prompt needs {needed}, but the {merged} adapter is merged into the weights; load the "
                "checkpoint without merge"
            )
        return
    present = list(config.loras)
    # A checkpoint without any is one whose adapters were merged into its weights.
    if default is not None and adapter is None and present and default.name not in present:
        raise InputError(
            f"the prompt needs the {default.name} adapter, which this checkpoint lacks (it has the {present[0]} "
            "adapter); use a checkpoint with it, or ask for adapter 'none'"
        )


def _check_context(length: int, counts: Mapping[str, Sequence[int]], context: int) -> None:
    if length > context:
        text = length - sum(map(sum, counts.values()))
        media = [f"{kind} {i}: {n}" for kind, each_of in counts.items() for i, n in enumerate(each_of, 1)]
        raise ContextLengthError(
            f"the prompt has {length} tokens ({', '.join([f'text: {text}', *media])}), more than the context of "
            f"{context}; shorten the text, give fewer or shorter media, or cap the crops with max_crops"
        )


def _row_media(media: Sequence[Any] | None, row: int, prompts: Sequence[Any], name: str) -> Sequence[Any]:
    """Return the media of one row."""
    if media is None:
        return ()
    if isinstance(media, str | bytes) or not isinstance(media, Sequence) or len(media) != len(prompts):
        given = (
            len(media) if isinstance(media, Sequence) and not isinstance(media, str | bytes) else type(media).__name__
        )
        raise InputError(
            f"{name} must have one list per prompt ({len(prompts)}), got {given}; "
            f"for one prompt with one medium write {name}=[[medium]]"
        )
    of_row = media[row]
    if of_row is None:
        return ()
    if isinstance(of_row, str | bytes | tuple) or not isinstance(of_row, Sequence):
        raise InputError(f"{name}[{row}] must be a list, got {type(of_row).__name__}; write [medium] for a single one")
    return of_row
