"""Tool calls are taken out of an answer; what is malformed stays text."""

import pytest

from phi4mm_jax.generation.tools import ToolCall, parse_tool_calls


@pytest.mark.parametrize(
    ("inside", "calls"),
    [
        ('[{"name": "weather", "arguments": {"city": "Bonn"}}]', [ToolCall("weather", {"city": "Bonn"})]),
        ('{"name": "now"}', [ToolCall("now", {})]),
        ('[{"type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}]', [ToolCall("f", {"x": 1})]),
        ('[{"name": "a", "arguments": {}}, {"name": "b", "parameters": {"y": [2]}}]',
         [ToolCall("a", {}), ToolCall("b", {"y": [2]})]),
    ],
)  # fmt: skip
def test_calls(inside, calls):
    assert parse_tool_calls(f"Let me see.<|tool_call|>{inside}<|/tool_call|>") == ("Let me see.", calls)


@pytest.mark.parametrize(
    "inside",
    ["", "weather(Bonn)", "[1]", "[]", "null", '[{"name": ""}]', '[{"name": "a"}, {"arguments": {}}]',
     '{"name": "a", "arguments": "no json"}', '{"name": "a", "arguments": [1]}', '[{"name": "a"'],
)  # fmt: skip
def test_malformed_calls_are_text(inside):
    text = f"Before <|tool_call|>{inside}<|/tool_call|> after"
    assert parse_tool_calls(text) == (text, [])


def test_without_an_end_it_is_text():
    text = '<|tool_call|>[{"name": "a"}]'
    assert parse_tool_calls(text) == (text, [])
