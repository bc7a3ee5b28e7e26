"""Conversations of manifests' lines in one form, also of those that were written for other tools.

Besides our own chats these are ms-swift's, LLaMA-Factory's and TRL's, with media beside the messages and their places
in the texts, and OpenAI's, with tools and weights beside them. Keys that change the loss mask are taken or refused.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.chat import ROLE_ALIASES, ROLES, with_tools
from phi4mm_jax.processing.media_urls import refuse_segment
from phi4mm_jax.processing.message_parts import looks_like_media, names_media_file, words_of
from phi4mm_jax.utils.strict_json import parse_json

_log = logging.getLogger(__name__)
_logged: set[str] = set()  # kinds of places that are text: once of each, as texts may be anybody's
MESSAGES = ("messages", "conversations", "conversation")
MEDIA = {"image": ("images", "image"), "audio": ("audios", "audio"), "video": ("videos", "video")}
_SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
_LOSS = ("loss", "weight", "train", "training")
_SETTINGS = ("parallel_tool_calls", "tool_choice")  # of OpenAI's format; they are not part of the prompt
_OF_ALL_LINES = ("adapter", "max_crops")  # of lines of requests; here they are settings of the data
_LINE_KEYS = {*MESSAGES, *_SYSTEM, *(key for keys in MEDIA.values() for key in keys), *_SETTINGS, "tools", "transcript"}
_ANSWERS = ("prompt", "completion", "chosen", "rejected", "rejected_response")
_MESSAGE_KEYS = {
    "role", "from", "content", "value", "name", "tools", "tool_calls", "tool_call_id", "function_call", *_LOSS,
}  # fmt: skip
_ROLES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "observation": "tool",
    "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # roles of messages that are tool calls alone
_TOOL_WORDS = {"tool", "tools", "function", "functions"}
_LOSS_WORDS = {"loss", "losses", "weight", "weights", "mask", "masks", "masked", "train", "training", "trainable"}
_REASONING_WORDS = {"thinking", "reasoning", "thought", "thoughts"}
_PLACE = re.compile(r"<(image|audio|video)>")
_NAMED_IN_TEXT = re.compile(r"<(img|image|audio|video)>([^<>\n]+)</\1>")


@dataclass(frozen=True)
class Conversation:
    """Chat messages as `render_chat` takes them, with their media and tools.

    Attributes:
        loss_mask: per message of role assistant.
    """

    messages: list[dict[str, Any]]
    loss_mask: tuple[bool, ...]


def read_conversation(values: Mapping[str, Any]) -> Conversation:
    """Return the conversation of a line.

    Raises:
        InputError: it has none, its media are not as many as their places, or a key that looks like media, tools or a
            loss mask is not taken.
    """
    values = _with_completion(values)
    name, given = _messages(values)
    _check_line(values)
    messages = [read_message(f"{name}[{i}]", message) for i, message in enumerate(given)]
    roles = [message["role"] for message in messages]
    loss = [_in_loss(f"{name}[{i}]", message) for i, message in enumerate(given)]
    for i, (role, in_loss) in enumerate(zip(roles, loss, strict=True)):
        if in_loss and role not in ("assistant", *_CALLS):
            raise InputError(f"{name}[{i}] is of role {role!r:.40} and asks for loss; only answers have one")
    messages, mask = _join_tool_calls(name, messages, [in_loss is not False for in_loss in loss])
    messages = _with_system(values, messages)
    messages = _with_tools(values, messages)
    return Conversation(_with_media(values, messages), mask)


def _with_completion(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a line of TRL's other form, a prompt and its completion, with messages."""
    prompt, completion = values.get("prompt"), values.get("completion")
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        return values
    if given := [key for key in MESSAGES if values.get(key) is not None]:
        raise InputError(f"the line has {given[0]}, and a prompt with its completion; leave one out")
    asked = [{**message, "loss": False} if isinstance(message, Mapping) else message for message in prompt]
    return {**values, "messages": [*asked, *completion]}


