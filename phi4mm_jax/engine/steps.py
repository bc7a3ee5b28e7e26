"""Compiled steps of the engine.

Encode media, prefill a chunk of some sequences, decode all slots for some steps, with drafts or without, extend some
beams by a token.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, Shaped

from phi4mm_jax.batch import NO_MEDIA, AudioStack, ImageStack
from phi4mm_jax.engine.drafts import begin_round, decode_with_drafts
from phi4mm_jax.engine.sampling import restrict_if_asked, restrict_to_allowed, sample, top_k
from phi4mm_jax.engine.step_io import BeamInputs, Carried, DecodeInputs, PrefillInputs, SampledTokens, TopLogprobs
from phi4mm_jax.kernels import gpu
from phi4mm_jax.kernels.pages import as_cached
from phi4mm_jax.mesh import (
    AXES,
    ENCODING,
    PREFILL,
    check_heads,
    jit_on_mesh,
    logits_sharding,
    replicate,
    shardings,
    split_batch,
)
from phi4mm_jax.model import KVCache, Phi4MM
from phi4mm_jax.model.kv_cache import copy_pages


class Programs:
    """Jitted steps of an engine, compiled once for each shape that they meet: these are few, and known beforehand.

    Raises:
        InputError: the mesh of the variables does not divide the KV heads.
    """

    def __init__(self, model: Phi4MM, variables: Mapping[str, Any]):
        self.model = model
        self._sharding = jax.tree.leaves(variables)[0].sharding
        if isinstance(self._sharding, NamedSharding):
            check_heads(model.config.decoder, self._sharding.mesh.shape.get("tensor", 1))
        self._apply: Callable[..., Any] = model.apply
        self._stops = jnp.asarray(model.config.stop_token_ids, jnp.int32)
        self.encode = jit_on_mesh(variables, self._encode, donate_argnums=1)
        self.prefill = jit_on_mesh(variables, self._prefill, donate_argnums=1, static_argnames="candidates")
        sizes = ("width", "candidates")
        self.decode = jit_on_mesh(variables, self._decode, donate_argnums=(1, 2), static_argnames=sizes)
        self.decode_drafts = jit_on_mesh(
            variables, self._decode_drafts, donate_argnums=(1, 2, 3), static_argnames=(*sizes, "max_draft")
        )
        self.decode_logits = jit_on_mesh(variables, self._decode_logits, donate_argnums=(1, 2))
        self.sample_allowed = jit_on_mesh(variables, self._sample_allowed, static_argnames="candidates")
        self.beam_step = jit_on_mesh(variables, self._beam_step, donate_argnums=1, static_argnames="candidates")
        self.carry_first = jit_on_mesh(variables, self._carry_first)
        self.set_penalty_mask = jit_on_mesh(variables, self._set_row, donate_argnums=0)
        self.set_history = jit_on_mesh(variables, self._set_row, donate_argnums=0)

    @property
    def devices(self) -> list[Any]:
        """This host's devices that compute."""
        return sorted(self._sharding.addressable_devices, key=lambda device: device.id)

    def param_shardings(self, boxed: Any) -> Mapping[tuple[str, ...], Any]:
        """Return the sharding of each of some parameters, beside the model's, by path; see `mesh.shardings`."""
        sharding: Any = self._sharding
        if isinstance(sharding, NamedSharding):
            return shardings(boxed, sharding.mesh)  # pyright: ignore[reportArgumentType]
        return dict.fromkeys(shardings(boxed, None), sharding)

    @property
    def shares(self) -> int:
        """Number of devices that share the cache: its heads, and the tokens of each page."""
        return self._size("tensor") * self.context

    @property
    def context(self) -> int:
        """Number of devices that share the tokens of each page."""
        return self._size("context")

    @property
    def has_first_chunks(self) -> bool:
        """Return whether sequences without a token in the cache have programs of their own; see `cached_attention`."""
        return gpu.target() is not None and self.context == 1

    def _size(self, axis: str) -> int:
        place = self._sharding
        return place.mesh.shape.get(axis, 1) if isinstance(place, NamedSharding) else 1

    def place(self, state: Any) -> Any:
        """Put an engine's state where the parameters are.

        Keys and values by heads and, along `context`, by the tokens of each page; flags by the vocabulary.

        Steps return it with the sharding that they were given: otherwise the second call would be compiled anew.
        """
        return jax.tree.map(lambda x: jax.device_put(x, self.sharding_of(x)), state)

    def _constrain_state(self, state: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self.sharding_of(x)), state)

    def sharding_of(self, x: Any) -> jax.sharding.Sharding:
        """Sharding of an array of an engine's state."""
        if not isinstance(self._sharding, NamedSharding):
            return self._sharding
        mesh = self._sharding.mesh
        if x.dtype == jnp.bool_ and x.ndim == 2:  # the tokens that sequences have, (N, V)
            return logits_sharding(mesh, x.shape)
        if x.ndim < 4:
            return NamedSharding(mesh, jax.P())
        of_cache = (name if name in mesh.shape else None for name in ("tensor", "context"))  # (L, P, K, S, ...)
        return NamedSharding(mesh, jax.P(None, None, *of_cache))

    def place_media(self, stack: ImageStack | AudioStack) -> ImageStack | AudioStack:
        """Give each device its crops or chunks, of which there are as many for each."""
        if not isinstance(self._sharding, NamedSharding):
            return stack
        mesh = self._sharding.mesh
        by_entry = NamedSharding(mesh, jax.P(tuple(name for name in AXES if name in mesh.shape)))
        return jax.tree.map(lambda x: jax.device_put(x, by_entry), stack)

    def _set_row(self, state: Any, slot: Int[Array, ""], row: Any) -> Any:
        """Set a slot's row of `token_seen` (N, V) or of the history (N, M)."""
        return self._constrain_state(state.at[slot].set(row, mode="drop"))

    def _encode(self, variables, table: Shaped[Array, "F D"], stack: ImageStack | AudioStack, rows: Int[Array, " M"]):
        method = "encode_images" if isinstance(stack, ImageStack) else "encode_audio"
        with split_batch(ENCODING):
            features = replicate(self._apply(variables, stack, method=method))
        (found,) = as_cached([features[: len(rows)]], table.dtype)
        return self._constrain_state(table.at[rows].set(found))

    def _prefill(
        self, variables, cache: KVCache, table: Shaped[Array, "F D"], token_seen: Bool[Array, "N V"],
        inputs: PrefillInputs, *, candidates: int = 0,
    ) -> tuple[KVCache, SampledTokens, TopLogprobs | None]:  # fmt: skip
        """Write the chunk to the cache and sample each sequence's next token; also the likeliest, if asked for."""
        with split_batch(PREFILL):
            embedded = self._apply(variables, inputs.tokens, inputs.media, table, method="embed")
            hidden, cache = self._apply(
                variables, embedded, inputs.lengths, inputs.adapters, inputs.use_long_rope, cache, inputs.starts,
                inputs.tables, method="decode",
            )  # fmt: skip
        last = jnp.maximum(inputs.lengths - inputs.starts - 1, 0)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0]  # (R, D)
        logits = self._apply(variables, _pad_single(hidden), method="logits")[: len(hidden)]
        choosable = restrict_if_asked(logits, inputs.allowed, inputs.restricted)
        tokens = sample(choosable, inputs.num_output_tokens, inputs.sampling, token_seen[inputs.slots])
        log_probabilities = _log_probability(logits, tokens)
        sampled = SampledTokens(tokens[:, None], log_probabilities[:, None], jnp.ones_like(tokens), _finite(logits))
        if not candidates:
            return self._constrain_state(cache), sampled, None
        ranked = logits if inputs.with_beams is None else jnp.where(inputs.with_beams[:, None], choosable, logits)
        return self._constrain_state(cache), sampled, _top_log_probabilities(logits, candidates, ranked)

    def _decode(
        self, variables, cache: KVCache, token_seen: Bool[Array, "N V"], inputs: DecodeInputs, *, width: int,
        candidates: int = 0,
    ) -> tuple[KVCache, Bool[Array, "N V"], SampledTokens]:  # fmt: skip
        """Decode until every slot has taken its steps, at most `width`, or has sampled a stop token.

        With `candidates` also give the likeliest tokens in place of each, for the slots that ask for them.
        """
        sampled = _no_tokens(len(inputs.last), width, min(candidates, self.model.config.decoder.vocab_size))
        last = jnp.asarray(inputs.last)
        if inputs.carried is not None:
            last = jnp.where(last < 0, inputs.carried.last, last)
        left = jnp.where(last < 0, 0, jnp.minimum(inputs.num_decode_steps, width))

        def unfinished(carry):
            # `step` ends nothing. It keeps XLA for TPUs from following `left`, alone in the condition, back through the
            # whole model to count the trips, once for every instruction: many minutes.
            *_, left, step = carry
            return (left > 0).any() & (step < width)

        def advance(carry):
            cache, token_seen, last, sampled, left, step = carry
            active = left > 0
            lengths = jnp.where(active, inputs.lengths + sampled.counts + 1, 0)
            cache, token_seen, logits = self._next_logits(variables, cache, token_seen, inputs, last, lengths)
            state = _sample_next(inputs, self._stops, token_seen, logits, active, last, sampled, left)
            return cache, token_seen, *state, step + 1

        start = cache, token_seen, last, sampled, left, jnp.int32(0)
        cache, token_seen, last, sampled, _, _ = jax.lax.while_loop(unfinished, advance, start)
        sampled = sampled._replace(carried=self._constrain_state(Carried(last, jnp.zeros_like(last))))
        return self._constrain_state(cache), self._constrain_state(token_seen), sampled

    def _decode_drafts(
        self, variables, cache: KVCache, token_seen: Bool[Array, "N V"], history: Int[Array, "N M"],
        inputs: DecodeInputs, *, width: int, max_draft: int, candidates: int = 0,
    ) -> tuple[KVCache, Bool[Array, "N V"], Int[Array, "N M"], SampledTokens]:  # fmt: skip
        """Decode as `_decode` does, at most `inputs.max_steps` steps, and guess tokens of slots `with_drafts`."""
        inputs, last, room = begin_round(inputs)
        sampled = _no_tokens(len(last), width, min(candidates, self.model.config.decoder.vocab_size))
        left = jnp.where(last < 0, 0, room)

        def compute(cache, ids, starts, lengths):
            hidden, cache = self._hidden_after(variables, cache, inputs, ids, starts, lengths)
            return cache, self._apply(variables, hidden, method="logits")[: len(ids)]

        state = cache, token_seen, history, last, sampled, left
        state, steps = decode_with_drafts(compute, partial(_sample_next, inputs, self._stops), state, inputs, max_draft)
        cache, token_seen, history, last, sampled, _ = state
        carried = Carried(last, jnp.where(jnp.asarray(inputs.with_drafts), room - sampled.counts, 0))
        sampled = sampled._replace(carried=self._constrain_state(carried), num_steps=steps)
        cache, token_seen, history = map(self._constrain_state, (cache, token_seen, history))
        return cache, token_seen, history, sampled

    def _carry_first(self, carried: Carried, slots: Int[Array, " R"], sampled: SampledTokens) -> Carried:
        """Put the tokens of a prefill into `DecodeInputs.carried`, except for slots out of range."""
        tokens = sampled.tokens[:, 0]
        tokens = jnp.where(sampled.finite & ~_is_stop(tokens, self._stops), tokens, -1)
        last = carried.last.at[slots].set(tokens, mode="drop")
        return self._constrain_state(Carried(last, carried.untaken.at[slots].set(0, mode="drop")))

    def _decode_logits(
        self, variables, cache: KVCache, token_seen: Bool[Array, "N V"], inputs: DecodeInputs
    ) -> tuple[KVCache, Bool[Array, "N V"], Float[Array, "N V"]]:
        """Put each decoding slot's last token into the cache; gives the logits after it, for `sample_allowed`.

        Two calls: the host computes the grammars' masks during the first.
        """
        lengths = jnp.where(inputs.num_decode_steps > 0, inputs.lengths + 1, 0)
        last = jnp.asarray(inputs.last)
        cache, token_seen, logits = self._next_logits(variables, cache, token_seen, inputs, last, lengths)
        if isinstance(self._sharding, NamedSharding):
            place = logits_sharding(self._sharding.mesh, logits.shape)
            logits = jax.lax.with_sharding_constraint(logits, place)
        return self._constrain_state(cache), self._constrain_state(token_seen), logits

    def _sample_allowed(
        self, logits: Float[Array, "N V"], token_seen: Bool[Array, "N V"], inputs: DecodeInputs,
        allowed: Int[Array, "N W"], *, candidates: int = 0,
    ) -> SampledTokens:  # fmt: skip
        """Sample one token of each decoding slot, among those that its grammar allows."""
        none = _no_tokens(len(inputs.last), 1, min(candidates, self.model.config.decoder.vocab_size))
        choosable = restrict_to_allowed(logits, allowed)
        tokens = sample(choosable, inputs.num_output_tokens, inputs.sampling, token_seen)
        return _add_tokens(none, tokens, logits, jnp.asarray(inputs.num_decode_steps) > 0, inputs.with_top)[0]

    def _next_logits(
        self, variables, cache: KVCache, token_seen: Bool[Array, "N V"], inputs: DecodeInputs, last: Int[Array, " N"],
        lengths: Int[Array, " N"],
    ) -> tuple[KVCache, Bool[Array, "N V"], Float[Array, "N V"]]:  # fmt: skip
        """Put a token of each slot into the cache, the last of `lengths`; 0 for an idle slot."""
        last, starts = jnp.maximum(last, 0), jnp.maximum(lengths - 1, 0)
        token_seen = token_seen.at[jnp.arange(len(last)), last].max(lengths > 0)
        hidden, cache = self._hidden_after(variables, cache, inputs, last[:, None], starts, lengths)
        return cache, token_seen, self._apply(variables, hidden[:, 0], method="logits")[: len(last)]

    def _hidden_after(
        self, variables, cache: KVCache, inputs: DecodeInputs, ids: Int[Array, "N T"], starts: Int[Array, " N"],
        lengths: Int[Array, " N"],
    ) -> tuple[Float[Array, "X T D"], KVCache]:  # fmt: skip
        """Put some tokens of each slot into the cache, from `starts` up to `lengths`; gives the decoder's output."""
        rows = ids, lengths, inputs.adapters, inputs.use_long_rope, starts, inputs.tables
        ids, ends, adapters, use_long_rope, starts, tables = map(_pad_single, rows)
        embedded = self._apply(variables, ids, jnp.full(ids.shape, NO_MEDIA), None, method="embed")
        return self._apply(variables, embedded, ends, adapters, use_long_rope, cache, starts, tables, method="decode")

    def _beam_step(
        self, variables, cache: KVCache, inputs: BeamInputs, *, candidates: int
    ) -> tuple[KVCache, TopLogprobs]:
        """Put each beam's last token into the cache; gives the likeliest ones after it."""
        cache = copy_pages(cache, inputs.sources, inputs.targets, inputs.num_copies)
        media = jnp.full((len(inputs.last), 1), NO_MEDIA)
        embedded = self._apply(variables, inputs.last[:, None], media, None, method="embed")
        hidden, cache = self._apply(
            variables, embedded, inputs.lengths, inputs.adapters, inputs.use_long_rope, cache,
            jnp.maximum(inputs.lengths - 1, 0), inputs.tables, method="decode",
        )  # fmt: skip
        logits = self._apply(variables, hidden[:, 0], method="logits")
        ranked = restrict_if_asked(logits, inputs.allowed, inputs.restricted)
        return self._constrain_state(cache), _top_log_probabilities(logits, candidates, ranked)


