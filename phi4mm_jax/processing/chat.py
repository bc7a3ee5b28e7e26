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
_ROLE_ALIASES = {"developer": "system", "function": "tool"}  # OpenAI's newer and older names


@dataclass(frozen=True)
class Tokens:
    """An answer as the ids that were drawn: in a chat the content of a message, or a part of it.

    A class, and no form of JSON: only the caller's program can put ids into a chat, which may be special tokens.
    """

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Media:
    """The place of an image or an audio clip among the pieces of a prompt; `index` counts each kind from 0."""

    kind: Kind
    index: int


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt: plain text (str), ids of special tokens (int), drawn tokens and media, in order.

    `images[i]` and `audios[i]` are what `Media("image", i)` and `Media("audio", i)` stand for, as the caller passed
    them, but for base64, which is decoded to bytes, file URLs, which become paths, and videos and images of low detail,
    which become `Frame`s.
    """

    pieces: tuple[str | int | Tokens | Media, ...]
    images: tuple[Any, ...]
    audios: tuple[Any, ...]


def parse_prompt(
    prompt: str | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    images: Sequence[Any] | None = (),
    audios: Sequence[Any] | None = (),
    *,
    continue_final_message: bool = False,
) -> Prompt:
    """A string goes to `parse_raw`, a list of messages to `render_chat`; anything else raises InputError, and so does a
    string that is to be continued as a message."""
    if not isinstance(continue_final_message, bool):
        raise InputError(f"continue_final_message is {continue_final_message!r:.60}: pass True or False")
    if isinstance(prompt, str):
        if continue_final_message:
            raise InputError("continue_final_message is for chat messages: a raw prompt is continued where it ends")
        return parse_raw(prompt, tokenizer, images, audios)
    if isinstance(prompt, list | tuple):
        return render_chat(prompt, tokenizer, images, audios, continue_final_message=continue_final_message)
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
    continue_final_message: bool = False,
) -> Prompt:
    """Renders chat messages by the published template: `<|role|>content<|end|>` for each, then `<|assistant|>`, or
    `<|endoftext|>` without a generation prompt. Nothing is trimmed here: tokens swallow white space by their flags.

    With `continue_final_message` the last message, which is the assistant's and ends with a text, is the beginning of
    the answer: nothing follows it.

    A message has a "role" (system, user, assistant or tool; developer is system) and a "content": a string, or a list
    of parts, joined with nothing between them. A part is a string, or one of

        {"type": "text", "text": str}                              also input_text, output_text
        {"type": "image_url", "image_url": {"url": URL} or URL}    data:image/...;base64,..., file://... or a path
        {"type": "input_audio", "input_audio": {"data": base64 or data URL, "format": "wav"}}
        {"type": "image", "image": PIL image, path, URL or bytes}  without "image": the next of `images`
        {"type": "audio", "audio": (samples, rate), path or bytes} without "audio": the next of `audios`
        {"type": "video", "video": path, bytes, or list of images} as that many images, one after the other; of a file,
                                                                   a folder or a list, see `video_frames`

    As transformers has it, "url", "path" or "base64" may stand for the last three's own key; as vLLM has it, there are
    audio_url and video_url like image_url, and "type" may be left out. A medium may be an object as data sets store it:
    {"bytes": ..., "path": ...}, {"url": ...}, {"array": ..., "sampling_rate": ...}. A string of base64 is told from a
    path. A key that is None is taken as absent. "detail": "low" is one crop. Whatever else looks like a medium is an
    error.

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
    if continue_final_message:
        _check_continued(messages)
    if not isinstance(messages, list | tuple) or not messages:
        cause = "empty" if isinstance(messages, list | tuple) else type(messages).__name__
        raise InputError(f"messages is {cause}: pass a list of at least one message with role and content")
    given = {"image": given_media("image", images), "audio": given_media("audio", audios)}
    roles = [_role(f"messages[{i}]", message, tokenizer) for i, message in enumerate(messages)]
    owner = roles.index("system") if "system" in roles else None

    pieces: list[str | int | Tokens | Media] = []
    media: dict[Kind, list[Any]] = {kind: [] for kind in KINDS}
    if tools is not None and owner is None:
        pieces += [_id(tokenizer, "<|system|>"), *_tools("tools", tools, tokenizer), _id(tokenizer, "<|end|>")]
    for i, (role, message) in enumerate(zip(roles, messages, strict=True)):
        where = f"messages[{i}]"
        pieces.append(_id(tokenizer, f"<|{role}|>"))
        for piece in _content(where, message):
            if isinstance(piece, str | Tokens):
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
        if calls := _called(message):
            if role != "assistant":
                raise InputError(f"{where}.tool_calls: only an assistant message calls tools; remove them")
            text = _json(f"{where}.tool_calls", list(_calls(f"{where}.tool_calls", calls)))
            pieces += [_id(tokenizer, "<|tool_call|>"), text, _id(tokenizer, "<|/tool_call|>")]
        pieces.append(_id(tokenizer, "<|end|>"))
    if continue_final_message:
        pieces.pop()
    else:
        pieces.append(_id(tokenizer, "<|assistant|>" if add_generation_prompt else "<|endoftext|>"))
    taken = {kind: _fill(kind, media[kind], given[kind]) for kind in KINDS}
    return Prompt(tuple(pieces), taken["image"], taken["audio"])


