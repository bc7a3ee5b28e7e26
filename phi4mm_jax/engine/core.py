"""Engine core: the parts of an engine, and a round of theirs."""

from collections.abc import Mapping
from typing import Any

from phi4mm_jax.engine.admission import Admission
from phi4mm_jax.engine.config import EngineConfig
from phi4mm_jax.engine.model_runner import ModelRunner
from phi4mm_jax.engine.output_processor import OutputProcessor
from phi4mm_jax.engine.request_queue import RequestQueue, WaitingRequest
from phi4mm_jax.engine.scheduler import Scheduler
from phi4mm_jax.engine.sequence import Sequence
from phi4mm_jax.engine.steps import Programs, TopLogprobs
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.processor import Processor


class EngineCore:
    """Takes the requests in the queue through rounds: admission, a chunk of prefill, some steps of decoding.

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
        self._broken = False  # a round was interrupted

    @property
    def idle(self) -> bool:
        return not self.queue and not self.outputs and not self.scheduler.resident

    def check_adapter(self, adapter: str | None) -> None:
        """Raise InputError for an adapter that no request may ask for."""
        self._admission.check_adapter(self.runner.user_adapters.choose(adapter).builtin)

    def cancel(self, request_id: int) -> None:
        """End a request now; its slot and pages are free at once."""
        if self.queue.cancel(request_id):
            return self.outputs.reject(request_id, "cancelled")
        for sequence in self.scheduler.resident:
            if sequence.id == request_id:
                self.outputs.finish(sequence, "cancelled")

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
        self._admit()
        alone = not self.queue and len(self.scheduler.resident) == 1
        steps = 1 if watched and alone else self._config.steps
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
            row, media = waiting.result(self._config.media_seconds)
            sequence = self._admission.sequence(waiting.id, waiting.request, row, media, slot, waiting.adapters)
        except Exception as error:  # whatever a library raises for a bad file, other requests are answered
            self.queue.remove(waiting)
            self.outputs.reject(waiting.id, "error", error)
            return True
        if not self.scheduler.admit(sequence):
            return False
        self.queue.remove(waiting)
        sequence.sampling, sequence.matcher = waiting.seeded_sampling(row, media), waiting.matcher
        self.runner.set_penalty_mask(sequence)
        return True

    def _prefill(self) -> None:
        """Prefill one chunk's worth of tokens at most, so that decoding sequences are not delayed long."""
        budget = self._config.chunk
        while budget > 0 and (batch := self.scheduler.next_prefill()):
            budget -= batch.width * len(batch.sequences)
            sampled, top = self.runner.prefill(batch)
            for i, (sequence, stop) in enumerate(zip(batch.sequences, batch.stops, strict=True)):
                if not sampled.finite[i]:
                    self.outputs.fail(sequence)
                elif self.scheduler.complete_chunk(sequence, stop):
                    if (cause := _dead_end(sequence)) is not None:
                        self.outputs.fail_grammar(sequence, cause)
                        continue
                    if (beams := sequence.beams) is None:
                        self.outputs.append(sequence, sampled.tokens[i], sampled.log_probabilities[i], _row(top, i))
                        continue
                    self.scheduler.start_beams(sequence, beams)
                    if beams.search.num_output_tokens:  # after a preemption: their tokens are recomputed one by one
                        self.scheduler.fork(sequence, beams, [0] * len(beams.search.beams))
                    else:
                        assert top is not None
                        self.outputs.extend_beams(sequence, beams, _rows(top, i, i + 1))

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
                self.outputs.fail_grammar(sequence, cause)
            elif sequence is not None:
                n = int(sampled.counts[i])
                sequence.num_computed_tokens += n
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
            top = self.runner.beam_step(groups)
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
    """Why a sequence's grammar allows no token, where it allows none."""
    return None if sequence.matcher is None else sequence.matcher.error


def _row(top: TopLogprobs | None, i: int) -> tuple[Any, Any] | None:
    """The likeliest tokens in place of the one that a sequence has drawn, as `OutputProcessor.append` takes them."""
    return None if top is None else (top.tokens[i : i + 1], top.log_probabilities[i : i + 1])


def _rows(top: TopLogprobs, start: int, stop: int) -> TopLogprobs:
    return TopLogprobs(*(x[start:stop] for x in top))
