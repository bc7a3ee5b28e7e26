"""What the programs of training have in common: their arguments, and the dry run."""

import argparse
from collections.abc import Callable
from itertools import groupby
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.data.pipeline import Kind
from phi4mm_jax.errors import InputError
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.training.loop import Run, compiled_step, init_train_state, place, prepare, train
from phi4mm_jax.training.optimizer import make_optimizer
from phi4mm_jax.training.recipe import Recipe, load_recipe
from phi4mm_jax.training.step import Objective, Variables, dropout_key

_GIB = 2**30


def parse_arguments(program: str, description: str | None, kind: Kind) -> tuple[argparse.Namespace, Recipe]:
    """The arguments, and the recipe that they name.

    Raises:
        InputError: the recipe cannot be used, or its data are of another kind.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change")
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained, its memory, a batch; end")
    arguments = parser.parse_intermixed_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.data.kind != kind:
        raise InputError(f"{arguments.recipe}: data.kind is {recipe.data.kind!r}; {program} needs {kind!r}")
    return arguments, recipe


def start(arguments: argparse.Namespace, recipe: Recipe, objective_of: Callable[[Phi4MM], Objective]) -> int:
    """Train, or show what would be; returns the program's status."""
    run = prepare(recipe, objective_of, propose=arguments.dry_run)
    recipe = run.recipe
    if not arguments.dry_run:
        return train(run)
    batch = next(run.data)
    print(trainable_table(run.trainable))
    print(f"\n{run.steps} steps of {recipe.accumulate} micro-batches.\n")
    print(memory(run, batch))
    print(f"\nThe first batch:\n{shown(run, batch)}")
    run.data.close()
    return 0


def trainable_table(trainable: Variables) -> str:
    """The trained parameters, a line each."""
    flat: dict[Any, Any] = flatten_dict(trainable)
    names = {"/".join(path): x for path, x in flat.items()}
    width = max(map(len, names))
    lines = [f"{name:{width}}  {x.shape!s:24} {x.size:>15,}" for name, x in sorted(names.items())]
    return "\n".join([*lines, f"{'all':{width}}  {'':24} {sum(x.size for x in flat.values()):>15,}"])


def memory(run: Run, batch: TrainingBatch) -> str:
    """What a step takes of each device, as its compiled program says."""
    optimizer = make_optimizer(run.recipe.optimizer, run.steps, run.trainable)
    state = init_train_state(run, optimizer)
    batches = place([batch] * run.recipe.accumulate, mesh=run.mesh)
    step: Any = compiled_step(run, optimizer, state)
    found = step.lower(state, run.frozen, batches, dropout_key(run.recipe.seed)).compile().memory_analysis()
    share = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(run.frozen))
    return (
        f"Each device holds {found.argument_size_in_bytes / _GIB:.2f} GiB ({share / _GIB:.2f} of frozen parameters; "
        f"trained ones, optimizer, batch), and a step needs {found.temp_size_in_bytes / _GIB:.2f} GiB besides."
    )


def shown(run: Run, batch: TrainingBatch) -> str:
    """A batch's shapes, and its first row as text, what carries loss in brackets."""
    inner = batch.batch
    lines = [f"{name} {x.shape}" for name, x in inner._asdict().items() if isinstance(x, np.ndarray)]
    lines += [f"crops {inner.images.crops.shape}"] if inner.images is not None else []
    lines += [f"frames of clips {inner.audio.frames.shape}"] if inner.audio is not None else []
    filled = inner.lengths.sum() / inner.tokens.size
    lines += [f"{filled:.0%} of the positions are filled; {np.count_nonzero(batch.weights)} targets carry loss"]
    return "\n".join([*lines, "", _text(run, batch)])


def _text(run: Run, batch: TrainingBatch) -> str:
    length, config = int(batch.batch.lengths[0]), run.model.config
    tokens = batch.batch.tokens[0, :length].tolist()
    learnt = [False, *(batch.weights[0, : max(length - 1, 0)] > 0).tolist()]
    media = (config.image_token_id, config.audio_token_id)
    pieces = []
    for (medium, carries), places in groupby(range(length), lambda i: (tokens[i] in media, learnt[i])):
        own = [tokens[i] for i in places]
        text = f"<{len(own)} media tokens>" if medium else run.model.processor.tokenizer.decode(own)
        pieces.append(f"[[{text}]]" if carries else text)
    return "".join(pieces)