def _check_continued(messages: Any) -> None:
    last = messages[-1] if isinstance(messages, list | tuple) and messages else None
    if not isinstance(last, Mapping):
        return  # as will be said
    where = f"messages[{len(messages) - 1}]"
    if last.get("role") != "assistant":
        raise InputError(
            f"{where}.role is {last.get('role')!r:.60}: continue_final_message continues an answer; end the messages "
            "with one of role assistant"
        )
    if _called(last):
        raise InputError(f"{where}.tool_calls: an answer that ends with tool calls is not continued; remove them")
    content = last.get("content")
    final = content[-1] if isinstance(content, list | tuple) and content else content
    is_text = isinstance(final, str | Tokens) or (isinstance(final, Mapping) and isinstance(final.get("text"), str))
    if not is_text:
        raise InputError(f"{where}.content does not end with a text: continue_final_message continues a text")


def _id(tokenizer: Tokenizer, content: str) -> int:
    if content not in tokenizer.special_tokens:
        raise CheckpointError(
            f"tokenizer: {content} is not one of its added tokens, so the chat cannot be rendered. Copy tokenizer.json "
            "of the published checkpoint into the folder; where tokens were added to it, add them to the published one"
        )
    return tokenizer.special_tokens[content]


def _role(where: str, message: Any, tokenizer: Tokenizer) -> str:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is {type(message).__name__}: pass a dict with role and content")
    allowed = [role for role in ROLES if f"<|{role}|>" in tokenizer.special_tokens]
    role = message.get("role")
    known = _ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if known not in allowed:
        raise InputError(f"{where}.role is {role!r:.60}: it must be one of {', '.join(allowed)}")
    for key, value in message.items():
        if key not in _MESSAGE_KEYS and looks_like_media(key, value):
            raise InputError(
                f'{where}.{key} is not taken: media of a message are parts of its content, such as {{"type": "image", '
                '"image": ...}'
            )
    return known


def _called(message: Mapping[str, Any]) -> Any:
    """The tool calls of a message, also in OpenAI's older form, which has one."""
    one = message.get("function_call")
    return message.get("tool_calls") or ([{"function": one}] if one else None)


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


def _content(where: str, message: Mapping[str, Any]) -> Iterator[str | Tokens | tuple[Kind, Any]]:
    content = message.get("content")
    if isinstance(content, str | Tokens):
        yield content
    elif isinstance(content, list | tuple):
        for j, part in enumerate(content):
            if isinstance(part, str | Tokens):
                yield part
            else:
                yield from _part(f"{where}.content[{j}]", part)
    elif content is not None or not _called(message):
        raise InputError(f"{where}.content is {_kind_of(message, 'content')}: pass a string, or a list of parts")


# What stands for a part's own key, as transformers has it.
_SOURCES = ("url", "path", "base64")
_URLS = {"image_url": "image", "input_image": "image", "audio_url": "audio", "video_url": "video"}
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_TYPES = ("text", *_URLS, "input_audio", "image", "audio", "video")
_DETAILS = ("low", "high", "auto", "original")


