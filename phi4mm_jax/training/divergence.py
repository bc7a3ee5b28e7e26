"""Checks during a run: divergence, and data that do not reach the trainable parameters."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from phi4mm_jax.errors import InputError
from phi4mm_jax.training.step import TrainState

_ZERO_STEPS = 10  # so many first steps without a gradient end a run


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


class ZeroGradientCheck:
    """Ends a run whose first steps have no gradient.

    Args:
        trainable: patterns of the trainable parameters.
        step: the last one before; only the first steps of a new run are checked.
        steps: of the run.
    """

    def __init__(self, trainable: Sequence[str], step: int, steps: int):
        self._trainable, self._max = trainable, min(_ZERO_STEPS, steps)
        self._count: int | None = 0 if step == 0 else None  # None once there was a gradient

    def observe(self, step: int, gradient_norm: float) -> None:
        """Observe a logged step.

        Raises:
            InputError: none of the first steps had a gradient.
        """
        if self._count is None:
            return
        self._count = self._count + 1 if gradient_norm == 0 else None
        if self._count == self._max:
            raise InputError(
                f"the gradients of all steps up to {step} are 0: the data do not reach the trainable parameters "
                f"({', '.join(self._trainable)}); an adapter needs samples with its media"
            )
