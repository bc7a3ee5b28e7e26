"""The batch engine: continuous batching, with fixed slots over a paged KV cache.

Each round admits waiting requests into free slots, prefills a chunk of some sequences, and decodes all others several
tokens in one compiled program (multi-step decoding). Only then does the host look at the tokens. The host decides, with
numpy; the device computes, with a handful of programs whose shapes never change.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from phi4mm_jax.engine.admission import Admission
from phi4mm_jax.engine.config import EngineConfig
from phi4mm_jax.engine.model_runner import ModelRunner, default_cache_tokens
from phi4mm_jax.engine.output_processor import OutputProcessor, Update
from phi4mm_jax.engine.request import Completion, Request
from phi4mm_jax.engine.request_queue import RequestQueue, WaitingRequest
from phi4mm_jax.engine.scheduler import Scheduler
from phi4mm_jax.engine.sequence import Sequence
from phi4mm_jax.engine.steps import Programs, TopLogprobs
from phi4mm_jax.engine.user_adapters import UserAdapter
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.batching import Row
from phi4mm_jax.processing.processor import Processor


class Engine:
    """Answers requests, many at a time. Not thread-safe; see `AsyncEngine`.

    Life of a request, from prompt to text:

    1. `submit` puts it into the `RequestQueue`, whose threads run `Processor.row` (chat template, tokens, media) and
       cut its media into encoder inputs (`encoder_cache.media_inputs`).
    2. `_admit`: once that is done and a slot is free, `Admission.sequence` checks it and makes it a `Sequence`, for
       whose worst case `Scheduler.admit` reserves pages.
    3. `_prefill`: `Scheduler.next_prefill` looks up its prefix in the cache, picks the next chunk and allocates pages;
       `ModelRunner.prefill` encodes media that are not in the `EncoderCache`, builds the arrays and calls
       `Programs.prefill` (`steps.py`). The last chunk samples the first token.
    4. `_decode`: `Scheduler.next_decode` and `ModelRunner.decode` take all slots up to `EngineConfig.steps` tokens
       further; `_extend_beams` does so for beam search.
    5. `OutputProcessor` detokenizes, looks for stop tokens, stop strings and limits, collects an `Update` for the
       caller and in the end has the `Scheduler` free slot and pages.

    Attributes:
        queue: requests that wait for a slot.
        scheduler: sequences in the slots, and the pages of the KV cache.
        runner: the state on the device, and the calls of the compiled steps.

    Raises:
        InputError: sizes that do not fit, or a mesh of several hosts.
    """

    def __init__(self, programs: Programs, variables: Mapping[str, Any], processor: Processor, config: EngineConfig):
        if not jax.tree.leaves(variables)[0].sharding.is_fully_addressable:  # each host's would run other steps
            raise InputError(
                "the model's mesh is of several hosts, and an engine is of one; give a mesh of jax.local_devices(), "
                "and each host its prompts, or use infer.ray"
            )
        config = replace(config, page_size=config.page_size * programs.context)  # each device has its part of a page
        if config.cache_tokens is None:
            tokens = default_cache_tokens(config, programs, processor.context)
            config = replace(config, cache_tokens=tokens)
        self.config = config
        stops = programs.model.config.stop_token_ids
        self.runner = ModelRunner(programs, variables, config, processor.context)
        encoder_cache = self.runner.encoder_cache
        self.scheduler = Scheduler(config, encoder_cache, processor.config.decoder.rope.original_length)
        self.queue = RequestQueue(processor, config.workers, config.media_seconds)
        self._admission = Admission(config, processor, variables, encoder_cache, stops)
        self._outputs = OutputProcessor(processor.tokenizer, stops, self.scheduler)
        self._next_id = 0
        self._broken = False  # a round was interrupted

    # ------------------------------------------------------------------------------------------ requests

    def submit(self, request: Request, row: Row | None = None, *, earlier: Counter[bytes] | None = None) -> int:
        """Queue a request; returns the id that its updates carry. Its prompt is processed in the background.

        Without a seed a request samples by its prompt and media: the same again whenever it is submitted.

        Args:
            row: the prompt and its media, where they are processed already.
            earlier: one counter for a group of requests, of which equal ones then sample independently.
        """
        request_id, self._next_id = self._next_id, self._next_id + 1
        try:
            adapters = self.runner.user_adapters.choose(request.adapter)
        except InputError as error:
            self._outputs.reject(request_id, "error", error)
        else:
            self.queue.add(request_id, request, row, earlier, adapters)
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request now; its slot and pages are free at once. The tokens generated so far are its answer."""
        if self.queue.cancel(request_id):
            return self._outputs.reject(request_id, "cancelled")
        for sequence in self.scheduler.resident:
            if sequence.id == request_id:
                self._outputs.finish(sequence, "cancelled")

    def check_adapter(self, adapter: str | None) -> None:
        """Raise InputError for an adapter that no request may ask for."""
        self._admission.check_adapter(self.runner.user_adapters.choose(adapter).builtin)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the users' adapters that are loaded."""
        return tuple(self.runner.user_adapters.loaded)

    def read_adapter(self, name: str, folder: str | Path) -> UserAdapter:
        """Read a user's adapter for `load_adapter`, in any thread, while the engine runs.

        Raises:
            InputError, CheckpointError, ConfigError: see `read_user_adapter`.
        """
        return self.runner.user_adapters.read(name, folder)

    def load_adapter(self, name: str, folder: str | Path | UserAdapter) -> None:
        """Load a user's adapter, which requests then ask for by its name. Nothing is compiled.

        Args:
            folder: as PEFT or `train.export --adapters-only` has written it, or what `read_adapter` has read.

        Raises:
            InputError: the name cannot be used or is loaded, the rank is too large, or no place is free.
            CheckpointError, ConfigError: the folder cannot be used.
        """
        adapter = folder if isinstance(folder, UserAdapter) else self.read_adapter(name, folder)
        waiting, running = self.queue.adapters, [sequence.adapters for sequence in self.scheduler.resident]
        self.runner.user_adapters.add(adapter, {c.user for c in (*waiting, *running) if c.user is not None})

    def unload_adapter(self, name: str) -> None:
        """Unload a user's adapter. Requests that have it already are answered with it; its place is free after them.

        Raises:
            InputError: there is no such adapter.
        """
        self.runner.user_adapters.remove(name)

    @property
    def idle(self) -> bool:
        return not self.queue and not self._outputs and not self.scheduler.resident

    def step(self) -> list[Update]:
        """Run one round; return its updates, by slot. A request that cannot be served ends with an error.

        A request that runs alone has an update after every token, others after `EngineConfig.steps`.
        """
        self._round(watched=True)
        return self._outputs.take()

    def updates_of(self, ids: Collection[int], watched: bool = False) -> list[Update]:
        """Take the updates of these requests, if need be after a round. Those of others stay.

        Args:
            watched: return after each token where possible (streaming).
        """
        if not (updates := self._outputs.take(ids)):
            self._round(watched)
            updates = self._outputs.take(ids)
        return updates

    def run(self, requests: Iterable[Request], ahead: int | None = None) -> Iterator[tuple[int, Completion]]:
        """Answer requests as they come, in the order in which they end.

        Args:
            requests: read as slots become free, and some more whose media are processed meanwhile. Equal ones without
                a seed sample independently.
            ahead: how many more; by default as many as there are slots.

        Yields:
            The request's index in `requests`, and its answer.
        """
        ahead = self.config.slots if ahead is None else ahead
        incoming = enumerate(requests)
        places: dict[int, int] = {}
        earlier: Counter[bytes] = Counter()
        more = True
        try:
            while more or places:
                while more and len(self.queue) < ahead + self.config.slots - len(self.scheduler.resident):
                    place, request = next(incoming, (None, None))
                    if request is None or place is None:
                        more = False
                    else:
                        places[self.submit(request, earlier=earlier)] = place
                for update in self.updates_of(places):
                    if update.completion is not None:
                        yield places.pop(update.id), update.completion
        finally:
            self._discard(list(places))

    def stream(self, request: Request) -> Iterator[str]:
        """Yield the answer in pieces of whole characters. Closing the iterator cancels the request.

        Raises:
            InputError: the request cannot be served.
        """
        request_id, done = self.submit(request), False
        try:
            while not done:
                for update in self.updates_of([request_id], watched=True):
                    done = update.completion is not None
                    if update.completion is not None and update.completion.error:
                        raise InputError(update.completion.error)
                    if update.text:
                        yield update.text
        finally:
            if not done:
                self._discard([request_id])

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile every program for every shape: no request will have to wait for a compilation.

        May be called while requests are being answered.

        Args:
            progress: called with the number of programs compiled, and of all.
        """
        self.queue.warm_up()
        self.runner.warm_up(progress)

    def _discard(self, ids: Collection[int]) -> None:
        """Cancel requests whose answers nobody waits for."""
        for request_id in ids:
            self.cancel(request_id)
        self._outputs.take(ids)

    # ------------------------------------------------------------------------------------------ a round

    def _round(self, watched: bool = False) -> None:
        if self._broken:
            raise InputError("this engine was stopped in the middle of a round, by Ctrl-C or an error; make another")
        self._broken = True
        self._admit()
        alone = not self.queue and len(self.scheduler.resident) == 1
        steps = 1 if watched and alone else self.config.steps
        self._prefill()
        self._decode(steps)
        self._extend_beams()
        self._broken = False

    def _admit(self) -> None:
        """Fill free slots, FCFS, so that large requests do not starve."""
        if not self.scheduler.readmit_preempted():
            return
        while (slot := self.scheduler.free_slot) is not None:
            waiting = self.queue.next_ready(block=not self.scheduler.resident)
            if waiting is None or not self._admit_one(waiting, slot):
                return  # resident sequences are computed meanwhile

    def _admit_one(self, waiting: WaitingRequest, slot: int) -> bool:
        """Return False for a request that has to wait for pages."""
        try:
            row, media = waiting.result(self.config.media_seconds)
            sequence = self._admission.sequence(waiting.id, waiting.request, row, media, slot, waiting.adapters)
        except Exception as error:  # whatever a library raises for a bad file, other requests are answered
            self.queue.remove(waiting)
            self._outputs.reject(waiting.id, "error", error)
            return True
        if not self.scheduler.admit(sequence):
            return False
        self.queue.remove(waiting)
        sequence.sampling, sequence.matcher = waiting.seeded_sampling(row, media), waiting.matcher
        self.runner.set_penalty_mask(sequence)
        return True

    def _prefill(self) -> None:
        """Prefill one chunk's worth of tokens at most, so that decoding sequences are not delayed long."""
        budget = self.config.chunk
        while budget > 0 and (batch := self.scheduler.next_prefill()):
            budget -= batch.width * len(batch.sequences)
            sampled, top = self.runner.prefill(batch)
            for i, (sequence, stop) in enumerate(zip(batch.sequences, batch.stops, strict=True)):
                if not sampled.finite[i]:
                    self._outputs.fail(sequence)
                elif self.scheduler.complete_chunk(sequence, stop):
                    if (cause := _dead_end(sequence)) is not None:
                        self._outputs.fail_grammar(sequence, cause)
                        continue
                    if (beams := sequence.beams) is None:
                        self._outputs.append(sequence, sampled.tokens[i], sampled.log_probabilities[i], _row(top, i))
                        continue
                    self.scheduler.start_beams(sequence, beams)
                    if beams.search.num_output_tokens:  # after a preemption: their tokens are recomputed one by one
                        self.scheduler.fork(sequence, beams, [0] * len(beams.search.beams))
                    else:
                        assert top is not None
                        self._outputs.extend_beams(sequence, beams, _rows(top, i, i + 1))

    def _decode(self, max_steps: int) -> None:
        """Decode all other sequences up to `max_steps` tokens."""
        batch = self.scheduler.next_decode(max_steps)
        for sequence in batch.preempted:
            self.runner.set_penalty_mask(sequence)
        if not batch.num_decode_steps.any():
            return
        sampled = self.runner.decode(batch)
        top_tokens, top_values = sampled.top_tokens, sampled.top_log_probabilities
        for i, sequence in enumerate(batch.sequences):
            if sequence is not None and (cause := _dead_end(sequence)) is not None:
                self._outputs.fail_grammar(sequence, cause)
            elif sequence is not None:
                n = int(sampled.counts[i])
                sequence.num_computed_tokens += n
                top = None if top_tokens is None or top_values is None else (top_tokens[i], top_values[i])
                self._outputs.append(sequence, sampled.tokens[i, :n], sampled.log_probabilities[i, :n], top)
                if not sampled.finite[i]:
                    self._outputs.fail(sequence)

    def _extend_beams(self) -> None:
        """Extend all beams by several tokens; after each the host selects the next beams."""
        for _ in range(self.config.steps):
            groups = self.scheduler.next_beams()
            if not groups:
                return
            top = self.runner.beam_step(groups)
            start = 0
            for sequence, beams in groups:
                stop = start + len(beams.search.beams)
                sequence.num_computed_tokens += 1
                beams.copies = []
                if not top.finite[start:stop].all():
                    self._outputs.fail(sequence)
                elif sequence.num_computed_tokens == sequence.num_prompt_tokens + beams.search.num_output_tokens:
                    self._outputs.extend_beams(sequence, beams, _rows(top, start, stop))
                start = stop


def _dead_end(sequence: Sequence) -> str | None:
    """Why a sequence's grammar allows no token, where it allows none."""
    return None if sequence.matcher is None else sequence.matcher.error


def _row(top: TopLogprobs | None, i: int) -> tuple[Any, Any] | None:
    """The likeliest tokens in place of the one that a sequence has drawn, as `OutputProcessor.append` takes them."""
    return None if top is None else (top.tokens[i : i + 1], top.log_probabilities[i : i + 1])


def _rows(top: TopLogprobs, start: int, stop: int) -> TopLogprobs:
    return TopLogprobs(*(x[start:stop] for x in top))
