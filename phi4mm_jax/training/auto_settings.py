"""Auto fields of a recipe, resolved by its data: batch sizes, and the trainable parameters."""

import dataclasses
from dataclasses import replace

import jax
from jax.sharding import Mesh

from phi4mm_jax.data.pipeline import measure_samples, without_augmentation
from phi4mm_jax.data.sizing import Divisors, check_reached, describe, propose_packing, propose_trainable
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.training.recipe import AUTO, Recipe
from phi4mm_jax.training.sharding import divisors


def has_auto_fields(recipe: Recipe) -> bool:
    """Return whether a field of a recipe is auto."""
    return recipe.data.packing is None or recipe.trainable == AUTO


def resolve_auto_fields(recipe: Recipe, processor: Processor, mesh: Mesh | None) -> tuple[Recipe, list[str]]:
    """Measure all samples, and resolve the recipe's auto fields.

    Returns:
        The recipe, and lines for the user: statistics of the data, and the settings that are taken or proposed.

    Raises:
        InputError: a sample cannot be used, or none has the media that the trainable parameters need.
    """
    sizes = measure_samples(recipe.data, processor)
    held_out = []
    if recipe.evaluation is not None:
        data = replace(without_augmentation(recipe.data), sources=recipe.evaluation.sources)
        held_out = measure_samples(data, processor)
    lines = [f"The data: {describe(sizes)}."]
    check_reached(sizes, recipe.trainable)
    rows, parts = divisors(mesh)
    packing = propose_packing(
        sizes, held_out, kind=recipe.data.kind, accumulate=recipe.accumulate,
        divisors=Divisors(rows, jax.process_count(), parts), context=processor.context,
    )  # fmt: skip
    settings = {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(packing).items()}
    listed = ", ".join(f"{name}: {str(x).lower()}" for name, x in settings.items())
    taken = "Taken" if recipe.data.packing is None else "Proposed"
    lines += [f'{taken} for these: "data.packing={{{listed}}}"']
    if recipe.trainable == AUTO:
        recipe = replace(recipe, trainable=propose_trainable(sizes))
        lines += [f"Trained on these: {', '.join(recipe.trainable)}"]
    if recipe.data.packing is None:
        recipe = replace(recipe, data=replace(recipe.data, packing=packing))
    return recipe, lines
