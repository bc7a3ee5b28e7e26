"""Requests that wait for a slot while their prompts and media are processed in the background."""

import hashlib
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from phi4mm_jax.engine.encoder_cache import MediaInputs, media_inputs
from phi4mm_jax.engine.grammar import Grammar, GrammarMatcher, is_installed, start_matcher
from phi4mm_jax.engine.request import Request
from phi4mm_jax.engine.sampling import Sampling, seeded_by_request
from phi4mm_jax.engine.user_adapters import AdapterChoice
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.batching import Row
from phi4mm_jax.processing.processor import Processor


@dataclass(eq=False)
class WaitingRequest:
    """A request, its prompt being processed.

    Attributes:
        duplicates: number of equal earlier requests by identity, one counter for a group of requests.
        adapters: that it asks for.
        processed: its prompt and media.
        matcher: state of its grammar before the first token, once it is processed.
        started: when their processing began.
    """

    id: int
    request: Request
    duplicates: Counter[bytes] | None = None
    adapters: AdapterChoice = field(default_factory=AdapterChoice)
    processed: Future[tuple[Row, MediaInputs]] = field(init=False)
    matcher: GrammarMatcher | None = None
    started: float | None = None

    @property
    def depends_on_order(self) -> bool:
        """Return whether its seed depends on the number of equal earlier requests."""
        return self.duplicates is not None and seeded_by_request(self.request.sampling)

    def seconds(self) -> float:
        """Return how long its processing has taken."""
        return 0.0 if self.started is None else time.monotonic() - self.started

    def result(self, max_seconds: int) -> tuple[Row, MediaInputs]:
        """Return its prompt and media.

        Raises:
            InputError: they cannot be used, or are not there yet. Media libraries raise others.
        """
        if not self.processed.done():
            raise InputError(f"its media took longer than {max_seconds} seconds to process; pass smaller ones")
        return self.processed.result()

    def seeded_sampling(self, row: Row, media: MediaInputs) -> Sampling:
        """Return its sampling with a seed by its prompt and the number of equal ones before; call it once."""
        settings = self.request.sampling
        if not seeded_by_request(settings):
            return settings
        content = row.tokens.tobytes() + b"".join(digest for *_, digest in media.spans)
        identity = hashlib.blake2b(content, digest_size=16).digest()
        count = 0
        if self.duplicates is not None:
            count = self.duplicates[identity]
            self.duplicates[identity] += 1
        return settings.for_identity(b"%s %d" % (identity, count))


class RequestQueue:
    """Waiting requests, FCFS, except that requests with slow media are overtaken.

    Attributes:
        patience: seconds to wait for the first request before it is overtaken.
        workers: threads that process prompts and media.
    """

    def __init__(self, processor: Processor, workers: int, media_seconds: int):
        self.patience = 1.0
        self._processor, self._media_seconds = processor, media_seconds
        self.workers = ThreadPoolExecutor(workers, thread_name_prefix="phi4mm-process")
        self._waiting: deque[WaitingRequest] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(
        self, request_id: int, request: Request, row: Row | None = None, duplicates: Counter[bytes] | None = None,
        adapters: AdapterChoice | None = None,
    ) -> None:  # fmt: skip
        """Put a request at the end, and have its prompt processed, unless its `row` is given."""
        waiting = WaitingRequest(request_id, request, duplicates, adapters or AdapterChoice(request.adapter))

        def process() -> tuple[Row, MediaInputs]:
            waiting.started = time.monotonic()
            asked = (
                request.prompt, request.images, request.audios, request.max_crops, request.continue_final_message,
                waiting.adapters.builtin,
            )  # fmt: skip
            if request.grammar is not None:
                waiting.matcher = self._start_matcher(request.grammar, request.stop_tokens)
            made = self._processor.row(*asked) if row is None else row
            return made, media_inputs(made, self._processor.config)

        waiting.processed = self.workers.submit(process)
        self._waiting.append(waiting)

    def _start_matcher(self, grammar: Grammar, stop_tokens: Sequence[int] = ()) -> GrammarMatcher:
        tokenizer, config = self._processor.tokenizer, self._processor.config
        return start_matcher(grammar, tokenizer, config.decoder.vocab_size, config.stop_token_ids, stop_tokens)

    def warm_up(self) -> None:
        """Prepare the tokenizer for grammars, which takes seconds, where they can be used."""
        if is_installed():
            self._start_matcher(Grammar.json_object())

    @property
    def adapters(self) -> list[AdapterChoice]:
        """Return what the waiting requests ask for."""
        return [waiting.adapters for waiting in self._waiting]

    def cancel(self, request_id: int) -> bool:
        """Remove a request; returns whether it was there."""
        for waiting in self._waiting:
            if waiting.id == request_id:
                waiting.processed.cancel()
                self.remove(waiting)
                return True
        return False

    def remove(self, waiting: WaitingRequest) -> None:
        self._waiting.remove(waiting)

    def next_ready(self, block: bool) -> WaitingRequest | None:
        """Return the first request whose prompt is processed, or timed out; it stays in the queue.

        Requests keep their order as long as their media take about a second; slower ones are overtaken.

        Args:
            block: wait for the first one, as there is nothing else to do.
        """
        if not self._waiting:
            return None
        head = self._waiting[0]
        if block:
            wait([head.processed], timeout=self.patience)
        if not head.processed.done() and head.seconds() < self.patience:
            return None
        overtakes = False  # one that `depends_on_order`: others like it must not pass it
        for waiting in self._waiting:
            if waiting.processed.done() and not (waiting.depends_on_order and overtakes):
                return waiting
            if waiting.seconds() > self._media_seconds:
                return waiting
            overtakes |= waiting.depends_on_order
        return None
