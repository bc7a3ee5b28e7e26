"""Engine core: the parts of an engine, and a round of theirs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from phi4mm_jax.engine.admission import Admission
from phi4mm_jax.engine.config import EngineConfig
from phi4mm_jax.engine.model_runner import ModelRunner
from phi4mm_jax.engine.output_processor import OutputProcessor
from phi4mm_jax.engine.request_queue import RequestQueue, WaitingRequest
from phi4mm_jax.engine.scheduler import DecodeBatch, PrefillBatch, Scheduler
from phi4mm_jax.engine.sequence import Sequence, SequenceStatus
from phi4mm_jax.engine.step_io import SampledTokens, TopLogprobs
from phi4mm_jax.engine.steps import Programs
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.processor import Processor


class DispatchedChunks(NamedTuple):
    """Chunks of a prefill batch from `starts`, and its results on the device."""

    batch: PrefillBatch
    starts: list[int]
    sampled: SampledTokens
    top: TopLogprobs | None


class DispatchedDecode(NamedTuple):
    """A round of decoding, and its results on the device."""

    batch: DecodeBatch
    sampled: SampledTokens

    @property
    def unfinished(self) -> list[Sequence]:
        """Sequences to whom the results matter."""
        return [s for s in self.batch.sequences if s is not None and s.status is not SequenceStatus.FINISHED]


class EngineCore:
    """Takes the requests in the queue through rounds: admission, a chunk of prefill, some steps of decoding.

    A round's steps are dispatched before the tokens of the last round's decoding are read, so that the device never
    waits for the host. Sequences that turn out to have ended meanwhile idle in a round; its results for them are
    thrown away.

    Attributes:
        queue: requests that wait for a slot.
        scheduler: sequences in the slots, and the pages of the KV cache.
        runner: the state on the device, and the calls of the compiled steps.
        outputs: updates that nobody has taken yet.
    """

    def __init__(self, programs: Programs, variables: Mapping[str, Any], processor: Processor, config: EngineConfig):
        stops = programs.model.config.stop_token_ids
        self._config = config
        self.runner = ModelRunner(programs, variables, config, processor.context)
        encoder_cache = self.runner.encoder_cache
        self.scheduler = Scheduler(config, encoder_cache, processor.config.decoder.rope.original_length)
        self.queue = RequestQueue(processor, config.workers, config.media_seconds)
        self.outputs = OutputProcessor(processor.tokenizer, stops, self.scheduler)
        self._admission = Admission(config, processor, variables, encoder_cache, stops)
        self._decoding: DispatchedDecode | None = None  # dispatched in the last round, and not read
        self._broken = False  # a round was interrupted

    @property
    def idle(self) -> bool:
        return not self.queue and not self.outputs and not self._unfinished

    @property
    def _unfinished(self) -> list[Sequence]:
        """Sequences in the slots, and those that are retired while their last tokens are decoded."""
        retired = [] if self._decoding is None else self._decoding.unfinished
        return list(dict.fromkeys([*self.scheduler.resident, *retired]))

    def check_adapter(self, adapter: str | None) -> None:
        """Raise InputError for an adapter that no request may ask for."""
        self._admission.check_adapter(self.runner.user_adapters.choose(adapter).builtin)

    def cancel(self, request_id: int) -> None:
        """End a request now; its slot and pages are free at once."""
        if self.queue.cancel(request_id):
            return self.outputs.reject(request_id, "cancelled")
        for sequence in self._unfinished:
            if sequence.id == request_id:
                self.outputs.finish(sequence, "cancelled")
        self._drop_finished()

    def _drop_finished(self) -> None:
        """Let go of results that matter to nobody."""
        if self._decoding is not None and not self._decoding.unfinished:
            self._decoding = None

    def round(self, watched: bool = False) -> None:
        """Run a round.

        Args:
            watched: look at the tokens of a request that runs alone after each of them.

        Raises:
            InputError: an earlier round was interrupted.
        """
        if self._broken:
            raise InputError("this engine was stopped in the middle of a round, by Ctrl-C or an error; make another")
        self._broken = True
        self.scheduler.retire_ending()
        self._admit()
        alone = not self.queue and len(self._unfinished) == 1
        chunks = self._dispatch_prefill()
        before, self._decoding = self._decoding, None
        if in_turn := self._decodes_in_turn:
            self._read(before, chunks)
            before, chunks = None, []
        self._decoding = self._dispatch_decode(1 if watched and alone else self._config.steps)
        self._read(before, chunks)
        if in_turn:
            decoding, self._decoding = self._decoding, None
            self._read(decoding, [])
        self._extend_beams()
        self._drop_finished()
        self._broken = False

    @property
    def _decodes_in_turn(self) -> bool:
        """Return whether a round's tokens are read before the next round is dispatched.

        For a grammar; and with drafts, of which answers take few rounds, as long as requests wait for a slot: an end
        would be seen a round late, and the slot would idle beside others. One that decodes alone ends the round, and
        what waits beside a free slot waits for its media or for pages.
        """
        waited_for = bool(self.queue) and len(self._unfinished) > 1 and self.scheduler.free_slot is None
        return self.scheduler.decodes_by_grammar or (waited_for and self.scheduler.decodes_with_drafts)

    def _admit(self) -> None:
        """Fill free slots, FCFS, so that large requests do not starve."""
        if not self.scheduler.readmit_preempted():
            return
        while (slot := self.scheduler.free_slot) is not None:
            waiting = self.queue.next_ready(block=not self._unfinished)
            if waiting is None or not self._admit_one(waiting, slot):
                return  # resident sequences are computed meanwhile

    def _admit_one(self, waiting: WaitingRequest, slot: int) -> bool:
        """Return False for a request that has to wait for pages."""
        try:
            row, media = waiting.result(self._config.media_seconds)
            sequence = self._admission.sequence(waiting.id, waiting.request, row, media, slot, waiting.adapters)
        except Exception as error:  # whatever a library raises for a bad file, other requests are answered
            self.queue.remove(waiting)
            self.outputs.reject(waiting.id, "error", error)
            error.__traceback__ = None  # it would keep the round's arrays until the garbage collector comes
            return True
        if not self.scheduler.admit(sequence):
            return False
        self.queue.remove(waiting)
        sequence.sampling, sequence.matcher = waiting.seeded_sampling(row, media), waiting.matcher
        if sequence.beams is not None:
            sequence.beams.start_grammar(waiting.matcher)
        self.runner.set_penalty_mask(sequence)
        return True

    def _dispatch_prefill(self) -> list[DispatchedChunks]:
        """Dispatch one chunk's worth of tokens at most, so that decoding sequences are not delayed long."""
        budget, dispatched = self._config.chunk, []
        while budget > 0 and (batch := self.scheduler.next_prefill()):
            budget -= batch.width * len(batch.sequences)
            starts = [sequence.num_computed_tokens for sequence in batch.sequences]
            dispatched.append(DispatchedChunks(batch, starts, *self.runner.prefill(batch)))
            self.scheduler.advance_prefill(batch)
        return dispatched

    def _dispatch_decode(self, max_steps: int) -> DispatchedDecode | None:
        """Dispatch up to `max_steps` steps of all other sequences."""
        batch = self.scheduler.next_decode(max_steps)
        for sequence in batch.preempted:
            self.runner.set_penalty_mask(sequence)
        if not any(batch.sequences):
            return None
        dispatched = DispatchedDecode(batch, self.runner.decode(batch))
        batch.advance()
        return dispatched

    def _read(self, decoding: DispatchedDecode | None, chunks: list[DispatchedChunks]) -> None:
        """Wait for the results of dispatched steps, and give them to their sequences."""
        if decoding is not None:
            self._read_decode(decoding.batch, jax.device_get(decoding.sampled))
        for batch, starts, *results in chunks:
            self._read_chunks(batch, starts, *jax.device_get(results))

    def _read_chunks(
        self, batch: PrefillBatch, starts: list[int], sampled: SampledTokens, top: TopLogprobs | None
    ) -> None:
        for i, (sequence, start, stop) in enumerate(zip(batch.sequences, starts, batch.stops, strict=True)):
            last = self.scheduler.complete_chunk(sequence, start, stop, bool(sampled.finite[i]))
            if not sampled.finite[i]:
                self.outputs.fail(sequence)
            elif not last or sequence.status is SequenceStatus.FINISHED:
                continue
            elif (cause := _dead_end(sequence)) is not None:
                self.outputs.fail_grammar(sequence, cause)
            elif (beams := sequence.beams) is None:
                sequence.num_pending_tokens -= 1
                self.outputs.append(sequence, sampled.tokens[i], sampled.log_probabilities[i], _row(top, i))
            else:
                self.scheduler.start_beams(sequence, beams)
                if beams.search.num_output_tokens:  # after a preemption: their tokens are recomputed one by one
                    self.scheduler.fork(sequence, beams, [0] * len(beams.search.beams))
                else:
                    assert top is not None
                    self.outputs.extend_beams(sequence, beams, _rows(top, i, i + 1))

    def _read_decode(self, batch: DecodeBatch, sampled: SampledTokens) -> None:
        top_tokens, top_values = sampled.top_tokens, sampled.top_log_probabilities
        self.runner.count_drafts(batch, sampled)
        later = None if self._decoding is None else self._decoding.batch
        for i, sequence in enumerate(batch.sequences):
            if sequence is None or sequence.status is SequenceStatus.FINISHED:
                continue
            if (cause := _dead_end(sequence)) is not None:
                self.outputs.fail_grammar(sequence, cause)
                continue
            n = int(sampled.counts[i])
            batch.complete(i, n, later)
            top = None if top_tokens is None or top_values is None else (top_tokens[i], top_values[i])
            self.outputs.append(sequence, sampled.tokens[i, :n], sampled.log_probabilities[i, :n], top)
            if not sampled.finite[i]:
                self.outputs.fail(sequence)

    def _extend_beams(self) -> None:
        """Extend all beams by several tokens; after each the host selects the next beams."""
        for _ in range(self._config.steps):
            groups = self.scheduler.next_beams()
            if not groups:
                return
            top = jax.device_get(self.runner.beam_step(groups))
            start = 0
            for sequence, beams in groups:
                stop = start + len(beams.search.beams)
                sequence.num_computed_tokens += 1
                beams.copies = []
                if not top.finite[start:stop].all():
                    self.outputs.fail(sequence)
                elif sequence.num_computed_tokens == sequence.num_prompt_tokens + beams.search.num_output_tokens:
                    self.outputs.extend_beams(sequence, beams, _rows(top, start, stop))
                start = stop


def _dead_end(sequence: Sequence) -> str | None:
    """Return why a sequence's grammar allows no token, where it allows none."""
    return None if sequence.matcher is None else sequence.matcher.error


def _row(top: TopLogprobs | None, i: int) -> tuple[Any, Any] | None:
    """Return the likeliest tokens in place of the one that was sampled, as `OutputProcessor.append` takes them."""
    return None if top is None else (top.tokens[i : i + 1], top.log_probabilities[i : i + 1])


def _rows(top: TopLogprobs, start: int, stop: int) -> TopLogprobs:
    return TopLogprobs(*(x[start:stop] for x in top))
