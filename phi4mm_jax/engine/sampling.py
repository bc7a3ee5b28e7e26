"""Sampling of the next token, on the device, each row with its own settings."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from phi4mm_jax.errors import InputError
from phi4mm_jax.mesh import vocabulary_parts
from phi4mm_jax.utils.checks import is_number, is_whole

_GREEDY = 1e-5  # below this temperature float32 sampling equals argmax


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Filters may be combined; each applies to the tokens that the ones before it left.

        Sampling()                                         # greedy
        Sampling(temperature=0.7, top_p=0.9)               # seeded by the request itself
        Sampling(temperature=1.0, min_p=0.05, seed=7)      # seed 7, whatever the request

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: sample from this many likeliest tokens; 0 from all, and so does -1, as in vLLM.
        top_p: sample from the fewest tokens whose probabilities reach this (arXiv:1904.09751); 1 from all.
        min_p: drop tokens less likely than this fraction of the likeliest's probability (arXiv:2407.01082); 0 none.
        repetition_penalty: divides positive logits of tokens that the sequence has, and multiplies negative ones
            (arXiv:1909.05858); 1 changes nothing.
        seed: of the random generator. By default it follows from the request (see `for_identity`): different requests
            sample independently, and a request samples the same whenever and beside whatever it is submitted.
        stream: tells apart requests that share a seed; by default 0 where there is a seed.

    Raises:
        InputError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stream: int | None = None

    def __post_init__(self):
        def check(name: str, valid: bool, expected: str) -> None:
            if not valid:
                raise InputError(f"{name} is {getattr(self, name)!r:.40}; expected {expected}")

        check("temperature", 0.0 <= _real(self.temperature) <= 1e30, "0 (greedy) or a positive number")
        check("top_k", is_whole(self.top_k, -1, 2**31 - 1), "0 or -1 (off), or a whole number below 2**31")
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        check("top_p", 0.0 < _real(self.top_p) <= 1.0, "a number above 0, at most 1 (off)")
        check("min_p", 0.0 <= _real(self.min_p) <= 1.0, "a number from 0 (off) to 1")
        check(
            "repetition_penalty", 1e-3 <= _real(self.repetition_penalty) <= 1e3, "a number from 0.001 to 1000; 1 is off"
        )
        for name in ("seed", "stream"):
            value = getattr(self, name)
            check(name, value is None or is_whole(value, 0, 2**31 - 1), "a whole number from 0 to 2**31 - 1")

    def for_identity(self, identity: bytes) -> "Sampling":
        """Return these settings with a seed and a stream from a request's identity, unless either is given."""
        if self.seed is not None or self.stream is not None:
            return self
        digest = hashlib.blake2b(identity, digest_size=8).digest()
        seed, stream = (int.from_bytes(half, "little") & 0x7FFFFFFF for half in (digest[:4], digest[4:]))
        return replace(self, seed=seed, stream=stream)


class SamplingRows(NamedTuple):
    """Settings of B rows."""

    temperature: Float[Any, " B"]
    top_k: Int[Any, " B"]
    top_p: Float[Any, " B"]
    min_p: Float[Any, " B"]
    repetition_penalty: Float[Any, " B"]
    seed: Int[Any, " B"]
    stream: Int[Any, " B"]

    @classmethod
    def of(cls, settings: Sequence[Sampling]) -> "SamplingRows":
        def column(name: str, dtype: type) -> np.ndarray:
            return np.asarray([getattr(s, name) or 0 for s in settings], dtype)

        reals = {n: column(n, np.float32) for n in ("temperature", "min_p", "repetition_penalty")}
        wholes = {n: column(n, np.int32) for n in ("top_k", "seed", "stream")}
        top_p = np.maximum(column("top_p", np.float64), 1e-30)  # positive in float32, too, so that one token is kept
        return cls(**reals, **wholes, top_p=top_p.astype(np.float32))


def seeded_by_request(settings: Sampling) -> bool:
    """Return whether the seed follows from the request itself: it samples, and has neither seed nor stream."""
    return settings.temperature != 0 and settings.seed is None and settings.stream is None


def _real(value: Any) -> float:
    """Convert to float; NaN, which fails every comparison, where it is not a number."""
    try:
        return float(value) if is_number(value) else float("nan")
    except OverflowError:
        return float("inf")


