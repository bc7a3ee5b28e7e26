"""What a training step takes: a batch, and what the model should have said."""

from typing import Any, NamedTuple

from jaxtyping import Float, Int

from phi4mm_jax.processing.batch import Batch


class TrainingBatch(NamedTuple):
    """B rows of T positions; a row holds one sample, or several after one another, which do not see each other."""

    batch: Batch
    targets: Int[Any, "B T"]  # the token that follows each position in its sample; any where the weight is 0
    weights: Float[Any, "B T"]  # how much a position's loss counts: 1 where its target is part of an answer, else 0