def _messages(values: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    found = [key for key in MESSAGES if values.get(key) is not None] or ["messages"]
    if len(found) > 1:
        raise InputError(f"the line has both {found[0]} and {found[1]}; leave one out")
    name, messages = found[0], values.get(found[0])
    if isinstance(messages, str):  # as tables have it, whose columns are of one type
        try:
            messages = parse_json(messages)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name} is a string, but not JSON ({error})") from None
    if not isinstance(messages, list) or not messages:
        kind = type(messages).__name__ if messages else f"missing or empty; the line has {_names(values)}"
        raise InputError(f"{name} is {kind}; expected a list of messages with role and content")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InputError(f"{name}[{i}] is a {type(message).__name__}; expected a message with role and content")
    return name, messages


def _names(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key!r:.40}" for key in list(values)[:6]) or "no keys"


# Keys that are not taken.


def _check_line(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if key not in _LINE_KEYS and (what := _looks_like(key, value)):
            raise InputError(
                f"{key!r} looks like {what} and is not taken; expected images, audios or videos beside the messages, "
                'tools, or "loss" in a message. Write it so, rename it, or take it out'
            )
    if (key := next((key for key in _OF_ALL_LINES if values.get(key) is not None), None)) is not None:
        raise InputError(
            f"{key!r} is not taken of a line; give it for all of them (data.{key} in a recipe), and take it out"
        )
    choice = values.get("tool_choice")
    if choice not in (None, "auto"):
        raise InputError(f'tool_choice is {choice!r:.60} and has no place in the prompt; leave it out, or say "auto"')
    labels = [values.get(key) for key in ("kto_tag", "label")]
    if any(label.lower() == "false" if isinstance(label, str) else label in (False, 0) for label in labels):
        raise InputError("the answer is marked as a bad one, which only KTO learns from; take the line out")
    objects = values.get("objects")
    if isinstance(objects, Mapping) and (objects.get("bbox") or objects.get("ref")):
        raise InputError("objects are not put into the texts; write names and boxes there, and take objects out")


def _looks_like(key: str, value: Any) -> str | None:
    if looks_like_media(key, value):
        return "media"
    if value is None or (isinstance(value, str | list | Mapping) and not value):
        return None
    words = words_of(key)
    if not _TOOL_WORDS.isdisjoint(words):
        is_list = isinstance(value, list | Mapping) or (isinstance(value, str) and value.lstrip()[:1] in ("[", "{"))
        return "tools" if is_list else None
    if not _LOSS_WORDS.isdisjoint(words) and words[-1] not in ("id", "source", "set", "split", "name"):
        return "a loss mask"
    if words == ["history"]:
        return "earlier turns"
    return None


# Messages.


def read_message(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with role and content, without nulls and loss.

    Raises:
        InputError: its role is not known, or a key that would change what is trained on is not taken; it names `where`.
    """
    for key, value in given.items():
        if key not in _MESSAGE_KEYS and (what := _looks_like(key, value)):
            raise InputError(f"{where}.{key} looks like {what} and is not taken; rename it, or take it out")
        if value and not _REASONING_WORDS.isdisjoint(words_of(key)):
            raise InputError(
                f"{where}.{key} would not be trained on: the chat template has no place for reasoning; write it into "
                "the content, or take it out"
            )
    if None not in (given.get("content"), given.get("value")) and given["content"] != given["value"]:
        raise InputError(f"{where}: content and value are both given, and differ; leave one out")
    if isinstance(kind := given.get("type"), str) and kind in MEDIA:
        raise InputError(
            f"{where}.type is {kind!r}, whose text is no {kind}; make it a part of a message's content: "
            f'{{"type": "{kind}", "{kind}": PATH}}'
        )
    message = {key: value for key, value in given.items() if value is not None and key not in ("from", "value", *_LOSS)}
    role = message.get("role", given.get("from"))
    role = _ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else role
    if role not in (known := (*ROLES, *ROLE_ALIASES, *_CALLS)):
        found = "missing; the message has " + _names(given) if role is None else f"{role!r:.40}"
        raise InputError(f"{where}.role is {found}; expected one of {', '.join(known)}, or human, gpt, ...")
    message["role"] = role
    if "content" not in message and given.get("value") is not None:
        message["content"] = given["value"]
    return message


def _in_loss(where: str, message: Mapping[str, Any]) -> bool | None:
    """Return whether a message is in the loss mask, by one of several keys; None without any."""
    found = {}
    for key in _LOSS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise InputError(f"{where}.{key} is {value!r:.40}; expected true or false, or 1 or 0")
        found[key] = bool(value)
    if len(set(found.values())) > 1:
        raise InputError(f"{where}: {' and '.join(found)} contradict each other; leave one out")
    return next(iter(found.values()), None)


def _join_tool_calls(
    name: str, messages: Sequence[dict[str, Any]], loss: Sequence[bool]
) -> tuple[list[dict[str, Any]], tuple[bool, ...]]:
    """Join messages that are tool calls alone to the answer before them, or make them one."""
    joined: list[dict[str, Any]] = []
    mask: list[bool] = []
    for i, (message, in_loss) in enumerate(zip(messages, loss, strict=True)):
        if message["role"] not in _CALLS:
            joined.append(message)
            mask += [in_loss] if message["role"] == "assistant" else []
            continue
        calls = [*_parse_calls(f"{name}[{i}]", message.get("content"))]
        if joined and joined[-1]["role"] == "assistant":
            if mask[-1] != in_loss:
                raise InputError(f"{name}[{i}]: a part of an answer is masked, another is not; make them alike")
            joined[-1] = {**joined[-1], "tool_calls": [*(joined[-1].get("tool_calls") or []), *calls]}
        else:
            joined.append({"role": "assistant", "tool_calls": calls})
            mask.append(in_loss)
    return joined, tuple(mask)


def _parse_calls(where: str, content: Any) -> Iterator[dict[str, Any]]:
    """Parse calls that are written as JSON: an object with name and arguments, or a list of them."""
    try:
        found = parse_json(content) if isinstance(content, str) else content
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: the tool call is not JSON ({error})") from None
    for call in found if isinstance(found, list) else [found]:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise InputError(f"{where}: a tool call is an object with name and arguments")
        yield {"function": dict(call)}


def _with_system(values: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    given = [key for key in _SYSTEM if values.get(key)]
    if not given:
        return messages
    text = values[given[0]]
    if not isinstance(text, str):
        raise InputError(f"{given[0]} is a {type(text).__name__}; expected the system message as a string")
    if len(given) > 1 or any(message["role"] in ("system", "developer") for message in messages):
        raise InputError(f"{given[0]} is given beside the messages, and there is another system message; leave one out")
    return [{"role": "system", "content": text}, *messages]


def _with_tools(values: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put tools beside the messages into the first system message, as `render_chat` puts them."""
    tools = values.get("tools")
    if not tools or (isinstance(tools, str) and tools.split() in ([], ["[]"])):
        return messages
    if not isinstance(tools, str | list):
        raise InputError(f"tools is a {type(tools).__name__}; expected a list of tools, or its JSON as a string")
    return with_tools(messages, tools)


# Media beside the messages.


def _with_media(values: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the media beside the messages into their places: parts without a medium of their own or, where there are
    none, `<image>`, `<audio>` and `<video>` in the texts."""
    for text in (part for message in messages for part in _content_parts(message) if isinstance(part, str)):
        for found in _NAMED_IN_TEXT.finditer(text):
            if "://" in found[2] or names_media_file("file", found[2].strip()):
                raise InputError(
                    f"{found[0]!r:.80} names a medium within a text; write its path as image, audio or video beside "
                    "the messages, and <image>, <audio> or <video> in its place"
                )
    beside = {kind: _media_beside(values, kind) for kind in MEDIA}
    if all(media is None for media in beside.values()):
        _check_texts(values, messages)
        return messages
    if beside["audio"]:  # NeMo's; other keys may be answers, such as the times or the box that are to be found
        refuse_segment("the line", {"offset": values.get("offset")}, "audio")
    kinds = [kind for message in messages for kind in _empty_parts(message)]
    in_texts = not kinds
    if in_texts:
        messages = [{**message, **_split_texts(message)} for message in messages]
        kinds = [kind for message in messages for kind in _empty_parts(message)]
    for kind, media in beside.items():
        count, places = len(media or ()), kinds.count(kind)
        if count != places:
            places_of = f"<{kind}>" if in_texts else f'{{"type": "{kind}"}}'
            raise InputError(
                f"messages have {places} place(s) {places_of}, and {count} {kind}(s) stand beside them; put one where "
                f"each {kind} belongs"
            )
    rest = {kind: enumerate(media or ()) for kind, media in beside.items()}
    return [_fill_parts(message, rest) for message in messages]


def _check_texts(values: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a file that looks like the medium of messages without any; log the first text that has a place for one."""
    parts = [part for message in messages for part in _content_parts(message)]
    if not all(isinstance(part, str) for part in parts):
        return
    for key, value in values.items():
        if key not in (*_LINE_KEYS, *_ANSWERS) and names_media_file(key, value):
            raise InputError(
                f"{key!r} is {value!r:.80}, and the messages have no medium; write it as image, audio or video beside "
                "them, with <image>, <audio> or <video> where it belongs, or take it out"
            )
    for text in parts:
        if (place := _PLACE.search(text)) and place[1] not in _logged:
            _logged.add(place[1])
            _log.warning("%s is text where no %ss stand beside the messages (said once)", place[0], place[1])


def _content_parts(message: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the texts of a message, and its other parts as they are."""
    content = message.get("content")
    for part in content if isinstance(content, list) else [content or ""]:
        text = part.get("text") if isinstance(part, Mapping) else None
        yield text if isinstance(text, str) else part


def _media_beside(values: Mapping[str, Any], kind: str) -> list[Any] | None:
    """Return the media of a kind; None if the line has no such key."""
    plural, singular = MEDIA[kind]
    given = [key for key in (plural, singular) if values.get(key) is not None]
    if len(given) > 1:
        raise InputError(f"the line has both {plural} and {singular}; leave one out")
    if not given:
        return [] if plural in values or singular in values else None
    media = values[given[0]]
    if not isinstance(media, list):
        return [media] if media else []
    if given[0] == "video" and len(media) > 1:
        raise InputError('video is a list; write "videos": [[frame, ...]] for one of frames, or "videos": [file, ...]')
    if None in media:
        raise InputError(f"{given[0]}[{media.index(None)}] is null; give a path, or take it out")
    return media


def _empty_parts(message: Mapping[str, Any]) -> Iterator[str]:
    """Return the kinds of the parts that have no medium of their own."""
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        if isinstance(part, Mapping) and _is_empty(part):
            yield part["type"]


def _is_empty(part: Mapping[str, Any]) -> bool:
    kind = part.get("type")
    return kind in MEDIA and all(part.get(key) is None for key in (kind, "url", "path", "base64"))


def _split_texts(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a message, its texts cut where media belong."""
    content = message.get("content")
    if isinstance(content, str):
        return {"content": _split_text(content)} if _PLACE.search(content) else {}
    if not isinstance(content, list):
        return {}
    parts: list[Any] = []
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        parts += _split_text(part["text"]) if is_text and _PLACE.search(part["text"]) else [part]
    return {"content": parts}


def _split_text(text: str) -> list[dict[str, Any]]:
    pieces = _PLACE.split(text)  # texts, with the kinds between them
    return [
        {"type": piece} if i % 2 else {"type": "text", "text": piece}
        for i, piece in enumerate(pieces)
        if i % 2 or piece
    ]


def _fill_parts(message: dict[str, Any], rest: Mapping[str, Iterator[tuple[int, Any]]]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_fill_part(part, rest) for part in content]}


def _fill_part(part: Any, rest: Mapping[str, Iterator[tuple[int, Any]]]) -> Any:
    if not isinstance(part, Mapping) or not _is_empty(part):
        return part
    number, medium = next(rest[part["type"]])
    if (index := part.get("index")) not in (None, number):  # as datasets for TRL have it
        kind = part["type"]
        raise InputError(
            f"index of the {kind} in place {number} is {index!r:.40}; list the {kind}s in the order of their places"
        )
    return {**{key: value for key, value in part.items() if key != "index"}, part["type"]: medium}