@jax.named_scope("sampling")
def sample(
    logits: Float[Array, "B V"],
    positions: Int[Array, " B"],
    rows: SamplingRows,
    token_seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """Sample one token per row.

    The result depends on a row's logits, settings and position, never on other rows. Filters that no row asks for are
    not computed.

    Args:
        positions: number of tokens generated before, per row.
        token_seen: the tokens in each row's sequence, where a row may have a repetition penalty.
    """
    if token_seen is not None:
        penalty = rows.repetition_penalty[:, None]
        logits = jax.lax.cond(
            (rows.repetition_penalty != 1.0).any(),
            lambda x: jnp.where(token_seen, jnp.where(x > 0, x / penalty, x * penalty), x),
            lambda x: x,
            logits,
        )
    likeliest = jnp.argmax(logits, -1).astype(jnp.int32)
    greedy = rows.temperature < _GREEDY

    def draw() -> Int[Array, " B"]:
        scaled = logits / jnp.where(greedy, 1.0, rows.temperature)[:, None]
        restricted = (rows.top_k > 0) | (rows.top_p < 1.0) | (rows.min_p > 0.0)
        scaled = jax.lax.cond(
            restricted.any(), lambda x: restrict(x, rows.top_k, rows.top_p, rows.min_p), lambda x: x, scaled
        )
        return jnp.where(greedy, likeliest, jax.vmap(_draw)(scaled, rows.seed, rows.stream, positions))

    return jax.lax.cond(greedy.all(), lambda: likeliest, draw)


def _draw(logits: Float[Array, " V"], seed, stream, position) -> Int[Array, ""]:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), position)
    return jax.random.categorical(key, logits).astype(jnp.int32)


@jax.named_scope("grammar")
def restrict_to_allowed(logits: Float[Array, "B V"], allowed: Int[Array, "B W"]) -> Float[Array, "B V"]:
    """Set the logits of tokens that are not allowed to -inf.

    Args:
        allowed: a bit for each token, the first token's lowest in the first of 32-bit words.
    """
    tokens = jnp.arange(logits.shape[-1])
    bits = (allowed[:, tokens // 32] >> (tokens % 32)) & 1  # a gather, so that each device makes its own part
    return jnp.where(bits == 1, logits, -jnp.inf)


def restrict_if_asked(
    logits: Float[Array, "B V"], allowed: Int[Array, "B W"] | None, asked: Bool[Array, ""] | None
) -> Float[Array, "B V"]:
    """Call `restrict_to_allowed` where any row has a grammar; compute nothing where none has, or `allowed` is None."""
    if allowed is None:
        return logits
    return jax.lax.cond(asked, lambda x: restrict_to_allowed(x, allowed), lambda x: x, logits)


def restrict(
    logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"], min_p: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Apply the top-k, top-p and min-p filters: set dropped tokens to -inf; ties with the last kept one are kept.

    Nothing is sorted, and on a mesh no logits are gathered: each device has the sums of its own part of the vocabulary.
    """
    keys = _order_keys(logits)
    kept = keys >= _cut(keys, jnp.ones_like(logits), jnp.where(top_k > 0, top_k.astype(jnp.float32), jnp.inf))
    weights = jnp.where(kept, jnp.exp(logits - logits.max(-1, keepdims=True)), 0.0)
    kept &= keys >= _cut(keys, weights, jnp.where(top_p < 1.0, top_p * weights.sum(-1), jnp.inf))
    return jnp.where(kept & (weights >= min_p[:, None]), logits, -jnp.inf)


def _order_keys(x: Float[Array, "B V"]) -> UInt[Array, "B V"]:
    """Return unsigned numbers that compare as these float32 do."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return bits ^ jnp.where(bits >> 31 == 1, jnp.uint32(0xFFFFFFFF), jnp.uint32(0x80000000))


def _cut(keys: UInt[Array, "B V"], weights: Float[Array, "B V"], limits: Float[Array, " B"]) -> UInt[Array, "B 1"]:
    """Find the least key such that all greater ones weigh less than the limit, 2 of its bits at a time."""

    def digit(i, cut):
        shift = (30 - 2 * i).astype(jnp.uint32)
        digits = jnp.arange(1, 4, dtype=jnp.uint32)[:, None]
        tops = cut | ((digits << shift) - 1)  # (3, B), the greatest keys of the digits 0 to 2
        heavy = jnp.where(keys > tops[..., None], weights, 0.0).sum(-1) >= limits
        return cut | (heavy.sum(0).astype(jnp.uint32) << shift)

    return jax.lax.fori_loop(0, 16, digit, jnp.zeros(len(keys), jnp.uint32))[:, None]


def top_k(logits: Float[Array, "R V"], count: int) -> tuple[Float[Array, "R C"], Int[Array, "R C"]]:
    """Return the greatest logits and their tokens: of each device's part of the vocabulary first, and then of all."""
    parts = vocabulary_parts(logits.shape[-1])
    size = logits.shape[-1] // parts
    values, tokens = jax.lax.top_k(logits.reshape(-1, parts, size), min(count, size))  # (R, parts, C)
    tokens += size * jnp.arange(parts)[:, None]
    values, order = jax.lax.top_k(values.reshape(len(logits), -1), count)
    return values, jnp.take_along_axis(tokens.reshape(len(logits), -1), order, 1)
