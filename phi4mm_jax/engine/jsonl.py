"""Request files, one JSON object per line.

Lines are read when needed. Only their ids, and a few bytes each, are kept of all of them.
"""

import codecs
import hashlib
import json
import shutil
import stat
import tempfile
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from phi4mm_jax.engine.grammar import Grammar
from phi4mm_jax.engine.openai_batch import from_openai
from phi4mm_jax.engine.request import Request
from phi4mm_jax.engine.sampling import Sampling
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.media_urls import path_in, with_paths
from phi4mm_jax.utils.checks import is_whole
from phi4mm_jax.utils.json_lines import BEGINNING, check_json_lines
from phi4mm_jax.utils.strict_json import unique_keys

_SAMPLING = {f.name for f in fields(Sampling)} - {"stream"}
_REQUEST = {
    "max_new_tokens", "stop", "stop_tokens", "max_crops", "beams", "length_penalty", "adapter",
    "continue_final_message", "grammar", "draft", "skip_special_tokens",
}  # fmt: skip
KEYS = _SAMPLING | _REQUEST | {"id", "prompt", "messages", "images", "audios", "logprobs"}


@dataclass(frozen=True)
class Line:
    """Line of the input: its request, or its error.

    Attributes:
        where: its name in errors.
        id: None where the line is too broken to have one; its answer then has its number as "line".
        digest: of the line and the settings that its request depends on; None: not compared.
        logprobs: whether the answer has the log-probabilities of its tokens.
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
        """Key that identifies the line, and its answer, among all others."""
        return line_key(self.named)

    @property
    def named(self) -> dict[str, Any]:
        """Keys that its answer begins with."""
        named = {"id": self.id}
        if self.id is None or self.duplicate:
            named["line"] = self.number + 1
        return named if self.digest is None else named | {"request": self.digest}


class LineIndex:
    """Index of lines: for each key its index, and for each index some bytes."""

    def __init__(self, lines: Iterable[Line]):
        self.places: dict[Any, int] = {}
        self.numbers, self.digests, self.broken = array("Q"), array("Q"), bytearray()
        for line in lines:
            self.places[line.key] = len(self.places)
            self.numbers.append(line.number)
            self.digests.append(digest_number(line.digest))
            self.broken.append(line.request is None)

    def __len__(self) -> int:
        return len(self.places)


class RequestFile:
    """Lines of a file, read again in each iteration.

    Attributes:
        index: see `LineIndex`.

    Raises:
        InputError: the file cannot be read, or has changed in an iteration since the first.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], adapters: Collection[str] = ()):
        self._path, self._settings, self._adapters = path, settings, adapters
        self._duplicates: dict[int, int] | None = None
        self._source = path
        with self._readable():
            if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():  # a pipe gives its lines only once
                self._copy = tempfile.NamedTemporaryFile()  # noqa: SIM115 - it lives as long as this object
                with path.open("rb") as file:
                    shutil.copyfileobj(file, self._copy)
                self._copy.flush()
                self._source = Path(self._copy.name)
            with self._source.open("rb") as file:
                beginning = file.read(BEGINNING)
                check_json_lines(path, beginning)
                if b"\0" in beginning:
                    raise InputError(
                        f"{path}: is no text in UTF-8; expected a file of lines of JSON, one for each prompt"
                    )
        self.index = LineIndex(self)

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[Line]:
        known = self._duplicates
        seen: dict[Any, int] = {}
        duplicates = {} if known is None else known
        place = 0
        with self._readable(), self._source.open("rb") as file:
            for number, text in enumerate(file):
                text = text.removeprefix(codecs.BOM_UTF8) if number == 0 else text
                if not text.strip():
                    continue
                line = parse_line(number, text, self._path.parent, self._settings, adapters=self._adapters)
                if known is None and (first := seen.setdefault(line.key, number)) != number:
                    duplicates[number] = first
                if number in duplicates:
                    line = _duplicate(line, duplicates[number])
                if known is not None:
                    self._check(place, line)
                place += 1
                yield line
        if known is not None and place < len(self.index):
            raise self._changed("has fewer lines than when")
        self._duplicates = duplicates

    def _check(self, place: int, line: Line) -> None:
        if place >= len(self.index):
            raise self._changed("has more lines than when")
        if self.index.digests[place] != digest_number(line.digest):
            raise self._changed(f"{line.where} has changed since")

    def _changed(self, cause: str) -> InputError:
        return InputError(f"{self._path}: {cause} the run began; rerun the same command to resume")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self._path}: cannot be read ({error.strerror}); check the path") from error


