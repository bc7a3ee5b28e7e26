"""From prompts, images and audio to the static-shaped `Batch`: all that depends on sizes is decided here."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from phi4mm_jax.batch import NO_MEDIA, AudioStack, Batch, ImageStack
from phi4mm_jax.config import Phi4MMConfig, SpeechConfig, read_json
from phi4mm_jax.errors import CheckpointError, InputError
from phi4mm_jax.processing.audio import load_audio, measure_audio
from phi4mm_jax.processing.audio_features import (
    AUDIO_RATES,
    FEATURE_SETTINGS,
    log_mel,
    num_audio_tokens,
    num_frames,
)
from phi4mm_jax.processing.chat import parse_prompt
from phi4mm_jax.processing.images import (
    SUB_SEPARATOR,
    ImageFeatures,
    ImageSource,
    check_max_crops,
    count_crops,
    count_image_tokens,
    image_size,
    load_image,
    preprocess_image,
)
from phi4mm_jax.processing.prompt import Kind, Media, Prompt, Tokens, given_media
from phi4mm_jax.processing.sources import each
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.processing.video import Frame

PromptLike = str | Sequence[Mapping[str, Any]]

# Short sequences are padded to this: smaller products round in another order, and cost no less.
_LEAST_LENGTH = 64
_HALO_TOKENS = 1  # before each chunk; a whole token, see `AudioStack`
_ADAPTER_NONE, _ADAPTER_VISION, _ADAPTER_SPEECH = 0, 1, 2


class Row(NamedTuple):
    """One prompt, with its media processed and its tokens counted."""

    tokens: np.ndarray  # int32 (T,), the media's placeholders repeated
    media: tuple[tuple[Media, int], ...]  # each medium with the position of its first token
    images: tuple[ImageFeatures, ...]
    clips: tuple[np.ndarray, ...]  # log-mel frames

    @property
    def adapter(self) -> int:
        """0 none, 1 vision, 2 speech."""
        return _adapter(self.images, self.clips)


class Outline(NamedTuple):
    """What the headers of a prompt's media tell of its `Row`."""

    tokens: np.ndarray  # int32 (T,), as in the row
    images: tuple[int, ...]  # tokens of each
    clips: tuple[int, ...]  # tokens of each
    crops: int  # of all images

    @property
    def adapter(self) -> int:
        """0 none, 1 vision, 2 speech."""
        return _adapter(self.images, self.clips)


def _adapter(images: Sequence[Any], clips: Sequence[Any]) -> int:
    """Images decide, then clips."""
    return _ADAPTER_VISION if images else _ADAPTER_SPEECH if clips else _ADAPTER_NONE


class BatchSizes(NamedTuple):
    """What the shapes of a batch depend on, besides its number of rows."""

    length: int
    crops: int  # 0: the batch has no stack of crops
    chunks: int  # 0: the batch has no stack of chunks
    chunk_tokens: int  # what a chunk has room for


