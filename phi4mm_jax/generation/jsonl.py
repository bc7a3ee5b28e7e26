"""Files of requests and answers, one JSON object a line; a run that was stopped goes on where it was."""

import codecs
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from phi4mm_jax.errors import InputError
from phi4mm_jax.generation.engine import Engine
from phi4mm_jax.generation.request import Completion, Request
from phi4mm_jax.generation.sampling import Sampling
from phi4mm_jax.processing.chat import path_in, with_paths

_SAMPLING = {f.name for f in fields(Sampling)} - {"stream"}
_REQUEST = {"max_new_tokens", "stop", "stop_tokens", "max_crops", "beams", "length_penalty", "adapter"}
_KEYS = _SAMPLING | _REQUEST | {"id", "prompt", "messages", "images", "audios", "logprobs"}


@dataclass(frozen=True)
class Line:
    """A line of the input: what it asks, or what is wrong with it.

    Attributes:
        where: what an error calls it.
        id: None where the line is too broken to have one; its answer then has its number as "line".
        digest: of the line and of what its request depends on besides; None: nobody compares it.
        logprobs: whether the answer has those of its tokens.
    """

    number: int
    where: str
    id: Any
    request: Request | None
    error: str | None = None
    digest: str | None = None
    logprobs: bool = False

    @property
    def key(self) -> tuple[str, Any]:
        """What tells it from all others, in its answer as well."""
        return _key(self.named)

    @property
    def named(self) -> dict[str, Any]:
        """What its answer begins with."""
        named = {"id": self.id} if self.id is not None else {"id": None, "line": self.number + 1}
        return named if self.digest is None else named | {"request": self.digest}


def read_requests(path: Path, *, max_new_tokens: int, hosts: int = 1, host: int = 0) -> list[Line]:
    """The lines that this host answers: those whose number, from 0, is `host` modulo `hosts`.

    Raises:
        InputError: the file cannot be read, two lines have the same id, or there is no such host.
    """
    if not 0 <= host < hosts:
        raise InputError(f"host {host} of {hosts}; expected one or more hosts, the first of which is host 0")
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    lines: list[Line] = []
    places: dict[Any, int] = {}
    for number, line in enumerate(content.split(b"\n")):
        if not line.strip():
            continue
        parsed = _line(number, line, path.parent, max_new_tokens)
        if (first := places.setdefault(parsed.key, number)) != number:
            raise InputError(
                f"{path}: lines {first + 1} and {number + 1} have the same id {parsed.id!r:.80}; give each its own (a "
                "line without one has its number, from 0)"
            )
        lines.append(parsed)
    return [line for line in lines if line.number % hosts == host]


