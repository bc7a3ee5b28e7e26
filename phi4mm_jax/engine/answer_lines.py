"""Lines of an output: answers in our format or in OpenAI's, and the records that are read back from them."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phi4mm_jax.engine.jsonl import Line, line_key
from phi4mm_jax.engine.provenance import media_fingerprint
from phi4mm_jax.engine.request import Completion
from phi4mm_jax.errors import InputError
from phi4mm_jax.utils.strict_json import strict_json

Format = Literal["plain", "openai"]
_PREFIX = "batch_req_"


@dataclass(frozen=True)
class Record:
    """Identity and outcome of a line of the output, and where it begins; `cut`: at its limit of tokens."""

    key: Any
    digest: str | None
    failed: bool
    media: str | None
    start: int
    cut: bool = False


def read_records(path: Path, form: Format, descriptor: int) -> Iterator[Record]:
    """Yield the records of an output's whole lines; truncate what a killed run left of a last line.

    Args:
        descriptor: of the open file, to truncate it.

    Raises:
        InputError: a line is not an answer, or one of another format.
    """
    start, rest = 0, b""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                rest = line
                break
            yield parse_record(path, form, line, number, start)
            start += len(line)
        else:
            number = 0
    first = b'{"id": '
    if not (rest.startswith(first) or first.startswith(rest)):
        raise _foreign(path, number)
    if rest:
        os.ftruncate(descriptor, start)


def parse_record(path: Path, form: Format, line: bytes, number: int, start: int) -> Record:
    """Parse line `number` of an output, which begins at byte `start`; raise an InputError if it is not an answer."""
    try:
        answer = json.loads(line)
        is_openai = "custom_id" in answer
        if is_openai != (form == "openai"):
            other = "openai" if is_openai else "plain"
            raise InputError(f"{path}: has answers of --format {other}; give that format, or another output")
        if is_openai:
            failed = answer["error"] is not None
            named, made_of = {**answer, "id": answer["custom_id"]}, answer["id"].removeprefix(_PREFIX)
            return Record(line_key(named), made_of, failed, answer.get("media"), start, is_cut(answer))
        failed = "error" in answer
        if not failed and not {"text", "tokens"} <= answer.keys():
            raise _foreign(path, number)
        return Record(line_key(answer), answer.get("request"), failed, answer.get("media"), start, is_cut(answer))
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _foreign(path, number) from None


def is_cut(answer: Mapping[str, Any]) -> bool:
    """Return whether an answer, of either format, ended at its limit of tokens."""
    choice = answer["response"]["body"]["choices"][0] if answer.get("response") else answer
    return choice.get("finish_reason") == "length"


def cut_line(cut: int, max_new_tokens: int) -> str:
    """Return what a run says of answers that are cut."""
    return (
        f"{cut} answers are cut, their finish_reason is length: more of --max-new-tokens (now {max_new_tokens}; or a "
        "line's own max_new_tokens) lets them end, in another output"
    )


def _foreign(path: Path, number: int) -> InputError:
    return InputError(f"{path}: line {number} is not an answer of a run before; give another output")


def answer_of(line: Line, completion: Completion, form: Format) -> dict[str, Any]:
    """Return the answer of a line from its completion."""
    return _openai_answer(line, completion) if form == "openai" else _plain_answer(line, completion)


def _plain_answer(line: Line, completion: Completion) -> dict[str, Any]:
    answer = line.named | {
        "text": completion.text, "tokens": completion.tokens,
        "finish_reason": completion.finish_reason, "prompt_tokens": completion.prompt_tokens,
    }  # fmt: skip
    if completion.tool_calls:
        answer["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in completion.tool_calls]
    if line.logprobs:
        answer["logprobs"] = completion.log_probabilities
    if completion.alternatives:
        answer["alternatives"] = [
            {"text": a.text, "tokens": a.tokens, "score": a.score} for a in completion.alternatives
        ]
    return answer | _media(line)


def _media(line: Line) -> dict[str, str]:
    found = None if line.digest is None or line.request is None else media_fingerprint(line.request)
    return {} if found is None else {"media": found}


def _openai_named(line: Line) -> dict[str, Any]:
    named = line.named
    return {"id": f"{_PREFIX}{named.pop('request', '')}", "custom_id": named.pop("id"), **named}


def _openai_answer(line: Line, completion: Completion) -> dict[str, Any]:
    """Return a line of OpenAI's output files; nothing in it depends on when it was made."""
    message, reason = chat_message(completion, str(line.digest))
    choice: dict[str, Any] = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    if line.logprobs:
        pairs = zip(completion.tokens, completion.log_probabilities, strict=True)
        choice["logprobs"] = {
            "content": [{"token": f"token_id:{t}", "logprob": x, "bytes": None, "top_logprobs": []} for t, x in pairs]
        }
    usage = usage_of(completion.prompt_tokens, len(completion.tokens))
    body = {
        "id": f"chatcmpl-{line.digest}", "object": "chat.completion", "created": 0, "model": "phi4mm-jax",
        "choices": [choice], "usage": usage,
    }  # fmt: skip
    response = {"status_code": 200, "request_id": f"req_{line.digest}", "body": body}
    return _openai_named(line) | _media(line) | {"response": response, "error": None}


def chat_message(completion: Completion, name: str) -> tuple[dict[str, Any], str]:
    """Return the assistant's message of an answer in OpenAI's form, and why it ended.

    Args:
        name: what the ids of its tool calls hold.
    """
    message: dict[str, Any] = {"role": "assistant", "content": completion.content, "refusal": None}
    reason: str = completion.finish_reason
    if completion.tool_calls:
        reason = "tool_calls" if reason == "stop" else reason
        message["tool_calls"] = [
            {"id": f"call_{name}_{i}", "type": "function",
             "function": {"name": c.name, "arguments": strict_json(c.arguments, ensure_ascii=False)}}
            for i, c in enumerate(completion.tool_calls)
        ]  # fmt: skip
    return message, reason


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the count of tokens in OpenAI's form."""
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }  # fmt: skip


def error_answer(line: Line, error: str, form: Format) -> dict[str, Any]:
    """Return the answer of a line that failed."""
    if form == "openai":
        return _openai_named(line) | {"response": None, "error": {"code": "invalid_request", "message": error}}
    return line.named | {"error": error}


def encode_answer(answer: Mapping[str, Any]) -> bytes:
    """Return a line of the output, without its end."""
    try:
        return strict_json(answer, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, in an id
        return strict_json(answer).encode()
