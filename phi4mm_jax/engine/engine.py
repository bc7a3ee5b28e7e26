"""The batch engine: fixed slots that are refilled as rows end, over a paged cache.

Each round admits waiting requests into free slots, prefills a chunk of some of those that are not through, and decodes
all others some steps in one compiled program. Only then does the host look at the tokens. The host decides, with numpy;
the device computes, with a handful of programs whose shapes never change.
"""

import hashlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi4mm_jax.adapters import ADAPTERS, NONE, adapter_indices, index_of, used_collections
from phi4mm_jax.batch import NO_MEDIA
from phi4mm_jax.engine.beam_search import MOST_STOPS, Group, Search, advance
from phi4mm_jax.engine.detokenizer import IncrementalDetokenizer
from phi4mm_jax.engine.encoder_cache import BLOCK_SIZE, EncoderCache, MediaInputs, media_inputs, warm_up_stacks
from phi4mm_jax.engine.page_allocator import Key, PageAllocator, page_keys
from phi4mm_jax.engine.request import Completion, FinishReason, Request
from phi4mm_jax.engine.sampling import Sampling, SamplingRows
from phi4mm_jax.engine.steps import BeamInputs, DecodeInputs, PrefillInputs, Programs, SampledTokens, TopLogprobs
from phi4mm_jax.errors import InputError
from phi4mm_jax.model.phi4mm import empty_cache
from phi4mm_jax.processing.batching import Row
from phi4mm_jax.processing.processor import Processor

_CACHE_TOKENS = 32768  # where the memory is not known
_ROWS = (4, 1)  # rows that are prefilled at once
_PATIENCE = 1.0  # seconds that the first request is waited for before it is overtaken
CACHE_DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class EngineConfig:
    """Sizes; all memory is taken at the start.

        model.engine(EngineConfig(slots=16, cache_tokens=65536, cache_dtype="int8"))

    Attributes:
        slots: rows that are decoded at once.
        cache_tokens: what the cache holds, of all rows together. By default three quarters of what is free of each
            device's memory, at most what the slots can use; 32768 on CPUs, which do not tell.
        page_size: tokens of a page; prompts share whole pages, and prefill at least one. By default 128 on TPUs, whose
            kernel asks for that, and 64 elsewhere, where a short prompt then costs half as much.
        chunk: tokens of a row that are prefilled at once, at most; a multiple of the page size.
        steps: tokens that are decoded before the host looks at them.
        cache_dtype: the model's by default, else "int8".
        feature_blocks: of 64 features each: room for encoded media. A crop takes 4, a 40 s chunk of a clip 8.
        beams: the most that a request may ask for. They take no memory but pages, of which a request with n beams comes
            to need as many for its answer as n others.
        cli: messages name the sizes as the options of a program (`--beams`).
        workers: threads that process prompts and their media: so many slow ones hold up no other.
        media_seconds: that this may take for one request, which else ends with an error.
    """

    slots: int = 8
    cache_tokens: int | None = None
    page_size: int = field(default_factory=lambda: 128 if jax.default_backend() == "tpu" else 64)
    chunk: int = 2048
    steps: int = 8
    cache_dtype: str | None = None
    feature_blocks: int = 512
    beams: int = 1
    cli: bool = False
    workers: int = 4
    media_seconds: int = 300

    def __post_init__(self):
        sizes = ("slots", "cache_tokens", "page_size", "chunk", "steps", "feature_blocks", "beams")
        for name in (*sizes, "workers", "media_seconds"):
            value = getattr(self, name)
            if name == "cache_tokens" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} is {value!r}; expected a positive whole number")
        if self.chunk % self.page_size:
            raise InputError(f"chunk is {self.chunk}; expected a multiple of the page size of {self.page_size}")
        if self.cache_dtype is not None and self.cache_dtype not in CACHE_DTYPES:
            raise InputError(
                f"cache_dtype is {self.cache_dtype!r}; expected None, for the model's, or one of "
                f"{', '.join(CACHE_DTYPES)}"
            )
        if self.feature_blocks < 16:
            raise InputError(f"feature_blocks is {self.feature_blocks}; expected at least 16")

    def named(self, size: str) -> str:
        """What a message calls a size."""
        return f"--{size.replace('_', '-')}" if self.cli else f"EngineConfig({size}=...)"

    @property
    def pages(self) -> int:
        return math.ceil((self.cache_tokens or _CACHE_TOKENS) / self.page_size)


@dataclass(frozen=True)
class Update:
    """What a round brought for one request: text, and in the end the whole answer."""

    id: int
    text: str
    completion: Completion | None = None


