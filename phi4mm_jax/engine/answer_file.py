"""Output file of a run, one line per answer; rerun the same command to resume a run that was stopped."""

import os
import stat
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from phi4mm_jax.engine.answer_lines import (
    Format,
    Record,
    answer_of,
    encode_answer,
    error_answer,
    is_cut,
    parse_record,
    read_records,
)
from phi4mm_jax.engine.engine import Engine
from phi4mm_jax.engine.jsonl import Line, LineIndex, RequestFile, digest_number
from phi4mm_jax.engine.provenance import Settings, check_settings, media_fingerprint
from phi4mm_jax.engine.request import Request
from phi4mm_jax.errors import InputError
from phi4mm_jax.utils.files import RESUME_REMEDY, incomplete_path, try_lock, writing

_NEW, _FAILED, _KEPT, _ANSWERED = range(4)  # kept: the error of a broken line


class AnswerFile:
    """Output file with one line per answer, written as it comes. A context manager.

    A line whose answer is an error is retried by the next run. Until that run has ended, its earlier answer stands
    before the new one; then the new one takes its place.

    Args:
        settings: returns the settings that answers depend on (see `settings_of`); kept beside the output, so that a run
            with others is refused, whichever lines are answered. Called once the output can be written.
        form: of the answers: ours, or OpenAI's.
        retry: retry lines whose answer is an error.

    Attributes:
        total: lines of this run's share.
        answered: those of them that have an answer, and are skipped.
        errors: those of them that are errors.
        cut: those of them that ended at their limit of tokens.

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
        self.answered = self.errors = self.cut = 0

    def __enter__(self) -> "AnswerFile":
        while True:
            with self._writing():
                self._file = self.path.open("a+b", buffering=0)
            try:
                if self._lock():
                    self._begin()
                    return self
            except BaseException:
                self._file.close()
                raise
            self._file.close()  # another run has replaced it meanwhile

    def _lock(self) -> bool:
        """Lock the file; return whether it still is the one of that name."""
        with self._writing():
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise InputError(f"{self.path}: is not a file, so that a run could not be resumed; give one")
            if not try_lock(self._file):
                raise InputError(f"{self.path}: another run is writing it; wait for it, or stop it")
            try:
                return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
            except FileNotFoundError:
                return False

    def _begin(self) -> None:
        """Read the existing answers, and find the lines left to do."""
        self._state = bytearray(self.total)  # of each line
        media, cut = array("Q", bytes(8 * self.total)), bytearray(self.total)
        changed, repeated, in_order, count, others = None, False, True, 0, False
        for record in read_records(self.path, self._form, self._file.fileno()):
            place = self._index.places.get(record.key)
            if place is None:
                repeated |= self._is_stale(record)
                others |= not record.failed
                continue
            if self._state[place]:
                repeated = True
            else:
                in_order &= place == count
                count += 1
            same = record.digest is None or digest_number(record.digest) == self._index.digests[place]
            if record.failed:
                self._state[place] = _FAILED if not same or self._can_retry(place) else _KEPT
            else:
                self._state[place], media[place], cut[place] = _ANSWERED, digest_number(record.media), record.cut
                changed = changed or (None if same else (record.key, place))
        if self._settings is not None:
            now = self._settings()
            with self._writing():
                check_settings(self.path, now, has_answers=others or _ANSWERED in self._state)
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
            self._compact()
        self.errors, self.cut = self._state.count(_KEPT), sum(cut)
        self.answered = self._state.count(_ANSWERED) + self.errors

    def _can_retry(self, place: int) -> bool:
        return self._retry and not self._index.broken[place]

    def _is_stale(self, record: Record) -> bool:
        """Return whether it is the error of a broken line that has been repaired."""
        if not record.failed or not isinstance(record.key, tuple):
            return False
        numbers, number = self._index.numbers, record.key[1] - 1
        at = bisect_left(numbers, number)
        return at < len(numbers) and numbers[at] == number

    def _check_media(self, media: array) -> None:
        """Refuse answers about media that have changed since; media that are gone cannot be compared."""
        for place, line in enumerate(self._lines):
            if media[place] and line.request is not None and self._state[place] == _ANSWERED:
                now = digest_number(media_fingerprint(line.request))
                if now and now != media[place]:
                    raise InputError(
                        f"{self.path}: its answer with id {line.id!r:.80} is about other media than {line.where} has "
                        "now; give another output, or restore the files"
                    )

    def _writing(self) -> AbstractContextManager[None]:
        """Return a context in which a failure to write is an InputError."""
        return writing(self.path, remedy=RESUME_REMEDY if self.path.is_file() else None)

    def __exit__(self, *exception) -> None:
        self._file.close()

    def _compact(self) -> None:
        """Rewrite the file atomically, with only the last answer of each line."""
        last = array("q", [-1]) * self.total
        for record in read_records(self.path, self._form, self._file.fileno()):
            place = self._index.places.get(record.key)
            if place is not None:
                last[place] = record.start
        path = Path(os.path.realpath(self.path))
        aside = incomplete_path(path)
        try:
            with self._writing(), ExitStack() as opened:
                new = opened.enter_context(aside.open("w+b", buffering=0))
                try_lock(new)  # nobody else opens it under this name
                os.fchmod(new.fileno(), stat.S_IMODE(os.fstat(self._file.fileno()).st_mode))
                with path.open("rb") as source, path.open("rb") as answers, open(os.dup(new.fileno()), "wb") as writer:
                    for number, line in enumerate(source, 1):
                        record = parse_record(self.path, self._form, line, number, 0)
                        place = self._index.places.get(record.key)
                        if place is not None and last[place] >= 0:
                            answers.seek(last[place])
                            writer.write(answers.readline())
                            last[place] = -1
                        elif place is None and not self._is_stale(record):
                            writer.write(line)
                os.fsync(new.fileno())
                os.replace(aside, path)
                opened.pop_all()
        except InputError:
            aside.unlink(missing_ok=True)
            raise
        self._file.close()
        self._file = new

    def run(self, engine: Engine) -> Iterator[tuple[Mapping[str, Any], int]]:
        """Answer the lines that have no answer yet, and retry those that failed.

        Yields:
            Each answer as it is written, and its number of sampled tokens.
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
            self._compact()

    def _answers(self, engine: Engine) -> Iterator[tuple[int, Mapping[str, Any], bool, int]]:
        """Yield index among the lines left, answer, whether it is an error, and tokens, in order of completion."""
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
                yield i, answer_of(line, completion, self._form), False, len(completion.tokens)
        yield from errors()

    def _write(self, answer: Mapping[str, Any], failed: bool) -> None:
        left = memoryview(encode_answer(answer) + b"\n")
        with self._writing():
            while left:
                left = left[self._file.write(left) :]
        self.answered += 1
        self.errors += failed
        self.cut += is_cut(answer)
