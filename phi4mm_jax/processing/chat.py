"""Prompts: a raw string or a list of chat messages becomes a sequence of texts, special tokens and media.

A raw prompt is in the caller's hands: its special tokens and its media placeholders are recognised. In a chat they come
from the structure of the messages alone, and whatever a text holds is text. Media are collected, not opened;
only a video is, since its frames are as many images.
"""

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.request import url2pathname

from phi4mm_jax.errors import CheckpointError, InputError
from phi4mm_jax.processing.images import check_max_crops
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.processing.video import MAX_FRAMES, Frame, crops_per_frame, video_frames

Kind = Literal["image", "audio"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Media:
    """The place of an image or an audio clip among the pieces of a prompt; `index` counts each kind from 0."""

    kind: Kind
    index: int


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt: plain text (str), ids of special tokens (int) and media, in order.

    `images[i]` and `audios[i]` are what `Media("image", i)` and `Media("audio", i)` stand for, as the caller passed
    them, but for base64, which is decoded to bytes, file URLs, which become paths, and videos, which become `Frame`s.
    """

    pieces: tuple[str | int | Media, ...]
    images: tuple[Any, ...]
    audios: tuple[Any, ...]


def parse_prompt(
    prompt: str | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    images: Sequence[Any] | None = (),
    audios: Sequence[Any] | None = (),
) -> Prompt:
    """A string goes to `parse_raw`, a list of messages to `render_chat`; anything else raises InputError."""
    if isinstance(prompt, str):
        return parse_raw(prompt, tokenizer, images, audios)
    if isinstance(prompt, list | tuple):
        return render_chat(prompt, tokenizer, images, audios)
    raise InputError(f"prompt is {type(prompt).__name__}: pass a raw string, or a list of chat messages")


# Raw prompts.

# Both the spellings of the published prompts and the tokens that these become.
_PLACEHOLDER = re.compile(r"<\|(?P<kind>image|audio)(?:_(?P<number>[0-9]+))?\|>|<\|endoftext1(?P<token>[01])\|>")


def parse_raw(
    prompt: str, tokenizer: Tokenizer, images: Sequence[Any] | None = (), audios: Sequence[Any] | None = ()
) -> Prompt:
    """Parses a raw prompt, in which special tokens are recognised.

    `<|image_1|>`, `<|image_2|>`, ... (or, unnumbered, `<|image|>` or `<|endoftext10|>`) take the images in order of
    appearance; `<|audio_1|>`, ..., `<|audio|>`, `<|endoftext11|>` the clips. White space around them is kept, unless a
    special token next to it swallows it. Raises InputError if a kind's placeholders are not numbered 1, 2, ... in order
    of appearance (the original ignores the numbers: in another order a prompt would show another image than it says),
    if numbered and unnumbered ones are mixed, if they are not as many as the media, or if the prompt is empty.
    """
    if not isinstance(prompt, str) or not prompt:
        cause = "empty" if prompt == "" else type(prompt).__name__
        raise InputError(f"prompt is {cause}: pass a string with at least one character")
    given = {"image": given_media("image", images), "audio": given_media("audio", audios)}
    found: dict[Kind, list[re.Match[str]]] = {kind: [] for kind in KINDS}
    pieces: list[str | int | Media] = []
    end = 0
    for match in _PLACEHOLDER.finditer(prompt):
        pieces += tokenizer.split_special(prompt[end : match.start()])
        kind: Kind = "image" if match["kind"] == "image" or match["token"] == "0" else "audio"
        pieces.append(Media(kind, len(found[kind])))
        found[kind].append(match)
        end = match.end()
    pieces += tokenizer.split_special(prompt[end:])
    for kind, matches in found.items():
        _check_placeholders(kind, matches, len(given[kind]))
    return Prompt(tuple(pieces), given["image"], given["audio"])


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
    """The media given beside a prompt. Strings may be URLs here as in a chat's parts; raises InputError likewise."""
    if media is not None and not isinstance(media, list | tuple):
        raise InputError(
            f"{kind}s is {type(media).__name__}: pass a list, one entry for each placeholder of the prompt"
        )
    return tuple(_located(f"{kind}s[{i}]", medium, kind) for i, medium in enumerate(media or ()))


# Chats.

_NEXT = object()  # stands for the next of the media given beside the messages


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    images: Sequence[Any] | None = (),
    audios: Sequence[Any] | None = (),
    *,
    tools: str | Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
) -> Prompt:
    """Renders chat messages by the published template: `<|role|>content<|end|>` for each, then `<|assistant|>`, or
    `<|endoftext|>` without a generation prompt. Nothing is trimmed here: tokens swallow white space by their flags.

    A message has a "role" (system, user, assistant or tool) and a "content": a string, or a list of parts, joined with
    nothing between them:

        {"type": "text", "text": str}
        {"type": "image_url", "image_url": {"url": URL} or URL}    data:image/...;base64,..., file://... or a path
        {"type": "input_audio", "input_audio": {"data": base64, "format": "wav"}}
        {"type": "image", "image": PIL image, path or bytes}       without "image": the next of `images`
        {"type": "audio", "audio": (samples, rate), path or bytes} without "audio": the next of `audios`
        {"type": "video", "video": path, bytes, or list of images} as that many images, one after the other; of a file,
                                                                   a folder or a list, see `video_frames`

    A video may have "frames", how many at most (64), and "max_crops" of each (by default 64 // their number).

    Tools, a string or a list to be written as JSON, end the system turn as `<|tool|>JSON<|/tool|>`. They are "tools" of
    a system message, or the argument, which goes to the first system message, or to an empty one put before the others.
    "tool_calls" of an assistant message, in OpenAI's form, follow its content (which may then be None or absent) as
    `<|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>`. The published template has no place for them.
    The result of a call is a message of role tool and becomes `<|tool|>content<|end|>`, as in the published template.
    (The vocabulary also has `<|tool_response|>`, but nothing published says where it goes; a raw prompt can use it.)
    Other keys of a message, such as "name" and "tool_call_id", are ignored, as the template ignores them.

    Raises InputError, naming the message and the key, for whatever does not fit the above, and if the parts without
    media of their own are not as many as the media given beside the messages.
    """
    if not isinstance(messages, list | tuple) or not messages:
        cause = "empty" if isinstance(messages, list | tuple) else type(messages).__name__
        raise InputError(f"messages is {cause}: pass a list of at least one message with role and content")
    given = {"image": given_media("image", images), "audio": given_media("audio", audios)}
    roles = [_role(f"messages[{i}]", message, tokenizer) for i, message in enumerate(messages)]
    owner = roles.index("system") if "system" in roles else None

    pieces: list[str | int | Media] = []
    media: dict[Kind, list[Any]] = {kind: [] for kind in KINDS}
    if tools is not None and owner is None:
        pieces += [_id(tokenizer, "<|system|>"), *_tools("tools", tools, tokenizer), _id(tokenizer, "<|end|>")]
    for i, (role, message) in enumerate(zip(roles, messages, strict=True)):
        where = f"messages[{i}]"
        pieces.append(_id(tokenizer, f"<|{role}|>"))
        for piece in _content(where, message):
            if isinstance(piece, str):
                pieces.append(piece)
            else:
                kind, payload = piece
                pieces.append(Media(kind, len(media[kind])))
                media[kind].append(payload)
        if message.get("tools") is not None:
            if role != "system":
                raise InputError(f"{where}.tools: only a system message has tools; move them there")
            if tools is not None and i == owner:
                raise InputError(f"{where}.tools: tools are also given beside the messages; pass them in one place")
            pieces += _tools(f"{where}.tools", message["tools"], tokenizer)
        elif tools is not None and i == owner:
            pieces += _tools("tools", tools, tokenizer)
        if message.get("tool_calls"):
            if role != "assistant":
                raise InputError(f"{where}.tool_calls: only an assistant message calls tools; remove them")
            calls = _json(f"{where}.tool_calls", list(_calls(f"{where}.tool_calls", message["tool_calls"])))
            pieces += [_id(tokenizer, "<|tool_call|>"), calls, _id(tokenizer, "<|/tool_call|>")]
        pieces.append(_id(tokenizer, "<|end|>"))
    pieces.append(_id(tokenizer, "<|assistant|>" if add_generation_prompt else "<|endoftext|>"))
    taken = {kind: _fill(kind, media[kind], given[kind]) for kind in KINDS}
    return Prompt(tuple(pieces), taken["image"], taken["audio"])


