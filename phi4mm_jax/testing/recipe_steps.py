"""Recipes' training steps, as they stand, for the slices of TPUs that their head comments name.

A recipe says "# Topology: v5e:2x4" in a line of its own, or "# Topology: any" where it is for any machine.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from phi4mm_jax.adapters import NO_ADAPTER, index_of
from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.data.examples import Size
from phi4mm_jax.data.sizing import Divisors, propose_packing, propose_trainable
from phi4mm_jax.errors import InputError
from phi4mm_jax.mesh import mesh_of_sizes, training_mesh
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.phi4mm import abstract_variables
from phi4mm_jax.testing.abstract_variables import variables_on
from phi4mm_jax.testing.compiled import CHIPS
from phi4mm_jax.testing.training_steps import batch_shapes, compile_on, full_batch
from phi4mm_jax.training.flops import step_flops
from phi4mm_jax.training.optimizer import make_optimizer
from phi4mm_jax.training.recipe import AUTO, Recipe
from phi4mm_jax.training.sharding import check_divisible, divisors, split_trainable
from phi4mm_jax.training.step import Objective, Variables

ANY = "any"  # machine
STEPS = 1000
_SAMPLES = 4096  # of a large set, all alike; below, what one of them is
_KINDS = {
    "text": Size((512,), 0, 0, 0, NO_ADAPTER),
    "images": Size((2048,), 7, 0, 0, index_of("vision")),  # one of 1344 x 896: six crops and the global view
    "clips": Size((500,), 0, 1, 375, index_of("speech")),  # one of 30 s, with its transcript
}


class Shape(NamedTuple):
    """Shape of a recipe's step."""

    rows: int  # of a micro-batch
    length: int
    crops: int
    chunks: int
    accumulate: int


def topology_of(recipe: Path) -> str:
    """Return the topology that a recipe's head comment names, or "any".

    Raises:
        InputError: it names none, or one of chips that are not known.
    """
    found = re.search(r"^# Topology: ([^\s,;]+)", recipe.read_text(), re.MULTILINE)
    if found is None:
        raise InputError(f"{recipe}: names no topology; give its head a line such as '# Topology: v5e:2x4'")
    topology = found.group(1).rstrip(".")
    chip, _, sizes = topology.partition(":")
    if topology != ANY and not (chip in CHIPS and re.fullmatch(r"\d+(x\d+)+", sizes)):
        raise InputError(f"{topology}: expected a topology of {', '.join(CHIPS)}, such as v5e:2x4")
    return topology


def resolved_recipes(recipe: Recipe, chips: Sequence[Any], config: Phi4MMConfig) -> dict[str, Recipe]:
    """Return a recipe with its auto fields as a large set resolves them, by the kind of the set.

    One recipe, unless it trains what the media need: then one for text, images and clips each.
    """
    rows, parts = divisors(training_mesh(recipe.mesh, config, chips))

    def of(size: Size) -> Recipe:
        kind = recipe.data.kind
        size = size._replace(tokens=size.tokens * 2) if kind == "preferences" else size
        sizes = [size] * _SAMPLES
        packing = propose_packing(
            sizes, kind=kind, accumulate=recipe.accumulate, divisors=Divisors(rows, 1, parts),
            context=config.decoder.rope.max_length,
        )  # fmt: skip
        trainable = propose_trainable(sizes) if recipe.trainable == AUTO else recipe.trainable
        return replace(recipe, trainable=trainable, data=replace(recipe.data, packing=packing))

    if recipe.trainable == AUTO:
        return {f" on {kind}": of(size) for kind, size in _KINDS.items()}
    if recipe.data.packing is not None:
        return {"": recipe}
    trained = ",".join(recipe.trainable)
    return {"": of(_KINDS["images" if "vision" in trained else "clips" if "speech" in trained else "text"])}


def shape_of(recipe: Recipe) -> Shape:
    """Return the shape of a resolved recipe's step: its largest, of a packing with several sizes."""
    packing = recipe.data.sizes
    crops, chunks = max(packing.crops, default=0), max(packing.chunks, default=0)
    return Shape(packing.rows, packing.lengths[-1], crops, chunks, recipe.accumulate)


def compile_recipe(
    recipe: Recipe,
    objective: Callable[[Phi4MM, Recipe], Objective],
    add_reference_params: Callable[[Variables, Variables], Variables],
    config: Phi4MMConfig,
    chips: Sequence[Any],
) -> jax.stages.Compiled:
    """Compile the step of a resolved recipe for a slice's chips, as `train.sft` builds it.

    Args:
        objective, add_reference_params: of the `TrainingMethod`.

    Raises:
        InputError: the mesh, or the sizes of the batches, do not suit the chips.
    """
    mesh = training_mesh(recipe.mesh, config, chips) or mesh_of_sizes({"fsdp": 1}, chips)
    check_divisible(recipe.data.packing, mesh)
    module = Phi4MM(config, jnp.dtype(recipe.dtype), remat=recipe.remat)
    variables: Variables = unflatten_dict(variables_on(mesh, module, recipe.weights, recipe.trainable))
    trainable, frozen = split_trainable(variables, recipe.trainable, recipe.data.sizes, recipe.data.adapter)
    frozen |= jax.eval_shape(lambda trainable: add_reference_params({}, trainable), trainable)
    optimizer = make_optimizer(recipe.optimizer, STEPS, trainable)
    return compile_on(
        mesh, objective(module, recipe), optimizer, trainable, frozen, _batch(recipe, config), recipe.accumulate,
        recipe.dropout,
    )  # fmt: skip


def recipe_flops(recipe: Recipe, config: Phi4MMConfig) -> float:
    """Return the FLOP of a resolved recipe's step, without recomputation."""
    variables = nn.unbox(abstract_variables(Phi4MM(config)))
    trainable, _ = split_trainable(variables, recipe.trainable, recipe.data.sizes, recipe.data.adapter)
    batches = [full_batch(_batch(recipe, config))] * recipe.accumulate
    return step_flops(config, trainable, batches, reference=recipe.data.kind == "preferences")


def _batch(recipe: Recipe, config: Phi4MMConfig) -> TrainingBatch:
    packing, shape = recipe.data.sizes, shape_of(recipe)
    return batch_shapes(config, shape.rows, shape.length, shape.crops, shape.chunks, packing.chunk_tokens, packing.pack)
