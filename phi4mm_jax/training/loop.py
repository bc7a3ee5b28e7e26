"""A run, from its recipe to its report: load, go on where it was, step, log, evaluate, save."""

import dataclasses
import fcntl
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from phi4mm_jax.api import Model, load
from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.data.packing import PackingConfig
from phi4mm_jax.data.pipeline import Kind, TrainingData, measure_samples, without_augmentation
from phi4mm_jax.data.sizing import Divisors, check_reached, describe, propose_packing, propose_trainable
from phi4mm_jax.errors import InputError
from phi4mm_jax.mesh import ROWS, jit_on_mesh, make_mesh
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.training.checkpointing import Checkpoints
from phi4mm_jax.training.dpo import REFERENCE
from phi4mm_jax.training.evaluation import Evaluation
from phi4mm_jax.training.flops import peak_flops, step_flops
from phi4mm_jax.training.metrics_log import REPORT, Log, draw, report
from phi4mm_jax.training.optimizer import learning_rates, make_optimizer
from phi4mm_jax.training.param_filter import split
from phi4mm_jax.training.recipe import (
    AUTO,
    EvaluationConfig,
    Recipe,
    check_same_run,
    resolved_as_before,
    save_recipe,
)
from phi4mm_jax.training.step import (
    Metrics,
    Objective,
    TrainState,
    Variables,
    compiler_options,
    dropout_key,
    initial_state,
    train_step,
)
from phi4mm_jax.utils.paths import local_path
from phi4mm_jax.utils.progress import progress_bar, step_bar

CHECKPOINTS, RECIPE = "checkpoints", "recipe.yaml"  # in a run's folder
_IDLE = 10  # as many steps without any gradient are no chance
STOPPED = 143  # the status of a program that SIGTERM ended


class Run(NamedTuple):
    """What a run is made of, before its first step."""

    recipe: Recipe
    model: Model  # as it was loaded; its parameters are spread over the mesh
    module: Phi4MM  # with the recipe's way of computing again
    trainable: Variables  # of the model
    frozen: Variables
    objective: Objective
    data: TrainingData
    steps: int
    mesh: Mesh | None


def prepare(
    recipe: Recipe,
    objective_of: Callable[[Phi4MM], Objective],
    say: Callable[[str], None] = print,
    propose: bool = False,
) -> Run:
    """Load what a recipe names, and settle what it leaves to the data.

    Args:
        objective_of: gives a model's objective.
        propose: tell what would be proposed for the data, also where the recipe leaves nothing open.

    Raises:
        InputError, CheckpointError, ConfigError: something in the recipe, the data or the checkpoint cannot be used.
    """
    mesh = _mesh(recipe)
    folder = local_path(recipe.output)
    _check_folder(folder)
    if (folder / RECIPE).exists() and (folder / CHECKPOINTS).exists():
        recipe = resolved_as_before(recipe, folder / RECIPE)
        check_same_run(recipe, folder / RECIPE)
    if recipe.data.packing is not None:
        _check_rows(recipe.data.packing, mesh)
    with progress_bar("Reading the weights", size=True) as advance:
        model = load(
            recipe.model, recipe.dtype, mesh, scan=True, fresh_adapters=recipe.fresh_adapters, progress=advance
        )
    if propose or recipe.data.packing is None or recipe.trainable == AUTO:
        recipe = _resolved(recipe, model, mesh, say)
    data = TrainingData(recipe.data, model.processor, jax.process_index(), jax.process_count())
    with progress_bar("Counting the batches"):
        steps = math.ceil(data.count_batches() / recipe.accumulate)
    trainable, frozen = split(model.variables, recipe.trainable, "trainable")
    for adapter, stacks in (("lora_vision", recipe.data.sizes.crops), ("lora_speech", recipe.data.sizes.chunks)):
        if not stacks:  # no row will need it
            frozen.pop(adapter, None)
    module = Phi4MM(model.config, model.module.dtype, remat=recipe.remat)
    if recipe.data.kind == "preferences":
        frozen[REFERENCE] = jax.tree.map(jnp.copy, trainable)  # what is trained is donated to the step
    return Run(recipe, model, module, trainable, frozen, objective_of(module), data, steps, mesh)


