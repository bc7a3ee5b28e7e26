"""Checks during a run: divergence, and data that do not reach the trainable parameters."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from phi4mm_jax.errors import InputError
from phi4mm_jax.training.step import TrainState

_ZERO_STEPS = 10  # so many first steps without a gradient end a run, at the next that is logged


@jax.jit
def _all_finite(state: TrainState) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state)]))


def check_finite(step: int, values: Mapping[str, float], state: TrainState | None = None) -> None:
    """Raise InputError if a step has diverged, by its loss and gradients, and by its state where that is given."""
    if not all(math.isfinite(values[name]) for name in ("loss", "gradient_norm")):
        found = f"the loss of step {step} is {values['loss']}, its gradients' norm {values['gradient_norm']}"
    elif state is not None and not bool(_all_finite(state)):
        found = f"step {step} has left trainable parameters or optimizer moments that are not finite"
    else:
        return
    raise InputError(
        f"{found}: the run has diverged, and nothing of this step was saved. Resume from the last checkpoint with a "
        "lower optimizer.learning_rate, or clip"
    )


def check_evaluated(step: int, values: Mapping[str, float]) -> None:
    """Raise InputError if an evaluation after a step has a value that is not finite."""
    if unbounded := [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]:
        raise InputError(
            f"the evaluation after step {step} gave {', '.join(unbounded)}: the run has diverged. Remove the "
            "checkpoints since it did, then resume with a lower optimizer.learning_rate, or clip"
        )


class ZeroGradientCheck:
    """Ends a run whose first steps have no gradient.

    Args:
        trainable: patterns of the trainable parameters.
        step: the last one before; only the first steps of a new run are checked.
        steps: of the run.
    """

    def __init__(self, trainable: Sequence[str], step: int, steps: int):
        self._trainable, self._steps = trainable, min(_ZERO_STEPS, steps)
        self._had_gradient = step > 0

    def observe(self, step: int, gradient_norm: float) -> None:
        """Observe a logged step, which need not be every one.

        Raises:
            InputError: none of the first steps had a gradient.
        """
        self._had_gradient |= gradient_norm != 0
        if not self._had_gradient and step >= self._steps:
            raise InputError(
                f"the gradients of all logged steps up to {step} are 0: the data do not reach the trainable parameters "
                f"({', '.join(self._trainable)}); an adapter needs samples with its media"
            )