def _part(where: str, part: Any) -> Iterator[str | tuple[Kind, Any]]:
    if not isinstance(part, Mapping):
        raise InputError(f'{where} is {type(part).__name__}: pass a dict such as {{"type": "text", "text": ...}}')
    given = {key: value for key, value in part.items() if value is not None}  # tables give every part all keys
    kind = given.get("type")
    if kind is None:
        found = [key for key in _TYPES if key in given]
        kind = found[0] if len(found) == 1 else None
    if not isinstance(kind, str):
        kind = None
    if kind in _TEXTS:
        _check_keys(where, given, _TEXTS[kind])
        yield _string(where, part, _TEXTS[kind])
    elif kind in _URLS:
        key = "image_url" if kind == "input_image" else kind
        inner = given.get(key)
        beside = {str(k): v for k, v in inner.items() if v is not None} if isinstance(inner, Mapping) else {}
        known = ("frames", "max_crops") if _URLS[kind] == "video" else ("detail",)
        for at_key, found in ((where, given), (f"{where}.{key}", beside)):
            _check_keys(at_key, found, key, "url", "detail", *known)
        at, url = (f"{where}.{key}.url", _string(f"{where}.{key}", inner, "url")) if isinstance(inner, Mapping) else (
            f"{where}.{key}", _string(where, part, key)
        )  # fmt: skip
        source = _located(at, url, _URLS[kind])
        if _URLS[kind] == "video":
            for frame in _frames(at, source, {**given, **beside}):
                yield "image", frame
        elif _URLS[kind] == "image":
            yield "image", _detailed(f"{where}.{key}", source, {**given, **beside})
        else:
            yield "audio", source
    elif kind == "input_audio":
        _check_keys(where, given, kind)
        inner = given.get(kind)
        if not isinstance(inner, Mapping):
            raise InputError(f'{where}.input_audio is {_kind_of(part, kind)}: pass {{"data": base64, "format": "wav"}}')
        at, data = f"{where}.input_audio.data", _string(f"{where}.input_audio", inner, "data")
        yield "audio", _located(at, data, "audio") if data[:5].lower() == "data:" else _base64(at, data)
    elif kind == "image_pil":
        yield "image", _payload(where, {"image": given.get(kind, _NEXT)}, "image")
    elif kind in KINDS:
        payload = _payload(where, given, kind)
        inner = given.get(kind)
        beside = inner if isinstance(inner, Mapping) else {}
        _check_settings(f"{where}.{kind}", beside)
        detail = given.get("detail") if beside.get("detail") is None else beside["detail"]
        yield kind, payload if kind == "audio" else _detailed(where, payload, {"detail": detail})
    elif kind == "video":
        payload = _payload(where, given, kind)
        if payload is _NEXT:
            raise InputError(
                f"{where}.video is {_kind_of(part, kind)}: pass a path, a file's bytes or a list of images"
            )
        for frame in _frames(f"{where}.video", payload, given):
            yield "image", frame
    else:
        raise InputError(
            f"{where}.type is {part.get('type')!r:.60}: it must be text, image_url, input_audio, image, audio or video"
        )


def _check_settings(where: str, given: Mapping[str, Any], *known: str) -> None:
    for key, value in given.items():
        if key in _SETTINGS and key not in known and value is not None:
            raise InputError(f"{where}.{key} is a setting that is not taken here; leave it out")


# Of media, in the parts of others; those that are taken are named where they are.
_SETTINGS = frozenset({
    "fps", "frames", "nframes", "num_frames", "max_frames", "min_frames", "max_crops", "max_pixels", "min_pixels",
    "total_pixels", "resized_height", "resized_width", "video_start", "video_end",
})  # fmt: skip


def _check_keys(where: str, given: Mapping[str, Any], *known: str) -> None:
    """A part that has a medium, or a setting of it, besides what its type says would lose it."""
    _check_settings(where, given, *known)
    for key, value in given.items():
        if key not in ("type", *known) and looks_like_media(key, value):
            raise InputError(f"{where}.{key} is not taken in a part of type {given.get('type', known[0])}: make it one")


def _detailed(where: str, source: Any, given: Mapping[str, Any]) -> Any:
    """An image with the detail that OpenAI's form asks for: "low" is one crop besides the global view."""
    detail = given.get("detail")
    if detail not in (None, *_DETAILS):
        raise InputError(f"{where}.detail is {detail!r:.60}: it must be one of {', '.join(_DETAILS)}")
    if detail == "low" and source is _NEXT:
        raise InputError(f"{where}.detail: an image that is given beside the messages has none; use max_crops")
    return Frame(source, 1) if detail == "low" else source