def train(run: Run, say: Callable[[str], None] = print) -> int:
    """Train to the last step, or until SIGTERM or Ctrl-C: then save, and end; the same command goes on from there.

    Returns:
        The status to end the program with.
    """
    recipe, folder = run.recipe, local_path(run.recipe.output)
    optimizer = make_optimizer(recipe.optimizer, run.steps, run.trainable)
    state = init_train_state(run, optimizer)
    rates: Any = learning_rates(recipe.optimizer, run.steps)
    key = dropout_key(recipe.seed) if recipe.dropout else None
    asked = recipe.evaluation
    evaluation = None if asked is None else Evaluation(asked, recipe.data, run.model, run.module)
    greater = asked is not None and asked.greater
    folder.mkdir(parents=True, exist_ok=True)
    with (
        _alone(folder),
        closing(run.data),
        closing(Checkpoints(folder / CHECKPOINTS, recipe.keep, greater)) as checkpoints,
    ):
        unscored = False
        if checkpoints.last is not None:
            state, data_state = checkpoints.restore(checkpoints.last, state)
            run.data.set_state(data_state)
            run = run._replace(steps=_total_steps(run, checkpoints.last, data_state))
            unscored = _due(asked, checkpoints.last, run.steps) and checkpoints.score(checkpoints.last) is None
            if checkpoints.last >= run.steps and (folder / REPORT).exists() and not unscored:
                say(f"{folder}: has taken {checkpoints.last} steps, and the recipe asks for {run.steps}: all done")
                return 0
            say(f"Resuming after step {checkpoints.last} of {run.steps}.")
            if data_state["data"]["bytes"] != run.data.get_state()["data"]["bytes"]:
                say(
                    "The data's files have changed since; they have as many samples, and each is taken to be as it was."
                )
            optimizer = make_optimizer(recipe.optimizer, run.steps, run.trainable)
            rates = learning_rates(recipe.optimizer, run.steps)
        save_recipe(recipe, folder / RECIPE)
        number = int(state.step)
        step = compiled_step(run, optimizer, state)
        with (
            _stopping() as signals,
            closing(Log(folder, number)) as log,
            step_bar(run.steps, number) as advance,
            closing(Throughput(run, number)) as throughput,
        ):
            idle = 0 if number == 0 else None  # steps from the first on that changed nothing

            def tell(number: int, metrics: Metrics) -> None:
                values = _values(metrics, recipe.data.kind) | {"learning_rate": float(rates(number - 1))}
                values |= throughput.of(number)
                _check_finite(number, values)
                nonlocal idle
                if idle is not None:
                    idle = idle + 1 if values["gradient_norm"] == 0 else None
                    _check_reached(idle or 0, number, run)
                log.write(number, values)
                advance(number, values)

            def evaluate(number: int) -> float | None:
                """The score of the state; None if the run was told to end before it is known."""
                if evaluation is None or asked is None:
                    return None
                placed = partial(place, mesh=run.mesh)
                found = evaluation(state.trainable, run.frozen, run.objective, placed, signals.told)
                if found is None:
                    return None
                log.write(number, found)
                return found[f"evaluation_{asked.metric}"]

            def save(number: int, score: float | None = None) -> None:
                """What is saved has been checked: a diverged state is no place to resume from."""
                if metrics is not None:
                    _check_finite(number, _values(metrics, recipe.data.kind), state)
                checkpoints.save(state, taken | {"total": run.steps, "epochs": recipe.data.epochs}, score)

            def keep_what_is_done() -> None:
                """Log and save the steps before an end that was not foreseen."""
                for earlier in untold:
                    tell(*earlier)
                if number and checkpoints.last != number:
                    save(number)

            metrics: Metrics | None = None
            scored = True
            if unscored:  # its evaluation was cut short
                score = evaluate(number)
                scored = score is not None
                if score is not None:
                    checkpoints.add_score(number, score)
            untold: list[tuple[int, Metrics]] = []
            steps = _steps(run, number)
            taken = run.data.get_state()  # after the last whole step
            while number < run.steps and scored:
                try:
                    batches = next(steps, None)
                except InputError:
                    keep_what_is_done()
                    raise
                if batches is None:
                    keep_what_is_done()
                    say(f"The data ended after step {number}, though {run.steps} were counted; they changed meanwhile.")
                    run = run._replace(steps=number)
                    break
                taken = run.data.get_state()
                state, metrics = step(state, run.frozen, place(batches, mesh=run.mesh), key)
                number += 1
                throughput.watch(number, metrics, batches)
                for earlier in untold:  # while the devices are busy with this one
                    tell(*earlier)
                untold = [(number, metrics)] if number % recipe.log_every == 0 else []
                stop = signals.reached(number)
                end = stop or number == run.steps
                due = not stop and _due(asked, number, run.steps)
                if not (end or due or number % recipe.save_every == 0):
                    continue
                tell(number, metrics)  # what has diverged is not saved
                untold, score = [], None
                if due:
                    score = evaluate(number)
                    scored = score is not None
                elif _due(asked, number, run.steps):
                    scored = False
                save(number, score)
                throughput.pause()
                if end or signals.told():
                    break
            if number == run.steps and recipe.data.steps is None and next(run.data, None) is not None:
                say("The data have more batches than were counted: they changed meanwhile. Rerun to train on them.")
    if number < run.steps or not scored:
        rest = "" if scored else ", without its score"
        say(f"Stopped and saved after step {number} of {run.steps}{rest}; rerun the same command to resume.")
        return STOPPED
    if run.data.skipped:
        say(f"Unusable samples that were skipped: {run.data.skipped}")
    draw(folder)
    report(folder, _facts(run, checkpoints))
    say(f"{folder}: trained; see report.md, and write a checkpoint with python -m train.export")
    return 0


