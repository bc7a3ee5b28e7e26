"""Files of requests and answers, one JSON object a line; rerun the same command to resume a run that was stopped.

Lines are read as they are needed. What is kept of all of them at once is their ids, and a few bytes each.
"""

import codecs
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from phi4mm_jax.checkpoint.hub import local_folder
from phi4mm_jax.checkpoint.peft import adapter_folders
from phi4mm_jax.engine.engine import Engine
from phi4mm_jax.engine.request import Completion, Request
from phi4mm_jax.engine.sampling import Sampling
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.chat import with_tools
from phi4mm_jax.processing.media_urls import path_in, with_paths
from phi4mm_jax.utils.files import write_atomically
from phi4mm_jax.utils.fingerprint import file_fingerprint, weights_fingerprint
from phi4mm_jax.utils.strict_json import strict_json

_SAMPLING = {f.name for f in fields(Sampling)} - {"stream"}
_REQUEST = {
    "max_new_tokens", "stop", "stop_tokens", "max_crops", "beams", "length_penalty", "adapter",
    "continue_final_message",
}  # fmt: skip
_KEYS = _SAMPLING | _REQUEST | {"id", "prompt", "messages", "images", "audios", "logprobs"}
_NEVER_MEDIA = ("text", "role", "type")  # keys of a message's parts

Format = Literal["plain", "openai"]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A line of the input: what it asks, or what is wrong with it.

    Attributes:
        where: what an error calls it.
        id: None where the line is too broken to have one; its answer then has its number as "line".
        digest: of the line and of what its request depends on besides; None: nobody compares it.
        logprobs: whether the answer has those of its tokens.
        duplicate: an earlier line has this id; its answer has its number as well.
    """

    number: int
    where: str
    id: Any
    request: Request | None
    error: str | None = None
    digest: str | None = None
    logprobs: bool = False
    duplicate: bool = False

    @property
    def key(self) -> Any:
        """What tells it from all others, in its answer as well."""
        return _key(self.named)

    @property
    def named(self) -> dict[str, Any]:
        """What its answer begins with."""
        named = {"id": self.id}
        if self.id is None or self.duplicate:
            named["line"] = self.number + 1
        return named if self.digest is None else named | {"request": self.digest}


class LineIndex:
    """What is kept of lines: for each key its place, and for each place some bytes."""

    def __init__(self, lines: Iterable[Line]):
        self.places: dict[Any, int] = {}
        self.numbers, self.digests, self.broken = array("Q"), array("Q"), bytearray()
        for line in lines:
            self.places[line.key] = len(self.places)
            self.numbers.append(line.number)
            self.digests.append(_number(line.digest))
            self.broken.append(line.request is None)

    def __len__(self) -> int:
        return len(self.places)


class RequestFile:
    """The lines of a file that one host answers, read anew each time that they are gone through.

    Attributes:
        index: see `LineIndex`.

    Raises:
        InputError: the file cannot be read, or changes meanwhile.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], hosts: int, host: int):
        self._path, self._settings, self._hosts, self._host = path, settings, hosts, host
        self._duplicates: dict[int, int] | None = None
        self._source = path
        try:
            if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():  # a pipe gives its lines only once
                self._copy = tempfile.NamedTemporaryFile()  # noqa: SIM115 - it lives as long as this object
                with path.open("rb") as file:
                    shutil.copyfileobj(file, self._copy)
                self._copy.flush()
                self._source = Path(self._copy.name)
            self.index = LineIndex(self)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[Line]:
        known = self._duplicates
        seen: dict[Any, int] = {}
        duplicates = {} if known is None else known
        place = 0
        with self._source.open("rb") as file:
            for number, text in enumerate(file):
                text = text.removeprefix(codecs.BOM_UTF8) if number == 0 else text
                if not text.strip():
                    continue
                if known is not None and number % self._hosts != self._host:
                    continue
                line = parse_line(number, text, self._path.parent, self._settings)
                if known is None and (first := seen.setdefault(line.key, number)) != number:
                    duplicates[number] = first
                if number in duplicates:
                    line = _duplicate(line, duplicates[number])
                if number % self._hosts != self._host:
                    continue
                if known is not None and self.index.digests[place] != _number(line.digest):
                    raise InputError(f"{self._path}: {line.where} has changed since the run began; run again")
                place += 1
                yield line
        self._duplicates = duplicates