def _string(where: str, mapping: Mapping[str, Any], key: str) -> str:
    value = mapping.get(key)
    if not isinstance(value, str):
        raise InputError(f"{where}.{key} is {_kind_of(mapping, key)}: pass a string")
    return value


def _kind_of(mapping: Mapping[str, Any], key: str) -> str:
    return type(mapping[key]).__name__ if key in mapping else "missing"


_PART_KEYS = {
    "image": ("detail", "uuid", "cache_control"),
    "audio": ("uuid", "cache_control"),
    "video": ("frames", "max_crops", "uuid", "cache_control"),
}


def _payload(where: str, given: Mapping[str, Any], kind: str) -> Any:
    """The medium of a part of type image, audio or video, or `_NEXT`."""
    sources = (kind, *_SOURCES)
    for key in given:
        if key not in ("type", *sources, *_PART_KEYS[kind]):
            raise InputError(
                f'{where}.{key}: a part of type {kind} has only the key "{kind}", or {", ".join(_SOURCES)}; put the '
                f"{kind} there"
            )
    found = [key for key in sources if key in given]
    if len(found) > 1:
        raise InputError(f"{where} has both {found[0]} and {found[1]}: give the {kind} once")
    if not found:
        return _NEXT
    source, at = given[found[0]], f"{where}.{found[0]}"
    if found[0] == "base64" and isinstance(source, str) and source[:5].lower() != "data:":
        return _base64(at, source)
    return source if source is _NEXT else _located(at, source, kind)


def _frames(where: str, source: Any, given: Mapping[str, Any]) -> list[Frame]:
    max_crops = given.get("max_crops")
    if max_crops is not None:
        check_max_crops(f"{where.removesuffix('.video')}.max_crops", max_crops)
    try:
        frames = video_frames(source, given.get("frames", MAX_FRAMES), max_crops)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return [Frame(image, max_crops or crops_per_frame(len(frames))) for image in frames]


def _located(where: str, url: Any, kind: str) -> Any:
    """What a URL points to: the bytes of a data URL or of base64, the path of a file URL, what an object of a data set
    holds; a path, or anything else, as it is."""
    if isinstance(url, Mapping):
        return _stored(where, url, kind)
    if isinstance(url, list) and kind == "video":
        return [_located(f"{where}[{i}]", frame, "image") for i, frame in enumerate(url)]
    if not isinstance(url, str):
        return url
    if is_base64(url):
        return _base64(where, url)
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


def _stored(where: str, found: Mapping[str, Any], kind: str) -> Any:
    """The medium in an object such as those in which `datasets` stores images, audio and video."""
    given = {key: value for key, value in found.items() if value is not None}
    if kind == "audio" and {"array", "sampling_rate"} <= given.keys():
        return given["array"], given["sampling_rate"]
    for key in ("bytes", "base64", "path", "url", kind):
        if key in given:
            source = given[key]
            is_text = key in ("bytes", "base64") and isinstance(source, str) and source[:5].lower() != "data:"
            return _base64(f"{where}.{key}", source) if is_text else _located(f"{where}.{key}", source, kind)
    keys = ", ".join(map(str, found)) or "no keys"
    raise InputError(f"{where} is an object with {keys:.80}: give it bytes, path, url or base64")


# How the base64 of files begins: PNG, JPEG, GIF, RIFF (WebP, WAV), TIFF, BMP, FLAC, Ogg, MP3, MP4, Matroska.
_BEGINNINGS = (
    "iVBORw0KGgo",
    "/9j/",
    "R0lGOD",
    "UklGR",
    "SUkq",
    "TU0A",
    "Qk",
    "ZkxhQ",
    "T2dnU",
    "SUQz",
    "AAAA",
    "GkXf",
)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_SHORTEST_FILE, _LONGEST_PATH = 48, 4096  # characters


def is_base64(source: str) -> bool:
    """Whether a string is the base64 of a file, and no path: it begins like one, or is longer than paths are."""
    if len(source) < _SHORTEST_FILE or not (source.startswith(_BEGINNINGS) or len(source) > _LONGEST_PATH):
        return False
    return _BASE64.fullmatch(source) is not None


