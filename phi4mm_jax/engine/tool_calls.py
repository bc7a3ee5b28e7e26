"""Tool calls in an answer: `<|tool_call|>[{"name": ..., "arguments": {...}}, ...]<|/tool_call|>`.

The marks are special tokens. Text that merely looks like one, as in a quoted document, has other ids, and is not parsed
as a tool call.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from phi4mm_jax.engine.grammar import Grammar, on_one_line
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.tokenizer import Tokenizer

BEGIN, _END = "<|tool_call|>", "<|/tool_call|>"
_SPACE = " \t\n\r"  # of JSON


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]


def parse_tool_calls(
    answer: Sequence[int] | str, tokenizer: Tokenizer | None = None, length: int | None = None
) -> tuple[str, list[ToolCall]]:
    """Take the tool calls out of an answer; a `Completion` has them as `tool_calls`.

    A call is an object with a name and arguments, or one with these below "function", as in the OpenAI API; arguments
    may be an object or JSON in a string. Anything else between the marks stays text, marks included. A mark within a
    string of the JSON is part of that string.

    Args:
        answer: its token ids. A string holds no special tokens: whatever it spells, it has no calls.
        tokenizer: whose ids they are.
        length: characters of the answer's text that count; by default all. An end mark right behind them counts too,
            since it may be what ended the answer.

    Returns:
        The text without the calls, and the calls in their order.

    Raises:
        InputError: ids without their tokenizer.
    """
    if isinstance(answer, str):
        return answer, []
    if tokenizer is None:
        raise InputError("parse_tool_calls was given ids without their tokenizer; pass model.processor.tokenizer")
    text, begins, ends = _marked(answer, tokenizer)
    length = len(text) if length is None else length
    ends = {end for end in ends if end <= length}
    pieces: list[str] = []
    calls: list[ToolCall] = []
    at = 0
    for begin in begins:
        if begin < at or begin >= length:
            continue  # within a call, or behind the answer's end
        found, stop = _block(text, begin + len(BEGIN), ends)
        if found:
            pieces.append(text[at:begin])
            calls += found
            at = stop
    return "".join([*pieces, text[at:length]]), calls


def without_special(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of an answer's text by `Request.skip_special_tokens`; those that mark tool calls stay.

    vLLM as well leaves the marks in, since it finds the calls by them.
    """
    marks = {tokenizer.special_tokens.get(name) for name in (BEGIN, _END)}
    return [token for token in tokens if token in marks or tokenizer.decode_bytes([token], skip_special=True)]


def tool_call_grammar(
    tools: Sequence[tuple[str, Mapping[str, Any]]], *, max_calls: int | None = None, answer: Grammar | None = None
) -> Grammar:
    """Return the grammar of an answer that calls functions, in the model's form.

    Args:
        tools: name of each, and the JSON schema of its arguments.
        max_calls: 1, or as many as the model likes.
        answer: the JSON schema of answers without calls; by default it calls at least one.
    """

    def json_of(schema: Any) -> str:
        return json.dumps(on_one_line(schema), ensure_ascii=False)

    more = "" if max_calls == 1 else ' (", " call)*'
    calls = f'{BEGIN} "[" call{more} "]" {_END}'
    rules = [f"start: calls{'' if answer is None else ' | answer'}", f"calls: {calls}"]
    if answer is not None:
        rules.append(f"answer: %json {json_of(json.loads(answer.text))}")
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, (name, parameters) in enumerate(tools):
        begin = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
        rules.append(f'call_{i}: {json.dumps(begin, ensure_ascii=False)} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {json_of(parameters)}")
    return Grammar.lark("\n".join(rules))


def _marked(tokens: Sequence[int], tokenizer: Tokenizer) -> tuple[str, list[int], list[int]]:
    """Return the text of the ids, and the offsets of the special tokens that begin and end calls."""
    marks = {tokenizer.special_tokens.get(name): name for name in (BEGIN, _END)}
    text, places, start = "", {BEGIN: [], _END: []}, 0
    for i, token in enumerate(tokens):
        if token in marks:
            text += tokenizer.decode(tokens[start:i])
            places[marks[token]].append(len(text))
            text += marks[token]
            start = i + 1
    return text + tokenizer.decode(tokens[start:]), places[BEGIN], places[_END]


def _block(text: str, start: int, ends: Collection[int]) -> tuple[list[ToolCall], int]:
    """Parse the calls at `start`; return them and the offset after their end mark, or none and `start` if malformed."""
    try:
        values, stop = _DECODER.raw_decode(text, _skip(text, start))
    except (ValueError, RecursionError):
        return [], start
    stop = _skip(text, stop)
    calls = [_call(value) for value in (values if isinstance(values, list) else [values])]
    if stop not in ends or None in calls:
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
