"""A run of infer.ray: files of requests, engines on all chips of a cluster, and a folder of answers."""

import asyncio
import logging
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray._private import state  # the public way to actors' restarts needs Ray's dashboard
from ray.exceptions import RayError, RayTaskError

from phi4mm_jax.engine.answer_lines import Format, answer_of, encode_answer, error_answer
from phi4mm_jax.engine.jsonl import parse_line
from phi4mm_jax.errors import CheckpointError, ConfigError, InputError
from phi4mm_jax.ray.answer import Answer
from phi4mm_jax.ray.inputs import Chunk, Index, folder_of, index_file, read_chunk
from phi4mm_jax.ray.parts import Parts, Records, index_part
from phi4mm_jax.ray.storage import find_files

_IN_FLIGHT = 4  # batches of an engine at once
_SMALLEST_BATCH = 16
_POLL_SECONDS = 2.0  # between looks for engines that have died
_RETRIES = 10  # of a batch whose engine dies; then its lines are left out, so that one that kills engines stops no run

_log = logging.getLogger(__name__)
_ANSWERED = pa.schema([("answer", pa.large_binary()), ("tokens", pa.int64()), ("failed", pa.bool_())])


class AnswerLines(Answer):
    """Callable class like `Answer` for lines of request files; an answer is a line of the output.

    Args:
        form: of the answers.
        options: arguments of `Answer`.
    """

    def __init__(self, form: Format, **options: Any):
        super().__init__(**options)
        self._form: Format = form

    async def __call__(self, batch: pa.Table) -> pa.Table:
        found = await asyncio.gather(*(self._answered(**row) for row in batch.to_pylist()))
        return pa.Table.from_pylist(found, schema=_ANSWERED)

    async def _answered(self, number: int, line: bytes, url: str, name: str) -> dict[str, Any]:
        asked = await asyncio.to_thread(
            parse_line, number, line, folder_of(url), self.settings, f"{name}:{number}", self._adapters
        )
        found = await self.answer_line(asked)
        if isinstance(found, str):
            return {"answer": encode_answer(error_answer(asked, found, self._form)), "tokens": 0, "failed": True}
        answer = await asyncio.to_thread(answer_of, asked, found, self._form)  # reads media, for their fingerprint
        return {"answer": encode_answer(answer), "tokens": len(found.tokens), "failed": False}


@dataclass(frozen=True)
class Engines:
    """The engines of a run, and what each has: so many chips, or processors where there are none."""

    count: int
    resource: str
    each: int

    def options(self) -> dict[str, Any]:
        """Return arguments of `map_batches`."""
        if self.resource == "TPU":
            return {"num_cpus": 1, "resources": {"TPU": self.each}}
        return {"num_cpus": 1, "num_gpus": self.each} if self.resource == "GPU" else {"num_cpus": self.each}


def connect(address: str, engines: int | None) -> None:
    """Join the cluster at an address; "auto": the one that there is, else this host alone, "local".

    Raises:
        InputError: there is none at the address.
    """
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # what Ray forks becomes another program at once
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address != "local":
        try:
            ray.init(address, **quiet)
            return
        except (ConnectionError, ValueError) as error:
            if address != "auto":
                raise InputError(f"--cluster is {address!r}, which cannot be joined ({error}); check it") from error
    ray.init("local", num_cpus=max(os.cpu_count() or 1, (engines or 1) + 1), include_dashboard=False, **quiet)