@dataclass
class _Active:
    """A request in a slot."""

    id: int
    request: Request
    row: Row
    media: MediaInputs
    limit: int  # tokens that it may draw
    slot: int
    needed: int  # pages that it may come to need
    text: IncrementalDetokenizer
    tokens: list[int] = field(default_factory=list)  # drawn
    log_probabilities: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)  # of the whole pages of what has to be prefilled
    cached: int = 0  # tokens in the cache
    target: int = 0  # tokens to prefill before it decodes; 0 once it does
    admitted: bool = False  # its pages are its own or promised
    promised: int = 0  # pages that it has not taken yet
    started: bool = False  # it has looked for pages to share
    long: bool = False
    group: Group | None = None  # where it has several beams; their tokens are not among its own
    sampling: Sampling = field(default_factory=Sampling)  # the request's, with its seed

    @property
    def adapter(self) -> int:
        asked = self.request.adapter
        return self.row.adapter if asked is None else index_of(asked)

    @property
    def prompt_tokens(self) -> int:
        return len(self.row.tokens)

    def sequence(self, stop: int) -> np.ndarray:
        """Its first tokens, drawn ones included."""
        return np.concatenate([self.row.tokens, np.asarray(self.tokens, np.int32)])[:stop]


class Engine:
    """Answers requests, many at a time. Not for use from several threads at once.

    Raises:
        InputError: sizes that do not fit.
    """

    def __init__(self, programs: Programs, variables: Mapping[str, Any], processor: Processor, config: EngineConfig):
        if config.cache_tokens is None:
            tokens = default_cache_tokens(config, programs, processor.context)
            config = replace(config, cache_tokens=tokens)
        self.config, self._programs, self._processor = config, programs, processor
        self._variables = variables
        self._context = processor.context
        self._boundary = processor.config.decoder.rope.original_length
        model = programs.model.config
        self._pool = PageAllocator(config.pages)
        dtype = jnp.dtype(programs.model.dtype)
        cache_dtype = jnp.dtype(config.cache_dtype or dtype)
        if cache_dtype not in (dtype, jnp.int8):
            raise InputError(
                f"cache_dtype is {cache_dtype.name!r}, but the model computes in {dtype.name}; expected None, "
                f"{dtype.name!r} or 'int8'"
            )
        self._table_size = min(config.pages, math.ceil(self._context / config.page_size))
        self._cache = programs.place(empty_cache(model, config.pages, config.page_size, cache_dtype))
        features = programs.place(jnp.zeros((config.feature_blocks * BLOCK_SIZE, model.decoder.embed_dim), dtype))
        base = {"params": variables["params"]}
        self._features = EncoderCache(lambda *arguments: programs.encode(base, *arguments), features)
        self._seen = programs.place(jnp.zeros((config.slots, model.decoder.vocab_size), bool))
        self._stops = set(model.stop_token_ids)
        self._candidates = config.beams + max(MOST_STOPS, len(self._stops)) if config.beams > 1 else 0
        self._slots: list[_Active | None] = [None] * config.slots
        self._waiting: deque[tuple[int, Request, Future[tuple[Row, MediaInputs]]]] = deque()
        self._workers = ThreadPoolExecutor(config.workers, thread_name_prefix="phi4mm-process")
        self._started: dict[int, float] = {}  # when the processing of each waiting request began
        self._earlier: dict[int, Counter[bytes]] = {}  # of waiting requests, see `submit`
        self._next_id = 0
        self._steps = config.steps  # of this round
        self._updates: list[Update] = []
        self._broken = False  # a round was left before its end

    # ------------------------------------------------------------------------------------------ requests

    def submit(self, request: Request, row: Row | None = None, *, earlier: Counter[bytes] | None = None) -> int:
        """Queue a request; returns the id that its updates carry. Its prompt is processed in the background.

        Without a seed a request draws by its prompt and media: the same again whenever it is asked.

        Args:
            row: the prompt and its media, where they are processed already.
            earlier: one of all requests that belong together; of equal ones each then draws for itself.
        """

        def process() -> tuple[Row, MediaInputs]:
            self._started[number] = time.monotonic()
            asked = (
                request.prompt, request.images, request.audios, request.max_crops, request.continue_final_message,
                request.adapter,
            )  # fmt: skip
            made = self._processor.row(*asked) if row is None else row
            return made, media_inputs(made, self._processor.config)

        number, self._next_id = self._next_id, self._next_id + 1
        if earlier is not None:
            self._earlier[number] = earlier
        self._waiting.append((number, request, self._workers.submit(process)))
        return number

    def cancel(self, number: int) -> None:
        """End a request now; its slot and pages are free at once. What it drew so far is its answer."""
        for entry in self._waiting:
            if entry[0] == number:
                entry[2].cancel()
                self._started.pop(number, None)
                self._waiting.remove(entry)
                self._earlier.pop(number, None)
                self._updates.append(Update(number, "", Completion("", [], "cancelled", 0)))
                return
        for active in self._slots:
            if active is not None and active.id == number:
                self._finish(active, "cancelled")

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._updates and all(a is None for a in self._slots)

    def step(self) -> list[Update]:
        """One round. Updates come in the order of their slots; a request that cannot be served ends with an error.

        A request that is alone is told of after every token, others after `EngineConfig.steps`.
        """
        self._round(watched=True)
        updates, self._updates = self._updates, []
        return updates

    def _round(self, watched: bool = False) -> None:
        """Args: watched: somebody wants to see each token as soon as it is there."""
        if self._broken:
            raise InputError("this engine was stopped in the middle of a round, by Ctrl-C or an error; make another")
        self._broken = True
        self._admit()
        alone = not self._waiting and sum(a is not None for a in self._slots) == 1
        self._steps = 1 if watched and alone else self.config.steps
        self._prefill()
        self._decode()
        self._extend()
        self._broken = False

    def _updates_of(self, numbers: Collection[int], watched: bool = False) -> list[Update]:
        """What there is for these requests, if need be after a round. What is for others stays for them."""
        if not any(update.id in numbers for update in self._updates):
            self._round(watched)
        taken = [update for update in self._updates if update.id in numbers]
        self._updates = [update for update in self._updates if update.id not in numbers]
        return taken

    def _drop(self, numbers: Collection[int]) -> None:
        """Cancel requests whose answers nobody waits for."""
        for number in numbers:
            self.cancel(number)
        self._updates = [update for update in self._updates if update.id not in numbers]

    def run(self, requests: Iterable[Request], ahead: int | None = None) -> Iterator[tuple[int, Completion]]:
        """Answer requests as they come, in the order in which they end.

        Args:
            requests: read as slots become free, and some more whose media are processed meanwhile. Equal ones that
                have no seed draw each for itself.
            ahead: how many more; by default as many as there are slots.

        Yields:
            The request's place among `requests`, and its answer.
        """
        ahead = self.config.slots if ahead is None else ahead
        incoming = enumerate(requests)
        places: dict[int, int] = {}
        earlier: Counter[bytes] = Counter()
        more = True
        try:
            while more or places:
                while more and len(self._waiting) < ahead + sum(a is None for a in self._slots):
                    place, request = next(incoming, (None, None))
                    if request is None or place is None:
                        more = False
                    else:
                        places[self.submit(request, earlier=earlier)] = place
                for update in self._updates_of(places):
                    if update.completion is not None:
                        yield places.pop(update.id), update.completion
        finally:
            self._drop(list(places))

    def stream(self, request: Request) -> Iterator[str]:
        """The answer in pieces of text, none of which splits a character. Closing the iterator cancels the request.

        Raises:
            InputError: the request cannot be served.
        """
        number, done = self.submit(request), False
        try:
            while not done:
                for update in self._updates_of([number], watched=True):
                    done = update.completion is not None
                    if update.completion is not None and update.completion.error:
                        raise InputError(update.completion.error)
                    if update.text:
                        yield update.text
        finally:
            if not done:
                self._drop([number])

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile every program for every shape: no request will have to wait for a compilation.

        Requests that are being answered meanwhile lose nothing.

        Args:
            progress: called with how many programs are compiled, and of how many.
        """
        index = adapter_indices()
        present = [index[name] for name in self._variables if name in index]
        pages = self.config.chunk // self.config.page_size
        widths = sorted({self._width(count * self.config.page_size) for count in range(1, pages + 1)})
        prefills = [(adapter, count, width) for adapter in [0, *present] for count in _ROWS for width in widths]
        together = [{0, *some} for n in range(len(present) + 1) for some in combinations(present, n)]
        stacks = list(warm_up_stacks(self._processor.config))
        extends = [(adapters, size) for adapters in together for size in self._extend_sizes()]
        total, done = len(stacks) + len(prefills) + len(together) + len(extends) + 1, 0

        def compiled() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        for stack, features in stacks:
            self._features.warm_up(stack, features)
            compiled()
        for adapter, count, width in prefills:
            nothing = np.zeros((count, width), np.int32)
            self._run_prefill({adapter}, [], count, nothing, nothing + NO_MEDIA, [])
            compiled()
        for adapters in together:
            self._run_decode(adapters, [None] * self.config.slots, np.zeros(self.config.slots, np.int32))
            compiled()
        for adapters, size in extends:
            self._run_extend(adapters, [], size)
            compiled()
        nobody = np.int32(self.config.slots)
        self._seen = self._programs.mark(self._seen, nobody, np.zeros(self._seen.shape[1], bool))
        compiled()

    # ------------------------------------------------------------------------------------------ admission

    def _admit(self) -> None:
        """Promise pages, in the order of the requests: one that needs many is not overtaken for ever."""
        for active in sorted((a for a in self._slots if a is not None and not a.admitted), key=lambda a: a.id):
            if not self._promise(active):
                return
        while self._waiting and None in self._slots:
            at = self._next_processed()
            if at is None:
                return  # the others go on meanwhile
            number, request, work = self._waiting[at]
            try:
                if not work.done():
                    limit = self.config.media_seconds
                    raise InputError(f"its media took longer than {limit} seconds to process; pass smaller ones")
                active = self._activate(number, request, *work.result())
            except Exception as error:  # whatever a medium makes a library raise, the others are answered
                del self._waiting[at]
                self._earlier.pop(number, None)
                self._started.pop(number, None)
                cause = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
                self._updates.append(Update(number, "", Completion("", [], "error", 0, error=cause)))
                continue
            if not self._promise(active):
                return
            del self._waiting[at]
            self._started.pop(number, None)
            active.sampling = self._draws(active)
            self._slots[active.slot] = active
            self._mark(active)

    def _next_processed(self) -> int | None:
        """The place of the first waiting request whose prompt is processed, or whose time for that is over.

        Requests keep their order as long as their media take about a second; what takes longer is overtaken.
        """
        head, _, work = self._waiting[0]
        if not any(a is not None for a in self._slots):
            wait([work], timeout=_PATIENCE)
        now = time.monotonic()
        if not work.done() and now - self._started.get(head, now) < _PATIENCE:
            return None
        counted = False  # one is overtaken on whose identity that of others depends
        for at, (number, request, work) in enumerate(self._waiting):
            by_order = number in self._earlier and _draws_by_identity(request.sampling)
            if work.done() and not (by_order and counted):
                return at
            if now - self._started.get(number, now) > self.config.media_seconds:
                return at
            counted |= by_order
        return None

    def _draws(self, active: _Active) -> Sampling:
        """How it draws. The identity of a request is its prompt, and how many equal ones came before."""
        earlier, settings = self._earlier.pop(active.id, None), active.request.sampling
        if not _draws_by_identity(settings):
            return settings
        content = active.row.tokens.tobytes() + b"".join(digest for *_, digest in active.media.spans)
        identity = hashlib.blake2b(content, digest_size=16).digest()
        count = 0
        if earlier is not None:
            count, earlier[identity] = earlier[identity], earlier[identity] + 1
        return settings.for_identity(b"%s %d" % (identity, count))

    def _mark(self, active: _Active) -> None:
        """Tell the device which tokens a row has, where they count; decoding adds those that it is given itself."""
        if active.request.sampling.repetition_penalty != 1.0:
            seen = np.zeros(self._seen.shape[1], bool)
            seen[active.sequence(active.target)] = True
            self._seen = self._programs.mark(self._seen, np.int32(active.slot), seen)

    def _promise(self, active: _Active) -> bool:
        if active.needed > self._pool.available:
            return False
        self._pool.reserve(active.needed)
        active.promised, active.admitted = active.needed, True
        return True

    def _activate(self, number: int, request: Request, row: Row, media: MediaInputs) -> _Active:
        length, size = len(row.tokens), self.config.page_size
        if length >= self._context:
            raise InputError(
                f"the prompt has {length} tokens, which leaves no room in the context of {self._context}; shorten it"
            )
        self._check_adapter(request.adapter)
        self._check_room(media, length)
        limit = min(int(request.max_new_tokens), self._context - length)
        shared = length // size if request.beams > 1 else 0  # by all its beams
        needed = shared + request.beams * (math.ceil((length + limit) / size) - shared)
        if needed > self._pool.num_pages:
            each = f" of each of {request.beams} beams" if request.beams > 1 else ""
            raise InputError(
                f"the prompt's {length} tokens and {limit} new ones{each} need {needed} pages of {size} tokens, but "
                f"the cache has {self._pool.num_pages}; give it more tokens, or ask for fewer ("
                f"{self.config.named('cache_tokens')})"
            )
        text = IncrementalDetokenizer(self._processor.tokenizer, request.stop)
        active = _Active(number, request, row, media, limit, self._slots.index(None), needed, text)
        active.group = self._group(request, limit)
        self._begin(active)
        return active

    def _check_room(self, media: MediaInputs, length: int) -> None:
        """A chunk is a page at least, whose media must be in the table together."""
        if self._features.max_stop(media, 0, length) == length:
            return
        size = self.config.page_size
        for start in range(0, length, size):
            stop = min(start + size, length)
            if self._features.max_stop(media, start, stop) < stop:
                raise InputError(
                    f"tokens {start} to {stop} of the prompt take features of more media than feature_blocks="
                    f"{self.config.feature_blocks} hold together; give the engine more"
                )

    def _check_adapter(self, adapter: str | None) -> None:
        if adapter is not None and self._processor.merged is not None:
            raise InputError(
                f"adapter is {adapter!r}, but the {self._processor.merged} adapter is merged into the weights; load "
                "the checkpoint without merge"
            )
        if adapter not in (None, NONE) and ADAPTERS[adapter].collection not in self._variables:
            raise InputError(f"adapter is {adapter!r}, which this checkpoint lacks; use a checkpoint with it")

    def _begin(self, active: _Active) -> None:
        """Everything has to be prefilled: at first, and when the row is about to outgrow the short rotary set."""
        active.cached, active.started = 0, False
        active.target = active.prompt_tokens + len(active.tokens)
        drawn = len(active.tokens) if active.group is None else active.group.search.drawn
        active.long = active.prompt_tokens + drawn > self._boundary
        salt = bytes([active.adapter, active.long])
        tokens = active.sequence(active.target)
        active.keys = list(page_keys(tokens, active.media.spans, self.config.page_size, salt))

    def _give_back(self, active: _Active) -> None:
        """Its pages, and those that it was promised."""
        self._pool.decref(active.pages)
        if active.group is not None:
            active.group.release(self._pool)
        self._pool.unreserve(active.promised)
        active.pages, active.promised, active.admitted = [], 0, False

    # ------------------------------------------------------------------------------------------ prefill

    def _prefill(self) -> None:
        """Chunks of rows, those that wait longest first; one chunk's worth, so that decoding rows are not kept long."""
        budget = self.config.chunk
        while budget > 0 and (chosen := self._choose()):
            stops = [self._chunk_end(active) for active in chosen]
            width = self._width(stops[0] - chosen[0].cached)
            budget -= width * self._prefill_rows(chosen, stops, width)

    def _choose(self) -> list[_Active]:
        """Rows with the same adapter and the same width of chunk."""
        computed: set[Key] = set()  # pages that a row before will publish
        chosen: list[_Active] = []
        admitted = (a for a in self._slots if a is not None and a.target and a.admitted)
        for active in sorted(admitted, key=lambda a: a.id):
            if not active.started:
                shared = min(self._pool.match_prefix(active.keys), (active.target - 1) // self.config.page_size)
                if any(key in computed for key in active.keys[shared : shared + 1]):
                    continue  # another is about to make what this one needs next
                self._share(active, shared)
            computed.update(active.keys[active.cached // self.config.page_size :])
            if not chosen or (active.adapter, self._next_width(active)) == (
                chosen[0].adapter,
                self._next_width(chosen[0]),
            ):
                chosen.append(active)
        chosen = chosen[: next((n for n in _ROWS if n <= len(chosen)), 0)]
        media = [(a.media, a.cached, min(self._chunk_end(a), a.prompt_tokens)) for a in chosen]
        return chosen if self._features.fits(media) else chosen[:1]

    def _share(self, active: _Active, pages: int) -> None:
        """Take pages that others made; as many are no longer promised."""
        active.pages = self._pool.acquire_cached(active.keys[:pages])
        self._pool.unreserve(pages)
        active.promised -= pages
        active.cached, active.started = pages * self.config.page_size, True

    def _next_width(self, active: _Active) -> int:
        return self._width(self._chunk_end(active) - active.cached)

    def _chunk_end(self, active: _Active) -> int:
        """As far as the chunk and the room for its media go; short of the end, to a page's border."""
        stop = min(active.cached + self.config.chunk, active.target)
        prompt = min(stop, active.prompt_tokens)
        fit = self._features.max_stop(active.media, active.cached, prompt)
        return stop if fit >= prompt else fit // self.config.page_size * self.config.page_size

    def _width(self, tokens: int) -> int:
        """Chunks are padded to a page times a power of two."""
        pages = math.ceil(tokens / self.config.page_size)
        return min(self.config.page_size << (pages - 1).bit_length(), self.config.chunk)

    def _prefill_rows(self, chosen: list[_Active], stops: list[int], width: int) -> int:
        count = len(chosen)
        tokens = np.zeros((count, width), np.int32)
        media = np.full((count, width), NO_MEDIA, np.int32)
        indices = self._features.lookup_or_encode(
            [(a.media, a.cached, min(s, a.prompt_tokens)) for a, s in zip(chosen, stops, strict=True)]
        )
        for i, (active, stop) in enumerate(zip(chosen, stops, strict=True)):
            tokens[i, : stop - active.cached] = active.sequence(stop)[active.cached :]
            media[i, : len(indices[i])] = indices[i]
            self._grow(active, stop)
        drawn, candidates = self._run_prefill({a.adapter for a in chosen}, chosen, count, tokens, media, stops)
        for i, (active, stop) in enumerate(zip(chosen, stops, strict=True)):
            if not drawn.finite[i]:  # its pages may hold NaN, which nobody shall share
                self._fail(active)
                continue
            size = self.config.page_size
            for page in range(active.cached // size, min(stop // size, len(active.keys))):
                self._pool.cache_page(active.pages[page], active.keys[page])
            active.cached = stop
            if stop == active.target:
                active.target = 0
                if active.group is None:
                    self._append(active, drawn.tokens[i], drawn.log_probabilities[i])
                else:
                    self._start_beams(active, active.group, TopLogprobs(*(x[i : i + 1] for x in candidates)))
        return count

    def _run_prefill(self, adapters: set[int], chosen, count: int, tokens, media, stops: Sequence[int]):
        chunk = PrefillInputs(
            tokens, media,
            starts=_column(chosen, count, lambda a: a.cached),
            lengths=_padded(stops, count),
            tables=self._tables(chosen, count),
            adapters=_column(chosen, count, lambda a: a.adapter),
            long=_column(chosen, count, lambda a: a.long).astype(bool),
            slots=_column(chosen, count, lambda a: a.slot),
            drawn=_column(chosen, count, lambda a: len(a.tokens)),
            settings=_settings(chosen, count),
        )  # fmt: skip
        variables = self._variables_for(adapters)
        self._cache, *results = self._programs.prefill(
            variables, self._cache, self._features.table, self._seen, chunk, candidates=self._candidates
        )
        return jax.device_get(results)

    # ------------------------------------------------------------------------------------------ decoding

    def _decode(self) -> None:
        rows: list[_Active | None] = []
        steps = np.zeros(len(self._slots), np.int32)
        for i, active in enumerate(self._slots):
            if active is not None and not active.target and active.group is None:
                room = active.limit - len(active.tokens)
                if not active.long:
                    room = min(room, self._boundary - active.cached)
                    if room == 0:
                        self._give_back(active)
                        self._begin(active)
                        self._mark(active)
                steps[i] = min(room, self._steps)
            if active is not None and steps[i]:
                self._grow(active, active.cached + int(steps[i]))
                rows.append(active)
            else:
                rows.append(None)
        if not steps.any():
            return
        drawn = self._run_decode({a.adapter for a in rows if a is not None}, rows, steps)
        for active, tokens, log_probabilities, n, finite in zip(rows, *drawn, strict=True):
            if active is not None:
                active.cached += int(n)
                self._append(active, tokens[:n], log_probabilities[:n])
                if not finite:
                    self._fail(active)

    def _run_decode(self, adapters: set[int], rows: Sequence[_Active | None], steps: np.ndarray) -> SampledTokens:
        count = len(rows)
        slots = DecodeInputs(
            last=_column(rows, count, lambda a: a.tokens[-1]),
            lengths=_column(rows, count, lambda a: a.cached),
            steps=steps,
            tables=self._tables(rows, count),
            adapters=_column(rows, count, lambda a: a.adapter),
            long=_column(rows, count, lambda a: a.long).astype(bool),
            drawn=_column(rows, count, lambda a: len(a.tokens)),
            settings=_settings(rows, count),
        )
        self._cache, self._seen, drawn = self._programs.decode(
            self._variables_for(adapters), self._cache, self._seen, slots, width=self.config.steps
        )
        return jax.device_get(drawn)

    def _append(self, active: _Active, tokens: Any, log_probabilities: Any) -> None:
        """Take new tokens, up to what ends the answer."""
        pieces = []
        for token, log_probability in zip(tokens.tolist(), log_probabilities.tolist(), strict=True):
            active.tokens.append(token)
            active.log_probabilities.append(log_probability)
            if token in self._stops or token in active.request.stop_tokens:
                return self._finish(active, "stop", pieces)
            pieces.append(active.text.add(token))
            if active.text.stopped:
                return self._finish(active, "stop", pieces)
            if len(active.tokens) == active.limit:
                return self._finish(active, "length", pieces)
        if text := "".join(pieces):
            self._updates.append(Update(active.id, text))

    def _fail(self, active: _Active) -> None:
        """End a row whose logits are NaN or infinite with an error; it keeps the tokens before."""
        drawn = len(active.tokens) if active.group is None else active.group.search.drawn
        error = (
            f"the model's logits are not finite (NaN or infinity) at token {active.prompt_tokens + drawn + 1} of the "
            "sequence; the weights or the media hold such values, or overflow: check both, or load with float32"
        )
        self._finish(active, "error", error=error)

    def _finish(
        self, active: _Active, reason: FinishReason, pieces: Sequence[str] = (), error: str | None = None
    ) -> None:
        if active.group is not None:
            return self._finish_beams(active, active.group, reason, error)
        rest = active.text.finish()
        completion = Completion.of(
            self._processor.tokenizer, active.text.text, active.tokens, reason, active.prompt_tokens,
            log_probabilities=tuple(active.log_probabilities), error=error,
        )  # fmt: skip
        self._updates.append(Update(active.id, "".join(pieces) + rest, completion))
        self._give_back(active)
        self._slots[active.slot] = None

    # ------------------------------------------------------------------------------------------ beams

    def _group(self, request: Request, limit: int) -> Group | None:
        if request.beams == 1:
            return None
        if request.beams > self.config.beams:
            raise InputError(
                f"the request asks for {request.beams} beams, but the engine allows {self.config.beams}; ask for "
                f"fewer, or allow more with {self.config.named('beams')}"
            )
        stops = frozenset({*self._stops, *request.stop_tokens})
        most = self._candidates - self.config.beams
        if len(stops) > most:
            raise InputError(
                f"stop_tokens and the model's own are {len(stops)} together, but beams may end by {most} at most; "
                "give fewer stop_tokens"
            )
        return Group(Search(int(request.beams), limit, float(request.length_penalty), stops))

    def _extend(self) -> None:
        """All beams some steps; after each the host chooses among what could follow."""
        for _ in range(self.config.steps):
            ready: list[tuple[_Active, Group]] = []
            for active in self._slots:
                if active is None or active.group is None or active.target:
                    continue
                if not active.long and active.cached == self._boundary:
                    self._give_back(active)
                    self._begin(active)
                else:
                    ready.append((active, active.group))
            if not ready:
                return
            for active, group in ready:
                self._grow_beams(active, group)
            count = sum(len(group.search.beams) for _, group in ready)
            size = next(size for size in self._extend_sizes() if size >= count)
            found = self._run_extend({active.adapter for active, _ in ready}, ready, size)
            first = 0
            for active, group in ready:
                stop = first + len(group.search.beams)
                active.cached += 1
                group.copies = []
                if not found.finite[first:stop].all():
                    self._fail(active)
                elif active.cached == active.prompt_tokens + group.search.drawn:
                    self._select(active, group, TopLogprobs(*(x[first:stop] for x in found)))
                first = stop

    def _extend_sizes(self) -> list[int]:
        """Beams that are extended at once: those of one request, or of as many as there are slots."""
        beams = self.config.beams
        return sorted({beams, beams * self.config.slots}) if beams > 1 else []

    def _run_extend(self, adapters: set[int], groups: Sequence[tuple[_Active, Group]], size: int) -> TopLogprobs:
        rows = [(a, beam, pages) for a, g in groups for beam, pages in zip(g.search.beams, g.pages, strict=True)]
        copies = [copy for _, group in groups for copy in group.copies]
        beams = BeamInputs(
            last=_padded([beam.tokens[a.cached - a.prompt_tokens] for a, beam, _ in rows], size),
            lengths=_padded([a.cached + 1 for a, _, _ in rows], size),
            tables=np.zeros((size, self._table_size), np.int32),
            adapters=_padded([a.adapter for a, _, _ in rows], size),
            long=_padded([a.long for a, _, _ in rows], size).astype(bool),
            sources=_padded([source for source, _ in copies], size),
            targets=_padded([target for _, target in copies], size),
            copies=np.int32(len(copies)),
        )
        for i, (active, _, pages) in enumerate(rows):
            table = active.pages + pages
            beams.tables[i, : len(table)] = table
        self._cache, found = self._programs.extend(
            self._variables_for(adapters), self._cache, beams, candidates=self._candidates
        )
        return jax.device_get(found)

    def _start_beams(self, active: _Active, group: Group, candidates: TopLogprobs) -> None:
        """Once the prompt is in the cache. Beams that were there before have their tokens put there one by one."""
        whole = active.prompt_tokens // self.config.page_size
        group.pages, active.pages = [active.pages[whole:]], active.pages[:whole]
        if group.search.drawn:
            self._branch(active, group, [0] * len(group.search.beams))
        else:
            self._select(active, group, candidates)

    def _select(self, active: _Active, group: Group, candidates: TopLogprobs) -> None:
        group.search, parents = advance(group.search, candidates.tokens, candidates.log_probabilities)
        if group.search.over:
            self._finish_beams(active, group)
        else:
            self._branch(active, group, parents)

    def _branch(self, active: _Active, group: Group, parents: Sequence[int]) -> None:
        """Each beam gets the pages of the one that it continues: all but one of them a copy of the page in writing."""
        group.reorder(self._pool, parents)
        promised = active.needed - len(active.pages) - group.own  # what no beam continues may be needed again
        self._pool.reserve(promised - active.promised)
        active.promised = promised
        if active.cached % self.config.page_size:
            group.part(self._pool, lambda: self._take(active))

    def _grow_beams(self, active: _Active, group: Group) -> None:
        """A page for each beam's next token."""
        for pages in group.pages:
            if (len(active.pages) + len(pages)) * self.config.page_size == active.cached:
                pages.append(self._take(active))

    def _finish_beams(
        self, active: _Active, group: Group, reason: FinishReason | None = None, error: str | None = None
    ) -> None:
        completion = group.completion(self._processor.tokenizer, active.prompt_tokens, reason)
        completion = replace(completion, error=error)
        self._updates.append(Update(active.id, completion.text, completion))
        self._give_back(active)
        self._slots[active.slot] = None

    # ------------------------------------------------------------------------------------------ small things

    def _take(self, active: _Active) -> int:
        active.promised -= 1
        return self._pool.allocate()

    def _grow(self, active: _Active, tokens: int) -> None:
        """Pages for its first tokens."""
        while len(active.pages) * self.config.page_size < tokens:
            active.pages.append(self._take(active))

    def _tables(self, rows: Sequence[_Active | None], count: int) -> np.ndarray:
        tables = np.zeros((count, self._table_size), np.int32)
        for i, active in enumerate(rows):
            if active is not None:
                tables[i, : len(active.pages)] = active.pages
        return tables

    def _variables_for(self, adapters: set[int]) -> dict[str, Any]:
        """Without the adapters that no row uses, which then cost nothing."""
        return used_collections(self._variables, adapters)


def default_cache_tokens(config: EngineConfig, programs: Programs, context: int) -> int:
    """The size of the cache that the devices have room for, see `EngineConfig`.

    Raises:
        InputError: there is no room for one page.
    """
    stats = [device.memory_stats() for device in programs.devices]
    if not all(found and "bytes_limit" in found for found in stats):
        return _CACHE_TOKENS
    free = min(found["bytes_limit"] - found["bytes_in_use"] for found in stats)
    decoder, itemsize = programs.model.config.decoder, jnp.dtype(programs.model.dtype).itemsize
    features, seen = (
        config.feature_blocks * BLOCK_SIZE * decoder.embed_dim * itemsize,
        config.slots * decoder.vocab_size,
    )
    cached = jnp.dtype(config.cache_dtype or programs.model.dtype)
    head = decoder.head_size * cached.itemsize + (4 if cached == jnp.int8 else 0)  # with its scale
    token = 2 * decoder.num_layers * decoder.num_kv_heads // programs.shares * head
    pages = int(0.75 * (free - features - seen)) // (token * config.page_size) - 1  # the scratch page
    if pages < 1:
        raise InputError(
            f"of a device's memory {free / 2**30:.1f} GiB are free, which is no room for a cache; use more devices "
            "(mesh), cache_dtype int8 or fewer feature_blocks, or say what to try with cache_tokens"
        )
    return config.page_size * min(pages, config.slots * config.beams * math.ceil(context / config.page_size))


def _column(rows: Sequence[_Active | None], count: int, value) -> np.ndarray:
    return _padded([0 if a is None else value(a) for a in rows], count)


def _padded(values: Sequence[int], count: int) -> np.ndarray:
    return np.asarray([*values, *[0] * (count - len(values))], np.int32)


def _settings(rows: Sequence[_Active | None], count: int) -> SamplingRows:
    settings = [Sampling() if a is None else a.sampling for a in rows]
    return SamplingRows.of(settings + [Sampling()] * (count - len(settings)))


def _draws_by_identity(settings: Sampling) -> bool:
    return settings.temperature != 0 and settings.seed is None and settings.stream is None
