"""The compiled programs of the engine.

Encode media, prefill a chunk of some rows, decode all slots for some steps, extend some beams by a token.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from phi4mm_jax.batch import NO_MEDIA, AudioStack, ImageStack
from phi4mm_jax.engine.sampling import SamplingRows, sample
from phi4mm_jax.mesh import Axes, check_heads, jit_on_mesh, over_mesh
from phi4mm_jax.model import Cache, Phi4MM
from phi4mm_jax.model.decoder import cache_axes, row_major


class PrefillInputs(NamedTuple):
    """The next tokens of R rows, whose earlier ones are in the cache."""

    tokens: Int[Any, "R T"]
    media: Int[Any, "R T"]  # rows of the table of features
    starts: Int[Any, " R"]
    lengths: Int[Any, " R"]  # tokens of each row, those of this chunk included; 0 for none
    tables: Int[Any, "R M"]
    adapters: Int[Any, " R"]
    long: Bool[Any, " R"]
    slots: Int[Any, " R"]
    drawn: Int[Any, " R"]  # tokens that the row has drawn before
    settings: SamplingRows


class DecodeInputs(NamedTuple):
    """All N slots as a round of decoding begins. A slot's last token is not in the cache."""

    last: Int[Any, " N"]
    lengths: Int[Any, " N"]  # tokens in the cache
    steps: Int[Any, " N"]  # tokens to decode in this round at most; 0 for a slot that rests
    tables: Int[Any, "N M"]
    adapters: Int[Any, " N"]
    long: Bool[Any, " N"]
    drawn: Int[Any, " N"]
    settings: SamplingRows


class SampledTokens(NamedTuple):
    """Tokens chosen in a round, and their log-probabilities, before any setting of the sampling.

    A row whose logits are not finite draws nothing from them, and rests.
    """

    tokens: Int[Array, "N W"]
    log_probabilities: Float[Array, "N W"]
    counts: Int[Array, " N"]
    finite: Bool[Array, " N"]  # whether all logits were


class BeamInputs(NamedTuple):
    """The last tokens of R beams, whose earlier ones are in the cache, and the C pages to copy before."""

    last: Int[Any, " R"]
    lengths: Int[Any, " R"]  # tokens of each beam, the last one included; 0 for none
    tables: Int[Any, "R M"]
    adapters: Int[Any, " R"]
    long: Bool[Any, " R"]
    sources: Int[Any, " C"]
    targets: Int[Any, " C"]
    copies: Int[Any, ""]  # how many of these count; no target is a source


class TopLogprobs(NamedTuple):
    """The C likeliest tokens after each row, the likeliest first, and their log-probabilities."""

    tokens: Int[Any, "R C"]
    log_probabilities: Float[Any, "R C"]
    finite: Bool[Any, " R"]  # whether all logits were


