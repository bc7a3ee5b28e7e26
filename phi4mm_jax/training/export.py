"""What a run has trained, as a checkpoint in PyTorch's layouts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from phi4mm_jax.checkpoint.convert import to_torch
from phi4mm_jax.checkpoint.pytorch import Layout
from phi4mm_jax.errors import InputError
from phi4mm_jax.model.lora import ADAPTERS
from phi4mm_jax.training.checkpoints import Checkpoints
from phi4mm_jax.training.loop import CHECKPOINTS, RECIPE
from phi4mm_jax.training.recipe import load_recipe


def export(
    run: str | Path,
    destination: str | Path,
    layout: Layout,
    *,
    step: str | int = "best",
    adapters_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Write the model that the run began with, with what was trained in place of its own, in its dtype.

    Args:
        run: the recipe's output.
        step: of the checkpoint: its number, "last" or "best".
        The others are those of `to_torch`.

    Returns:
        The step.

    Raises:
        InputError: the run has no such checkpoint, or has trained more than adapters where they alone are asked for.
        CheckpointError: as `to_torch`; or the run's checkpoint cannot be read.
    """
    run = Path(run)
    recipe = load_recipe(run / RECIPE)
    greater = recipe.evaluation is not None and recipe.evaluation.greater
    checkpoints = Checkpoints(run / CHECKPOINTS, None, greater, read_only=True)
    named = {"best": checkpoints.best, "last": checkpoints.last}
    number = named[str(step)] if str(step) in named else int(step) if str(step).isdigit() else None
    if number not in checkpoints.steps:
        found = ", ".join(map(str, checkpoints.steps)) or "none"
        raise InputError(f"{run}: has no checkpoint {step!r}; those that it has: {found}")
    trained = {path: np.asarray(x) for path, x in flatten_dict(checkpoints.trained(number)).items()}
    if adapters_only and (others := sorted("/".join(p) for p in trained if p[0] not in ADAPTERS)):
        raise InputError(
            f"{run}: has trained {others[0]} and {len(others) - 1} more besides adapters, which adapters alone would "
            "leave out; export the whole checkpoint"
        )
    to_torch(
        recipe.model, destination, layout, adapters_only=adapters_only, fresh_adapters=recipe.fresh_adapters,
        trained=trained, progress=progress, say=say,
    )  # fmt: skip
    return number