def read_requests(
    path: Path, *, max_new_tokens: int, hosts: int = 1, host: int = 0, adapter: str | None = None
) -> RequestFile:
    """The lines that this host answers: those whose number, from 0, is `host` modulo `hosts`.

    Args:
        adapter: of the lines that do not name one.

    Raises:
        InputError: the file cannot be read, or there is no such host.
    """
    if not 0 <= host < hosts:
        raise InputError(f"host {host} of {hosts}; expected one or more hosts, the first of which is host 0")
    settings = {"max_new_tokens": max_new_tokens} | ({} if adapter is None else {"adapter": adapter})
    return RequestFile(path, settings, hosts, host)


def _duplicate(line: Line, first: int) -> Line:
    error = (
        f"line {line.number + 1}: lines {first + 1} and {line.number + 1} have the same id {line.id!r:.80}; give each "
        "its own (a line without one has its number, from 0)"
    )
    return replace(line, request=None, error=error, duplicate=True)


def parse_line(
    number: int, text: bytes, folder: Path, settings: Mapping[str, Any], default_id: str | None = None
) -> Line:
    """A line of a file of requests.

    Args:
        number: from 0.
        folder: of relative paths.
        settings: of lines that do not say, "max_new_tokens" at least.
        default_id: of a line without an id, or too broken to have one; by default the line's number, or none.
    """
    where = f"line {number + 1}"
    digest = hashlib.blake2b(b"%d %s" % (settings["max_new_tokens"], text.strip()), digest_size=8).hexdigest()

    def bad(error: str, name: Any = default_id) -> Line:
        return Line(number, where, name, None, f"{where}{error}", digest)

    try:
        values = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return bad(f" is not UTF-8 (at byte {error.start}); save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return bad(f" is not JSON ({error}); expected one object a line")
    if not isinstance(values, dict):
        return bad(f" is a {type(values).__name__}; expected an object with a prompt")
    id_key = "custom_id" if "body" in values or "custom_id" in values else "id"
    name = values.get(id_key, number if default_id is None else default_id)
    if not isinstance(name, str | int) or isinstance(name, bool):
        return bad(f": {id_key} is {name!r:.80}; expected a string or a whole number")
    try:
        if id_key == "custom_id":
            values = _from_openai(values)
        request = _request(values, folder, settings)
        identity = repr(name).encode("utf-8", "backslashreplace")
        # Its own draws, wherever the line stands and whichever run answers it.
        request = replace(request, sampling=request.sampling.for_identity(identity))
        return Line(number, where, name, request, digest=digest, logprobs=values.get("logprobs", False))
    except InputError as error:
        return bad(f": {error}", name)


_LINE = {"custom_id", "method", "url", "body"}  # of OpenAI's batch files
_SAME = ("messages", "temperature", "top_p", "seed", "logprobs", "top_k", "min_p", "repetition_penalty",
         "continue_final_message")  # as here  # fmt: skip
_NOTHING = {  # what changes no answer, whatever it says
    "model", "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
    "prompt_cache_key", "stream_options",
}  # fmt: skip
_USUAL = {  # what changes none with these values
    "n": (1,), "stream": (False,), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "top_logprobs": (0,), "response_format": ({"type": "text"},), "tool_choice": ("auto",), "modalities": (["text"],),
}  # fmt: skip


def _from_openai(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a line of ours, from one of OpenAI's batch files. What would change the answer and is not known here
    is an error; what is null is as good as absent."""
    if unknown := sorted(values.keys() - _LINE):
        raise InputError(f"{unknown[0]!r} is not known beside custom_id and body; expected {', '.join(sorted(_LINE))}")
    if values.get("method", "POST") != "POST" or values.get("url", _URL) != _URL:
        given = f"{values.get('method', 'POST')} {values.get('url', _URL)}"
        raise InputError(f"asks for {given:.80}; only POST {_URL} is answered")
    body = values.get("body")
    if not isinstance(body, dict):
        raise InputError(f"body is a {type(body).__name__}; expected an object with messages")
    body = {key: value for key, value in body.items() if value is not None and key not in _NOTHING}
    found = {key: body.pop(key) for key in _SAME if key in body}
    if "messages" not in found:
        raise InputError("body has no messages")
    for key in ("max_tokens", "max_completion_tokens"):
        if key in body:
            found["max_new_tokens"] = body.pop(key)
    if "stop" in body:
        stop = body.pop("stop")
        found["stop"] = [stop] if isinstance(stop, str) else stop
    if "stop_token_ids" in body:
        found["stop_tokens"] = body.pop("stop_token_ids")
    tools = body.pop("tools", None)
    if tools and isinstance(found["messages"], list):  # another kind of messages is an error of its own
        found["messages"] = with_tools(found["messages"], tools)
    continued = bool(found.get("continue_final_message", False))
    if body.pop("add_generation_prompt", not continued) is continued:
        raise InputError(f"body.add_generation_prompt is {continued}, which goes with no answer; leave it out")
    for key, value in body.items():
        if value not in _USUAL.get(key, ()):
            usual = f"; expected {_USUAL[key][0]!r}" if key in _USUAL else ""
            raise InputError(f"body.{key} is {value!r:.60}, which is not supported{usual}; leave it out")
    return found


_URL = "/v1/chat/completions"


def _request(values: Mapping[str, Any], folder: Path, settings: Mapping[str, Any]) -> Request:
    values = {key: value for key, value in values.items() if value is not None}
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
    return Request(prompt, **media, sampling=sampling, **{**settings, **rest})


def settings_of(model: str | Path, adapters: Mapping[str, str | Path] | None = None, **settings: Any) -> dict[str, Any]:
    """What the answers of a run depend on besides its lines; the checkpoint by its fingerprint.

    Args:
        adapters: as of `phi4mm_jax.load`.

    Raises:
        CheckpointError: there is no such model or adapter.
    """
    weights = weights_fingerprint(local_folder(model), adapter_folders(adapters))
    return {"model": str(model), "weights": weights, **settings, "sampling": list(asdict(Sampling()).values())}


class AnswerFile:
    """The output: a line for each answer, written at once. A context manager.

    A line whose answer is an error is asked again by the next run. Until that run has ended its former answer stands
    before the new one; then the new one takes its place.

    Args:
        settings: gives what answers depend on besides their lines (see `settings_of`); kept beside the output, so that
            a run with others is refused. Called once the output can be written.
        form: of the answers: ours, or OpenAI's.
        retry: ask lines again whose answer is an error.

    Attributes:
        total: lines of this run's share.
        answered: those of them that have an answer, and are not asked again.
        errors: those of them that are errors.

    Raises:
        InputError: the file has something else in it, another run is writing it, or it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        lines: Sequence[Line] | RequestFile,
        *,
        ordered: bool = False,
        settings: Callable[[], Settings] | None = None,
        form: Format = "plain",
        retry: bool = True,
    ):
        self._retry = retry
        self.path, self._lines, self._ordered, self._settings = path, lines, ordered, settings
        self._form: Format = form
        self._index = lines.index if isinstance(lines, RequestFile) else LineIndex(lines)
        self.total = len(self._index)
        self.answered = self.errors = 0

    def __enter__(self) -> "AnswerFile":
        while True:
            try:
                self._file = self.path.open("a+b", buffering=0)
            except OSError as error:
                raise self._unwritable(error) from error
            try:
                if self._lock():
                    self._begin()
                    return self
            except BaseException:
                self._file.close()
                raise
            self._file.close()  # another run has replaced it meanwhile

    def _lock(self) -> bool:
        """Whether the file is this run's, and still the one of that name."""
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise InputError(f"{self.path}: is no file, so that a run could not be resumed; give one")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except BlockingIOError:
            raise InputError(f"{self.path}: another run is writing it; wait for it, or stop it") from None
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._unwritable(error) from error

    def _begin(self) -> None:
        """Find out what is left to do."""
        self._state = bytearray(self.total)  # of each line
        media = array("Q", bytes(8 * self.total))
        changed, repeated, in_order, count = None, False, True, 0
        for record in self._read():
            place = self._index.places.get(record.key)
            if place is None:
                repeated |= self._is_stale(record)
                continue
            if self._state[place]:
                repeated = True
            else:
                in_order &= place == count
                count += 1
            same = record.digest is None or _number(record.digest) == self._index.digests[place]
            if record.failed:
                self._state[place] = _FAILED if not same or self._can_retry(place) else _KEPT
            else:
                self._state[place], media[place] = _ANSWERED, _number(record.media)
                changed = changed or (None if same else (record.key, place))
        if self._settings is not None:
            self._check_settings(self._settings(), has_answers=_ANSWERED in self._state)
        if changed is not None:
            key, place = changed
            raise InputError(
                f"{self.path}: its answer with id {key!r:.80} is to another request than line "
                f"{self._index.numbers[place] + 1} is now; give another output, or restore the input (a line without "
                "an id goes by its number)"
            )
        if self._ordered and not in_order:
            raise InputError(
                f"{self.path}: its answers are not in the order of the input; leave --ordered out, or give another "
                "output"
            )
        if any(media):
            self._check_media(media)
        if repeated:
            self._settle()
        self.errors = self._state.count(_KEPT)
        self.answered = self._state.count(_ANSWERED) + self.errors

    def _can_retry(self, place: int) -> bool:
        return self._retry and not self._index.broken[place]

    def _is_stale(self, record: "_Record") -> bool:
        """Whether it is the error of a line that was broken, and is not any more."""
        if not record.failed or not isinstance(record.key, tuple):
            return False
        numbers, number = self._index.numbers, record.key[1] - 1
        at = bisect_left(numbers, number)
        return at < len(numbers) and numbers[at] == number

    def _check_settings(self, now: Settings, *, has_answers: bool) -> None:
        """Those of the answers that are there; without answers they become this run's."""
        path = self.path.with_name(f"{self.path.name}.settings.json")
        if has_answers:
            try:
                before = json.loads(path.read_text())
                others = [key for key in now if key != "model" and before.get(key) != now[key]]
            except (OSError, ValueError, AttributeError):
                raise InputError(
                    f"{self.path}: has answers, but {path.name}, which tells their model and settings, is missing or "
                    "broken; restore it, or give another output"
                ) from None
            if others:
                told = {"weights": "model"}
                causes = [
                    f"{told.get(k, k)} (was {before.get(told.get(k, k))!r}, now {now[told.get(k, k)]!r})"
                    for k in others
                ]
                raise InputError(
                    f"{self.path}: its answers are of another {', '.join(causes)}; give another output, or resume with "
                    "what it was"
                )
            return
        try:
            write_atomically(path, strict_json(now) + "\n")
        except OSError as error:
            raise self._unwritable(error) from error

    def _check_media(self, media: array) -> None:
        """Answers are kept of media that are what they were; media that are gone cannot be compared."""
        for place, line in enumerate(self._lines):
            if media[place] and line.request is not None and self._state[place] == _ANSWERED:
                now = _number(media_fingerprint(line.request))
                if now and now != media[place]:
                    raise InputError(
                        f"{self.path}: its answer with id {line.id!r:.80} is about other media than {line.where} has "
                        "now; give another output, or restore the files"
                    )

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"{self.path}: cannot be written ({error.strerror}); with room and permission, rerun the same command to "
            "resume"
        )

    def __exit__(self, *exception) -> None:
        self._file.close()

    def _read(self) -> "Iterator[_Record]":
        """Of whole lines what they tell; what a killed run left of a last line is cut off."""
        start, rest = 0, b""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    rest = line
                    break
                yield self._record(line, number, start)
                start += len(line)
            else:
                number = 0
        first = b'{"id": '
        if not (rest.startswith(first) or first.startswith(rest)):
            raise self._foreign(number)
        if rest:
            os.ftruncate(self._file.fileno(), start)

    def _record(self, line: bytes, number: int, start: int) -> "_Record":
        try:
            answer = json.loads(line)
            is_openai = "custom_id" in answer
            if is_openai != (self._form == "openai"):
                other = "openai" if is_openai else "plain"
                raise InputError(f"{self.path}: has answers of --format {other}; give that format, or another output")
            if is_openai:
                failed = answer["error"] is not None
                named = {**answer, "id": answer["custom_id"]}
                return _Record(_key(named), answer["id"].removeprefix(_PREFIX), failed, answer.get("media"), start)
            failed = "error" in answer
            if not failed and not {"text", "tokens"} <= answer.keys():
                raise self._foreign(number)
            return _Record(_key(answer), answer.get("request"), failed, answer.get("media"), start)
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._foreign(number) from None

    def _foreign(self, number: int) -> InputError:
        return InputError(f"{self.path}: line {number} is no answer of a run before; give another output")

    def _settle(self) -> None:
        """Rewrite the file, whole or not at all: each line's last answer takes the place of its first."""
        last = array("q", [-1]) * self.total
        for record in self._read():
            place = self._index.places.get(record.key)
            if place is not None:
                last[place] = record.start
        path = Path(os.path.realpath(self.path))
        aside = path.with_name(f".{path.name}.incomplete")
        try:
            new = aside.open("w+b", buffering=0)
            fcntl.flock(new, fcntl.LOCK_EX)
            os.fchmod(new.fileno(), stat.S_IMODE(os.fstat(self._file.fileno()).st_mode))
            with path.open("rb") as source, path.open("rb") as answers:
                writer = os.fdopen(os.dup(new.fileno()), "wb")
                for number, line in enumerate(source, 1):
                    record = self._record(line, number, 0)
                    place = self._index.places.get(record.key)
                    if place is not None and last[place] >= 0:
                        answers.seek(last[place])
                        writer.write(answers.readline())
                        last[place] = -1
                    elif place is None and not self._is_stale(record):
                        writer.write(line)
                writer.close()
            os.fsync(new.fileno())
            os.replace(aside, path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise self._unwritable(error) from error
        self._file.close()
        self._file = new

    def run(self, engine: Engine) -> Iterator[tuple[Mapping[str, Any], int]]:
        """Answer what is not answered yet, and again what failed.

        Yields:
            Each answer as it is written, and how many tokens were drawn for it.
        """
        asked_again = _FAILED in self._state
        waiting: dict[int, Any] = {}  # answers, whether they are errors, their tokens
        place = 0
        for number, *answer in self._answers(engine):
            waiting[number] = answer
            while waiting and (not self._ordered or place in waiting):
                ready, failed, tokens = waiting.pop(place if self._ordered else number)
                place += 1
                self._write(ready, failed)
                yield ready, tokens
        if asked_again:
            self._settle()

    def _answers(self, engine: Engine) -> Iterator[tuple[int, Mapping[str, Any], bool, int]]:
        """By place in what is to do, in the order in which they end: the answer, whether it is an error, its tokens."""
        broken: deque[tuple[int, Line]] = deque()
        asked: dict[int, tuple[int, Line]] = {}

        def requests() -> Iterator[Request]:
            count = 0
            left = (line for place, line in enumerate(self._lines) if self._state[place] in (_NEW, _FAILED))
            for i, line in enumerate(left):
                if line.request is None:
                    broken.append((i, line))
                    continue
                asked[count] = i, line
                count += 1
                yield line.request

        def errors() -> Iterator[tuple[int, Mapping[str, Any], bool, int]]:
            while broken:
                i, line = broken.popleft()
                yield i, error_answer(line, line.error or "", self._form), True, 0

        for n, completion in engine.run(requests()):
            yield from errors()
            i, line = asked.pop(n)
            if completion.error is not None:
                yield i, error_answer(line, f"{line.where}: {completion.error}", self._form), True, 0
            else:
                yield i, completion_answer(line, completion, self._form), False, len(completion.tokens)
        yield from errors()

    def _write(self, answer: Mapping[str, Any], failed: bool) -> None:
        left = memoryview(encode_answer(answer) + b"\n")
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._unwritable(error) from error
        self.answered += 1
        self.errors += failed


_NEW, _FAILED, _KEPT, _ANSWERED = range(4)  # kept: the error of a line that cannot be asked
_PREFIX = "batch_req_"


@dataclass(frozen=True)
class _Record:
    """What a line of the output tells, and where it begins."""

    key: Any
    digest: str | None
    failed: bool
    media: str | None
    start: int


def completion_answer(line: Line, completion: Completion, form: Format = "plain") -> dict[str, Any]:
    """The answer to a line as the output has it."""
    return (_openai_answer if form == "openai" else _answer)(line, completion)


def error_answer(line: Line, error: str, form: Format = "plain") -> dict[str, Any]:
    """What the output has for a line that could not be answered."""
    if form == "openai":
        return _openai_named(line) | {"response": None, "error": {"code": "invalid_request", "message": error}}
    return line.named | {"error": error}


def encode_answer(answer: Mapping[str, Any]) -> bytes:
    """A line of the output, without its end."""
    try:
        return strict_json(answer, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, in an id
        return strict_json(answer).encode()


def _answer(line: Line, completion: Completion) -> dict[str, Any]:
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
    """A line of OpenAI's output files. Nothing in it depends on when it was made."""
    message: dict[str, Any] = {"role": "assistant", "content": completion.content, "refusal": None}
    reason = completion.finish_reason
    if completion.tool_calls:
        reason = "tool_calls" if reason == "stop" else reason
        message["tool_calls"] = [
            {"id": f"call_{line.digest}_{i}", "type": "function",
             "function": {"name": c.name, "arguments": strict_json(c.arguments, ensure_ascii=False)}}
            for i, c in enumerate(completion.tool_calls)
        ]  # fmt: skip
    choice: dict[str, Any] = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    if line.logprobs:
        pairs = zip(completion.tokens, completion.log_probabilities, strict=True)
        choice["logprobs"] = {
            "content": [{"token": f"token_id:{t}", "logprob": x, "bytes": None, "top_logprobs": []} for t, x in pairs]
        }
    count = len(completion.tokens)
    usage = {
        "prompt_tokens": completion.prompt_tokens, "completion_tokens": count,
        "total_tokens": completion.prompt_tokens + count,
    }  # fmt: skip
    body = {
        "id": f"chatcmpl-{line.digest}", "object": "chat.completion", "created": 0, "model": "phi4mm-jax",
        "choices": [choice], "usage": usage,
    }  # fmt: skip
    response = {"status_code": 200, "request_id": f"req_{line.digest}", "body": body}
    return _openai_named(line) | _media(line) | {"response": response, "error": None}


def media_fingerprint(request: Request) -> str | None:
    """Of the files that a request shows; None where it has none, or one is gone."""
    sources: list[str] = [m for m in (*request.images, *request.audios) if isinstance(m, str)]
    if isinstance(request.prompt, list):
        for message in request.prompt:
            sources += _strings(message.get("content") if isinstance(message, dict) else None)
    state, found = hashlib.blake2b(digest_size=8), False
    for source in sources:
        path = Path(source.removeprefix("file://"))
        try:
            if len(source) > _LONGEST_PATH or not path.exists():
                continue
            files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
            for file in files:
                state.update(file_fingerprint(file) if file.is_file() else b"")
                found = True
        except (OSError, ValueError):
            return None
    return state.hexdigest() if found else None


_LONGEST_PATH = 4096


def _strings(value: Any) -> Iterator[str]:
    """What may be the path of a medium in a message's content."""
    if isinstance(value, list):
        for part in value:
            yield from [part] if isinstance(part, str) else _strings(part)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in _NEVER_MEDIA:
                yield from [inner] if isinstance(inner, str) else _strings(inner)


def _key(named: Mapping[str, Any]) -> Any:
    """1 and "1" are different ids. A line that has none, or that of an earlier one, goes by its number."""
    name = named["id"]
    if "line" in named:
        return ("line", named["line"])
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise TypeError(f"{name!r} is no id")
    return name


def _number(digest: str | None) -> int:
    return 0 if digest is None else int(digest[:16], 16)
