"""Limits of the keys that a query may attend to, as every implementation takes them."""

from typing import NamedTuple

from jaxtyping import Array, Int


class Limits(NamedTuple):
    """Limits of each row, int32.

    Query t of row b attends to key s if s < kv_lengths[b], the ids of their segments are the same and, where
    attention is causal, s <= t + q_offset[b].
    """

    q_offset: Int[Array, " B"]
    kv_lengths: Int[Array, " B"]
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None  # of queries and of keys
