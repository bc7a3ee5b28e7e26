"""From tokens to updates: text, stop tokens and strings, limits, errors."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from phi4mm_jax.engine.beam_search import BeamGroup, advance
from phi4mm_jax.engine.request import Completion, FinishReason
from phi4mm_jax.engine.scheduler import Scheduler
from phi4mm_jax.engine.sequence import Sequence, SequenceStatus
from phi4mm_jax.engine.steps import TopLogprobs
from phi4mm_jax.processing.tokenizer import Tokenizer


@dataclass(frozen=True)
class Update:
    """News of one request from a round: text, and in the end the whole answer."""

    id: int
    text: str
    completion: Completion | None = None


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

    def reject(self, request_id: int, reason: FinishReason, error: str | None = None) -> None:
        """End a request that never had a slot."""
        self._updates.append(Update(request_id, "", Completion("", [], reason, 0, error=error)))

    def append(self, sequence: Sequence, tokens: Any, log_probabilities: Any) -> None:
        """Append new tokens, up to what ends the answer."""
        pieces = []
        for token, log_probability in zip(tokens.tolist(), log_probabilities.tolist(), strict=True):
            sequence.tokens.append(token)
            sequence.log_probabilities.append(log_probability)
            if token in self._stops or token in sequence.request.stop_tokens:
                return self.finish(sequence, "stop", pieces)
            pieces.append(sequence.detokenizer.add(token))
            if sequence.detokenizer.stopped:
                return self.finish(sequence, "stop", pieces)
            if len(sequence.tokens) == sequence.max_new_tokens:
                return self.finish(sequence, "length", pieces)
        if text := "".join(pieces):
            self._updates.append(Update(sequence.id, text))

    def extend_beams(self, sequence: Sequence, beams: BeamGroup, top: TopLogprobs) -> None:
        """Choose the next beams among the likeliest tokens after each of the present ones."""
        beams.search, parents = advance(beams.search, top.tokens, top.log_probabilities)
        if beams.search.over:
            self._finish_beams(sequence, beams)
        else:
            self._scheduler.fork(sequence, beams, parents)

    def fail(self, sequence: Sequence) -> None:
        """End a sequence whose logits are NaN or infinite with an error; it keeps the tokens before."""
        if sequence.status is SequenceStatus.FINISHED:
            return  # by a token before
        error = (
            "the model's logits are not finite (NaN or infinity) at token "
            f"{sequence.num_prompt_tokens + sequence.num_drawn + 1} of the "
            "sequence; the weights or the media hold such values, or overflow: check both, or load with float32"
        )
        self.finish(sequence, "error", error=error)

    def finish(
        self, sequence: Sequence, reason: FinishReason, pieces: Iterable[str] = (), error: str | None = None
    ) -> None:
        """End a sequence with what it has drawn, and free its slot and pages."""
        if sequence.beams is not None:
            return self._finish_beams(sequence, sequence.beams, reason, error)
        rest = sequence.detokenizer.finish()
        completion = Completion.of(
            self._tokenizer, sequence.detokenizer.text, sequence.tokens, reason, sequence.num_prompt_tokens,
            log_probabilities=tuple(sequence.log_probabilities), error=error,
        )  # fmt: skip
        self._updates.append(Update(sequence.id, "".join(pieces) + rest, completion))
        self._scheduler.finish(sequence)

    def _finish_beams(
        self, sequence: Sequence, beams: BeamGroup, reason: FinishReason | None = None, error: str | None = None
    ) -> None:
        completion = beams.completion(self._tokenizer, sequence.num_prompt_tokens, reason)
        completion = replace(completion, error=error)
        self._updates.append(Update(sequence.id, completion.text, completion))
        self._scheduler.finish(sequence)
