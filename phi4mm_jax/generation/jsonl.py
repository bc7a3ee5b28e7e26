"""Files of requests and answers, one JSON object a line; a run that was stopped goes on where it was."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from phi4mm_jax.errors import InputError
from phi4mm_jax.generation.engine import Engine
from phi4mm_jax.generation.request import Completion, Request
from phi4mm_jax.generation.sampling import Sampling

_SAMPLING = {f.name for f in fields(Sampling)} - {"stream"}
_REQUEST = {"max_new_tokens", "stop", "stop_tokens", "max_crops"}
_KEYS = _SAMPLING | _REQUEST | {"id", "prompt", "messages", "images", "audios"}


@dataclass(frozen=True)
class Line:
    """A line of the input: what it asks, or what is wrong with it."""

    number: int
    id: Any
    request: Request | None
    error: str | None = None


def read_requests(path: Path, *, max_new_tokens: int, hosts: int = 1, host: int = 0) -> list[Line]:
    """The lines that this host answers: those whose number, from 0, is `host` modulo `hosts`.

    Raises:
        InputError: the file cannot be read, two lines have the same id, or there is no such host.
    """
    if not 0 <= host < hosts:
        raise InputError(f"host {host} of {hosts}; expected 0 to {hosts - 1}")
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    lines: list[Line] = []
    places: dict[Any, int] = {}
    for number, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        parsed = _line(number, line, path.parent, max_new_tokens)
        if (first := places.setdefault(_key(parsed.id), number)) != number:
            raise InputError(f"{path}: lines {first + 1} and {number + 1} have the same id {parsed.id!r}")
        lines.append(parsed)
    return [line for line in lines if line.number % hosts == host]


def _line(number: int, text: str, folder: Path, max_new_tokens: int) -> Line:
    try:
        values = json.loads(text)
    except ValueError as error:
        return Line(number, number, None, f"line {number + 1} is not JSON ({error})")
    if not isinstance(values, dict):
        return Line(number, number, None, f"line {number + 1} is a {type(values).__name__}, expected an object")
    name = values.get("id", number)
    if not isinstance(name, str | int):
        return Line(number, number, None, f"line {number + 1}: id is {name!r}; expected a string or a whole number")
    try:
        return Line(number, name, _request(values, folder, max_new_tokens))
    except InputError as error:
        return Line(number, name, None, f"line {number + 1}: {error}")


def _request(values: Mapping[str, Any], folder: Path, max_new_tokens: int) -> Request:
    if unknown := sorted(values.keys() - _KEYS):
        raise InputError(f"{unknown[0]!r} is not known; expected some of {', '.join(sorted(_KEYS))}")
    if ("prompt" in values) == ("messages" in values):
        raise InputError("expected either a prompt or messages")
    media = {}
    for kind in ("images", "audios"):
        given = values.get(kind, [])
        if not isinstance(given, list) or not all(isinstance(m, str) for m in given):
            raise InputError(f"{kind} is {given!r}; expected a list of paths or data URLs")
        media[kind] = [_located(m, folder) for m in given]
    prompt = values["prompt"] if "prompt" in values else _with_paths(values["messages"], folder)
    rest = {key: values[key] for key in _REQUEST & values.keys()}
    sampling = Sampling(**{key: values[key] for key in _SAMPLING & values.keys()})
    return Request(prompt, **media, sampling=sampling, **{"max_new_tokens": max_new_tokens, **rest})


def _located(source: str, folder: Path) -> str:
    """A path relative to the input file, as one to open; a URL as it is."""
    return source if ":" in source.split("/")[0] else str(folder / source)


def _with_paths(messages: Any, folder: Path) -> Any:
    if isinstance(messages, list):
        return [_with_paths(item, folder) for item in messages]
    if isinstance(messages, dict):
        return {
            key: _located(value, folder) if key in ("image", "audio", "video") and isinstance(value, str) else
            _with_paths(value, folder)
            for key, value in messages.items()
        }  # fmt: skip
    return messages


class AnswerFile:
    """The output: a line for each answer, written at once. A context manager.

    Attributes:
        answered: lines of this run's share that have their answer.
        errors: those of them that are errors.

    Raises:
        InputError: the file has something else in it, or another run is writing it.
    """

    def __init__(self, path: Path, lines: Sequence[Line], *, ordered: bool = False):
        self.path, self._lines, self._ordered = path, lines, ordered
        self.answered = self.errors = 0

    def __enter__(self) -> "AnswerFile":
        try:
            self._file = self.path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another run is writing it; wait for it, or stop it") from None
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error})") from error
        known = {_key(line.id) for line in self._lines}
        done = {key for key in self._read() if key in known}
        self._todo = [line for line in self._lines if _key(line.id) not in done]
        self.answered = len(done)
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def _read(self) -> Iterator[Any]:
        """The ids of whole lines; what a killed run left of a last line is cut off."""
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines()):
            try:
                answer = json.loads(line)
                self.errors += "error" in answer
                yield _key(answer["id"])
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{self.path}: line {number + 1} is no answer; is this the right output?") from None
        if whole < len(content):
            os.ftruncate(self._file.fileno(), whole)

    def run(self, engine: Engine) -> Iterator[tuple[Mapping[str, Any], int]]:
        """Answer what is not answered yet.

        Yields:
            Each answer as it is written, and how many tokens were drawn for it.
        """
        waiting: dict[int, Mapping[str, Any]] = {}
        place = 0
        for number, answer in self._answers(engine):
            waiting[number] = answer
            while waiting and (not self._ordered or place in waiting):
                ready = waiting.pop(place if self._ordered else number)
                place += 1
                self._write(ready)
                yield ready, len(ready.get("tokens", ()))

    def _answers(self, engine: Engine) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """By place in what is to do, in the order in which they end."""
        asked = [(i, line.request) for i, line in enumerate(self._todo) if line.request is not None]
        for i, line in enumerate(self._todo):
            if line.request is None:
                yield i, {"id": line.id, "error": line.error}
        for n, completion in engine.run(request for _, request in asked):
            i = asked[n][0]
            yield i, _answer(self._todo[i], completion)

    def _write(self, answer: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()
        self.answered += 1
        self.errors += "error" in answer


def _answer(line: Line, completion: Completion) -> dict[str, Any]:
    if completion.error is not None:
        return {"id": line.id, "error": f"line {line.number + 1}: {completion.error}"}
    return {
        "id": line.id, "text": completion.text, "tokens": completion.tokens,
        "finish_reason": completion.finish_reason, "prompt_tokens": completion.prompt_tokens,
    }  # fmt: skip


def _key(name: Any) -> tuple[str, Any]:
    """1 and "1" are different ids."""
    return type(name).__name__, name