class Programs:
    """Compiled once for each shape that they meet: an engine's shapes are few, and known beforehand.

    Raises:
        InputError: the mesh of the variables cannot share the key heads.
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
        self.decode = jit_on_mesh(variables, self._decode, donate_argnums=(1, 2), static_argnames="width")
        self.extend = jit_on_mesh(variables, self._extend, donate_argnums=1, static_argnames="candidates")
        self.mark = jit_on_mesh(variables, self._mark, donate_argnums=0)

    @property
    def devices(self) -> list[Any]:
        """This host's that compute."""
        return sorted(self._sharding.addressable_devices, key=lambda device: device.id)

    @property
    def shares(self) -> int:
        """Number of devices that share the heads."""
        place = self._sharding
        return place.mesh.shape.get("tensor", 1) if isinstance(place, NamedSharding) else 1

    def place(self, state: Any) -> Any:
        """Puts an engine's state where the parameters are: keys and values by heads, the rest on every device.

        Programs return it as they were given it: otherwise the second call would be compiled anew.
        """
        return jax.tree.map(lambda x: jax.device_put(x, self._placement(x)), state)

    def _kept(self, state: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self._placement(x)), state)

    def _placement(self, x: Array) -> jax.sharding.Sharding:
        if not isinstance(self._sharding, NamedSharding):
            return self._sharding
        heads = 2 if x.ndim >= 4 else None  # of the cache: (L, P, K, S, ...)
        mesh = self._sharding.mesh
        splits = heads is not None and "tensor" in mesh.shape
        return NamedSharding(mesh, jax.P(None, None, "tensor") if splits else jax.P())

    def _mark(self, seen: Bool[Array, "N V"], slot: Int[Array, ""], row: Bool[Array, " V"]) -> Bool[Array, "N V"]:
        return self._kept(seen.at[slot].set(row, mode="drop"))

    def _encode(self, variables, table: Float[Array, "F D"], stack: ImageStack | AudioStack, rows: Int[Array, " M"]):
        method = "encode_images" if isinstance(stack, ImageStack) else "encode_audio"
        features = self._apply(variables, stack, method=method)
        return self._kept(table.at[rows].set(features[: len(rows)].astype(table.dtype)))

    def _prefill(
        self, variables, cache: Cache, table: Float[Array, "F D"], seen: Bool[Array, "N V"], chunk: PrefillInputs, *,
        candidates: int = 0,
    ) -> tuple[Cache, SampledTokens, TopLogprobs | None]:  # fmt: skip
        """Fills the cache, and chooses the token that follows each row's last; where asked for, also the likeliest."""
        embedded = self._apply(variables, chunk.tokens, chunk.media, table, method="embed")
        hidden, cache = self._apply(
            variables, embedded, chunk.lengths, chunk.adapters, chunk.long, cache, chunk.starts, chunk.tables,
            method="decode",
        )  # fmt: skip
        last = jnp.maximum(chunk.lengths - chunk.starts - 1, 0)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0]  # (R, D)
        logits = self._apply(variables, hidden, method="logits")
        tokens = sample(logits, chunk.drawn, chunk.settings, seen[chunk.slots])
        log_probabilities = _log_probability(logits, tokens)
        drawn = SampledTokens(tokens[:, None], log_probabilities[:, None], jnp.ones_like(tokens), _finite(logits))
        return self._kept(cache), drawn, _likeliest(logits, candidates) if candidates else None

    def _decode(
        self, variables, cache: Cache, seen: Bool[Array, "N V"], slots: DecodeInputs, *, width: int
    ) -> tuple[Cache, Bool[Array, "N V"], SampledTokens]:
        """Decodes until every slot has taken its steps, at most `width`, or has drawn a stop token."""
        count = len(slots.last)
        every = jnp.arange(count)
        drawn = SampledTokens(
            jnp.zeros((count, width), jnp.int32), jnp.zeros((count, width), jnp.float32), jnp.zeros(count, jnp.int32),
            jnp.ones(count, bool),
        )  # fmt: skip

        def going_on(carry):
            return (carry[-1] > 0).any()

        def advance(carry):
            cache, seen, last, drawn, left = carry
            active = left > 0
            seen = seen.at[every, last].max(active)
            lengths = jnp.where(active, slots.lengths + drawn.counts + 1, 0)
            embedded = self._apply(variables, last[:, None], jnp.full((count, 1), NO_MEDIA), None, method="embed")
            hidden, cache = self._apply(
                variables, embedded, lengths, slots.adapters, slots.long, cache, jnp.maximum(lengths - 1, 0),
                slots.tables, method="decode",
            )  # fmt: skip
            logits = self._apply(variables, hidden[:, 0], method="logits")
            tokens = sample(logits, slots.drawn + drawn.counts, slots.settings, seen)
            finite = drawn.finite & (_finite(logits) | ~active)
            active &= finite
            at = every, jnp.where(active, drawn.counts, width)  # out of range: dropped
            drawn = SampledTokens(
                drawn.tokens.at[at].set(tokens, mode="drop"),
                drawn.log_probabilities.at[at].set(_log_probability(logits, tokens), mode="drop"),
                drawn.counts + active,
                finite,
            )
            stopped = (tokens[:, None] == self._stops).any(-1)
            left = jnp.where(active & ~stopped, left - 1, 0)
            return cache, seen, jnp.where(active, tokens, last), drawn, left

        start = cache, seen, jnp.asarray(slots.last), drawn, jnp.minimum(slots.steps, width)
        cache, seen, _, drawn, _ = jax.lax.while_loop(going_on, advance, start)
        return self._kept(cache), self._kept(seen), drawn

    def _extend(self, variables, cache: Cache, beams: BeamInputs, *, candidates: int) -> tuple[Cache, TopLogprobs]:
        """Puts each beam's last token into the cache."""
        cache = _copy_pages(cache, beams.sources, beams.targets, beams.copies)
        media = jnp.full((len(beams.last), 1), NO_MEDIA)
        embedded = self._apply(variables, beams.last[:, None], media, None, method="embed")
        hidden, cache = self._apply(
            variables, embedded, beams.lengths, beams.adapters, beams.long, cache, jnp.maximum(beams.lengths - 1, 0),
            beams.tables, method="decode",
        )  # fmt: skip
        logits = self._apply(variables, hidden[:, 0], method="logits")
        return self._kept(cache), _likeliest(logits, candidates)


@jax.named_scope("log_probability")
def _log_probability(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Float[Array, " B"]:
    chosen = jnp.take_along_axis(logits, tokens[:, None], 1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, -1)


def _finite(logits: Float[Array, "B V"]) -> Bool[Array, " B"]:
    return jnp.isfinite(logits).all(-1)


@jax.named_scope("log_probability")
def _likeliest(logits: Float[Array, "R V"], count: int) -> TopLogprobs:
    values, tokens = jax.lax.top_k(logits, min(count, logits.shape[-1]))
    return TopLogprobs(tokens, values - jax.nn.logsumexp(logits, -1, keepdims=True), _finite(logits))


@jax.named_scope("copy_on_write")
def _copy_pages(cache: Cache, sources: Int[Array, " C"], targets: Int[Array, " C"], count: Int[Array, ""]) -> Cache:
    """Copy pages of all layers, one after the other, in the cache's own order of bytes: XLA then copies nothing else.

    On a mesh each device copies its heads.
    """

    def copy(cache, sources, targets, count):
        def one(i, x):
            x = row_major(x)
            page = jax.lax.dynamic_slice_in_dim(x, sources[i], 1, 1)
            return row_major(jax.lax.dynamic_update_slice_in_dim(x, page, targets[i], 1))

        return jax.tree.map(lambda x: jax.lax.fori_loop(0, count, one, x), cache)

    pages = cache_axes(cache)
    inputs = pages, Axes(None), Axes(None), Axes()
    return over_mesh(copy, (cache, sources, targets, count), inputs, pages, rows=1, heads=cache.k.shape[2])
