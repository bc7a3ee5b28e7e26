"""Output processing: detokenization, stop tokens and strings, limits, errors."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from phi4mm_jax.engine.beam_search import BeamGroup, advance
from phi4mm_jax.engine.request import Completion, FinishReason, TokenLogprobs
from phi4mm_jax.engine.scheduler import Scheduler
from phi4mm_jax.engine.sequence import Sequence, SequenceStatus
from phi4mm_jax.engine.step_io import TopLogprobs
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.tokenizer import Tokenizer


@dataclass(frozen=True)
class Update:
    """New text and tokens of one request from a round, and at its end the whole answer.

    Attributes:
        tokens: generated since the last update. Their text may come with the next one, as where a character is not
            whole. Empty for beam search.
        log_probabilities: of these.
        top_logprobs: for each of these the likeliest tokens in its place, if the request asks for them.
    """

    id: int
    text: str
    completion: Completion | None = None
    tokens: tuple[int, ...] = ()
    log_probabilities: tuple[float, ...] = ()
    top_logprobs: tuple[TokenLogprobs, ...] = ()


class OutputProcessor:
    """Appends tokens to sequences, finishes them, and keeps the updates until they are taken."""

    def __init__(self, tokenizer: Tokenizer, stop_token_ids: Collection[int], scheduler: Scheduler):
        self._tokenizer, self._stops, self._scheduler = tokenizer, frozenset(stop_token_ids), scheduler
        self._updates: list[Update] = []

    def __len__(self) -> int:
        return len(self._updates)

    def take(self, ids: Collection[int] | None = None) -> list[Update]:
        """Remove and return the updates of some requests, by default of all."""
        taken = [update for update in self._updates if ids is None or update.id in ids]
        self._updates = [] if ids is None else [update for update in self._updates if update.id not in ids]
        return taken

    def reject(self, request_id: int, reason: FinishReason, error: Exception | None = None) -> None:
        """End a request that never had a slot."""
        if error is None:
            completion = Completion("", [], reason, 0)
        else:
            kind = type(error).__name__
            message = str(error) if isinstance(error, InputError) else f"{kind}: {error}"
            completion = Completion("", [], reason, 0, error=message, error_type=kind)
        self._updates.append(Update(request_id, "", completion))

    def append(
        self, sequence: Sequence, tokens: Any, log_probabilities: Any, top: tuple[Any, Any] | None = None
    ) -> None:
        """Append new tokens, up to the end of the answer.

        Args:
            top: the likeliest tokens in place of each, and their log-probabilities, where the engine gives them.
        """
        pieces, count = [], sequence.request.top_logprobs
        for i, (token, log_probability) in enumerate(zip(tokens.tolist(), log_probabilities.tolist(), strict=True)):
            sequence.output_token_ids.append(token)
            sequence.log_probabilities.append(log_probability)
            if count and top is not None:
                likeliest = (values[i, :count].tolist() for values in top)
                sequence.top_logprobs.append(tuple(zip(*likeliest, strict=True)))
            if token in self._stops or token in sequence.request.stop_tokens:
                return self.finish(sequence, "stop", pieces)
            pieces.append(sequence.detokenizer.add(token))
            if sequence.detokenizer.stopped:
                return self.finish(sequence, "stop", pieces)
            if sequence.matcher is not None:
                sequence.matcher.accept(token)
                if sequence.matcher.over:
                    return self.finish(sequence, "stop", pieces)
            if len(sequence.output_token_ids) == sequence.max_new_tokens:
                return self.finish(sequence, "length", pieces)
        if text := "".join(pieces):
            self._emit(sequence, text)

    def extend_beams(self, sequence: Sequence, beams: BeamGroup, top: TopLogprobs) -> None:
        """Select the next beams from the likeliest tokens after each of the present ones."""
        search, parents = advance(beams.search, top.tokens, top.log_probabilities)
        if not search.beams and not search.ended:
            causes = [beam.matcher.error for beam in beams.search.beams if beam.matcher is not None]
            return self.fail_grammar(sequence, next(filter(None, causes), "no token obeys it"))
        beams.search = search
        if search.over:
            self._finish_beams(sequence, beams)
        else:
            self._scheduler.fork(sequence, beams, parents)

    def fail(self, sequence: Sequence) -> None:
        """End a sequence whose logits are NaN or infinite with an error; it keeps the tokens before."""
        if sequence.status is SequenceStatus.FINISHED:
            return  # by an earlier token
        error = (
            "the model's logits are not finite (NaN or infinity) at token "
            f"{sequence.num_prompt_tokens + sequence.num_output_tokens + 1} of the "
            "sequence; the weights or the media hold such values, or overflow: check both, or load with float32"
        )
        self.finish(sequence, "error", error=error)

    def fail_grammar(self, sequence: Sequence, cause: str) -> None:
        """End a sequence whose grammar allows no token with an error; it keeps the tokens before."""
        error = f"grammar is at a dead end after {sequence.num_output_tokens} tokens: {cause}; give another one"
        self.finish(sequence, "error", error=error, error_type="InputError")

    def finish(
        self, sequence: Sequence, reason: FinishReason, pieces: Iterable[str] = (), error: str | None = None,
        error_type: str = "FloatingPointError",
    ) -> None:  # fmt: skip
        """End a sequence with the tokens that it has, and free its slot and pages."""
        if sequence.beams is not None:
            return self._finish_beams(sequence, sequence.beams, reason, error, error_type)
        rest = sequence.detokenizer.finish()
        completion = Completion.of(
            self._tokenizer, sequence.detokenizer.text, sequence.output_token_ids, reason, sequence.num_prompt_tokens,
            log_probabilities=tuple(sequence.log_probabilities), top_logprobs=tuple(sequence.top_logprobs), error=error,
            error_type=None if error is None else error_type,
            skip_special_tokens=sequence.request.skip_special_tokens,
        )  # fmt: skip
        self._emit(sequence, "".join(pieces) + rest, completion)
        self._scheduler.finish(sequence)

    def _emit(self, sequence: Sequence, text: str, completion: Completion | None = None) -> None:
        start, sequence.num_reported_tokens = sequence.num_reported_tokens, len(sequence.output_token_ids)
        update = Update(
            sequence.id, text, completion, tuple(sequence.output_token_ids[start:]),
            tuple(sequence.log_probabilities[start:]), tuple(sequence.top_logprobs[start:]),
        )  # fmt: skip
        self._updates.append(update)

    def _finish_beams(
        self, sequence: Sequence, beams: BeamGroup, reason: FinishReason | None = None, error: str | None = None,
        error_type: str | None = None,
    ) -> None:  # fmt: skip
        completion = beams.completion(
            self._tokenizer, sequence.num_prompt_tokens, reason, sequence.request.skip_special_tokens
        )
        completion = replace(completion, error=error, error_type=None if error is None else error_type)
        self._updates.append(Update(sequence.id, completion.text, completion))
        self._scheduler.finish(sequence)