def _id(tokenizer: Tokenizer, content: str) -> int:
    if content not in tokenizer.special_tokens:
        raise CheckpointError(
            f"tokenizer: {content} is not one of its special tokens, so the chat cannot be rendered. Use the tokenizer "
            "files of the published checkpoint."
        )
    return tokenizer.special_tokens[content]


def _role(where: str, message: Any, tokenizer: Tokenizer) -> str:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is {type(message).__name__}: pass a dict with role and content")
    allowed = [role for role in ROLES if f"<|{role}|>" in tokenizer.special_tokens]
    role = message.get("role")
    if role not in allowed:
        raise InputError(f"{where}.role is {role!r:.60}: it must be one of {', '.join(allowed)}")
    return role


def _fill(kind: Kind, media: Sequence[Any], given: Sequence[Any]) -> tuple[Any, ...]:
    """The media in order of appearance, with those given beside the messages in their places."""
    places = sum(payload is _NEXT for payload in media)
    if places != len(given):
        raise InputError(
            f'messages have {places} part(s) {{"type": "{kind}"}} for the next {kind}, and {len(given)} {kind}(s) are '
            f"given beside them: put such a part where each {kind} belongs (a placeholder in a text is plain text)"
        )
    rest = iter(given)
    return tuple(next(rest) if payload is _NEXT else payload for payload in media)