def _pad_single(x: Array) -> Array:
    """Add a resting row to a single one on GPUs.

    XLA for GPUs computes a matrix times one row as a sum over a product as large as the matrix, and writes that out.
    """
    return jnp.pad(x, ((0, 1), *[(0, 0)] * (x.ndim - 1))) if len(x) == 1 and gpu.target() else x


def _sample_next(
    inputs: DecodeInputs, stops: Int[Array, " E"], token_seen: Bool[Array, "N V"], logits: Float[Array, "N V"],
    active: Bool[Array, " N"], last: Int[Array, " N"], sampled: SampledTokens, left: Int[Array, " N"],
) -> tuple[Int[Array, " N"], SampledTokens, Int[Array, " N"]]:  # fmt: skip
    """Sample the next token of each active slot: the last one then, -1 where it has ended, with none left to decode."""
    tokens = sample(logits, inputs.num_output_tokens + sampled.counts, inputs.sampling, token_seen)
    sampled, added = _add_tokens(sampled, tokens, logits, active, inputs.with_top)
    ended = ~added | _is_stop(tokens, stops)
    last = jnp.where(active, jnp.where(ended, -1, tokens), last)
    return last, sampled, jnp.where(active, jnp.where(ended, 0, left - 1), left)


def _is_stop(tokens: Int[Array, " N"], stops: Int[Array, " E"]) -> Bool[Array, " N"]:
    return (tokens[:, None] == stops).any(-1)


