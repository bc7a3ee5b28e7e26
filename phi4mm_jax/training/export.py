"""Export of a run's trained parameters as a checkpoint in PyTorch's layouts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from flax.traverse_util import flatten_dict

from phi4mm_jax.adapters import adapter_indices
from phi4mm_jax.checkpoint.convert import to_torch
from phi4mm_jax.checkpoint.pytorch import Layout
from phi4mm_jax.errors import InputError
from phi4mm_jax.training.base import check_base
from phi4mm_jax.training.checkpointing import Checkpoints
from phi4mm_jax.training.metrics_log import read_log
from phi4mm_jax.training.recipe import Recipe, load_recipe, recipe_settings
from phi4mm_jax.training.run_folder import CHECKPOINTS, RECIPE
from phi4mm_jax.utils.paths import local_path


def export(
    run: str | Path,
    destination: str | Path,
    layout: Layout,
    *,
    step: str | int = "best",
    adapters_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the run's base model with the trained parameters in place of its own, in its dtype, and a model card.

    Args:
        run: the recipe's output.
        step: of the checkpoint: its number, "last" or "best".
        destination, layout, adapters_only, progress: as in `to_torch`.

    Returns:
        The step.

    Raises:
        InputError: the run has no such checkpoint, has trained more than adapters where they alone are asked for, or
            was begun with another base than there is now.
        CheckpointError: as `to_torch`; or the run's checkpoint cannot be read.
    """
    run = local_path(run)
    if not (run / RECIPE).is_file():
        cause = f"has no {RECIPE}, and is not a run's folder" if run.exists() else "there is no such folder"
        raise InputError(f"{run}: {cause}; give the output of a recipe, as train.sft names it when it begins")
    recipe = load_recipe(run / RECIPE)
    higher_is_better = recipe.evaluation is not None and recipe.evaluation.higher_is_better
    checkpoints = Checkpoints(run / CHECKPOINTS, None, higher_is_better, read_only=True)
    named = {"best": checkpoints.best, "last": checkpoints.last}
    number = named[str(step)] if str(step) in named else int(step) if str(step).isdigit() else None
    if number not in checkpoints.steps:
        found = ", ".join(map(str, checkpoints.steps)) or "none"
        raise InputError(f"{run}: has no checkpoint {step!r}; those that it has: {found}")
    trained = {path: np.asarray(x) for path, x in flatten_dict(checkpoints.trained(number)).items()}
    if adapters_only and (others := sorted("/".join(p) for p in trained if p[0] not in adapter_indices())):
        raise InputError(
            f"{run}: has trained {others[0]} and {len(others) - 1} more besides adapters, which adapters alone would "
            "leave out; export the whole checkpoint"
        )
    if not adapters_only:
        check_base(recipe.model, run, "export what was trained alone, if it is adapters (adapters_only)")
    card = model_card(Path(destination).name, run, recipe, number, sorted({path[0] for path in trained}), adapters_only)
    to_torch(
        recipe.model, destination, layout, adapters_only=adapters_only, fresh_adapters=recipe.fresh_adapters,
        trained=trained, card=card, progress=progress,
    )  # fmt: skip
    return number


def model_card(name: str, run: Path, recipe: Recipe, step: int, collections: Sequence[str], adapters_only: bool) -> str:
    """Return the README.md of an export: base, data, recipe, and the metrics at its step.

    Args:
        name: of the export.
        run: the folder with the run's metrics.
        collections: "params" or adapters that have trained parameters.
        adapters_only: whether the export needs the base beside it.
    """
    sources = [str(source.path) for source in recipe.data.sources]
    lines = [line for line in read_log(run) if line["step"] <= step]
    losses = [line["loss"] for line in lines if "loss" in line]
    scores = {k: v for line in lines if line["step"] == step for k, v in line.items() if k.startswith("evaluation_")}
    rows = {
        "base model": recipe.model,
        "trained": f"{', '.join(collections)}, by the patterns {', '.join(recipe.trainable)}",
        "data": ", ".join(sources),
        "steps": str(step),
        **({"training loss, first and last": f"{losses[0]:.4f}, {losses[-1]:.4f}"} if losses else {}),
        **{name.replace("_", " "): f"{score:.4f}" for name, score in scores.items()},
    }
    if recipe.evaluation is not None:
        rows["evaluated on"] = ", ".join(str(source.path) for source in recipe.evaluation.sources)
    settings = yaml.safe_dump(recipe_settings(recipe), sort_keys=False)
    header: dict[str, Any] = {"library_name": "peft" if adapters_only else "transformers"}
    if not local_path(recipe.model).exists():  # a repository on the Hub
        header |= {"base_model": recipe.model.partition("@")[0]}
    return "\n".join([
        "---", yaml.safe_dump(header, sort_keys=False) + "---", "", f"# {name}", "",
        "Trained with phi4mm-jax. The base model's card and licence hold for what was not trained.", "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), "",
        "The recipe:", "", f"```yaml\n{settings}```", "",
    ])  # fmt: skip
