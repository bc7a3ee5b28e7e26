"""Training steps of the speech adapter on rows of text, which benchmarks time."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.batch import NO_MEDIA, Batch, TrainingBatch
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.training.optimizer import OptimizerConfig, make_optimizer
from phi4mm_jax.training.param_filter import split
from phi4mm_jax.training.step import initial_state, supervised, train_step


def speech_adapter_step(
    module: Phi4MM,
    variables: dict[str, Any],
    tokens: Int[np.ndarray, "B T"],
    weights: Float[np.ndarray, "B T"],
    learning_rate: float = 1e-4,
) -> Callable[[], Float[Array, ""]]:
    """Return a function that takes a step, forward, backward, clipping and AdamW, and returns its loss.

    Args:
        variables: of a scanned model with both adapters.
        weights: of the targets, each the token after a position.
    """
    trainable, frozen = split(variables, ["lora_speech"], "trainable")
    frozen.pop("lora_vision")
    optimizer = make_optimizer(OptimizerConfig(learning_rate, 0, "constant"), 100, trainable)
    rows, length = tokens.shape
    whole, adapters = np.full(rows, length, np.int32), np.full(rows, ADAPTERS["speech"].index, np.int32)
    batch = Batch(tokens, whole, adapters, np.full_like(tokens, NO_MEDIA), None, None)
    batches = jax.tree.map(lambda x: x[None], TrainingBatch(batch, np.roll(tokens, -1, 1), weights))
    state = initial_state(trainable, optimizer)
    step = jax.jit(
        lambda state, frozen, batches: train_step(supervised(module), optimizer, state, frozen, batches, None),
        donate_argnums=0,
    )

    def one() -> Float[Array, ""]:
        nonlocal state
        state, metrics = step(state, frozen, batches)
        return metrics.loss

    return one