def _line(number: int, text: bytes, folder: Path, max_new_tokens: int) -> Line:
    where = f"line {number + 1}"
    digest = hashlib.blake2b(b"%d %s" % (max_new_tokens, text.strip()), digest_size=8).hexdigest()

    def bad(error: str, name: Any = None) -> Line:
        return Line(number, where, name, None, f"{where}{error}", digest)

    try:
        values = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return bad(f" is not UTF-8 (at byte {error.start}); save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return bad(f" is not JSON ({error}); expected one object a line")
    if not isinstance(values, dict):
        return bad(f" is a {type(values).__name__}; expected an object with a prompt")
    name = values.get("id", number)
    if not isinstance(name, str | int) or isinstance(name, bool):
        return bad(f": id is {name!r:.80}; expected a string or a whole number")
    try:
        request = _request(values, folder, max_new_tokens)
        # Its own draws, wherever the line stands and whichever run answers it.
        request = replace(
            request, sampling=request.sampling.for_identity(repr(name).encode("utf-8", "backslashreplace"))
        )
        return Line(number, where, name, request, digest=digest, logprobs=values.get("logprobs", False))
    except InputError as error:
        return bad(f": {error}", name)


def _request(values: Mapping[str, Any], folder: Path, max_new_tokens: int) -> Request:
    if unknown := sorted(values.keys() - _KEYS):
        raise InputError(f"{unknown[0]!r} is not known; expected some of {', '.join(sorted(_KEYS))}")
    if ("prompt" in values) == ("messages" in values):
        raise InputError("expected either a prompt or messages, not both" if "prompt" in values else
                         "expected a prompt or messages")  # fmt: skip
    if not isinstance(values.get("prompt", ""), str):
        raise InputError(f"prompt is a {type(values['prompt']).__name__}; expected a string (a chat is messages)")
    if not isinstance(values.get("messages", []), list):
        raise InputError(f"messages is a {type(values['messages']).__name__}; expected a list of chat messages")
    if not isinstance(values.get("logprobs", False), bool):
        raise InputError(f"logprobs is {values['logprobs']!r:.60}; expected true or false")
    media = {}
    for kind in ("images", "audios"):
        given = values.get(kind, [])
        if not isinstance(given, list) or not all(isinstance(m, str) for m in given):
            raise InputError(f"{kind} is {given!r}; expected a list of paths or data URLs")
        media[kind] = [path_in(m, folder) for m in given]
    prompt = values["prompt"] if "prompt" in values else with_paths(values["messages"], folder)
    rest = {key: values[key] for key in _REQUEST & values.keys()}
    sampling = Sampling(**{key: values[key] for key in _SAMPLING & values.keys()})
    return Request(prompt, **media, sampling=sampling, **{"max_new_tokens": max_new_tokens, **rest})


class AnswerFile:
    """The output: a line for each answer, written at once. A context manager.

    Attributes:
        answered: lines of this run's share that have their answer.
        errors: those of them that are errors.

    Raises:
        InputError: the file has something else in it, another run is writing it, or it cannot be written.
    """

    def __init__(self, path: Path, lines: Sequence[Line], *, ordered: bool = False):
        self.path, self._lines, self._ordered = path, lines, ordered
        self.answered = self.errors = 0

    def __enter__(self) -> "AnswerFile":
        try:
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._begin()
        except BaseException:
            self._file.close()
            raise
        return self

    def _begin(self) -> None:
        """Lock the file, and find out what is left to do."""
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise InputError(f"{self.path}: is no file, so that a run could not go on with it; give one")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another run is writing it; wait for it, or stop it") from None
        except OSError as error:
            raise self._unwritable(error) from error
        known = {line.key: line for line in self._lines}
        done = {}
        for key, digest, failed in self._read():
            if key not in known:
                continue
            if digest is not None and digest != known[key].digest:
                raise InputError(
                    f"{self.path}: its answer with id {known[key].id!r:.80} is to another request than "
                    f"{known[key].where} is now; give another output, or restore the input (a line without an id goes "
                    "by its number)"
                )
            done[key] = failed
        if self._ordered and list(done) != [line.key for line in self._lines[: len(done)]]:
            raise InputError(
                f"{self.path}: its answers are not in the order of the input; leave --ordered out, or give another "
                "output"
            )
        self._todo = [line for line in self._lines if line.key not in done]
        self.answered, self.errors = len(done), sum(done.values())

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"{self.path}: cannot be written ({error.strerror}); with room and permission, the same command goes on "
            "where it was"
        )

    def __exit__(self, *exception) -> None:
        self._file.close()

    def _read(self) -> Iterator[tuple[tuple[str, Any], str | None, bool]]:
        """Of whole lines their key, their request's digest, and whether they are errors; what a killed run left of a
        last line is cut off."""
        self._file.seek(0)
        content = self._file.readall()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                answer = json.loads(line)
                key, failed, digest = _key(answer), "error" in answer, answer.get("request")
                hash(key)  # a list is no id
                if not failed and not {"text", "tokens"} <= answer.keys():
                    raise self._foreign(number)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise self._foreign(number) from None
            yield key, digest, failed
        rest, start = content[whole:], b'{"id": '
        if not (rest.startswith(start) or start.startswith(rest)):
            raise self._foreign(content.count(b"\n") + 1)
        if rest:
            os.ftruncate(self._file.fileno(), whole)

    def _foreign(self, number: int) -> InputError:
        return InputError(f"{self.path}: line {number} is no answer of a run before; give another output")

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
                yield i, line.named | {"error": line.error}
        for n, completion in engine.run(request for _, request in asked):
            i = asked[n][0]
            yield i, _answer(self._todo[i], completion)

    def _write(self, answer: Mapping[str, Any]) -> None:
        try:
            content = json.dumps(answer, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a surrogate pair, in an id
            content = json.dumps(answer).encode()
        left = memoryview(content + b"\n")
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._unwritable(error) from error
        self.answered += 1
        self.errors += "error" in answer


def _answer(line: Line, completion: Completion) -> dict[str, Any]:
    if completion.error is not None:
        return line.named | {"error": f"{line.where}: {completion.error}"}
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
    return answer


def _key(named: Mapping[str, Any]) -> tuple[str, Any]:
    """1 and "1" are different ids."""
    name = named["id"]
    return ("line", named["line"]) if name is None else (type(name).__name__, name)
