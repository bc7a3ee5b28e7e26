"""Limits of the keys that a query may attend to, as every implementation takes them; and numbers of its softmax."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int

MASKED = -1e30  # score of a masked pair; finite, so that a fully masked row has no NaN
LOG2_E = 1.4426950408889634  # softmax is computed to the base 2, which is what the hardware has


class Limits(NamedTuple):
    """Limits of each row, int32.

    Query t of row b attends to key s if s < kv_lengths[b], the ids of their segments are the same and, where
    attention is causal, s <= t + q_offset[b], or + q_offset[b, t] in plain XLA. What is known when a program is
    traced is a numpy array.
    """

    q_offset: Int[Any, " B"] | Int[Any, "B T"]
    kv_lengths: Int[Any, " B"]
    segments: tuple[Int[Any, "B T"], Int[Any, "B S"]] | None  # of queries, of keys; one array where they are equal

    @property
    def starts_at_zero(self) -> bool:
        """Return whether each row's first query is known to be at its first key."""
        return isinstance(self.q_offset, np.ndarray) and not self.q_offset.any()

    def takes_all(self, num_keys: int) -> bool:
        """Return whether all keys are known to be valid."""
        return isinstance(self.kv_lengths, np.ndarray) and bool((self.kv_lengths == num_keys).all())

    @property
    def key_mask(self) -> Bool[Array, "B S"] | None:
        """Keys that may be attended to, where the queries are known to be one segment; else None."""
        if self.segments is None or not isinstance(self.segments[0], np.ndarray) or self.segments[0].any():
            return None
        return self.segments[1] == 0