def _content(where: str, message: Mapping[str, Any]) -> Iterator[str | tuple[Kind, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    elif isinstance(content, list | tuple):
        for j, part in enumerate(content):
            yield from _part(f"{where}.content[{j}]", part)
    elif content is not None or not message.get("tool_calls"):
        raise InputError(f"{where}.content is {_kind_of(message, 'content')}: pass a string, or a list of parts")


def _part(where: str, part: Any) -> Iterator[str | tuple[Kind, Any]]:
    match part:
        case {"type": "text"}:
            yield _string(where, part, "text")
        case {"type": "image_url"}:
            inner = part.get("image_url")
            if isinstance(inner, Mapping):
                yield "image", _located(f"{where}.image_url.url", _string(f"{where}.image_url", inner, "url"), "image")
            else:
                yield "image", _located(f"{where}.image_url", _string(where, part, "image_url"), "image")
        case {"type": "input_audio"}:
            inner = part.get("input_audio")
            if not isinstance(inner, Mapping):
                raise InputError(
                    f'{where}.input_audio is {_kind_of(part, "input_audio")}: pass {{"data": base64, "format": "wav"}}'
                )
            yield "audio", _base64(f"{where}.input_audio.data", _string(f"{where}.input_audio", inner, "data"))
        case {"type": "image" | "audio" as kind}:
            yield kind, _payload(where, part, kind)
        case {"type": "video"}:
            for frame in _frames(where, part):
                yield "image", frame
        case Mapping():
            raise InputError(
                f"{where}.type is {part.get('type')!r:.60}: "
                "it must be text, image_url, input_audio, image, audio or video"
            )
        case _:
            raise InputError(f'{where} is {type(part).__name__}: pass a dict such as {{"type": "text", "text": ...}}')


def _string(where: str, mapping: Mapping[str, Any], key: str) -> str:
    value = mapping.get(key)
    if not isinstance(value, str):
        raise InputError(f"{where}.{key} is {_kind_of(mapping, key)}: pass a string")
    return value


def _kind_of(mapping: Mapping[str, Any], key: str) -> str:
    return type(mapping[key]).__name__ if key in mapping else "missing"


def _payload(where: str, part: Mapping[str, Any], kind: Kind) -> Any:
    unknown = [key for key in part if key not in ("type", kind)]
    if unknown:
        raise InputError(f'{where}.{unknown[0]}: a part of type {kind} has only the key "{kind}"; put the {kind} there')
    payload = part.get(kind, _NEXT)
    if payload is None:
        raise InputError(f"{where}.{kind} is None: pass the {kind}, or leave the key out to take the next of {kind}s")
    return _located(f"{where}.{kind}", payload, kind)


def _frames(where: str, part: Mapping[str, Any]) -> list[Frame]:
    unknown = [key for key in part if key not in ("type", "video", "frames", "max_crops")]
    if unknown:
        raise InputError(f'{where}.{unknown[0]}: a part of type video has only the keys "video", "frames", "max_crops"')
    if part.get("video") is None:
        raise InputError(f"{where}.video is {_kind_of(part, 'video')}: pass a path, a file's bytes or a list of images")
    max_crops = part.get("max_crops")
    if max_crops is not None:
        check_max_crops(f"{where}.max_crops", max_crops)
    try:
        frames = video_frames(_located(f"{where}.video", part["video"], "video"), part.get("frames", MAX_FRAMES))
    except InputError as error:
        raise InputError(f"{where}.video: {error}") from error
    return [Frame(image, max_crops or crops_per_frame(len(frames))) for image in frames]


def _located(where: str, url: Any, kind: str) -> Any:
    """What a URL points to: the bytes of a data URL, the path of a file URL; a path, or what is no string, as it is."""
    if not isinstance(url, str):
        return url
    scheme = url[: url.find(":") + 1].lower()
    if scheme == "data:":
        header, comma, data = url.partition(",")
        media_type, *options = header[len("data:") :].lower().split(";")
        if not comma or options[-1:] != ["base64"] or media_type.split("/")[0] not in ("", "application", kind):
            raise InputError(f"{where} begins with {header!r:.60}: a data URL must read data:{kind}/...;base64,...")
        return _base64(where, data)
    if scheme == "file:":
        host, slash, path = url[len("file:") :].removeprefix("//").partition("/")
        if host not in ("", "localhost") or not slash:
            raise InputError(f"{where} is {url!r:.200}: a file URL must read file:///path")
        return Path(url2pathname("/" + path))
    if "://" in url[:64]:
        raise InputError(f"{where} is {url!r:.200}: nothing is downloaded; fetch it and pass the bytes or a path")
    if not url:
        raise InputError(f"{where} is an empty string: pass a data URL, a file URL or a path")
    return url


def _base64(where: str, data: str) -> bytes:
    try:
        content = base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:
        raise InputError(f"{where} is not base64 ({error}): encode the file's bytes with base64.b64encode") from None
    if not content:
        raise InputError(f"{where} holds no data: encode the file's bytes with base64.b64encode")
    return content


def _tools(where: str, tools: Any, tokenizer: Tokenizer) -> list[str | int]:
    if not isinstance(tools, str | list | tuple):
        raise InputError(f"{where} is {type(tools).__name__}: pass a list of tool descriptions, or its JSON as a str")
    text = tools if isinstance(tools, str) else _json(where, tools)
    return [_id(tokenizer, "<|tool|>"), text, _id(tokenizer, "<|/tool|>")]


def _calls(where: str, calls: Any) -> Iterator[dict[str, Any]]:
    """Tool calls as the model writes them, from OpenAI's form, whose arguments are JSON within a string."""
    if not isinstance(calls, list | tuple):
        raise InputError(f"{where} is {type(calls).__name__}: pass a list of calls")
    for i, call in enumerate(calls):
        at = f"{where}[{i}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise InputError(f'{at}.function is missing: pass {{"function": {{"name": ..., "arguments": ...}}}}')
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{at}.function.arguments is not JSON ({error}): pass a JSON object") from None
        if not isinstance(arguments, Mapping):
            raise InputError(f"{at}.function.arguments is {type(arguments).__name__}: pass a JSON object")
        yield {"name": _string(f"{at}.function", function, "name"), "arguments": dict(arguments)}


def _json(where: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be written as JSON ({error}): use dicts, lists and plain values") from None


# Files of chats.


def path_in(source: str, folder: Path) -> str:
    """A path relative to the folder, as one to open; a URL as it is."""
    is_url = source[:5].lower() in ("data:", "file:") or "://" in source[:64]
    return source if is_url or not source else str(folder / source)


def with_paths(value: Any, folder: Path) -> Any:
    """Messages, their content or one of its parts, with the paths of media located. Nothing else is touched."""
    if isinstance(value, list):
        return [with_paths(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key in ("content", "image", "audio", "video", "image_url", "url"):
        inner = value.get(key)
        if isinstance(inner, str) and key != "content":
            found[key] = path_in(inner, folder)
        elif isinstance(inner, list) and key == "video":  # frames
            found[key] = [path_in(frame, folder) if isinstance(frame, str) else frame for frame in inner]
        elif isinstance(inner, list | dict):
            found[key] = with_paths(inner, folder)
    return {**value, **found}