def _base64(where: str, data: str) -> bytes:
    try:
        content = base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:
        raise InputError(f"{where} is not base64 ({error}): encode the file's bytes with base64.b64encode") from None
    if not content:
        raise InputError(f"{where} holds no data: encode the file's bytes with base64.b64encode")
    return content


def with_tools(messages: Sequence[Any], tools: Any) -> list[Any]:
    """The messages, with tools that stand beside them in the first system message, as `render_chat` puts them.

    Raises:
        InputError: that message has tools of its own.
    """
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    at = next((i for i, role in enumerate(roles) if role in ("system", "developer")), None)
    if at is None:
        return [{"role": "system", "content": "", "tools": tools}, *messages]
    if messages[at].get("tools"):
        raise InputError("tools are given beside the messages and in the system message; leave one out")
    return [*messages[:at], {**messages[at], "tools": tools}, *messages[at + 1 :]]


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
        function = call.get("function", call if "name" in call else None) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise InputError(f'{at}.function is missing: pass {{"function": {{"name": ..., "arguments": ...}}}}')
        arguments = function.get("arguments")
        arguments = {} if arguments is None else arguments
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError) as error:
                raise InputError(f"{at}.function.arguments is not JSON ({error}): pass a JSON object") from None
        if not isinstance(arguments, Mapping):
            raise InputError(f"{at}.function.arguments is {type(arguments).__name__}: pass a JSON object")
        yield {"name": _string(f"{at}.function", function, "name"), "arguments": dict(arguments)}


def _json(where: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be written as JSON ({error}): use dicts, lists and plain values") from None


# What would be lost.

_MESSAGE_KEYS = {"role", "content", "name", "tools", "tool_calls", "tool_call_id", "function_call"}
_MEDIA_WORDS = {
    "image", "img", "picture", "pic", "photo", "pixel", "frame", "video", "clip", "audio", "sound", "speech", "wav",
    "media", "medium",
}  # fmt: skip
# A key that ends with one of these tells something about a medium.
_ABOUT = {
    "id", "ids", "size", "sizes", "width", "height", "duration", "length", "seconds", "rate", "format", "type",
    "caption", "description", "title", "alt", "text", "transcript", "transcription", "language", "lang", "source",
    "license", "author", "hash", "md5", "sha1", "sha256", "count", "number", "index",
}  # fmt: skip


def words_of(key: Any) -> list[str]:
    """The words of a key, however it is written: image_path, imagePath and image-path have two."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", " ", str(key)).lower().split()


def looks_like_media(key: Any, value: Any) -> bool:
    """Whether a key that is not taken seems to hold a medium: by its name, or because it holds bytes. Numbers, switches
    and what is empty are none."""
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:
        return any(v is not None for v in value.values())
    if value is None or isinstance(value, bool | int | float):
        return False
    if isinstance(value, str | bytes | list | tuple | Mapping) and not value:
        return False
    words = words_of(key)
    named = any(word.removesuffix("s") in _MEDIA_WORDS for word in words) and words[-1] not in _ABOUT
    numbers = isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value) and "pixel" not in key
    return isinstance(value, bytes) or (named and not numbers)


# Files of chats.


def path_in(source: str, folder: Path) -> str:
    """A path relative to the folder, as one to open; a URL, or base64, as it is."""
    is_url = source[:5].lower() in ("data:", "file:") or "://" in source[:64]
    return source if is_url or not source or is_base64(source) else str(folder / source)


def with_paths(value: Any, folder: Path) -> Any:
    """Messages, their content or one of its parts, with the paths of media located. Nothing else is touched."""
    if isinstance(value, list):
        return [with_paths(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key in ("content", "image", "audio", "video", "image_url", "audio_url", "video_url", "url", "path"):
        inner = value.get(key)
        if isinstance(inner, str) and key != "content":
            found[key] = path_in(inner, folder)
        elif isinstance(inner, list) and key == "video":  # frames
            found[key] = [
                path_in(frame, folder) if isinstance(frame, str) else with_paths(frame, folder) for frame in inner
            ]
        elif isinstance(inner, list | dict):
            found[key] = with_paths(inner, folder)
    return {**value, **found}
