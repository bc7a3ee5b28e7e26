"""Chats: messages rendered by the published template, with tools and tool calls.

Special tokens and media come from the structure of the messages alone; whatever a text holds is text. Media are
collected, not opened; only a video is, since its frames are as many images.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phi4mm_jax.errors import CheckpointError, InputError
from phi4mm_jax.processing.images import CROP_SIZE
from phi4mm_jax.processing.message_parts import NEXT, kind_of, looks_like_media, parse_part, string_at
from phi4mm_jax.processing.prompt import KINDS, Kind, Media, Prompt, Tokens, given_media, parse_raw, placeholder_in
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.utils.strict_json import parse_json

_log = logging.getLogger(__name__)
_warned: set[str] = set()  # of what texts spell: once of each role, as texts may be anybody's
ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {"developer": "system", "function": "tool"}  # OpenAI's newer and older names
_MESSAGE_KEYS = {"role", "content", "name", "tools", "tool_calls", "tool_call_id", "function_call"}


def parse_prompt(
    prompt: str | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    images: Sequence[Any] | None = (),
    audios: Sequence[Any] | None = (),
    *,
    continue_final_message: bool = False,
    crop_size: int = CROP_SIZE,
) -> Prompt:
    """Parse a string by `parse_raw`, a list of messages by `render_chat`.

    Raises:
        InputError: it is neither, or a string that is to be continued as a message; as those two.
    """
    if not isinstance(continue_final_message, bool):
        raise InputError(f"continue_final_message is {continue_final_message!r:.60}: pass True or False")
    if isinstance(prompt, str):
        if continue_final_message:
            raise InputError("continue_final_message is for chat messages: a raw prompt is continued where it ends")
        return parse_raw(prompt, tokenizer, images, audios)
    if isinstance(prompt, list | tuple):
        return render_chat(
            prompt, tokenizer, images, audios, continue_final_message=continue_final_message, crop_size=crop_size
        )
    raise InputError(f"prompt is {type(prompt).__name__}: pass a raw string, or a list of chat messages")


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    images: Sequence[Any] | None = (),
    audios: Sequence[Any] | None = (),
    *,
    tools: str | Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    crop_size: int = CROP_SIZE,
) -> Prompt:
    """Render chat messages by the published template: `<|role|>content<|end|>` for each, then `<|assistant|>`, or
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
    path. A key that is None is taken as absent. "detail": "low" of an image is one crop. Whatever else looks like a
    medium, or a setting of one, is an error.

    A video may have "frames", how many at most (64), and "max_crops" of each (by default 64 // their number). Frames
    are shrunk to what is seen of them in crops of `crop_size`, the checkpoint's.

    Tools, a string or a list to be written as JSON, end the system turn as `<|tool|>JSON<|/tool|>`. They are "tools" of
    a system message, or the argument, which goes to the first system message, or to an empty one put before the others.
    "tool_calls" of an assistant message, in OpenAI's form, follow its content (which may then be None or absent) as
    `<|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>`. The published template has no place for them.
    The result of a call is a message of role tool and becomes `<|tool|>content<|end|>`, as in the published template.
    (The vocabulary also has `<|tool_response|>`, but nothing published says where it goes; a raw prompt can use it.)
    Other keys of a message, such as "name" and "tool_call_id", are ignored, as the template ignores them.

    Raises:
        InputError: something does not fit the above; it names the message and the key. Or the parts without media of
            their own are not as many as the media given beside the messages.
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
        for piece in _content(where, message, crop_size):
            if isinstance(piece, str | Tokens):
                pieces.append(piece)
                if isinstance(piece, str):
                    _warn_of_spelling(where, role, piece, tokenizer)
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


def _warn_of_spelling(where: str, role: str, text: str, tokenizer: Tokenizer) -> None:
    """Log the first user's text with a media placeholder, and the first answer with a token that structures prompts.

    Both are text in a chat; their author may mean a medium, or the token.
    """
    if role in _warned or "<|" not in text:
        return
    if role == "user" and (found := placeholder_in(text)) is not None:
        remedy = (
            'stands for no medium; media are parts of the content, such as {"type": "image", "image": ...}, and '
            "placeholders are for raw prompts"
        )
    elif role == "assistant" and (ids := tokenizer.control_tokens.intersection(_ids_in(tokenizer, text))):
        found, remedy = tokenizer.decode([min(ids)]), "is no special token; write calls of tools as tool_calls"
    else:
        return
    _warned.add(role)
    _log.warning("%s: %s is text in a chat, and %s (said once)", where, found, remedy)


def _ids_in(tokenizer: Tokenizer, text: str) -> list[int]:
    return [piece for piece in tokenizer.split_special(text) if isinstance(piece, int)]


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
    known = ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
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
    """Return the tool calls of a message, also in OpenAI's older form, which has one."""
    one = message.get("function_call")
    return message.get("tool_calls") or ([{"function": one}] if one else None)


def _fill(kind: Kind, media: Sequence[Any], given: Sequence[Any]) -> tuple[Any, ...]:
    """Return the media in order of appearance, with those given beside the messages in their places."""
    places = sum(payload is NEXT for payload in media)
    if places != len(given):
        raise InputError(
            f'messages have {places} part(s) {{"type": "{kind}"}} for the next {kind}, and {len(given)} {kind}(s) are '
            f"given beside them: put such a part where each {kind} belongs (a placeholder in a text is plain text)"
        )
    rest = iter(given)
    return tuple(next(rest) if payload is NEXT else payload for payload in media)


def _content(where: str, message: Mapping[str, Any], crop_size: int) -> Iterator[str | Tokens | tuple[Kind, Any]]:
    content = message.get("content")
    if isinstance(content, str | Tokens):
        yield content
    elif isinstance(content, list | tuple):
        for j, part in enumerate(content):
            if isinstance(part, str | Tokens):
                yield part
            else:
                yield from parse_part(f"{where}.content[{j}]", part, crop_size)
    elif content is not None or not _called(message):
        raise InputError(f"{where}.content is {kind_of(message, 'content')}: pass a string, or a list of parts")


def with_tools(messages: Sequence[Any], tools: Any) -> list[Any]:
    """Return the messages, with tools that stand beside them put into the first system message, as by `render_chat`.

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
    """Yield tool calls as the model writes them, from OpenAI's form, whose arguments are JSON within a string."""
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
                arguments = parse_json(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError) as error:
                raise InputError(f"{at}.function.arguments is not JSON ({error}): pass a JSON object") from None
        if not isinstance(arguments, Mapping):
            raise InputError(f"{at}.function.arguments is {type(arguments).__name__}: pass a JSON object")
        yield {"name": string_at(f"{at}.function", function, "name"), "arguments": dict(arguments)}


def _json(where: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be written as JSON ({error}): use dicts, lists and plain values") from None
