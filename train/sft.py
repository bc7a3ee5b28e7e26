"""Train on answers that are given.

    python -m train.sft RECIPE [key=value]... [--dry-run]
        [--coordinator HOST:PORT --num-processes N --process-id I]

RECIPE is a YAML file, such as those in train/recipes; key=value overrides a setting: optimizer.learning_rate=1e-4.
Where the recipe's output has checkpoints, the run resumes from the last one. SIGTERM and Ctrl-C save, then end.
Of several hosts each runs the same command; TPU VMs, GKE and SLURM say which one it is, elsewhere the options do.
"""

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax

from phi4mm_jax.api import load
from phi4mm_jax.checkpoint.hub import local_folder
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.data.pipeline import TrainingData
from phi4mm_jax.errors import InputError
from phi4mm_jax.mesh import training_mesh
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.training.arguments import parse_arguments
from phi4mm_jax.training.auto_settings import is_open, settle_auto
from phi4mm_jax.training.checkpointing import Checkpoints
from phi4mm_jax.training.divergence import ZeroGradientCheck, check_finite
from phi4mm_jax.training.dry_run import describe_run
from phi4mm_jax.training.evaluation import Evaluation
from phi4mm_jax.training.hosts import (
    check_agreement,
    check_shared,
    connected_hosts,
    coordination_of,
    is_first,
    say,
)
from phi4mm_jax.training.metrics_log import MetricsLog
from phi4mm_jax.training.optimizer import learning_rates, make_optimizer
from phi4mm_jax.training.preemption import STOPPED, PreemptionSignal
from phi4mm_jax.training.recipe import Recipe, recipe_settings, save_recipe
from phi4mm_jax.training.report import REPORT, draw_losses, run_facts, write_report
from phi4mm_jax.training.resume import restore, settled_recipe
from phi4mm_jax.training.run_folder import CHECKPOINTS, RECIPE, check_folder, exclusive_lock
from phi4mm_jax.training.sharding import (
    check_divisible,
    compile_step,
    init_train_state,
    order_by_host,
    shard_batches,
    split_trainable,
)
from phi4mm_jax.training.step import Objective, Variables, dropout_key, supervised
from phi4mm_jax.training.step_batches import count_steps, saved_data_state, step_batches
from phi4mm_jax.training.step_log import StepLog, metric_values
from phi4mm_jax.training.throughput import Throughput
from phi4mm_jax.utils.cli import cli_entrypoint, command_of
from phi4mm_jax.utils.paths import local_path
from phi4mm_jax.utils.profiling import Profile
from phi4mm_jax.utils.progress import progress_bar, step_bar

PROFILED_STEPS = 3


class Method(NamedTuple):
    """Way of training: what is minimised, and which parameters are frozen besides the model's."""

    objective: Callable[[Phi4MM, Recipe], Objective]
    extend_frozen: Callable[[Variables, Variables], Variables] = lambda frozen, trainable: frozen


SFT = Method(lambda module, recipe: supervised(module, recipe.loss))