def init_train_state(run: Run, optimizer: Any) -> TrainState:
    """The state before the first step: as the parameters are spread, and what is a number on every device."""
    state = initial_state(run.trainable, optimizer)
    everywhere = None if run.mesh is None else NamedSharding(run.mesh, jax.P())

    def placed(x: jax.Array) -> jax.Array:
        # Where the step's results will be, in jax's eyes too: else the second step is compiled once more.
        stays = everywhere is None or isinstance(x.sharding, NamedSharding)
        return jax.device_put(x, x.sharding if stays else everywhere)

    return jax.tree.map(placed, state)


def compiled_step(run: Run, optimizer: Any, state: TrainState) -> Callable[..., tuple[TrainState, Metrics]]:
    """The training step on the run's mesh. The state is donated, and comes back where it was."""

    def step(state: TrainState, frozen: Variables, batches: Any, key: jax.Array):
        return train_step(run.objective, optimizer, state, frozen, batches, key)

    places = jax.tree.map(lambda x: x.sharding, state)
    options = compiler_options(jax.default_backend())
    return jit_on_mesh(run.trainable, step, donate_argnums=0, out_shardings=(places, None), compiler_options=options)


def place(batches: Sequence[TrainingBatch], *, mesh: Mesh | None) -> Any:
    """Micro-batches, stacked, on the devices: rows, crops and chunks are spread like rows."""
    stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
    if mesh is None:
        return stacked
    count = math.prod(mesh.shape[axis] for axis in ROWS if axis in mesh.shape)
    axes = tuple(axis for axis in ROWS if axis in mesh.shape)

    def on_devices(x: np.ndarray) -> jax.Array:
        divides = x.shape[1] * jax.process_count() % count == 0
        return jax.make_array_from_process_local_data(NamedSharding(mesh, jax.P(None, axes if divides else None)), x)

    return jax.tree.map(on_devices, stacked)


def _check_folder(folder: Path) -> None:
    """Raise InputError if a run could not write its folder: before the weights are read, and not after."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise InputError(f"output is {folder}, and {there} is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"output is {folder}, and {there} may not be written to; give another one")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two processes would write the same files. Hosts of one run are one: the first."""
    if jax.process_index():
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{folder}: another process is training here; wait for it, or give another output"
            ) from error
        yield


def _mesh(recipe: Recipe) -> Mesh | None:
    devices = jax.device_count()
    fsdp = recipe.fsdp or devices // recipe.tensor
    return None if fsdp * recipe.tensor == 1 else make_mesh(fsdp, recipe.tensor)


