"""Samples of a manifest: a conversation becomes a row with its answers marked.

A sample is an object with "messages", a chat whose assistant turns are its answers; or, a preference, with a prompt as
"messages" and the answers "chosen" and "rejected". The tokens are those that the model sees and says when it generates:
the prompt up to `<|assistant|>`, the answer, `<|end|>`; after the last answer also `<|endoftext|>`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.audio import load_audio
from phi4mm_jax.processing.chat import Prompt, render_chat, with_paths
from phi4mm_jax.processing.images import load_image
from phi4mm_jax.processing.processor import Outline, Processor, Row, num_chunks
from phi4mm_jax.processing.sources import each
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.processing.video import Frame
from phi4mm_jax.training.augment import Augment, Clip

# line: not an object; messages: no conversation to learn from; answer: nothing to say; media: cannot be read;
# length: exceeds a row or a batch.
Cause = Literal["line", "messages", "answer", "media", "length"]
CAUSES: tuple[Cause, ...] = get_args(Cause)
Kind = Literal["answers", "preferences"]


class BadSample(InputError):
    """A sample that cannot be learnt from; `cause` is what is counted where bad samples are skipped."""

    def __init__(self, cause: Cause, message: str):
        super().__init__(message)
        self.cause: Cause = cause


@dataclass(frozen=True)
class Sample:
    """A conversation whose text is checked and whose media are still files.

    Attributes:
        prompt: all of it, as pieces; ends with the last answer.
        learnt: of each assistant turn, whether it carries loss.
        rejected: of a preference, what may stand in place of the last answer.
    """

    prompt: Prompt
    learnt: tuple[bool, ...]
    rejected: str | None = None


class Example(NamedTuple):
    """A processed conversation."""

    row: Row
    answers: Bool[np.ndarray, " T"]  # the tokens that carry loss


class Size(NamedTuple):
    """What a sample takes of a batch; a preference is two sequences over the same media."""

    tokens: tuple[int, ...]  # of each sequence
    crops: int
    chunks: int
    longest: int  # tokens of the longest chunk
    adapter: int


def parse_sample(values: Any, folder: Path, tokenizer: Tokenizer, kind: Kind = "answers") -> Sample:
    """A line of a manifest. Keys that it does not use are ignored.

    Args:
        folder: what the paths of media are relative to.

    Raises:
        BadSample: it is no object, no conversation, or has nothing to learn.
    """
    if not isinstance(values, Mapping):
        raise BadSample("line", f"the sample is a {type(values).__name__}; expected an object with messages")
    messages = parse_messages(values.get("messages"))
    rejected = None
    if kind == "preferences":
        answer, rejected = (_answer_text(values, key) for key in ("chosen", "rejected"))
        if messages[-1].get("role") == "assistant":
            raise BadSample("messages", "messages end with an answer; a preference's are the prompt alone")
        messages = [*({**m, "loss": False} for m in messages), {"role": "assistant", "content": answer}]
    learnt = _learnt(messages)
    try:
        prompt = render_chat(with_paths(messages, folder), tokenizer, add_generation_prompt=False)
    except InputError as error:
        is_media = ".video: " in str(error)  # the only media that are opened here
        raise BadSample("media" if is_media else "messages", str(error)) from error
    return Sample(prompt, learnt, rejected)


def parse_messages(messages: Any) -> list[dict[str, Any]]:
    """The "messages" of a line, or what they are in a table.

    Raises:
        BadSample: they are no list of objects, or it is empty.
    """
    if isinstance(messages, str):  # as tables have it, whose columns are of one type
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise BadSample("messages", f"messages is a string, but not JSON ({error})") from None
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        found = type(messages).__name__ if messages else "missing or empty"
        raise BadSample("messages", f"messages is {found}; expected a list of messages with role and content")
    return messages


def _answer_text(values: Mapping[str, Any], key: str) -> str:
    text = values.get(key)
    if not isinstance(text, str) or not text.strip():
        found = "empty" if isinstance(text, str) else type(text).__name__ if key in values else "missing"
        raise BadSample("answer", f"{key} is {found}; expected the answer as a string")
    return text


def _learnt(messages: Sequence[Mapping[str, Any]]) -> tuple[bool, ...]:
    for i, message in enumerate(messages):
        loss = message.get("loss", True)
        if not isinstance(loss, bool):
            raise BadSample("messages", f"messages[{i}].loss is {loss!r:.40}; expected true or false")
    learnt = tuple(m.get("loss", True) for m in messages if m.get("role") == "assistant")
    if not any(learnt):
        cause = "every answer says that it carries no loss" if learnt else "messages have no answer"
        raise BadSample("answer", f"{cause}; give a message of role assistant to be learnt")
    if messages[-1].get("role") != "assistant":
        role = messages[-1].get("role")
        raise BadSample("answer", f"messages end with one of role {role!r:.40}; end them with an answer")
    return learnt


def measure(sample: Sample, processor: Processor, max_crops: int | None = None) -> tuple[Size, Outline]:
    """What a sample takes, by the headers of its media.

    Raises:
        BadSample: a medium cannot be opened; an answer is empty; the conversation is longer than the context.
    """
    outline = _by_media(lambda: processor.outline(sample.prompt, max_crops))
    tokens, tokenizer, most = outline.tokens, processor.tokenizer, processor.config.speech.chunk_tokens
    answer_mask(tokens, sample.learnt, tokenizer)
    sequences = [tokens] if sample.rejected is None else [tokens, _rejected(tokens, sample.rejected, tokenizer)]
    size = Size(
        tuple(map(len, sequences)),
        outline.crops,
        sum(num_chunks(n, most) for n in outline.clips),
        max((min(n, most) for n in outline.clips), default=0),
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
    """One example, or of a preference two, chosen and rejected, whose media are the same objects.

    Args:
        rng: what the augmentations draw from.

    Raises:
        BadSample: as `measure`, and for media that cannot be decoded.
        ValueError: an augmentation changes a size.
    """
    prompt = sample.prompt
    if rng is not None:
        prompt = _by_media(lambda: _augmented(prompt, augment, rng))
    row = _by_media(lambda: processor.row_of(prompt, max_crops))
    chosen = Example(row, answer_mask(row.tokens, sample.learnt, processor.tokenizer))
    if sample.rejected is None:
        return (chosen,)
    tokens = _rejected(row.tokens, sample.rejected, processor.tokenizer)
    rejected = Example(row._replace(tokens=tokens), answer_mask(tokens, sample.learnt, processor.tokenizer))
    return chosen, rejected


def answer_mask(tokens: np.ndarray, learnt: Sequence[bool], tokenizer: Tokenizer) -> Bool[np.ndarray, " T"]:
    """Which tokens of a whole conversation carry loss: those of answers, with `<|end|>` and a last `<|endoftext|>`.

    In a chat these tokens come from the structure alone, so the turns can be told by them.

    Raises:
        BadSample: an answer that carries loss has no tokens, or media.
    """
    mask = np.zeros(len(tokens), bool)
    ends = np.flatnonzero(tokens == tokenizer.special_tokens["<|end|>"])
    for number, begin in enumerate(np.flatnonzero(tokens == tokenizer.special_tokens["<|assistant|>"])):
        end = ends[np.searchsorted(ends, begin)]
        if learnt[number] and end == begin + 1:
            raise BadSample("answer", f'answer {number + 1} is empty; give it a text, or say "loss": false')
        mask[begin + 1 : end + 1] = learnt[number]
    mask[-1] = learnt[-1]
    media = [tokenizer.special_tokens[name] for name in ("<|endoftext10|>", "<|endoftext11|>")]
    if np.isin(tokens[mask], media).any():
        raise BadSample("messages", "an answer has media, which cannot be learnt; put them into a user's message")
    return mask


def _rejected(tokens: np.ndarray, text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The conversation with another last answer."""
    assistant, end, last = (tokenizer.special_tokens[f"<|{name}|>"] for name in ("assistant", "end", "endoftext"))
    begin = np.flatnonzero(tokens == assistant)[-1]
    return np.concatenate([tokens[:begin], tokenizer.encode_pieces([assistant, text, end, last])]).astype(np.int32)


def _by_media(process: Callable[[], Any]) -> Any:
    """Errors of media, told from those of the text and of the lengths."""
    try:
        return process()
    except InputError as error:
        cause = "media" if str(error).startswith(("image ", "audio ")) else "messages"
        raise BadSample("length" if " more than the context of " in str(error) else cause, str(error)) from error


def _augmented(prompt: Prompt, augment: Augment, rng: np.random.Generator) -> Prompt:
    """The prompt with its media decoded and changed."""

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
        changed = augment.clip((samples, rate), rng) if augment.clip else (samples, rate)
        if (len(changed[0]), changed[1]) != (len(samples), rate):
            raise ValueError("the augmentation changed the clip's length or rate; it must keep them")
        return changed

    return replace(
        prompt,
        images=each("image", prompt.images, image) if augment.image else prompt.images,
        audios=each("audio", prompt.audios, clip) if augment.clip else prompt.audios,
    )
