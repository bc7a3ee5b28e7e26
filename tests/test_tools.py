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
        ('\n [{"name": "a",\r\n\t"arguments": {"x": 1}}]\n', [ToolCall("a", {"x": 1})]),
        ('[{"name": "a", "arguments": {"x": [[1, [2]], {"y": [{}, "]}"]}]}}]',
         [ToolCall("a", {"x": [[1, [2]], {"y": [{}, "]}"]}]})]),
        ('[{"name": "a", "arguments": {"x": "<|/tool_call|>", "y": "<|tool_call|>[]<|/tool_call|>"}}]',
         [ToolCall("a", {"x": "<|/tool_call|>", "y": "<|tool_call|>[]<|/tool_call|>"})]),
        ('[{"name": "wetter", "arguments": {"ort": "Köln \\ud83d\\ude00 日本"}}]',
         [ToolCall("wetter", {"ort": "Köln 😀 日本"})]),
    ],
)  # fmt: skip
def test_calls(inside, calls):
    assert parse_tool_calls(f"Let me see.<|tool_call|>{inside}<|/tool_call|>") == ("Let me see.", calls)


@pytest.mark.parametrize(
    "inside",
    ["", "weather(Bonn)", "[1]", "[]", "null", '[{"name": ""}]', '[{"name": "a"}, {"arguments": {}}]',
     '{"name": "a", "arguments": "no json"}', '{"name": "a", "arguments": [1]}', '[{"name": "a"', "[" * 100_000,
     '[{"name": "a", "arguments": null}]', '[{"name": 1, "arguments": {}}]', '{"name": "a"} and', "[[]]", '["a"]',
     '{"name": "a", "arguments": {"x": NaN}}', '{"name": "a", "arguments": "{\\"x\\": Infinity}"}', "\x00",
     '{"name": "a", "arguments": {"x": 1e999}}',
     '{"function": {}}', '[{"name": "a"}, []]', '[{"name": "a"},]', "{'name': 'a'}", '[{"name": "a"}][{"name": "b"}]'],
)  # fmt: skip
def test_malformed_calls_are_text(inside):
    text = f"Before <|tool_call|>{inside}<|/tool_call|> after"
    assert parse_tool_calls(text) == (text, [])


def test_without_an_end_it_is_text():
    text = '<|tool_call|>[{"name": "a"}]'
    assert parse_tool_calls(text) == (text, [])


def test_each_block_is_by_itself():
    """What is malformed stays where it was, and hides nothing that comes after."""
    good = '<|tool_call|>[{"name": "%s"}]<|/tool_call|>'
    text = f"1{good % 'a'}2<|tool_call|>[oops<|/tool_call|>3{good % 'b'}{good % 'c'}4<|tool_call|>5{good % 'd'}6"
    rest = "12<|tool_call|>[oops<|/tool_call|>34<|tool_call|>56"
    assert parse_tool_calls(text) == (rest, [ToolCall(name, {}) for name in "abcd"])


@pytest.mark.parametrize("text", ["", "No call.", "<|/tool_call|>", "<|tool_call|>", "<|tool_call|>" * 3, "a <|tool|>"])
def test_text_without_calls_is_as_it_was(text):
    assert parse_tool_calls(text) == (text, [])


def test_what_the_prompt_writes_is_read(tiny):
    """The form in which a chat's earlier calls are shown to the model."""
    call = {"function": {"name": "f", "arguments": '{"x": [1, {"y": "ä"}]}'}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    tokens = tiny.processor.row(messages).tokens
    text, calls = parse_tool_calls(tiny.processor.tokenizer.decode(tokens.tolist()))
    assert calls == [ToolCall("f", {"x": [1, {"y": "ä"}]})]
    assert "tool_call" not in text
