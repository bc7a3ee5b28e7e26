"""Which keys a query may attend to, as every implementation takes it."""

from typing import NamedTuple

from jaxtyping import Array, Int


class Limits(NamedTuple):
    """Query t of row b attends to key s if s < kv_lengths[b], their segments are the same and, where attention is
    causal, s <= t + q_offset[b]. int32 throughout; without segments both are None."""

    q_offset: Int[Array, " B"]
    kv_lengths: Int[Array, " B"]
    q_segments: Int[Array, "B T"] | None
    kv_segments: Int[Array, "B S"] | None
