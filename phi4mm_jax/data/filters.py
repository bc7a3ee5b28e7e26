"""Filters of manifests, before training. Reads and writes JSON lines; both outputs are manifests."""

import contextlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4mm_jax.data.conversation import MEDIA, MESSAGES, read_conversation
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.media_urls import path_in, with_paths
from phi4mm_jax.utils.edits import edit_distance, optional_module
from phi4mm_jax.utils.files import open_atomically, write_remedy
from phi4mm_jax.utils.json_lines import BEGINNING, check_json_lines
from phi4mm_jax.utils.strict_json import parse_json, strict_json

# Scripts without spaces between words: each character is one. In all others marks, such as Devanagari's vowels, which
# are not in \w, are of their word.
_UNSPACED = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"
_MARKS = "".join(c for c in map(chr, range(0x300, 0x20000)) if unicodedata.category(c)[0] == "M")
_WORD = re.compile(rf"[{_UNSPACED}]|(?:[^\W{_UNSPACED}]|(?![{_UNSPACED}])[{_MARKS}])+")
_NOT_TEXT = {
    "id", "role", "from", "type", "image", "images", "audio", "audios", "video", "videos", "image_url", "audio_url",
    "video_url", "input_audio", "url", "path", "base64", "bytes", "tokens", "finish_reason",
}  # fmt: skip


# Keys of a line.
_CHATS = [*MESSAGES, "prompt", "completion"]
_ANSWERS = ["chosen", "rejected", "preferred_output", "non_preferred_output", "rejected_response"]  # of preferences
_BESIDE = [key for keys in MEDIA.values() for key in keys]


@dataclass(frozen=True)
class Line:
    """Line of a file, and the object that it holds."""

    number: int  # from 0
    values: Mapping[str, Any]

    @property
    def id(self) -> Any:
        """Id as in the files of `infer.batch`: by default its number."""
        return self.values.get("id", self.number)


@dataclass(frozen=True)
class Outcome:
    """Counts of samples that were kept and dropped, and notes for the user."""

    kept: int
    dropped: int
    notes: tuple[str, ...] = ()


def decontaminate(source: Path, against: Sequence[Path], output: Path, ngram: int = 13) -> Outcome:
    """Keep the samples that share no n-gram with evaluation texts.

    Words are compared as normalised by `words`. All texts of a sample count, but not ids, paths and media; an
    n-gram does not cross from one text into another. An instruction that both sides use counts too: keep it out of the
    evaluation files.

    Args:
        source: a manifest of JSON lines.
        against: JSON lines of evaluation samples, in any form: every text in them counts.
        output: the manifest that is kept; what is dropped goes beside it, see `dropped_path`.
        ngram: length in words. Shorter texts are not compared: they would match anywhere.

    Raises:
        InputError: a file cannot be read or written, or a line is broken.
    """
    if ngram < 1:
        raise InputError(f"ngram is {ngram}; expected a positive number of words")
    known: set[str] = set()
    texts = short = 0
    for path in against:
        for line in read_lines(path):
            for text in _texts(line.values):
                found = _ngrams(text, ngram)
                texts, short = texts + 1, short + (not found)
                known |= found
    if not known:
        raise InputError(f"{against[0]}: no text has {ngram} words, so nothing can be compared; compare by fewer")
    shared = Counter[str]()

    def fault(line: Line) -> str | None:
        found = set().union(*(_ngrams(text, ngram) for text in _texts(line.values))) & known
        shared.update(found)
        return f"shares: {min(found)}" if found else None

    kept, dropped = _split(source, output, fault)
    notes = []
    if short:
        notes.append(f"{short} of {texts} evaluation texts have fewer than {ngram} words and were not compared")
    if shared:
        run, times = shared.most_common(1)[0]
        notes.append(f'the run that most samples share ({times} of them): "{run}"')
    return Outcome(kept, dropped, tuple(notes))


def filter_speech(source: Path, hypotheses: Path, max_wer: float, output: Path) -> Outcome:
    """Keep the samples whose speech a recogniser understands.

    Args:
        source: a manifest of JSON lines. The reference is a sample's "transcript", or else its last answer.
        hypotheses: a recogniser's transcriptions: lines with "text", and the sample's "id" or else the number of its
            line, from 0, as `infer.batch` writes them. A line with "error" instead drops its sample.
        max_wer: maximum word error rate, with words compared as in `decontaminate`.
        output: as in `decontaminate`.

    Raises:
        InputError: a file cannot be read or written, a line is broken, or a sample has no hypothesis or transcript.
    """
    if not max_wer >= 0:
        raise InputError(f"max_wer is {max_wer}; expected a rate from 0 on")
    optional_module("rapidfuzz.distance")  # reported before anything is read, where it is missing
    heard: dict[Any, Line] = {}
    for line in read_lines(hypotheses):
        if (first := heard.setdefault(_key(line.id), line)) is not line:
            raise InputError(
                f"{hypotheses}: lines {first.number + 1} and {line.number + 1} have the same id {line.id!r:.80}; give "
                "each its own"
            )

    def fault(line: Line) -> str | None:
        where = f"{source}: line {line.number + 1}"
        answer = heard.get(_key(line.id))
        if answer is None:
            raise InputError(f"{where} (id {line.id!r:.80}): {hypotheses} lacks it; let the recogniser finish")
        if "error" in answer.values:
            return "could not be heard"
        text = answer.values.get("text")
        if not isinstance(text, str):
            raise InputError(f"{hypotheses}: line {answer.number + 1} has neither text nor error; expected one")
        transcript = words(_transcript(line.values, where))
        if not transcript:
            raise InputError(f'{where} has no words to compare with; give it a "transcript"')
        rate = edit_distance(transcript, words(text)) / len(transcript)
        return f"word error rate: {rate:.3f}" if rate > max_wer else None

    return Outcome(*_split(source, output, fault))


