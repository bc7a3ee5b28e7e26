"""Requests of OpenAI's batch files, as the keys of our own lines."""

from collections.abc import Mapping
from typing import Any, Literal

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.chat import with_tools

_URL = "/v1/chat/completions"
_LINE = {"custom_id", "method", "url", "body"}  # of OpenAI's batch files
_SAME = ("temperature", "top_p", "seed", "logprobs", "top_k", "min_p", "repetition_penalty",
         "continue_final_message")  # same keys as ours  # fmt: skip
_NOTHING = {  # keys that change no answer, whatever their value
    "model", "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
    "prompt_cache_key", "stream_options",
}  # fmt: skip
_USUAL = {  # keys that change none with these values
    "n": (1,), "stream": (False,), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "top_logprobs": (0,), "response_format": ({"type": "text"},), "tool_choice": ("auto",), "modalities": (["text"],),
}  # fmt: skip


def from_openai(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a line of ours, from one of OpenAI's batch files; null is as good as absent.

    Raises:
        InputError: a key that would change the answer is not known here.
    """
    if unknown := sorted(values.keys() - _LINE):
        raise InputError(f"{unknown[0]!r} is not known beside custom_id and body; expected {', '.join(sorted(_LINE))}")
    if values.get("method", "POST") != "POST" or values.get("url", _URL) != _URL:
        given = f"{values.get('method', 'POST')} {values.get('url', _URL)}"
        raise InputError(f"asks for {given:.80}; only POST {_URL} is answered")
    body = values.get("body")
    if not isinstance(body, dict):
        raise InputError(f"body is a {type(body).__name__}; expected an object with messages")
    return keys_of_body(body, "messages")


def keys_of_body(body: Mapping[str, Any], prompt: Literal["messages", "prompt"]) -> dict[str, Any]:
    """Return the keys of a line of ours, from the body of a request to OpenAI's API; null is as good as absent.

    Args:
        prompt: the key that holds it: "messages" of a chat, "prompt" of a text to complete.

    Raises:
        InputError: a key that would change the answer is not known here.
    """
    body = {key: value for key, value in body.items() if value is not None and key not in _NOTHING}
    found = {key: body.pop(key) for key in (prompt, *_SAME) if key in body}
    if prompt not in found:
        raise InputError(f"body has no {prompt}")
    for key in ("max_tokens", "max_completion_tokens"):
        if key in body:
            found["max_new_tokens"] = body.pop(key)
    if "stop" in body:
        stop = body.pop("stop")
        found["stop"] = [stop] if isinstance(stop, str) else stop
    if "stop_token_ids" in body:
        found["stop_tokens"] = body.pop("stop_token_ids")
    tools = body.pop("tools", None)
    if tools and isinstance(found[prompt], list):  # another kind of messages is an error of its own
        found[prompt] = with_tools(found[prompt], tools)
    continued = bool(found.get("continue_final_message", False))
    if body.pop("add_generation_prompt", not continued) is continued:
        raise InputError(f"body.add_generation_prompt is {continued}, which goes with no answer; leave it out")
    for key, value in body.items():
        if value not in _USUAL.get(key, ()):
            usual = f"; expected {_USUAL[key][0]!r}" if key in _USUAL else ""
            raise InputError(f"body.{key} is {value!r:.60}, which is not supported{usual}; leave it out")
    return found
