"""Supervised fine-tuning (SFT).

    python -m train.sft RECIPE [key=value]... [--dry-run]
        [--coordinator HOST:PORT --num-processes N --process-id I]

RECIPE is a YAML file, such as those in train/recipes; key=value overrides a setting: optimizer.learning_rate=1e-4.
Where the recipe's output has checkpoints, the run resumes from the last one. SIGTERM and Ctrl-C save, then end.
On several hosts each runs the same command; TPU VMs, GKE and SLURM identify it, elsewhere the options do.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import jax

from phi4mm_jax.api import load
from phi4mm_jax.checkpoint.hub import local_folder
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.data.pipeline import TrainingData
from phi4mm_jax.mesh import training_mesh
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.training.arguments import parse_arguments
from phi4mm_jax.training.auto_settings import has_auto_fields, resolve_auto_fields
from phi4mm_jax.training.base import check_base, save_base
from phi4mm_jax.training.checkpointing import Checkpoints
from phi4mm_jax.training.divergence import ZeroGradientCheck, check_evaluated, check_finite
from phi4mm_jax.training.dpo import REFERENCE
from phi4mm_jax.training.dry_run import describe_run
from phi4mm_jax.training.evaluation import Evaluation
from phi4mm_jax.training.hosts import (
    check_same_on_all_hosts,
    check_shared_filesystem,
    connected_hosts,
    coordination_of,
    is_primary_process,
    print_once,
)
from phi4mm_jax.training.metrics_log import MetricsLog
from phi4mm_jax.training.optimizer import make_lr_schedule, make_optimizer
from phi4mm_jax.training.preemption import PREEMPTED_EXIT_CODE, PreemptionSignal
from phi4mm_jax.training.recipe import AUTO, Recipe, check_sources, recipe_settings, save_recipe
from phi4mm_jax.training.report import REPORT, draw_losses, run_facts, write_report
from phi4mm_jax.training.resume import check_finished, recipe_for_resume, restore
from phi4mm_jax.training.run_folder import CHECKPOINTS, RECIPE, check_folder, exclusive_lock, writable
from phi4mm_jax.training.sharding import (
    check_divisible,
    compile_step,
    init_train_state,
    order_by_host,
    shard_batches,
    split_trainable,
)
from phi4mm_jax.training.step import Metrics, Objective, TrainState, Variables, abstract, dropout_key, supervised
from phi4mm_jax.training.step_batches import StepIterator, count_steps, saved_data_state, warn_of_few_steps
from phi4mm_jax.training.step_log import StepLog, metric_values
from phi4mm_jax.training.throughput import Throughput
from phi4mm_jax.utils.cli import cli_entrypoint, command_of, interruption_says
from phi4mm_jax.utils.paths import local_path
from phi4mm_jax.utils.profiling import Profile, check_profile
from phi4mm_jax.utils.progress import progress_bar, step_bar, weights_bar

PROFILED_STEPS = 3


class TrainingMethod(NamedTuple):
    """Objective of a training method, and the frozen parameters that it needs besides the model's."""

    objective: Callable[[Phi4MM, Recipe], Objective]
    add_reference_params: Callable[[Variables, Variables], Variables] = lambda frozen, trainable: frozen


SFT = TrainingMethod(lambda module, recipe: supervised(module, recipe.loss))


