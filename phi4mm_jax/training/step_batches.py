"""Steps of a run: their number, and the micro-batches of each."""

import logging
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import jax
import numpy as np

from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.data.pipeline import TrainingData
from phi4mm_jax.errors import InputError
from phi4mm_jax.training.recipe import Recipe
from phi4mm_jax.utils.progress import progress_bar

_FEW_STEPS = 20  # the recipe `small` takes 24 or more of a set of eight samples or more
_log = logging.getLogger(__name__)


def count_steps(data: TrainingData, accumulate: int) -> int:
    """Return the number of steps of a new run.

    Raises:
        InputError: a sample cannot be used.
    """
    with progress_bar("Counting the batches") as show:
        return math.ceil(data.count_batches(show) / accumulate)


def warn_of_few_steps(recipe: Recipe, steps: int) -> None:
    """Log a warning if the data make so few steps that little can be learnt; none if the recipe asks for its steps.

    A step of AdamW changes a parameter by about the learning rate at most.
    """
    if recipe.data.steps is not None or steps >= _FEW_STEPS:
        return
    rate, packing = recipe.optimizer.learning_rate, recipe.data.packing
    rows = packing.rows if packing is not None else "auto"
    _log.warning(
        f"The run has {steps} steps, and a step changes a parameter by about the learning rate at most: it may learn "
        f"little. More of data.epochs (now {recipe.data.epochs}), a higher optimizer.learning_rate (now {rate:g}) or "
        f"smaller batches (data.packing.rows, now {rows}; accumulate, now {recipe.accumulate}) help."
    )


def count_resumed_steps(recipe: Recipe, data: TrainingData, step: int, saved: Mapping[str, Any]) -> int:
    """Return the number of steps of a resumed run: those done, and those of the remaining data.

    Counted from the data's position, not from their beginning: repaired files may be packed otherwise, and a partial
    last batch stays one when more epochs follow.

    Args:
        data: after `set_state`.
        step: the last one done.
        saved: state of the data that was saved after it, see `saved_data_state`.

    Raises:
        InputError: a sample cannot be used.
    """
    same_plans = same_files(data, saved) and saved["data"].get("hosts") == data.get_state()["data"]["hosts"]
    if same_plans and "total" in saved and saved.get("epochs") == recipe.data.epochs:
        return saved["total"] if recipe.data.steps is None else count_steps(data, recipe.accumulate)
    with progress_bar("Counting the batches that are left") as show:
        return step + math.ceil(data.count_remaining(show) / recipe.accumulate)


def saved_data_state(state: Mapping[str, Any], steps: int, recipe: Recipe) -> dict[str, Any]:
    """Return the data's part of a checkpoint: their state, and the inputs of the count of steps."""
    return {**state, "total": steps, "epochs": recipe.data.epochs}


def same_files(data: TrainingData, saved: Mapping[str, Any]) -> bool:
    """Return whether the data's files have the sizes that they had when a state was saved."""
    return saved["data"]["bytes"] == data.get_state()["data"]["bytes"]


def step_batches(data: Iterator[TrainingBatch], accumulate: int, steps: int) -> Iterator[list[TrainingBatch]]:
    """Yield the micro-batches of each of `steps` steps, or until the data end.

    A last step with fewer micro-batches is filled up with batches without targets.
    """
    for _ in range(steps):
        batches = list(islice(data, accumulate))
        if not batches:
            return
        empty = batches[-1]._replace(weights=np.zeros_like(batches[-1].weights))
        yield batches + [empty] * (accumulate - len(batches))


class StepIterator(Iterator[list[TrainingBatch]]):
    """Iterates over `step_batches`, and ends at a bad sample as at the end of the data, so that the run can save first.

    Of several hosts one alone may find a sample to be bad, and cannot save alone: there it is raised at once.

    Attributes:
        error: the bad sample's.
    """

    def __init__(self, data: Iterator[TrainingBatch], accumulate: int, steps: int):
        self.error: InputError | None = None
        self._batches = step_batches(data, accumulate, steps)

    def __next__(self) -> list[TrainingBatch]:
        try:
            return next(self._batches)
        except InputError as error:
            if jax.process_count() > 1:
                raise
            self.error = error
            raise StopIteration from error
