"""Samples of a manifest: a conversation becomes a row with its loss mask.

A sample is a conversation (see `conversation`) whose assistant turns are its answers; or, a preference, one that ends
with a prompt, and the answers "chosen" and "rejected". The tokens are exactly those of inference: the prompt up to
`<|assistant|>`, the answer, `<|end|>`; after the last answer also `<|endoftext|>`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from phi4mm_jax.data.augment import (
    Augment,
    Clip,
    SpeechAugmentation,
    augment_clip,
    draw_speed,
    mask_features,
    stretched_length,
)
from phi4mm_jax.data.conversation import read_conversation, read_message
from phi4mm_jax.errors import ContextLengthError, InputError, MediaError
from phi4mm_jax.processing.audio import load_audio, measure_audio
from phi4mm_jax.processing.batching import Outline, Row, num_chunks
from phi4mm_jax.processing.chat import render_chat
from phi4mm_jax.processing.images import CROP_SIZE, load_image
from phi4mm_jax.processing.media_urls import with_paths
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.processing.sources import each
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.processing.video import Frame

# line: not an object; messages: no conversation to learn from; answer: nothing to say; media: cannot be read;
# length: exceeds a row or a batch.
Cause = Literal["line", "messages", "answer", "media", "length"]
Kind = Literal["answers", "preferences"]


class BadSample(InputError):
    """Unusable sample; counted by `cause` where bad samples are skipped."""

    def __init__(self, cause: Cause, message: str):
        super().__init__(message)
        self.cause: Cause = cause


@dataclass(frozen=True)
class Sample:
    """Parsed conversation, with its text checked and its media not read yet.

    Attributes:
        prompt: the whole conversation, as pieces; ends with the last answer.
        loss_mask: per assistant turn.
        rejected: of a preference, the rejected answer in place of the last one.
    """

    prompt: Prompt
    loss_mask: tuple[bool, ...]
    rejected: str | None = None


class Example(NamedTuple):
    """Processed conversation."""

    row: Row
    loss_mask: Bool[np.ndarray, " T"]


class Size(NamedTuple):
    """Size of a sample in a batch; a preference is two sequences over the same media."""

    tokens: tuple[int, ...]  # of each sequence
    crops: int
    chunks: int
    longest: int  # tokens of the longest chunk
    adapter: int


def parse_sample(
    values: Any, folder: Path, tokenizer: Tokenizer, kind: Kind = "answers", crop_size: int = CROP_SIZE
) -> Sample:
    """Return the sample of a manifest's line.

    Args:
        folder: that relative paths of media refer to.

    Raises:
        BadSample: it is not an object, not a conversation, or has an empty loss mask.
    """
    if not isinstance(values, Mapping):
        raise BadSample("line", f"the sample is a {type(values).__name__}; expected an object with messages")
    answers = None
    if kind == "preferences":
        values, *answers = _preference(values)
    try:
        conversation = read_conversation(values)
    except InputError as error:
        raise BadSample("messages", str(error)) from error
    messages, loss_mask, rejected = conversation.messages, conversation.loss_mask, None
    if answers is not None:
        answer, rejected = answers
        if messages[-1].get("role") == "assistant":
            raise BadSample("messages", "messages end with an answer; a preference's are the prompt alone")
        messages = [*messages, {"role": "assistant", "content": answer}]
        loss_mask = (*(False for _ in loss_mask), True)
    _check_answers(messages, loss_mask)
    try:
        prompt = render_chat(with_paths(messages, folder), tokenizer, add_generation_prompt=False, crop_size=crop_size)
    except InputError as error:
        raise BadSample(_cause(error), str(error)) from error
    return Sample(prompt, loss_mask, rejected)


def _preference(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], str, str]:
    """Return the prompt's line, the chosen and the rejected answer, from any of the accepted forms."""
    if isinstance(values.get("input"), Mapping) and "preferred_output" in values:
        outputs = {"chosen": values["preferred_output"], "rejected": values.get("non_preferred_output")}
        values = {**values, **values["input"], **outputs}
    if isinstance(values.get("prompt"), list) and values.get("messages") is None:
        values = {**values, "messages": values["prompt"]}
    chosen, rejected = values.get("chosen"), values.get("rejected")
    messages = values.get("messages")
    if messages is None and isinstance(chosen, list) and isinstance(rejected, list) and chosen[:-1] == rejected[:-1]:
        values, chosen, rejected = {**values, "messages": chosen[:-1]}, chosen[-1:], rejected[-1:]
    elif values.get("rejected_response") is not None and chosen is None and isinstance(messages, list) and messages[1:]:
        values, chosen, rejected = {**values, "messages": messages[:-1]}, messages[-1], values["rejected_response"]
    return values, _answer_text(values, "chosen", chosen), _answer_text(values, "rejected", rejected)