def dropped_path(output: Path) -> Path:
    """Return the path for what is dropped: out.jsonl -> out.dropped.jsonl. Each sample there says why, as "dropped"."""
    return output.with_name(f"{output.stem}.dropped{output.suffix}")


def words(text: str) -> list[str]:
    """Return the words of a text, normalised: without case and punctuation, in one Unicode form."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the objects of a file of JSON lines; empty lines are skipped, but counted.

    Raises:
        InputError: the file cannot be read, is no JSON Lines, or a line is not an object.
    """
    try:
        with path.open("rb") as file:
            check_json_lines(path, file.peek(BEGINNING))
            for number, text in enumerate(file):
                if text.strip():
                    yield Line(number, _object(text, f"{path}: line {number + 1}"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _object(text: bytes, where: str) -> Mapping[str, Any]:
    try:
        values = parse_json(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); expected one object per line") from None
    if not isinstance(values, dict):
        raise InputError(f"{where} is a {type(values).__name__}; expected an object")
    return values


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in an object."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _NOT_TEXT:
                yield from _texts(_parsed(item) if key in _CHATS else item)


def _parsed(messages: Any) -> Any:
    """Return messages that are a string of JSON as the list that it holds, and all else as it is."""
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):  # a prompt that begins so
            return parse_json(messages)
    return messages


def _ngrams(text: str, n: int) -> set[str]:
    found = words(text)
    return {" ".join(found[i : i + n]) for i in range(len(found) - n + 1)}


def _transcript(values: Mapping[str, Any], where: str) -> str:
    if isinstance(values.get("transcript"), str):
        return values["transcript"]
    try:
        last: Any = read_conversation(values).messages[-1]
    except InputError as error:
        raise InputError(
            f'{where} has neither "transcript" nor an answer at its end ({error}); say what should be heard'
        ) from error
    if last.get("role") != "assistant":
        raise InputError(f'{where} has neither "transcript" nor an answer at its end; say what should be heard')
    return " ".join(_texts(last.get("content")))


def _key(name: Any) -> tuple[str, str]:
    """Return the key of an id; 1 and "1" are different ids."""
    return type(name).__name__, str(name)


def _split(source: Path, output: Path, fault: Callable[[Line], str | None]) -> tuple[int, int]:
    """Write the samples without fault, and beside them the others; return the counts of both."""
    for path in (output, dropped_path(output)):
        if path.exists():
            raise InputError(f"{path}: exists already; remove it, or give another output")
    prefix = Path(os.path.relpath(source.parent.resolve(), output.parent.resolve()))  # ".." is not of a link to it
    counts = [0, 0]
    with _whole(output) as kept, _whole(dropped_path(output)) as dropped:
        for line in read_lines(source):
            values = {"id": line.id, **line.values}  # its number is another one now
            if prefix != Path():  # paths are relative to the manifest
                values = _with_moved(values, prefix)
            why = fault(line)
            counts[why is not None] += 1
            if why is not None:
                values["dropped"] = why
            (kept if why is None else dropped).write(strict_json(values, ensure_ascii=False) + "\n")
    return counts[0], counts[1]


def _with_moved(values: Mapping[str, Any], prefix: Path) -> dict[str, Any]:
    """Return a sample with the paths of its media below `prefix`."""
    chats = {key: _moved(values[key], prefix) for key in _CHATS if key in values}
    answers = {key: with_paths(values[key], prefix) for key in _ANSWERS if isinstance(values.get(key), list | Mapping)}
    beside = {key: _moved_media(values[key], prefix) for key in _BESIDE if key in values}
    inner = {"input": _with_moved(values["input"], prefix)} if isinstance(values.get("input"), Mapping) else {}
    return {**values, **chats, **answers, **beside, **inner}


def _moved(messages: Any, prefix: Path) -> Any:
    """Return messages, which may be a string of JSON, with the paths of their media below `prefix`."""
    parsed = _parsed(messages)
    if not isinstance(parsed, list):
        return messages
    moved = with_paths(parsed, prefix)
    return strict_json(moved, ensure_ascii=False) if isinstance(messages, str) else moved


def _moved_media(media: Any, prefix: Path) -> Any:
    """Return media beside the messages, likewise."""
    if isinstance(media, list):
        return [_moved_media(medium, prefix) for medium in media]
    return path_in(media, prefix) if isinstance(media, str) else with_paths(media, prefix)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Any]:
    """Open a file that takes its name once it is whole."""
    try:
        with open_atomically(path, errors="surrogatepass") as file:
            yield file
    except OSError as error:
        cause = f"{path}: cannot be written ({error.strerror}), nothing was left there"
        raise InputError(f"{cause}; {write_remedy(error)}") from error
