"""Batch generation with a key/value cache.

Whole rows are prefilled once; then one compiled loop decodes all rows on the device, until it has to come back: all
rows are done, a stop string may have appeared, or a row is about to grow past the LongRoPE boundary. Such a row needs
the long frequencies for all its positions, in all layers: it is prefilled again, the others are not touched.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from phi4mm_jax.errors import InputError
from phi4mm_jax.generation.sampling import Sampling, SamplingRows, is_whole, sample
from phi4mm_jax.kernels.xla import DECODE_BLOCK
from phi4mm_jax.model import Cache, Phi4MM
from phi4mm_jax.model.phi4mm import MediaFeatures, empty_cache
from phi4mm_jax.processing.batch import NO_MEDIA, Batch
from phi4mm_jax.processing.processor import bucket
from phi4mm_jax.processing.tokenizer import Tokenizer

_STEPS_BETWEEN_CHECKS = 8  # for stop strings, which only the host can see


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt.

    Attributes:
        text: the answer, without stop tokens; cut before a stop string.
        tokens: the generated ids, a final stop token included.
        finish_reason: "stop" by a stop token or string, "length" by max_new_tokens or the context.
        prompt_tokens: the prompt's length.
    """

    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int


class _State(NamedTuple):
    """Of all rows, on the device. A row's last token is chosen but not yet fed: it is not in the cache."""

    cache: Cache
    lengths: Int[Array, " B"]  # tokens in the cache
    out: Int[Array, "B M"]  # generated tokens
    size: Int[Array, " B"]  # how many of them
    limit: Int[Array, " B"]  # how many there may be
    done: Bool[Array, " B"]
    long: Bool[Array, " B"]  # made with the long rotary set