def train(recipe: Recipe, method: TrainingMethod = SFT, dry_run: bool = False, profile: Path | None = None) -> int:
    """Train to the last step, or until SIGTERM or Ctrl-C: then save, and end; the same call resumes from there.

    Args:
        dry_run: show what would be trained, and write nothing.
        profile: a folder for a profile of some steps.

    Returns:
        The program's exit status.

    Raises:
        InputError, CheckpointError, ConfigError: something in the recipe, the data or the checkpoint cannot be used,
            or the run has diverged.
    """
    folder = local_path(recipe.output)
    check_folder(folder)
    check_shared_filesystem(folder)
    recipe = recipe_for_resume(recipe, folder)
    check_same_on_all_hosts("the recipes", recipe_settings(recipe))
    check_sources(recipe)
    check_profile(profile)
    check_base(recipe.model, folder, "give another output")

    # ---- model
    mesh = order_by_host(training_mesh(recipe.mesh, Phi4MMConfig.from_folder(local_folder(recipe.model))))
    check_divisible(recipe.data.packing, mesh)
    with weights_bar("Reading", "the weights", recipe.weights) as progress:
        model = load(
            recipe.model, recipe.dtype, mesh, scan=True, weights=recipe.weights,
            trainable=() if recipe.trainable == AUTO else recipe.trainable, fresh_adapters=recipe.fresh_adapters,
            progress=progress,
        )  # fmt: skip
    config, processor, variables = model.config, model.processor, model.variables
    module = Phi4MM(config, model.module.dtype, remat=recipe.remat)
    objective = method.objective(module, recipe)

    # ---- data
    if has_auto_fields(recipe) or dry_run:
        with progress_bar("Measuring the samples"):
            recipe, lines = resolve_auto_fields(recipe, processor, mesh)
        print_once(*lines)
    data = TrainingData(recipe.data, processor, jax.process_index(), jax.process_count())
    total_steps = count_steps(data, recipe.accumulate)
    check_same_on_all_hosts("the data", [data.get_state()["data"], total_steps])
    if is_primary_process():
        warn_of_few_steps(recipe, total_steps)

    # ---- shard: parameters and optimizer state over the mesh
    trainable, frozen = split_trainable(variables, recipe.trainable, recipe.data.sizes, recipe.data.adapter)
    frozen = method.add_reference_params(frozen, trainable)
    optimizer = make_optimizer(recipe.optimizer, total_steps, trainable)
    state = init_train_state(trainable, optimizer, mesh)
    variables, trainable = abstract(variables), abstract(trainable)  # the arrays would be kept beside their masters
    del model
    key = dropout_key(recipe.seed) if recipe.dropout else None
    if dry_run:
        train_step, batches = compile_step(objective, optimizer, state), [next(data)] * recipe.accumulate
        print_once(describe_run(total_steps, train_step, state, frozen, batches, processor, mesh, key))
        data.close()
        return 0

    eval_config, evaluation = recipe.evaluation, None  # its data are read before anything is written
    if eval_config is not None:
        evaluation = Evaluation(eval_config, recipe.data, processor, module, variables)
    higher_is_better = eval_config is not None and eval_config.higher_is_better
    with ExitStack() as stack:  # left in reverse: the lock last
        stack.enter_context(exclusive_lock(folder))
        stack.enter_context(closing(data))
        checkpoints = stack.enter_context(closing(Checkpoints(folder / CHECKPOINTS, recipe.keep, higher_is_better)))

        # ---- resume
        recipe_for_resume(recipe, folder)  # another process may have begun a run here meanwhile
        resumed = restore(checkpoints, state, data, recipe, total_steps)
        state, step, total_steps = resumed.state, resumed.step, resumed.total_steps
        eval_pending = resumed.eval_pending
        if step >= total_steps and not eval_pending and (folder / REPORT).exists():
            check_finished(recipe, folder)
            print_once(f"{folder}: already finished ({step} of {total_steps} steps)")
            return 0
        check_same_on_all_hosts("the checkpoints", [step, total_steps, eval_pending])
        print_once(*resumed.messages)
        if is_primary_process():
            with writable(folder):
                (folder / REPORT).unlink(missing_ok=True)  # of fewer steps
                save_recipe(recipe, folder / RECIPE)
                if step == 0:
                    save_base(recipe.model, folder)

        # ---- step
        lr_schedule = make_lr_schedule(recipe.optimizer, total_steps)
        optimizer = make_optimizer(recipe.optimizer, total_steps, trainable)  # again: resuming may change total_steps
        train_step = compile_step(objective, optimizer, state)
        step_iterator = StepIterator(data, recipe.accumulate, total_steps - step)
        data_state = data.get_state()  # after the last whole step
        metrics: Metrics | None = None  # of the last step that this process has taken

        preemption = stack.enter_context(PreemptionSignal())
        stack.enter_context(
            interruption_says("Told to end: saving after this step, which may have to be compiled first.")
        )
        metrics_log = stack.enter_context(closing(MetricsLog(folder, step, writes=is_primary_process())))
        step_progress = stack.enter_context(step_bar(total_steps, step))
        throughput = stack.enter_context(closing(Throughput(config, trainable, step, reference=REFERENCE in frozen)))
        profiler = stack.enter_context(Profile(profile, total_steps, step, PROFILED_STEPS))
        zero_gradients = ZeroGradientCheck(recipe.trainable, step, total_steps)
        log = StepLog(metrics_log, throughput, lr_schedule, recipe.data.kind, zero_gradients, step_progress)

        # ---- checkpoint
        def save(state: TrainState, step: int, metrics: Metrics, data_state: dict, score: float | None = None) -> None:
            """Save a state, unless it has diverged."""
            check_finite(step, metric_values(metrics, recipe.data.kind), state)
            checkpoints.save(state, saved_data_state(data_state, resumed.total_steps, recipe), score)

        # ---- evaluate
        def evaluate(state: TrainState, step: int) -> float | None:
            """Score a state; None if the run was told to end before the score is known."""
            assert evaluation is not None  # else no evaluation is due
            values = evaluation(state.trainable, frozen, objective, mesh, preemption.requested)
            if values is not None:
                metrics_log.write(step, values)
                check_evaluated(step, values)
            return evaluation.score(values)

        # ---- loop
        if eval_pending and (score := evaluate(state, step)) is not None:
            checkpoints.add_score(step, score)
            eval_pending = False
        stopped = eval_pending  # told to end again, before the score is known
        while not stopped and (batches := next(step_iterator, None)) is not None:
            data_state = data.get_state()
            state, metrics = train_step(state, frozen, shard_batches(batches, mesh), key)
            step += 1
            throughput.record_step(step, metrics, batches)
            log.flush()  # the step before, while the devices are busy with this one
            profiler.advance()

            stop = preemption.should_stop(step)  # the same on all hosts
            eval_due = recipe.evaluates_after(step, total_steps)
            pauses = stop or eval_due or step == total_steps or step % recipe.save_every == 0
            if pauses or step % recipe.log_every == 0:
                log.add(step, metrics)
            if not pauses:
                continue
            log.flush()  # this step, too: one that has diverged ends the run here, and is not saved
            score = evaluate(state, step) if eval_due and not stop else None
            eval_pending = eval_due and score is None
            save(state, step, metrics, data_state, score)
            throughput.reset_timer()
            stopped = stop or eval_pending or preemption.requested()  # the latter: during evaluation or saving

        # ---- end of the data
        if step < total_steps and not stopped:  # before the last step, or at a bad sample: steps so far are not lost
            log.flush()
            if metrics is not None and checkpoints.last != step:
                save(state, step, metrics, data_state)
            if step_iterator.error is not None:
                raise step_iterator.error
            print_once(f"Data exhausted at step {step}, expected {total_steps}; the files changed during the run.")
            total_steps = step
        has_more = step == total_steps and recipe.data.steps is None and next(data, None) is not None
        if has_more:
            print_once("Data left after the last step; the files changed during the run. Rerun to train on the rest.")

    # ---- report
    if step < total_steps or eval_pending:
        pending = ", evaluation pending" if eval_pending else ""
        print_once(f"Stopped and saved after step {step} of {total_steps}{pending}; rerun the same command to resume.")
        return PREEMPTED_EXIT_CODE
    if data.skipped:
        print_once(f"Unusable samples that were skipped: {data.skipped}")
    if is_primary_process():
        with writable(folder):
            draw_losses(folder)
            write_report(folder, run_facts(recipe, trainable, total_steps, checkpoints.best, data.skipped))
    print_once(f"{folder}: trained; see report.md, and write a checkpoint with {command_of('train.export')}")
    return 0


@cli_entrypoint
def main() -> int:
    arguments, recipe = parse_arguments("train.sft", __doc__, "answers")
    with connected_hosts(coordination_of(arguments)):
        return train(recipe, dry_run=arguments.dry_run, profile=arguments.profile)


if __name__ == "__main__":
    sys.exit(main())