class Processor:
    """Turns prompts into batches; holds the tokenizer and the checkpoint's processing settings.

    Attributes:
        context: tokens of the longest sequence.
        merged: the adapter that is part of the weights, "vision" or "speech": other prompts than its own are refused.
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
        check_processing(folder)
        return cls(config, Tokenizer.from_folder(folder), read_dynamic_hd(folder), _context(folder, config))

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
            max_crops: the most crops of an image, besides its global view; what the checkpoint says (36) is the most
                that it can be. Frames of a video part have their own.
            continue_final_message: the last message of each chat, the assistant's, is the beginning of its answer.

        Raises:
            InputError: anything that cannot be processed; it names the row, and the medium by its number in the row.
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
        """The prompts, each by itself; as in `__call__`, and as in `row`."""
        is_list = isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes)
        if not is_list or not prompts or isinstance(prompts[0], Mapping):
            one = "; this is one chat: put it into a list" if is_list and prompts else ""
            raise InputError(
                f"prompts must be a non-empty list with one entry per row{one or '; put a single prompt into a list'}"
            )
        rows = []
        for i, prompt in enumerate(prompts):
            try:
                media = _of_row(images, i, prompts, "images"), _of_row(audios, i, prompts, "audios")
                rows.append(self.row(prompt, *media, max_crops, continue_final_message, adapter))
            except InputError as error:
                raise InputError(f"prompt {i}: {error}") from error
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
            InputError: as in `__call__`, and when the prompt is empty or longer than the context.
        """
        parsed = parse_prompt(prompt, self.tokenizer, images, audios, continue_final_message=continue_final_message)
        return self.row_of(parsed, max_crops, adapter)

    def row_of(self, prompt: Prompt, max_crops: int | None = None, adapter: str | None = None) -> Row:
        """`row` of a prompt that is parsed already."""
        self._check_media(bool(prompt.images), bool(prompt.audios), adapter)
        vision, most = self.config.vision, self._dynamic_hd(max_crops)
        # Counted before they are scaled and cut: what does not fit costs no more than loading.
        loaded = each("image", prompt.images, lambda image: self._load_image(image, most))
        clips = each("audio", prompt.audios, load_audio)
        counts = {
            "image": [self._tokens_of_size(*image.size, crops) for image, crops in loaded],
            "audio": [num_audio_tokens(num_frames(len(samples), rate)) for samples, rate in clips],
        }
        tokens, media = self._tokens(prompt, counts)
        features = (preprocess_image(image, crops, vision.crop_size, vision.patch_size) for image, crops in loaded)
        return Row(tokens, media, tuple(features), tuple(log_mel(*clip) for clip in clips))

    def outline(self, prompt: Prompt, max_crops: int | None = None) -> Outline:
        """What `row_of` will give, without decoding the media, but for audio as `measure_audio` says, and videos, which
        are decoded when they are parsed.

        Raises:
            InputError: as `row_of`, but for what only decoding shows.
        """
        self._check_media(bool(prompt.images), bool(prompt.audios))
        vision, most = self.config.vision, self._dynamic_hd(max_crops)
        sizes = each("image", prompt.images, lambda image: self._image_size(image, most))
        counts = {
            "image": [self._tokens_of_size(*size) for size in sizes],
            "audio": each("audio", prompt.audios, lambda clip: num_audio_tokens(num_frames(*measure_audio(clip)))),
        }
        tokens, _ = self._tokens(prompt, counts)
        crops = sum(count_crops(*size, vision.crop_size) for size in sizes)
        return Outline(tokens, tuple(counts["image"]), tuple(counts["audio"]), crops)

    def count_image_tokens(self, image: ImageSource, max_crops: int | None = None) -> int:
        """The tokens of an image, in any form that `__call__` takes, by its size alone: nothing is decoded.

        Raises:
            InputError: it cannot be opened, or would be refused by its size.
        """
        (source,) = given_media("image", [image])
        return self._tokens_of_size(*image_size(source), self._dynamic_hd(max_crops))

    def count_audio_tokens(self, clip: Any) -> int:
        """The tokens of a clip, in any form that `__call__` takes, by what its header says; few formats have to be
        decoded, see `measure_audio`.

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
        """Width and height of an image, and how many crops it may have."""
        source, max_crops = self._of_frame(source, max_crops)
        return *image_size(source), max_crops

    def _of_frame(self, source: Any, max_crops: int) -> tuple[Any, int]:
        return (source.image, self._dynamic_hd(source.max_crops)) if isinstance(source, Frame) else (source, max_crops)

    def _load_image(self, source: Any, max_crops: int) -> tuple[Image.Image, int]:
        """An image, and how many crops it may have; refused if it is too thin."""
        source, max_crops = self._of_frame(source, max_crops)
        image = load_image(source)
        self._tokens_of_size(*image.size, max_crops)
        return image, max_crops

    def _check_context(self, length: int, counts: Mapping[str, Sequence[int]]) -> None:
        if length > self.context:
            text = length - sum(map(sum, counts.values()))
            media = [f"{kind} {i}: {n}" for kind, each_of in counts.items() for i, n in enumerate(each_of, 1)]
            raise InputError(
                f"the prompt has {length} tokens ({', '.join([f'text: {text}', *media])}), more than the context of "
                f"{self.context}; shorten the text, give fewer or shorter media, or cap the crops with max_crops"
            )

    def _check_media(self, has_images: bool, has_clips: bool, adapter: str | None = None) -> None:
        """Refuse media that the checkpoint cannot take. `adapter` as in `row`."""
        for has_media, has_tower, media, tower in (
            (has_images, self.config.has_vision, "images", "vision tower"),
            (has_clips, self.config.has_speech, "clips", "speech encoder"),
        ):
            if has_media and not has_tower:
                raise InputError(
                    f"the prompt has {media}, but this checkpoint has no {tower}; leave them out, or use a checkpoint "
                    "with it"
                )
        kind = "vision" if has_images else "speech"
        if self.merged is not None:
            needed = f"the {kind} adapter" if has_images or has_clips else "no adapter"
            if needed != f"the {self.merged} adapter":
                raise InputError(
                    f"the prompt needs {needed}, but the {self.merged} adapter is merged into the weights; load the "
                    "checkpoint without merge"
                )
            return
        adapters = {"vision": self.config.vision_lora, "speech": self.config.speech_lora}
        present = [name for name, lora in adapters.items() if lora is not None]
        # A checkpoint without any is one whose adapters were merged into its weights.
        if (has_images or has_clips) and adapter is None and present and kind not in present:
            raise InputError(
                f"the prompt needs the {kind} adapter, which this checkpoint lacks (it has the {present[0]} adapter); "
                "use a checkpoint with it, or ask for adapter 'none'"
            )

    def _tokens(self, prompt: Prompt, counts: Mapping[str, Sequence[int]]):
        """The token ids with placeholders repeated, and where each medium begins; refused if too many."""
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
        self._check_context(len(tokens), counts)
        return np.asarray(tokens, np.int32), tuple(media)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Put processed rows together, each padded to the longest; counts and lengths are rounded up to buckets."""
        crops = sum(len(f.crops) for f in _unique_images(rows).values())
        counts = [num_audio_tokens(len(frames)) for frames, _ in _unique_clips(rows).values()]
        most = self.config.speech.chunk_tokens
        sizes = BatchSizes(
            min(bucket(max(len(r.tokens) for r in rows), _LEAST_LENGTH), self.context),
            bucket(crops) if crops else 0,
            bucket(sum(num_chunks(n, most) for n in counts)) if counts else 0,
            bucket(max((min(n, most) for n in counts), default=0), _LEAST_LENGTH),
        )
        return self.assemble([[row] for row in rows], sizes)._replace(segments=None)

    def assemble(self, rows: Sequence[Sequence[Row]], sizes: BatchSizes, part: int = 0, parts: int = 1) -> Batch:
        """Put processed rows together, in each row of the batch several after one another, or none: as its segments.

        Features that are the same object in several rows are stacked once.

        Args:
            rows: those of one row of the batch need the same adapter.
            sizes: what all must fit into.
            part, parts: the batch is this one of several that will be joined along the first axis of every array:
                `media` counts in the joined stacks.
        """
        all_rows = [r for row in rows for r in row]
        images, clips = _unique_images(all_rows), _unique_clips(all_rows)
        features = parts * sizes.crops * self.config.vision.features_per_crop
        image_stack, image_rows = self._stack_images(list(images.values()), sizes, part, features)
        audio_stack, clip_rows = self._stack_clips(
            list(clips.values()), sizes, features + (2 if sizes.crops else 0) + part * sizes.chunks * sizes.chunk_tokens
        )
        at_images, at_clips = dict(zip(images, image_rows, strict=True)), dict(zip(clips, clip_rows, strict=True))
        shape = len(rows), sizes.length
        tokens = np.full(shape, self.config.pad_token_id, np.int32)
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

    def _stack_images(self, images: Sequence[ImageFeatures], sizes: BatchSizes, part: int, separators: int):
        """The stack of all crops, and for each image the rows of the features that its tokens take; the separators'
        come after all crops'."""
        if not sizes.crops:
            return None, []
        vision = self.config.vision
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

    def _stack_clips(self, clips: Sequence[tuple[np.ndarray, bool]], sizes: BatchSizes, offset: int):
        """The stack of all chunks, and for each clip the rows of the features, from `offset`, that it takes."""
        if not sizes.chunks:
            return None, []
        speech, chunk = self.config.speech, sizes.chunk_tokens
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
    """Clips, and whether images are with them, which decides on their projector."""
    return {(id(c), bool(r.images)): (c, bool(r.images)) for r in rows for c in r.clips}