class Generator:
    """Compiled generation for one model; programs are kept for each shape of batch."""

    def __init__(self, model: Phi4MM, tokenizer: Tokenizer, context: int):
        self.model, self.tokenizer, self.context = model, tokenizer, context
        self._apply: Callable[..., Any] = model.apply
        self._stops = jnp.asarray(model.config.stop_token_ids, jnp.int32)
        self._encode = jax.jit(partial(model.apply, method="encode"))
        self._start = jax.jit(self._start_rows, static_argnames=("capacity", "max_new"))
        self._decode = jax.jit(self._decode_rows, donate_argnames="state")
        self._cross = jax.jit(self._cross_rows, donate_argnames="state")

    def __call__(
        self,
        variables: Any,
        batch: Batch,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """Generate for every row of the batch.

        Raises:
            InputError: a bad `max_new_tokens` or `stop`, or a prompt that already fills the context.
        """
        self._check(batch, max_new_tokens, stop)
        features = self._encode(variables, batch.images, batch.audio) if batch.images or batch.audio else None
        max_new = bucket(min(int(max_new_tokens), self.context), 8)
        capacity = -(-min(bucket(int(batch.lengths.max()) + max_new), self.context) // DECODE_BLOCK) * DECODE_BLOCK
        capacity = max(capacity, -(-batch.tokens.shape[1] // DECODE_BLOCK) * DECODE_BLOCK)
        limit = np.minimum(max_new_tokens, self.context - batch.lengths).astype(np.int32)
        rows = batch._replace(images=None, audio=None)
        settings = SamplingRows.of([dataclasses.replace(sampling, stream=s) for s in _streams(batch)])
        state = self._start(variables, rows, features, limit, settings, capacity=capacity, max_new=max_new)
        texts = _StopStrings(self.tokenizer, stop, len(batch.lengths))
        while not np.all(done := np.asarray(state.done)):
            crossing = ~done & ~np.asarray(state.long) & (np.asarray(state.lengths) == self._boundary)
            if crossing.any():
                again = self._rows_again(batch, state, np.flatnonzero(crossing))
                state = self._cross(variables, state, again, features, settings)
            else:
                steps = _STEPS_BETWEEN_CHECKS if stop else max_new
                state = self._decode(variables, state, rows.adapters, settings, np.int32(steps))
            state = state._replace(done=jnp.asarray(texts.update(state)))
        return self._completions(batch, state, texts)

    @property
    def _boundary(self) -> int:
        return self.model.config.decoder.rope.original_length

    def _check(self, batch: Batch, max_new_tokens: int, stop: Sequence[str]) -> None:
        if not is_whole(max_new_tokens) or max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens!r}; expected a positive whole number")
        if not isinstance(stop, Sequence) or isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise InputError(f"stop is {stop!r}; expected a list of non-empty strings")
        if any(0xD800 <= ord(character) < 0xE000 for s in stop for character in s):
            raise InputError(f"stop is {stop!r}, which has half a surrogate pair; expected text")
        full = np.flatnonzero(batch.lengths >= self.context)
        if len(full):
            raise InputError(
                f"prompt {full[0]} has {batch.lengths[full[0]]} tokens, which leaves no room in the context of "
                f"{self.context}; shorten it"
            )

    def _prefill(self, variables, rows: Batch, features: MediaFeatures | None, cache: Cache):
        """Each row's logits after its last token, and its filled cache."""
        embedded = self._apply(variables, rows.tokens, rows.media, features, method="embed")
        hidden, cache = self._apply(variables, embedded, rows.lengths, rows.adapters, cache, method="decode")
        last = jnp.take_along_axis(hidden, (rows.lengths - 1)[:, None, None], 1)[:, 0]  # (B, D)
        return self._apply(variables, last, method="logits"), cache

    def _start_rows(self, variables, rows: Batch, features, limit, settings, *, capacity: int, max_new: int):
        batch = len(rows.lengths)
        cache = empty_cache(self.model.config, batch, capacity, self.model.dtype)
        logits, cache = self._prefill(variables, rows, features, cache)
        state = _State(
            cache=cache,
            lengths=rows.lengths,
            out=jnp.zeros((batch, max_new), jnp.int32),
            size=jnp.zeros(batch, jnp.int32),
            limit=limit,
            done=jnp.zeros(batch, bool),
            long=rows.lengths > self._boundary,
        )
        return self._choose(state, logits, jnp.ones(batch, bool), settings)

    def _choose(self, state: _State, logits: Float[Array, "B V"], active, settings: SamplingRows) -> _State:
        """Append a token to the active rows."""
        tokens = sample(logits, state.size, settings)
        index = jnp.arange(len(tokens)), jnp.where(active, state.size, state.out.shape[1])  # out of range: dropped
        count = state.size + active
        stopped = (tokens[:, None] == self._stops).any(-1) | (count >= state.limit)
        return state._replace(
            out=state.out.at[index].set(tokens, mode="drop"), size=count, done=state.done | (active & stopped)
        )

    def _decode_rows(self, variables, state: _State, adapters, settings: SamplingRows, steps) -> _State:
        """Decode until all rows are done, `steps` are taken, or a row must cross the boundary."""

        def going_on(carry):
            step, state = carry
            waiting = ~state.done & ~state.long & (state.lengths == self._boundary)
            return (step < steps) & ~state.done.all() & ~waiting.any()

        def advance(carry):
            step, state = carry
            active = ~state.done
            lengths = state.lengths + active
            last = jnp.take_along_axis(state.out, jnp.maximum(state.size - 1, 0)[:, None], 1)  # (B, 1)
            embedded = self._apply(variables, last, jnp.full_like(last, NO_MEDIA), None, method="embed")
            hidden, cache = self._apply(
                variables, embedded, lengths, adapters, state.cache, state.long, method="decode"
            )
            logits = self._apply(variables, hidden[:, 0], method="logits")
            state = state._replace(cache=cache, lengths=lengths)
            return step + 1, self._choose(state, logits, active, settings)

        return jax.lax.while_loop(going_on, advance, (jnp.int32(0), state))[1]

    def _rows_again(self, batch: Batch, state: _State, rows: np.ndarray) -> tuple[np.ndarray, Batch]:
        """The rows that cross, whole, as a batch of their own; padded to a bucket by repeating the first."""
        rows = np.concatenate([rows, np.full(bucket(len(rows)) - len(rows), rows[0])])
        out, count = np.asarray(state.out), np.asarray(state.size)
        length = bucket(self._boundary + 1, 64)
        tokens = np.zeros((len(rows), length), np.int32)
        media = np.full((len(rows), length), NO_MEDIA, np.int32)
        for i, b in enumerate(rows):
            prompt = batch.lengths[b]
            tokens[i, :prompt], media[i, :prompt] = batch.tokens[b, :prompt], batch.media[b, :prompt]
            tokens[i, prompt : prompt + count[b]] = out[b, : count[b]]
        lengths = (batch.lengths + count)[rows].astype(np.int32)
        return rows, Batch(tokens, lengths, batch.adapters[rows], media, None, None)

    def _cross_rows(self, variables, state: _State, again, features, settings: SamplingRows) -> _State:
        """Prefill these rows again, with their chosen token and the long set, and choose their next token."""
        index, rows = again
        capacity = state.cache.k.shape[3]
        length = min(rows.tokens.shape[1], capacity)
        cache = empty_cache(self.model.config, len(index), rows.tokens.shape[1], self.model.dtype)
        logits, cache = self._prefill(variables, rows, features, cache)
        cache = Cache(*(
            old.at[:, index, :, :length].set(new[:, :, :, :length])
            for old, new in zip(state.cache, cache, strict=True)
        ))  # fmt: skip
        state = state._replace(
            cache=cache, lengths=state.lengths.at[index].set(rows.lengths), long=state.long.at[index].set(True)
        )
        active = jnp.zeros(len(state.done), bool).at[index].set(True)
        scattered = jnp.zeros((len(state.done), logits.shape[-1]), logits.dtype).at[index].set(logits)
        return self._choose(state, scattered, active, settings)

    def _completions(self, batch: Batch, state: _State, texts: "_StopStrings") -> list[Completion]:
        completions = []
        stops = set(self.model.config.stop_token_ids)
        out, count = np.asarray(state.out), np.asarray(state.size)
        for b, prompt_tokens in enumerate(batch.lengths.tolist()):
            tokens = out[b, : count[b]].tolist()
            if (cut := texts.cut[b]) is not None:
                tokens, text = cut
                completions.append(Completion(text, tokens, "stop", prompt_tokens))
                continue
            stopped = tokens[-1] in stops
            text = self.tokenizer.decode(tokens[:-1] if stopped else tokens)
            completions.append(Completion(text, tokens, "stop" if stopped else "length", prompt_tokens))
        return completions


def _streams(batch: Batch) -> list[int]:
    """For each row how many rows before it have the same prompt: equal prompts draw for themselves, and no row's draw
    depends on other prompts."""
    earlier: Counter[bytes] = Counter()
    streams = []
    for tokens, length in zip(batch.tokens, batch.lengths, strict=True):
        prompt = tokens[:length].tobytes()
        streams.append(earlier[prompt])
        earlier[prompt] += 1
    return streams


class _StopStrings:
    """Watches the text of each row for stop strings, byte by byte: a token may end inside a character."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], rows: int):
        self.tokenizer, self.stop = tokenizer, tuple(s.encode() for s in stop)
        self.cut: list[tuple[list[int], str] | None] = [None] * rows  # tokens, and text before the stop string
        self._seen = [0] * rows  # tokens looked at
        self._text = [b""] * rows  # and what they say

    def update(self, state: _State) -> np.ndarray:
        """Look at the new tokens; returns which rows are done."""
        done = np.asarray(state.done).copy()
        if not self.stop:
            return done
        out, count = np.asarray(state.out), np.asarray(state.size)
        for b in [b for b, cut in enumerate(self.cut) if cut is None]:
            while self._seen[b] < count[b] and self.cut[b] is None:
                self._append(b, int(out[b, self._seen[b]]))
                if (end := self._find(b)) is not None:
                    self.cut[b] = out[b, : self._seen[b]].tolist(), self._text[b][:end].decode(errors="replace")
                    done[b] = True
        return done

    def _append(self, row: int, token: int) -> None:
        self._text[row] += self.tokenizer.decode_bytes([token])
        self._seen[row] += 1

    def _find(self, row: int) -> int | None:
        """Where the first stop string begins."""
        found = [at for s in self.stop if (at := self._text[row].find(s)) >= 0]
        return min(found, default=None)