def _resolved(recipe: Recipe, model: Model, mesh: Mesh | None, say: Callable[[str], None]) -> Recipe:
    """The recipe with what it leaves to the data, which are measured for it."""
    with progress_bar("Measuring the samples"):
        sizes = measure_samples(recipe.data, model.processor)
        asked = recipe.evaluation
        held_out = replace(without_augmentation(recipe.data), sources=asked.sources) if asked is not None else None
        others = measure_samples(held_out, model.processor) if held_out is not None else []
    say(f"The data: {describe(sizes)}.")
    check_reached(sizes, recipe.trainable)
    devices = 1 if mesh is None else mesh.shape["fsdp"]
    packing = propose_packing(
        sizes, others, kind=recipe.data.kind, accumulate=recipe.accumulate,
        divisors=Divisors(devices, jax.process_count()), context=model.processor.context,
    )  # fmt: skip
    taken = "Taken" if recipe.data.packing is None else "Proposed"
    settings = {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(packing).items()}
    listed = ", ".join(f"{name}: {str(x).lower()}" for name, x in settings.items())
    say(f'{taken} for these: "data.packing={{{listed}}}"')
    if recipe.trainable == AUTO:
        recipe = replace(recipe, trainable=propose_trainable(sizes))
        say(f"Trained on these: {', '.join(recipe.trainable)}")
    return recipe if recipe.data.packing is not None else replace(recipe, data=replace(recipe.data, packing=packing))


def _check_rows(packing: PackingConfig, mesh: Mesh | None) -> None:
    fsdp = 1 if mesh is None else mesh.shape["fsdp"]
    for name, sizes in (("rows", (packing.rows,)), ("crops", packing.crops), ("chunks", packing.chunks)):
        for size in sizes:
            if size % fsdp:
                raise InputError(
                    f"data.packing.{name} is {size}, which {fsdp} devices cannot share; give a multiple of {fsdp}, or "
                    "set fsdp"
                )


def _due(asked: EvaluationConfig | None, number: int, steps: int) -> bool:
    """Whether a step's state is to be evaluated."""
    return asked is not None and (number % asked.every == 0 or number == steps)


def _total_steps(run: Run, done: int, data_state: Mapping[str, Any]) -> int:
    """Steps of a resumed run: those done, and those that the rest of the data make.

    Counted from where the data are, not from their beginning: repaired files may divide otherwise, and a last batch
    that was not full stays one when more epochs follow.
    """
    same = data_state["data"]["bytes"] == run.data.get_state()["data"]["bytes"]
    if same and "total" in data_state and data_state.get("epochs") == run.recipe.data.epochs:
        return data_state["total"] if run.recipe.data.steps is None else run.steps
    with progress_bar("Counting the batches that are left"):
        return done + math.ceil(run.data.count_remaining() / run.recipe.accumulate)


def _steps(run: Run, first: int) -> Iterator[list[TrainingBatch]]:
    """The micro-batches of each step. The last step's may be fewer than the others': it is filled with empty ones."""
    count = run.recipe.accumulate
    for _ in range(first, run.steps):
        batches = list(islice(run.data, count))
        if not batches:
            return
        empty = batches[-1]._replace(weights=np.zeros_like(batches[-1].weights))
        yield batches + [empty] * (count - len(batches))


def _values(metrics: Metrics, kind: Kind) -> dict[str, float]:
    values = {name: float(value) for name, value in metrics._asdict().items()}
    if kind == "preferences":
        values |= {"margin": -values.pop("cross_entropy"), "pairs": values.pop("targets")}
    return values


def _check_reached(idle: int, number: int, run: Run) -> None:
    if idle == min(_IDLE, run.steps):
        raise InputError(
            f"the gradients of all steps up to {number} are 0: the data do not reach what is trained "
            f"({', '.join(run.recipe.trainable)}); an adapter needs samples with its media"
        )


@jax.jit
def _all_finite(state: TrainState) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state)]))


