"""Resuming a run: the state, the data and the number of steps after its last checkpoint."""

from pathlib import Path
from typing import NamedTuple

from phi4mm_jax.data.pipeline import TrainingData
from phi4mm_jax.training.checkpointing import Checkpoints
from phi4mm_jax.training.recipe import Recipe, resolved_as_before
from phi4mm_jax.training.run_folder import CHECKPOINTS, RECIPE
from phi4mm_jax.training.step import TrainState
from phi4mm_jax.training.step_batches import count_resumed_steps, same_files


class Resumed(NamedTuple):
    """Place at which a run continues."""

    state: TrainState
    step: int  # the last one that was done
    steps: int  # of the whole run
    unscored: bool  # the evaluation of this state was cut short
    messages: tuple[str, ...]  # for the user


def settled_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with what an earlier process has settled by the data, where the run has begun.

    Raises:
        InputError: the run in the folder was begun with another recipe.
    """
    began = (folder / RECIPE).exists() and (folder / CHECKPOINTS).exists()
    return resolved_as_before(recipe, folder / RECIPE) if began else recipe


def restore(checkpoints: Checkpoints, state: TrainState, data: TrainingData, recipe: Recipe, steps: int) -> Resumed:
    """Restore the last checkpoint, and set the data to where they were; a run without one begins.

    Args:
        state: the first one, whose shardings the restored one takes.
        steps: of the run if it begins.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        InputError: it is of other data.
    """
    step = checkpoints.last
    if step is None:
        return Resumed(state, 0, steps, False, ())
    state, saved = checkpoints.restore(step, state)
    data.set_state(saved)
    steps = count_resumed_steps(recipe, data, step, saved)
    unscored = recipe.evaluates_after(step, steps) and checkpoints.score(step) is None
    messages = [f"Resuming after step {step} of {steps}."]
    if not same_files(data, saved):
        messages += [
            "The data's files have changed since; they have as many samples, and each is taken to be as it was."
        ]
    return Resumed(state, step, steps, unscored, tuple(messages))
