"""Tool calls in an answer: `<|tool_call|>[{"name": ..., "arguments": {...}}, ...]<|/tool_call|>`."""

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

_BEGIN, _END = "<|tool_call|>", "<|/tool_call|>"
_SPACE = " \t\n\r"  # of JSON


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """Take the tool calls out of an answer.

    A call is an object with a name and arguments, or one with these below "function", as in the OpenAI API; arguments
    may be an object or JSON in a string. What is between the marks but is no such call, or a list of them, stays text,
    marks included. A mark within a string of the JSON is part of that string.

    Returns:
        The text without the calls, and the calls in their order.
    """
    pieces: list[str] = []
    calls: list[ToolCall] = []
    at = 0
    while (begin := text.find(_BEGIN, at)) >= 0:
        found, stop = _block(text, begin + len(_BEGIN))
        pieces.append(text[at:begin] if found else text[at:stop])
        calls += found
        at = stop
    return "".join([*pieces, text[at:]]), calls


def _block(text: str, start: int) -> tuple[list[ToolCall], int]:
    """The calls from `start` on with the place after their end mark; for what is malformed none, and `start`."""
    try:
        values, stop = _DECODER.raw_decode(text, _skip(text, start))
    except (ValueError, RecursionError):
        return [], start
    stop = _skip(text, stop)
    calls = [_call(value) for value in (values if isinstance(values, list) else [values])]
    if not text.startswith(_END, stop) or None in calls:
        return [], start
    return [call for call in calls if call is not None], stop + len(_END)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _call(value: Any) -> ToolCall | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or not name:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = _DECODER.decode(arguments)
        except (ValueError, RecursionError):
            return None
    return ToolCall(name, arguments) if isinstance(arguments, dict) else None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _refuse(number)


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)  # no NaN, no infinities: JSON has none