def _check_finite(step: int, values: Mapping[str, float], state: TrainState | None = None) -> None:
    if not all(math.isfinite(values[name]) for name in ("loss", "gradient_norm")):
        found = f"the loss of step {step} is {values['loss']}, its gradients' norm {values['gradient_norm']}"
    elif state is not None and not bool(_all_finite(state)):
        found = f"step {step} has left trained parameters or moments of the optimizer that are not finite"
    else:
        return
    raise InputError(
        f"{found}: the run has diverged, and nothing of this step was saved. Resume from the last checkpoint with a "
        "lower optimizer.learning_rate, or clip"
    )


class Throughput:
    """Tokens a second and the use of the chips, from the end of one step to the end of another.

    Metrics are written a step late, and two at once before an evaluation; the clock is the steps' own.
    """

    def __init__(self, run: Run, step: int):
        self._run, self._at, self._since = run, step, time.monotonic()
        self._timed = False  # not the first step, which is compiled
        self._ends: dict[int, float | Future[float]] = {}
        self._work: dict[int, tuple[int, float]] = {}  # of each step this host's tokens and operations
        self._peak = peak_flops()
        self._watcher = ThreadPoolExecutor(1, "phi4mm-throughput")

    def watch(self, step: int, metrics: Metrics, batches: Sequence[TrainingBatch]) -> None:
        """Note what a step that was just dispatched works on, and when it ends."""
        arrays: Any = metrics
        ready = all(x.is_ready() for x in arrays)
        self._ends[step] = time.monotonic() if ready else self._watcher.submit(_end_of, metrics)
        tokens = sum(int(batch.batch.lengths.sum()) for batch in batches)
        flops = step_flops(self._run.module.config, self._run.trainable, batches) if self._peak else 0.0
        self._work[step] = tokens, flops

    def pause(self) -> None:
        """Leave out what has passed since the last step's end: it is no training."""
        self._since = time.monotonic()

    def of(self, step: int) -> dict[str, float]:
        """Of the steps since the last call; `step` is the last of them, and has ended."""
        end = self._ends[step]
        end = end.result() if isinstance(end, Future) else end
        self._ends = {number: e for number, e in self._ends.items() if number > step}
        done = [self._work.pop(number) for number in sorted(self._work) if number <= step]
        tokens, flops = (sum(x) * jax.process_count() for x in zip(*done, strict=True))
        seconds, steps, timed = end - self._since, step - self._at, self._timed
        self._since, self._at, self._timed = end, step, True
        if not timed or seconds <= 0:
            return {}
        values = {"seconds": seconds / steps, "tokens_per_second": tokens / seconds}
        if self._peak:
            values["mfu"] = flops / seconds / self._peak / jax.device_count()
        return values

    def close(self) -> None:
        self._watcher.shutdown()


def _end_of(metrics: Metrics) -> float:
    jax.block_until_ready(metrics)
    return time.monotonic()


class _Signals:
    """Whether the run was told to end."""

    def __init__(self):
        self._told = False

    def tell(self, *_: Any) -> None:
        self._told = True

    def reached(self, step: int) -> bool:
        """After a step: all hosts alike, once any was told."""
        if jax.process_count() == 1:
            return self._told
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step) or bool(
            multihost_utils.process_allgather(np.asarray(self._told)).any()
        )

    def told(self) -> bool:
        """At any time; among several hosts only `reached` can tell."""
        return self._told and jax.process_count() == 1


@contextmanager
def _stopping() -> Iterator[_Signals]:
    """SIGTERM and Ctrl-C are told instead of ending the process."""
    signals = _Signals()
    before = {s: signal.signal(s, signals.tell) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _facts(run: Run, checkpoints: Checkpoints) -> dict[str, Any]:
    recipe, packing = run.recipe, run.recipe.data.sizes
    count = sum(x.size for x in jax.tree.leaves(run.trainable))
    return {
        "model": recipe.model,
        "manifests": ", ".join(source.path for source in recipe.data.sources),
        "trained": f"{', '.join(recipe.trainable)}: {count:,} parameters",
        "steps": f"{run.steps} of {recipe.accumulate} x {packing.rows} rows of {packing.lengths[-1]}",
        "optimizer": ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(recipe.optimizer).items()),
        "best checkpoint": f"step {checkpoints.best}",
        "skipped samples": run.data.skipped or "none",
    }  # fmt: skip