def train(recipe: Recipe, method: Method = SFT, dry_run: bool = False, profile: Path | None = None) -> int:
    """Train to the last step, or until SIGTERM or Ctrl-C: then save, and end; the same call resumes from there.

    Args:
        dry_run: show what would be trained, and write nothing.
        profile: a folder for a profile of some steps.

    Returns:
        The status to end the program with.

    Raises:
        InputError, CheckpointError, ConfigError: something in the recipe, the data or the checkpoint cannot be used,
            or the run has diverged.
    """
    folder = local_path(recipe.output)
    check_folder(folder)
    check_shared(folder)
    recipe = settled_recipe(recipe, folder)
    check_agreement("the recipes", recipe_settings(recipe))

    # ---- model
    mesh = order_by_host(training_mesh(recipe.mesh, Phi4MMConfig.from_folder(local_folder(recipe.model))))
    check_divisible(recipe.data.packing, mesh)
    with progress_bar("Reading the weights", size=True) as progress:
        model = load(
            recipe.model, recipe.dtype, mesh, scan=True, fresh_adapters=recipe.fresh_adapters, progress=progress
        )
    module = Phi4MM(model.config, model.module.dtype, remat=recipe.remat)
    objective = method.objective(module, recipe)

    # ---- data
    if is_open(recipe) or dry_run:
        with progress_bar("Measuring the samples"):
            recipe, lines = settle_auto(recipe, model.processor, mesh)
        say(*lines)
    data = TrainingData(recipe.data, model.processor, jax.process_index(), jax.process_count())
    steps = count_steps(data, recipe.accumulate)
    check_agreement("the data", [data.get_state()["data"], steps])

    # ---- shard
    trainable, frozen = split_trainable(model.variables, recipe.trainable, recipe.data.sizes, recipe.data.adapter)
    frozen = method.extend_frozen(frozen, trainable)
    optimizer = make_optimizer(recipe.optimizer, steps, trainable)
    state = init_train_state(trainable, optimizer, mesh)
    key = dropout_key(recipe.seed) if recipe.dropout else None
    if dry_run:
        step, batches = compile_step(objective, optimizer, state), [next(data)] * recipe.accumulate
        say(describe_run(steps, step, state, frozen, batches, model.processor, mesh, key))
        data.close()
        return 0

    # ---- checkpoint
    asked = recipe.evaluation
    evaluation = None
    if asked is not None:
        evaluation = Evaluation(asked, recipe.data, model.processor, module, model.variables)
    greater = asked is not None and asked.greater
    with (
        exclusive_lock(folder),
        closing(data),
        closing(Checkpoints(folder / CHECKPOINTS, recipe.keep, greater)) as checkpoints,
    ):
        settled_recipe(recipe, folder)  # another process may have begun a run here meanwhile
        state, number, steps, unscored, messages = restore(checkpoints, state, data, recipe, steps)
        if number >= steps and not unscored and (folder / REPORT).exists():
            say(f"{folder}: has taken {number} steps, and the recipe asks for {steps}: all done")
            return 0
        check_agreement("the checkpoints", [number, steps, unscored])
        say(*messages)
        if is_first():
            save_recipe(recipe, folder / RECIPE)

        # ---- step
        rates = learning_rates(recipe.optimizer, steps)
        optimizer = make_optimizer(recipe.optimizer, steps, trainable)
        train_step = compile_step(objective, optimizer, state)
        batches_of_steps = step_batches(data, recipe.accumulate, steps - number)
        data_state = data.get_state()  # after the last whole step
        with (
            PreemptionSignal() as preemption,
            closing(MetricsLog(folder, number, writes=is_first())) as metrics_log,
            step_bar(steps, number) as advance,
            closing(Throughput(model.config, trainable, number)) as throughput,
            Profile(profile, steps, number, PROFILED_STEPS) as trace,
        ):
            zero_gradients = ZeroGradientCheck(recipe.trainable, number, steps)
            log = StepLog(metrics_log, throughput, rates, recipe.data.kind, zero_gradients, advance)

            def evaluate() -> float | None:
                """Score the state; None if the run was told to end before the score is known."""
                if evaluation is None:
                    return None
                values = evaluation(state.trainable, frozen, objective, mesh, preemption.requested)
                if values is not None:
                    metrics_log.write(number, values)
                return evaluation.score(values)

            def save(score: float | None = None) -> None:
                """Save the state, unless it has diverged."""
                check_finite(number, metric_values(metrics, recipe.data.kind), state)
                checkpoints.save(state, saved_data_state(data_state, steps, recipe), score)

            if unscored and (score := evaluate()) is not None:
                checkpoints.add_score(number, score)
                unscored = False
            while number < steps and not unscored:
                try:
                    batches, error = next(batches_of_steps, None), None
                except InputError as bad_sample:
                    batches, error = None, bad_sample
                if error is not None and jax.process_count() > 1:
                    raise error  # the other hosts do not save with this one
                if batches is None:  # what is done is not lost
                    log.flush()
                    if number and checkpoints.last != number:
                        save()
                    if error is not None:
                        raise error
                    say(f"The data ended after step {number}, though {steps} were counted; they changed meanwhile.")
                    steps = number
                    break
                data_state = data.get_state()
                state, metrics = train_step(state, frozen, shard_batches(batches, mesh), key)
                number += 1
                throughput.watch(number, metrics, batches)
                log.flush()  # the step before, while the devices are busy with this one
                trace.advance()
                if number % recipe.log_every == 0:
                    log.add(number, metrics)

                # ---- evaluate
                stop = preemption.should_stop(number)
                due = recipe.evaluates_after(number, steps)
                if not (stop or due or number == steps or number % recipe.save_every == 0):
                    continue
                log.add(number, metrics)
                log.flush()  # a step that has diverged ends the run here
                score = evaluate() if due and not stop else None
                unscored = due and score is None
                save(score)
                throughput.pause()
                if stop or preemption.requested():
                    break
            if number == steps and recipe.data.steps is None and next(data, None) is not None:
                say("The data have more batches than were counted: they changed meanwhile. Rerun to train on them.")

    # ---- report
    if number < steps or unscored:
        rest = ", without its score" if unscored else ""
        say(f"Stopped and saved after step {number} of {steps}{rest}; rerun the same command to resume.")
        return STOPPED
    if data.skipped:
        say(f"Unusable samples that were skipped: {data.skipped}")
    if is_first():
        draw_losses(folder)
        write_report(folder, run_facts(recipe, trainable, steps, checkpoints.best, data.skipped))
    say(f"{folder}: trained; see report.md, and write a checkpoint with {command_of('train.export')}")
    return 0


@cli_entrypoint
def main() -> int:
    arguments, recipe = parse_arguments("train.sft", __doc__, "answers")
    with connected_hosts(coordination_of(arguments)):
        return train(recipe, dry_run=arguments.dry_run, profile=arguments.profile)


if __name__ == "__main__":
    sys.exit(main())