def place_engines(count: int | None, each: int | None) -> Engines:
    """Find room for engines on the hosts: one for each chip, or each group of chips; one where there are none.

    Args:
        each: chips of an engine; by default one, or the processors' share.

    Raises:
        InputError: there is not as much room.
    """
    hosts = [host["Resources"] for host in ray.nodes() if host["Alive"]]
    resource = next((name for name in ("TPU", "GPU") if any(host.get(name) for host in hosts)), "CPU")
    room = [int(host.get(resource, 0)) for host in hosts]
    if resource == "CPU":
        count, room = count or 1, [max(0, processors - 1) for processors in room]  # the other one reads
        each = each or max(1, sum(room) // count)
    each = each or 1
    max_count = sum(there // each for there in room)  # an engine is within a host
    count = max_count if count is None else count
    if not 0 < count <= max_count:
        raise InputError(
            f"there is room for {max_count} engines of {each} {resource} each, and {max(count, 1)} are needed; give "
            f"fewer --engines, or another --mesh: the hosts have {', '.join(map(str, room))}"
        )
    return Engines(count, resource, each)


@dataclass(frozen=True)
class Inputs:
    """The lines of all files, one value each: see `Index`.

    Attributes:
        order: that sorts the keys.
    """

    chunks: list[Chunk]
    keys: np.ndarray
    digests: np.ndarray
    broken: np.ndarray
    order: np.ndarray


def index_files(pattern: str, settings: Mapping[str, Any], parquet: bool, adapters: Collection[str] = ()) -> Inputs:
    """Read all inputs once, on the cluster.

    Args:
        settings: of lines that do not say.
        parquet: the ids are to be a column.
        adapters: names of the users' adapters that are loaded.

    Raises:
        InputError: there is no file, one cannot be read, or two lines have the same id.
    """
    files = find_files(pattern)
    index: list[Index] = _gather(
        index_file, [(name, url, dict(settings), tuple(adapters)) for name, url in files.items()]
    )
    chunks = [chunk for found in index for chunk in found.chunks]
    keys, digests, broken = (
        np.concatenate([getattr(found, name) for found in index]) for name in ("keys", "digests", "broken")
    )
    kinds = sorted({kind for found in index for kind in found.kinds})
    if parquet and (len(kinds) > 1 or not {*kinds} <= {"strings", "whole numbers"}):
        raise InputError(
            f"{pattern}: its ids are {' and '.join(kinds)}, which no column holds; give --output-format jsonl"
        )
    order = np.argsort(keys, kind="stable")
    if len(twice := np.flatnonzero(keys[order][1:] == keys[order][:-1])):
        first, second = (_where(chunks, int(order[at])) for at in (twice[0], twice[0] + 1))
        raise InputError(f"{first} and {second} have the same id; give each its own")
    return Inputs(chunks, keys, digests, broken, order)


def compact(parts: Parts, inputs: Inputs, form: Format) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep one answer of each line: an error gives way to an answer, and an earlier error to a later one.

    Returns:
        Of each line of the inputs whether its answer is an error, whether it is none, and whether it is cut.

    Raises:
        InputError: an answer is to another request than its line is now.
    """
    keys, digests, order = inputs.keys, inputs.digests, inputs.order
    failed, done, cut = np.zeros((3, len(keys)), bool)
    records: list[Records] = _gather(index_part, [(path, parts.storage, form) for path in parts.paths])
    if not records or not len(keys):
        return failed, done, cut
    named, bad, made, long = (
        np.concatenate([getattr(r, name) for r in records]) for name in ("keys", "failed", "digests", "cut")
    )
    places = order[np.minimum(np.searchsorted(keys, named, sorter=order), len(keys) - 1)]
    known = keys[places] == named
    changed = known & ~bad & (digests[places] != 0) & (digests[places] != made)
    if changed.any():
        where = _where(inputs.chunks, int(places[changed.argmax()]))
        raise InputError(
            f"{parts.url}: has an answer to another request than {where} is now; give another folder, or "
            "restore the input"
        )
    ranked = np.lexsort((np.arange(len(named)), ~bad, np.where(known, places, -1)))  # the last of each line is kept
    last = np.append(places[ranked][1:] != places[ranked][:-1], True)
    kept = ~known
    kept[ranked] |= last
    done[places[known & kept & ~bad]] = True
    failed[places[known & kept & bad]] = True
    cut[places[known & kept & long]] = True
    ends = np.cumsum([len(r.keys) for r in records])
    for part, mine in reversed(list(enumerate(np.split(kept, ends[:-1])))):  # from the last, which may go
        if not mine.all():
            parts.keep(part, mine)
    return failed, done, cut


def answer(
    inputs: Inputs, todo: np.ndarray, parts: Parts, engines: Engines, *, form: Format, options: Mapping[str, Any],
    settings: Mapping[str, Any], advance: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Answer the lines left to do; engines that die are replaced, and their rows retried.

    Args:
        todo: whether a line is to be answered.
        options: arguments of `Answer`.
        settings: of lines that do not say.
        advance: called with numbers of answers and tokens as they come.

    Raises:
        InputError, CheckpointError, ConfigError: an engine cannot be made, or the answers cannot be written.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # what is left out is reported at the end
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = max(_SMALLEST_BATCH, (options.get("engine") or {}).get("slots", 0))
    pieces, at = [], 0
    for chunk in inputs.chunks:
        wanted = todo[at : at + chunk.lines]
        at += chunk.lines
        if wanted.any():
            pieces.append(asdict(chunk) | {"wanted": np.packbits(wanted).tobytes()})
    # No other way bounds retries; the extra `ray` ends before the release that is without this one.
    warnings.filterwarnings("ignore", ".*ray_remote_args_fn", DeprecationWarning)
    answers = (
        ray.data.from_items(pieces, override_num_blocks=len(pieces))
        .map_batches(_read, batch_size=1, batch_format="pyarrow", num_cpus=0.1)
        .repartition(target_num_rows_per_block=rows)
        .map_batches(
            AnswerLines, batch_size=rows, batch_format="pyarrow",
            fn_constructor_kwargs={"form": form, "defaults": dict(settings), **options},
            compute=ray.data.ActorPoolStrategy(
                size=engines.count, max_concurrent_calls_per_actor=_IN_FLIGHT,
                max_tasks_in_flight_per_actor=_IN_FLIGHT + 1,
            ),
            ray_remote_args_fn=lambda: {"max_task_retries": _RETRIES},
            **engines.options(),
        )
    )  # fmt: skip
    try:
        # Without prefetching, which holds a batch back until the next is ready.
        batches: Iterable[Any] = answers.iter_batches(prefetch_batches=0, batch_size=None, batch_format="pyarrow")
        with _deaths_logged():
            for batch in batches:
                failed = batch.column("failed").to_pylist()
                tokens = batch.column("tokens").to_pylist()
                parts.add(batch.column("answer").to_pylist(), sum(failed))
                advance(batch.num_rows, sum(tokens))
    except RayError as error:
        raise _cause(error) from error
    finally:
        parts.flush()


@contextmanager
def _deaths_logged() -> Iterator[None]:
    """Log engines that die and are started again, while the body runs; also in its last moments."""
    done = threading.Event()

    def look() -> None:
        known, is_last = 0, False
        while not is_last:
            is_last = done.wait(_POLL_SECONDS)
            with suppress(RayError, OSError):
                restarts = _restarts()
                if restarts > known:
                    _log.info(
                        "an engine has died and is started again, %d so far; its lines are asked again (at most %d "
                        "times)", restarts, _RETRIES,
                    )  # fmt: skip
                known = restarts

    thread = threading.Thread(target=look, name="phi4mm-engines", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _restarts() -> int:
    """Return how often engines of this run were started again."""
    found = state.actors(job_id=ray.JobID.from_hex(ray.get_runtime_context().get_job_id()))
    return sum(int(x["NumRestarts"]) for x in found.values() if AnswerLines.__name__ in x["ActorClassName"])


def _read(pieces: pa.Table) -> Iterator[pa.Table]:
    for piece in pieces.to_pylist():
        bits = np.frombuffer(piece.pop("wanted"), np.uint8)
        yield read_chunk(Chunk(**piece), np.unpackbits(bits, count=piece["lines"]).astype(bool))


def _gather(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
    """Call a function on the cluster once for each tuple of arguments."""
    remote = ray.remote(num_cpus=0.1)(function)
    try:
        return ray.get([remote.remote(*given) for given in arguments])
    except RayTaskError as error:
        raise _cause(error) from error


def _cause(error: Exception) -> Exception:
    """Return the error of this package that a worker raised, if it is one."""
    last = str(error).strip().splitlines()[-1]
    for kind in (InputError, CheckpointError, ConfigError):
        _, found, message = last.partition(f"{kind.__name__}: ")
        if found:
            return kind(message)
    return error


def _where(chunks: list[Chunk], place: int) -> str:
    """Return the file and number of a line, by its place in all lines."""
    for chunk in chunks:
        if place < chunk.lines:
            (number,) = read_chunk(chunk, np.arange(chunk.lines) == place).column("number").to_pylist()
            return f"{chunk.url} line {number + 1}"
        place -= chunk.lines
    raise IndexError(place)