def _answer_text(values: Mapping[str, Any], key: str, answer: Any) -> str:
    """Return the text of an answer: a string, a message, or a list of one message."""
    message = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    text = message
    if isinstance(message, Mapping):
        if message.get("tool_calls"):
            raise BadSample("answer", f"{key} calls tools; expected a text")
        try:
            read = read_message(key, {"role": message.get("from", "assistant"), **message})
        except InputError as error:
            raise BadSample("answer", str(error)) from error
        if read["role"] != "assistant":
            raise BadSample("answer", f"{key} is of role {read['role']!r:.40}; expected the assistant's answer")
        text = read.get("content")
    if isinstance(text, list) and len(text) == 1 and isinstance(text[0], Mapping):
        text = text[0].get("text")
    if not isinstance(text, str) or not text.strip():
        found = "empty" if isinstance(text, str) else type(answer).__name__ if key in values else "missing"
        raise BadSample("answer", f"{key} is {found}; expected the answer as a string")
    return text


def _check_answers(messages: Sequence[Mapping[str, Any]], loss_mask: Sequence[bool]) -> None:
    if not any(loss_mask):
        cause = "every answer is masked" if loss_mask else "messages have no answer"
        raise BadSample("answer", f"{cause}; give a message of role assistant that is in the loss mask")
    if messages[-1].get("role") != "assistant":
        role = messages[-1].get("role")
        raise BadSample("answer", f"messages end with one of role {role!r:.40}; end them with an answer")