def read_requests(path: Path, *, max_new_tokens: int, adapters: Collection[str] = (), **settings: Any) -> RequestFile:
    """Return the lines of a file.

    Args:
        adapters: names of the users' adapters that are loaded.
        settings: of the lines that do not say, "adapter" and "draft"; None is as good as absent.

    Raises:
        InputError: the file cannot be read.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    return RequestFile(path, {"max_new_tokens": max_new_tokens} | given, adapters)


def _duplicate(line: Line, first: int) -> Line:
    error = (
        f"line {line.number + 1}: lines {first + 1} and {line.number + 1} have the same id {line.id!r:.80}; give each "
        f"its own (a line without one has the number of those before it: line {line.number + 1} has {line.number})"
    )
    return replace(line, request=None, error=error, duplicate=True)


def parse_line(
    number: int, text: bytes, folder: Path, settings: Mapping[str, Any], default_id: str | None = None,
    adapters: Collection[str] = (),
) -> Line:  # fmt: skip
    """Parse a line of a file of requests.

    Args:
        number: from 0.
        folder: of relative paths.
        settings: defaults, "max_new_tokens" at least.
        default_id: of a line without an id, or too broken to have one; by default the line's number, or none.
        adapters: names of the users' adapters that are loaded, which lines of OpenAI's ask for as their model.
    """
    where = f"line {number + 1}"
    digest = hashlib.blake2b(b"%d %s" % (settings["max_new_tokens"], text.strip()), digest_size=8).hexdigest()

    def bad(error: str, name: Any = default_id) -> Line:
        return Line(number, where, name, None, f"{where}{error}", digest)

    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        return bad(f" is not UTF-8 (at byte {error.start}); save the file as UTF-8")
    except json.JSONDecodeError as error:  # which would count the line's own lines
        return bad(f" is not JSON ({error.msg} at character {error.pos + 1}); expected one object per line")
    except (ValueError, RecursionError) as error:
        return bad(f" is not JSON ({error}); expected one object per line")
    if not isinstance(values, dict):
        return bad(f" is a {type(values).__name__}; expected an object with a prompt")
    id_key = "custom_id" if "body" in values or "custom_id" in values else "id"
    name = values.get(id_key, number if default_id is None else default_id)
    if not isinstance(name, str) and not is_whole(name):
        return bad(f": {id_key} is {name!r:.80}; expected a string or a whole number")
    try:
        if id_key == "custom_id":
            values = from_openai(values, adapters)
        request = request_of(_with_paths(values, folder), settings)
        identity = repr(name).encode("utf-8", "backslashreplace")
        # Its seed is its own, wherever the line stands and whichever run answers it.
        request = replace(request, sampling=request.sampling.for_identity(identity))
        return Line(number, where, name, request, digest=digest, logprobs=values.get("logprobs", False))
    except InputError as error:
        return bad(f": {error}", name)


def _with_paths(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a line's keys, the paths of its media resolved."""
    found = dict(values)
    for key in ("images", "audios"):
        if isinstance(given := values.get(key), list):
            found[key] = [path_in(m, folder) if isinstance(m, str) else m for m in given]
    if "messages" in values:
        found["messages"] = with_paths(values["messages"], folder)
    return found


def request_of(values: Mapping[str, Any], settings: Mapping[str, Any]) -> Request:
    """Return the request that the keys of a line ask for.

    Args:
        settings: those of a line that does not say, "max_new_tokens" at least.

    Raises:
        InputError: a key is not known, or its value is not one that it may have.
    """
    values = {key: value for key, value in values.items() if value is not None}
    if unknown := sorted(values.keys() - KEYS):
        raise InputError(f"{unknown[0]!r} is not known; expected some of {', '.join(sorted(KEYS))}")
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
        media[kind] = values.get(kind, [])
        if not isinstance(media[kind], list) or not all(isinstance(m, str) for m in media[kind]):
            raise InputError(f"{kind} is {media[kind]!r}; expected a list of paths or data URLs")
    prompt = values["prompt"] if "prompt" in values else values["messages"]
    rest = {key: values[key] for key in _REQUEST & values.keys()}
    if "grammar" in rest:
        rest["grammar"] = Grammar.of(rest["grammar"])
    sampling = Sampling(**{key: values[key] for key in _SAMPLING & values.keys()})
    return Request(prompt, **media, sampling=sampling, **{**settings, **rest})


def line_key(named: Mapping[str, Any]) -> Any:
    """Return the key of a line, by which its answer is found; 1 and "1" are different ids.

    A line that has no id, or that of an earlier one, goes by its number.
    """
    name = named["id"]
    if "line" in named:
        return ("line", named["line"])
    if not isinstance(name, str) and not is_whole(name):
        raise TypeError(f"{name!r} is not an id")
    return name


def digest_number(digest: str | None) -> int:
    """Return a digest as 64 bits; 0 if there is none."""
    return 0 if digest is None else int(digest[:16], 16)
