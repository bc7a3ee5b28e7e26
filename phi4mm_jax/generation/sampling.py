"""The choice of the next token."""

import numbers
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from phi4mm_jax.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 restrict nothing. Both restrictions may be given: k, then p."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not _is_real(self.temperature) or not 0.0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature!r}; expected 0 (greedy) or a positive number")
        if not is_whole(self.top_k) or self.top_k < 0:
            raise InputError(f"top_k is {self.top_k!r}; expected 0 (off) or a positive whole number")
        if not _is_real(self.top_p) or not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p is {self.top_p!r}; expected a number above 0, at most 1 (off)")


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, of Python or numpy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def sample(
    logits: Float[Array, "B V"], seed: Int[Array, ""], positions: Int[Array, " B"], sampling: Sampling
) -> Int[Array, " B"]:
    """One token a row. A row's draw depends on the seed, the row's place in the batch and the token's position."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = restrict(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    key = jax.random.key(seed)
    rows = jnp.arange(len(logits))
    keys = jax.vmap(lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position))(rows, positions)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def restrict(logits: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """-inf outside of the k likeliest tokens, and outside of the fewest whose probabilities reach p.

    Nucleus sampling: arXiv:1904.09751. Tokens that tie with the last one kept are kept too.
    """
    if not 0 < top_k < logits.shape[-1] and top_p >= 1.0:
        return logits
    ordered = jax.lax.top_k(logits, top_k if 0 < top_k < logits.shape[-1] else logits.shape[-1])[0]
    probabilities = jax.nn.softmax(ordered, -1)
    before = jnp.cumsum(probabilities, -1) - probabilities  # of the tokens likelier than this one
    kept = jnp.where(before < top_p, ordered, jnp.inf)
    return jnp.where(logits >= kept.min(-1, keepdims=True), logits, -jnp.inf)