def measure(
    sample: Sample,
    processor: Processor,
    max_crops: int | None = None,
    speech: SpeechAugmentation | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[Size, Outline]:
    """Return the size of a sample, by the headers of its media.

    Args:
        speech, rng: the augmentation of `load_examples`, which changes clips' lengths, with a generator in the same
            state; without one they are as long as they can become.

    Raises:
        BadSample: a medium cannot be opened; an answer is empty; the conversation is longer than the context.
    """
    prompt = sample.prompt
    if speech is not None and speech.speed is not None and prompt.audios:
        prompt = _with_cause(lambda: _stretched(prompt, speech, rng))
    outline = _with_cause(lambda: processor.outline(prompt, max_crops))
    tokens, tokenizer, chunk_tokens = outline.tokens, processor.tokenizer, processor.config.speech.chunk_tokens
    token_loss_mask(tokens, sample.loss_mask, tokenizer)
    sequences = [tokens] if sample.rejected is None else [tokens, _rejected(tokens, sample.rejected, tokenizer)]
    size = Size(
        tuple(map(len, sequences)),
        outline.crops,
        sum(num_chunks(n, chunk_tokens) for n in outline.clips),
        max((min(n, chunk_tokens) for n in outline.clips), default=0),
        outline.adapter,
    )
    return size, outline


def load_examples(
    sample: Sample,
    processor: Processor,
    max_crops: int | None = None,
    augment: Augment = Augment(),  # noqa: B008 (frozen)
    rng: np.random.Generator | None = None,
) -> tuple[Example, ...]:
    """Return one example, or two of a preference (chosen, rejected), whose media are the same objects.

    Args:
        rng: of the augmentations; each clip has a generator spawned from it.

    Raises:
        BadSample: as `measure`, and for media that cannot be decoded.
        ValueError: an augmentation changes a size.
    """
    prompt = sample.prompt
    clip_rngs = [] if rng is None or augment.speech is None else rng.spawn(len(prompt.audios))
    if rng is not None:
        prompt = _with_cause(lambda: _augmented(prompt, augment, rng, clip_rngs))
    row = _with_cause(lambda: processor.row_of(prompt, max_crops))
    if augment.speech is not None and clip_rngs:
        pairs = zip(row.clips, clip_rngs, strict=True)
        row = row._replace(clips=tuple(mask_features(clip, augment.speech, clip_rng) for clip, clip_rng in pairs))
    chosen = Example(row, token_loss_mask(row.tokens, sample.loss_mask, processor.tokenizer))
    if sample.rejected is None:
        return (chosen,)
    tokens = _rejected(row.tokens, sample.rejected, processor.tokenizer)
    rejected = Example(row._replace(tokens=tokens), token_loss_mask(tokens, sample.loss_mask, processor.tokenizer))
    return chosen, rejected


def token_loss_mask(tokens: np.ndarray, turns: Sequence[bool], tokenizer: Tokenizer) -> Bool[np.ndarray, " T"]:
    """Return the loss mask of a whole conversation: its answers, with `<|end|>` and a last `<|endoftext|>`.

    In a chat these tokens come from the structure alone, so they delimit the turns.

    Args:
        turns: loss mask per assistant turn.

    Raises:
        BadSample: an answer in the loss mask has no tokens, or media.
    """
    mask = np.zeros(len(tokens), bool)
    ends = np.flatnonzero(tokens == tokenizer.special_tokens["<|end|>"])
    for number, begin in enumerate(np.flatnonzero(tokens == tokenizer.special_tokens["<|assistant|>"])):
        end = ends[np.searchsorted(ends, begin)]
        if turns[number] and end == begin + 1:
            raise BadSample("answer", f'answer {number + 1} is empty; give it a text, or say "loss": false')
        mask[begin + 1 : end + 1] = turns[number]
    mask[-1] = turns[-1]
    media = [tokenizer.special_tokens[name] for name in ("<|endoftext10|>", "<|endoftext11|>")]
    if np.isin(tokens[mask], media).any():
        raise BadSample("messages", "an answer has media, which no loss is computed of; put them into a user's message")
    return mask


def _rejected(tokens: np.ndarray, text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Return the conversation with another last answer."""
    assistant, end, last = (tokenizer.special_tokens[f"<|{name}|>"] for name in ("assistant", "end", "endoftext"))
    begin = np.flatnonzero(tokens == assistant)[-1]
    return np.concatenate([tokens[:begin], tokenizer.encode_pieces([assistant, text, end, last])]).astype(np.int32)


def _with_cause(process: Callable[[], Any]) -> Any:
    """Call a function; turn its InputError into a BadSample with the cause."""
    try:
        return process()
    except InputError as error:
        raise BadSample(_cause(error), str(error)) from error


def _cause(error: InputError) -> Cause:
    match error:
        case ContextLengthError():
            return "length"
        case MediaError():
            return "media"
    return "messages"


def _stretched(prompt: Prompt, speech: SpeechAugmentation, rng: np.random.Generator | None) -> Prompt:
    """Return the prompt with silence of the augmented lengths in place of its clips."""
    clip_rngs = iter([None] * len(prompt.audios) if rng is None else rng.spawn(len(prompt.audios)))
    slowest = replace(speech, speed=(speech.speed[0],) * 2) if speech.speed else speech

    def clip(source: Any) -> Clip:
        clip_rng = next(clip_rngs)
        length, rate = measure_audio(source)
        how, draws = (slowest, np.random.default_rng(0)) if clip_rng is None else (speech, clip_rng)
        length = stretched_length(length, draw_speed(how, length, rate, draws))
        return np.broadcast_to(np.float32(0), (length,)), rate

    return replace(prompt, audios=each("audio", prompt.audios, clip))


def _augmented(
    prompt: Prompt, augment: Augment, rng: np.random.Generator, clip_rngs: Sequence[np.random.Generator]
) -> Prompt:
    """Return the prompt with its media decoded and augmented; `clip_rngs` are the clips' generators."""
    rest = iter(clip_rngs)

    def image(source: Any) -> Any:
        if isinstance(source, Frame):
            return replace(source, image=image(source.image))
        decoded = load_image(source)
        changed = augment.image(decoded, rng) if augment.image else decoded
        if changed.size != decoded.size:
            raise ValueError(f"the augmentation made {changed.size} of {decoded.size} pixels; it must keep the size")
        return changed

    def clip(source: Any) -> Clip:
        samples, rate = load_audio(source)
        if augment.speech:
            samples, rate = augment_clip((samples, rate), augment.speech, next(rest))
        changed = augment.clip((samples, rate), rng) if augment.clip else (samples, rate)
        if (len(changed[0]), changed[1]) != (len(samples), rate):
            raise ValueError("the augmentation changed the clip's length or rate; it must keep them")
        return changed

    return replace(
        prompt,
        images=each("image", prompt.images, image) if augment.image else prompt.images,
        audios=each("audio", prompt.audios, clip) if augment.clip or augment.speech else prompt.audios,
    )