@jax.named_scope("log_probability")
def _log_probability(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Float[Array, " B"]:
    chosen = jnp.take_along_axis(logits, tokens[:, None], 1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, -1)


def _no_tokens(count: int, width: int, candidates: int) -> SampledTokens:
    """Return room for a round's tokens of each slot."""
    sampled = SampledTokens(
        jnp.zeros((count, width), jnp.int32), jnp.zeros((count, width), jnp.float32), jnp.zeros(count, jnp.int32),
        jnp.ones(count, bool),
    )  # fmt: skip
    if candidates:
        none = jnp.zeros((count, width, candidates))
        sampled = sampled._replace(top_tokens=none.astype(jnp.int32), top_log_probabilities=none)
    return sampled


def _add_tokens(
    sampled: SampledTokens, tokens: Int[Array, " N"], logits: Float[Array, "N V"], active: Bool[Array, " N"],
    with_top: Bool[Any, " N"] | None,
) -> tuple[SampledTokens, Bool[Array, " N"]]:  # fmt: skip
    """Add a token of each active slot; returns also which are active still, their logits being finite."""
    count, width = sampled.tokens.shape
    finite = sampled.finite & (_finite(logits) | ~active)
    active &= finite
    at = jnp.arange(count), jnp.where(active, sampled.counts, width)  # out of range: dropped
    top = (None, None) if sampled.top_tokens is None else _add_top(sampled, logits, at, with_top)
    added = SampledTokens(
        sampled.tokens.at[at].set(tokens, mode="drop"),
        sampled.log_probabilities.at[at].set(_log_probability(logits, tokens), mode="drop"),
        sampled.counts + active,
        finite,
        *top,
    )
    return added, active


def _add_top(
    sampled: SampledTokens, logits: Float[Array, "N V"], at: Any, with_top: Bool[Any, " N"] | None
) -> tuple[Array, Array]:
    """Return the likeliest tokens so far, with those of another step; compute nothing where no slot asks for them."""
    tokens, values = sampled.top_tokens, sampled.top_log_probabilities
    assert tokens is not None
    assert values is not None
    assert with_top is not None

    def add() -> tuple[Array, Array]:
        top = _top_log_probabilities(logits, tokens.shape[-1])
        return tokens.at[at].set(top.tokens, mode="drop"), values.at[at].set(top.log_probabilities, mode="drop")

    return jax.lax.cond(with_top.any(), add, lambda: (tokens, values))


def _finite(logits: Float[Array, "B V"]) -> Bool[Array, " B"]:
    return jnp.isfinite(logits).all(-1)


@jax.named_scope("log_probability")
def _top_log_probabilities(
    logits: Float[Array, "R V"], count: int, ranked: Float[Array, "R V"] | None = None
) -> TopLogprobs:
    """Return the likeliest tokens, by `ranked`, which is -inf for those that are not allowed."""
    values, tokens = top_k(logits if ranked is None else ranked, min(count, logits.shape[-1]))
    return TopLogprobs(tokens, values - jax.nn.logsumexp(logits, -1, keepdims=True), _finite(logits))
