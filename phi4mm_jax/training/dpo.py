"""Direct preference optimization (DPO, arXiv:2305.18290): the objective of pairs of a chosen and a rejected answer."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.errors import InputError
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.training.losses import LossConfig
from phi4mm_jax.training.step import LossStats, Objective, Variables, losses_of


@dataclass(frozen=True)
class DPOConfig:
    """Settings of the objective.

    Attributes:
        beta: strength of the KL penalty to the reference.
        label_smoothing: assumed fraction of pairs with swapped labels.

    Raises:
        InputError: a value out of range.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self):
        if not self.beta > 0:
            raise InputError(f"beta is {self.beta!r}; expected a positive number")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise InputError(f"label_smoothing is {self.label_smoothing!r}; expected a number from 0 to below 0.5")


REFERENCE = "reference"  # among the frozen parameters: the trainable ones before the first step


def preference(model: Phi4MM, config: DPOConfig) -> Objective:
    """Return the DPO objective of batches whose rows are pairs, the chosen answer before the rejected one.

    The frozen parameters include the reference, see `with_reference`.

    In `LossStats`, weight is the number of pairs, correct those with a positive reward margin, and log_probability the
    sum of the reward margins.
    """

    def objective(trainable: Variables, frozen: Variables, batch: TrainingBatch, key: Array | None):
        # The reference has no dropout; the policy does.
        others = without_reference(frozen)
        policy = answer_log_probability(model, trainable, others, batch, key)
        fixed = jax.lax.stop_gradient(answer_log_probability(model, frozen[REFERENCE], others, batch, None))
        gains = (policy - fixed).reshape(-1, 2)
        margins = config.beta * (gains[:, 0] - gains[:, 1])  # (pairs,)
        share = config.label_smoothing
        losses = -(1.0 - share) * jax.nn.log_sigmoid(margins) - share * jax.nn.log_sigmoid(-margins)
        pairs = jnp.asarray(batch.weights).reshape(len(losses), -1).any(1).astype(jnp.float32)
        total, correct, margin = (jnp.sum(x * pairs) for x in (losses, margins > 0, margins))
        return total, LossStats(total, pairs.sum(), margin, correct)

    return objective


def with_reference(frozen: Variables, trainable: Variables) -> Variables:
    """Return the frozen parameters and the reference: a copy, since the trainable ones are donated to the step."""
    return frozen | {REFERENCE: jax.tree.map(jnp.copy, trainable)}


def without_reference(frozen: Variables) -> Variables:
    """Return the frozen parameters without the reference."""
    return {name: value for name, value in frozen.items() if name != REFERENCE}


def answer_log_probability(
    model: Phi4MM, trainable: Variables, frozen: Variables, batch: TrainingBatch, key: Array | None
) -> Float[Array, " B"]:
    """Return the log-probability of each row's answer."""
    return -losses_of(model, trainable, frozen, batch, LossConfig(), key).loss.sum(1)
