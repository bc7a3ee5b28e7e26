"""Tool calls in an answer: `<|tool_call|>[{"name": ..., "arguments": {...}}, ...]<|/tool_call|>`."""

import json
import re
from dataclasses import dataclass
from typing import Any

_CALL = re.compile(r"<\|tool_call\|>(.*?)<\|/tool_call\|>", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """Take the tool calls out of an answer.

    A call is an object with a name and arguments, or one with these below "function", as in the OpenAI API; arguments
    may be an object or JSON in a string. What is between the marks but is no such call, or a list of them, stays text.

    Returns:
        The text without the calls, and the calls in their order.
    """
    calls: list[ToolCall] = []

    def take(match: re.Match[str]) -> str:
        found = _calls(match[1])
        calls.extend(found)
        return "" if found else match[0]

    return _CALL.sub(take, text), calls


def _calls(text: str) -> list[ToolCall]:
    """All of them, or none if one is malformed."""
    try:
        values = json.loads(text)
    except ValueError:
        return []
    calls = [_call(value) for value in (values if isinstance(values, list) else [values])]
    return [call for call in calls if call is not None] if None not in calls else []


def _call(value: Any) -> ToolCall | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or not name:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    return ToolCall(name, arguments) if isinstance(arguments, dict) else None
