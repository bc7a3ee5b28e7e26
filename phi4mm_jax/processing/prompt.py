"""Prompts as sequences of texts, special tokens and media; raw prompts, which are in the caller's hands.

In a raw prompt special tokens and media placeholders are recognised. Media are collected, not opened.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.media_urls import locate
from phi4mm_jax.processing.tokenizer import Tokenizer

Kind = Literal["image", "audio"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Tokens:
    """Answer as the ids that were sampled: in a chat the content of a message, or a part of it.

    A class, and no form of JSON: only the caller's program can put ids into a chat, which may be special tokens.
    """

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Media:
    """Place of an image or an audio clip among the pieces of a prompt; `index` counts each kind from 0."""

    kind: Kind
    index: int


@dataclass(frozen=True)
class Prompt:
    """Parsed prompt: plain text (str), ids of special tokens (int), sampled tokens and media, in order.

    `images[i]` and `audios[i]` are what `Media("image", i)` and `Media("audio", i)` stand for, as the caller passed
    them, but for base64, which is decoded to bytes, file URLs, which become paths, and videos and images of low detail,
    which become `Frame`s.
    """

    pieces: tuple[str | int | Tokens | Media, ...]
    images: tuple[Any, ...]
    audios: tuple[Any, ...]


# Both the spellings of the published prompts and the tokens that these become.
_PLACEHOLDER = re.compile(r"<\|(?P<kind>image|audio)(?:_(?P<number>[0-9]+))?\|>|<\|endoftext1(?P<token>[01])\|>")


def placeholder_in(text: str) -> str | None:
    """Return the first media placeholder that a text spells as the published prompts do; None without one."""
    return next((found.group() for found in _PLACEHOLDER.finditer(text) if found["kind"]), None)


def parse_raw(
    prompt: str, tokenizer: Tokenizer, images: Sequence[Any] | None = (), audios: Sequence[Any] | None = ()
) -> Prompt:
    """Parse a raw prompt, in which special tokens are recognised.

    `<|image_1|>`, `<|image_2|>`, ... (or, unnumbered, `<|image|>` or `<|endoftext10|>`) take the images in order of
    appearance; `<|audio_1|>`, ..., `<|audio|>`, `<|endoftext11|>` the clips. White space around them is kept, unless a
    special token next to it swallows it.

    Raises:
        InputError: a kind's placeholders are not numbered 1, 2, ... in order of appearance (the original ignores the
            numbers: in another order a prompt would show another image than it says), numbered and unnumbered ones are
            mixed, they are not as many as the media, or the prompt is empty.
    """
    given = {"image": given_media("image", images), "audio": given_media("audio", audios)}
    check_raw(prompt, {"image": len(given["image"]), "audio": len(given["audio"])})
    found: Counter[Kind] = Counter()
    pieces: list[str | int | Media] = []
    end = 0
    for match in _PLACEHOLDER.finditer(prompt):
        pieces += tokenizer.split_special(prompt[end : match.start()])
        pieces.append(Media(kind := _kind_of(match), found[kind]))
        found[kind] += 1
        end = match.end()
    pieces += tokenizer.split_special(prompt[end:])
    return Prompt(tuple(pieces), given["image"], given["audio"])


def check_raw(prompt: str, given: Mapping[Kind, int]) -> None:
    """Raise InputError for a raw prompt that is empty, or whose placeholders do not fit as many media as are given."""
    if not isinstance(prompt, str) or not prompt:
        cause = "empty" if prompt == "" else type(prompt).__name__
        raise InputError(f"prompt is {cause}: pass a string with at least one character")
    matches = list(_PLACEHOLDER.finditer(prompt))
    for kind in KINDS:
        _check_placeholders(kind, [match for match in matches if _kind_of(match) == kind], given[kind])


def _kind_of(placeholder: re.Match[str]) -> Kind:
    return "image" if placeholder["kind"] == "image" or placeholder["token"] == "0" else "audio"


def _check_placeholders(kind: Kind, matches: Sequence[re.Match[str]], given: int) -> None:
    spelled = ", ".join(match.group() for match in matches[:8]) + (", ..." if len(matches) > 8 else "")
    numbers = [match["number"] for match in matches]
    if any(numbers) and not all(numbers):
        raise InputError(f"prompt mixes numbered and unnumbered {kind} placeholders ({spelled}): number all or none")
    if any(numbers) and numbers != [str(i + 1) for i in range(len(numbers))]:
        raise InputError(
            f"prompt has the {kind} placeholders {spelled}: number them 1 to {len(numbers)} in order of appearance, "
            f"and list the {kind}s in that order (to show one twice, list it twice)"
        )
    if len(matches) != given:
        raise InputError(
            f"prompt has {len(matches)} {kind} placeholder(s), and {given} {kind}(s) are given with it: write one "
            f"placeholder, such as <|{kind}_1|>, for each {kind}"
        )


def given_media(kind: Kind, media: Sequence[Any] | None) -> tuple[Any, ...]:
    """Return the media given beside a prompt, located; strings may be URLs here as in a chat's parts.

    Raises:
        InputError: they are no list, or as in a chat's parts.
    """
    if media is not None and not isinstance(media, list | tuple):
        raise InputError(
            f"{kind}s is {type(media).__name__}: pass a list, one entry for each placeholder of the prompt"
        )
    return tuple(locate(f"{kind}s[{i}]", medium, kind) for i, medium in enumerate(media or ()))