def num_chunks(tokens: int, most: int) -> int:
    """The chunks of a clip of so many tokens."""
    return math.ceil(tokens / most)


def clip_chunks(frames: np.ndarray, with_images: bool, tokens: int, speech: SpeechConfig) -> Iterator[AudioStack]:
    """A clip's entries of an `AudioStack`, one by one, each with room for so many tokens."""
    reduction, most = speech.time_reduction, speech.chunk_tokens
    halo, count = _HALO_TOKENS * reduction, num_audio_tokens(len(frames))
    for start in range(0, len(frames), most * reduction):
        before = min(start, halo)
        piece = frames[start - before : start + most * reduction]
        first, last = halo - before, halo - before + len(piece)
        padded = np.zeros((halo + tokens * reduction, speech.num_bands), np.float32)
        padded[first:last] = piece
        # A clip that is cut attends to the zeros that fill its last chunk, as the original does.
        attended = count if count <= most else most
        yield AudioStack(padded, *(np.int32(n) for n in (first, last, attended)), with_images=np.bool_(with_images))


def bucket(n: int, least: int = 1) -> int:
    """The next size of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: four to the octave, at most a quarter more."""
    n = max(n, least)
    step = 1 << max((n - 1).bit_length() - 3, 0)
    return -(-n // step) * step


# What the files may say of processing, and what is done here whatever they say.
_PROCESSING: Mapping[str, Any] = {
    "image_mean": 0.5, "image_std": 0.5, "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_resize": True, **FEATURE_SETTINGS, **AUDIO_RATES,
}  # fmt: skip


def check_processing(folder: Path) -> None:
    """Check that the checkpoint's media are processed as they are here.

    Raises:
        CheckpointError: a setting that would change the numbers; it names the file and the key.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        values = read_json(path) if path.exists() else {}
        sections = [values, *(values.get(key) for key in ("image_processor", "feature_extractor"))]
        for section in sections:
            for key in _PROCESSING.keys() & (section.keys() if isinstance(section, Mapping) else set()):
                found = section[key]
                numbers = found if isinstance(found, list) else [found]
                if found is not None and not all(_is_close(number, _PROCESSING[key]) for number in numbers):
                    raise CheckpointError(
                        f"{path}: {key} is {found!r:.60}; only {_PROCESSING[key]!r:.20}, the release's, is supported: "
                        "media are processed as in its training"
                    )


def _is_close(found: Any, usual: float) -> bool:
    return isinstance(found, int | float) and math.isclose(found, usual, rel_tol=1e-6)


def read_dynamic_hd(folder: Path) -> int:
    """The largest number of crops of an image.

    It is in preprocessor_config.json or, as transformers 5 saves a processor, in a section of processor_config.json,
    which transformers reads first.

    Raises:
        CheckpointError: neither file says it, or one is unusable.
    """
    path = folder / "processor_config.json"
    settings = read_json(path).get("image_processor") if path.exists() else None
    if not isinstance(settings, Mapping):  # older ones only name the processor's class
        path = folder / "preprocessor_config.json"
        settings = read_json(path)
    dynamic_hd = settings.get("dynamic_hd")
    if not isinstance(dynamic_hd, int) or isinstance(dynamic_hd, bool) or dynamic_hd < 1:
        raise CheckpointError(f"{path}: dynamic_hd is {dynamic_hd!r}; expected the largest number of crops")
    return dynamic_hd


def _context(folder: Path, config: Phi4MMConfig) -> int:
    """The longest sequence: what the tokenizer's file says, else what the network's does."""
    path = folder / "tokenizer_config.json"
    length = read_json(path).get("model_max_length") if path.exists() else None
    is_number = isinstance(length, int | float) and not isinstance(length, bool)
    if length is None or (is_number and length >= 10**9):  # some tools write 10**30 for "unknown"
        return config.decoder.rope.max_length
    if not is_number or not length >= 1 or length != int(length):
        raise CheckpointError(f"{path}: model_max_length is {length!r:.80}; expected the context's number of tokens")
    return int(length)


def _of_row(media: Sequence[Any] | None, row: int, prompts: Sequence[Any], name: str) -> Sequence[Any]:
    """The media of one row."""
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
