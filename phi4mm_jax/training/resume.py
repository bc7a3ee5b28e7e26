"""Resuming a run from its last checkpoint: state, data, number of steps. Stopping by SIGTERM is in preemption.py."""

from pathlib import Path
from typing import NamedTuple

import jax

from phi4mm_jax.data.pipeline import TrainingData
from phi4mm_jax.errors import InputError
from phi4mm_jax.training.checkpointing import Checkpoints
from phi4mm_jax.training.recipe import Recipe, load_recipe, resolved_as_before
from phi4mm_jax.training.run_folder import RECIPE, has_checkpoint
from phi4mm_jax.training.step import TrainState, abstract
from phi4mm_jax.training.step_batches import count_resumed_steps, same_files


class Resumed(NamedTuple):
    """Position from which a run starts or resumes."""

    state: TrainState
    step: int  # the last one done; 0 in a new run
    total_steps: int
    eval_pending: bool  # the evaluation that is due after `step` was interrupted
    messages: tuple[str, ...]  # for the user


def recipe_for_resume(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe, with the auto fields as an earlier process resolved them if the run has saved anything.

    Raises:
        InputError: what the folder's run has saved is of another recipe.
    """
    return resolved_as_before(recipe, folder / RECIPE) if has_checkpoint(folder) else recipe


def check_finished(recipe: Recipe, folder: Path) -> None:
    """Raise InputError where a finished run's recipe now names other data, which it would not be trained on."""
    trained, given = ([str(s.path) for s in r.data.sources] for r in (load_recipe(folder / RECIPE), recipe))
    if trained != given:
        raise InputError(
            f"{folder}: the run is finished, and was trained on {', '.join(trained)}; data.sources has "
            f"{', '.join(given)} now. Give another output to train on these"
        )


def restore(checkpoints: Checkpoints, state: TrainState, data: TrainingData, recipe: Recipe, steps: int) -> Resumed:
    """Restore the last checkpoint and the data's position; without a checkpoint, start a new run.

    Args:
        state: initial, and the shardings of a restored one, which takes its memory: it is deleted before.
        steps: of a new run.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        InputError: it is of other data.
    """
    step = checkpoints.last
    if step is None:
        return Resumed(state, 0, steps, False, ())
    like = abstract(state)
    jax.tree.map(lambda x: x.delete(), state)
    state, saved = checkpoints.restore(step, like)
    data.set_state(saved)
    steps = count_resumed_steps(recipe, data, step, saved)
    eval_pending = recipe.evaluates_after(step, steps) and checkpoints.score(step) is None
    messages = [f"Resuming after step {step} of {steps}."]
    if not same_files(data, saved):
        messages += [
            "The data's files have changed since; they have as many samples, which are assumed to be in the same order."
        ]
    return Resumed(state, step, steps, eval_pending, tuple(messages))
