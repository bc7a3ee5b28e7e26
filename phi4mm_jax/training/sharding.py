"""Devices of a run: its mesh, its state and batches on them, and the step compiled for them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.data.packing import PackingConfig
from phi4mm_jax.errors import InputError
from phi4mm_jax.mesh import ROWS, jit_on_mesh, make_mesh
from phi4mm_jax.training.param_filter import split
from phi4mm_jax.training.step import (
    Metrics,
    Objective,
    TrainState,
    Variables,
    compiler_options,
    initial_state,
    train_step,
)


def training_mesh(fsdp: int, tensor: int) -> Mesh | None:
    """Return the mesh of a run; None for one device.

    Args:
        fsdp: devices that share the rows; 0 takes all that `tensor` leaves.

    Raises:
        InputError: more devices than there are.
    """
    fsdp = fsdp or jax.device_count() // tensor
    return None if fsdp * tensor == 1 else make_mesh(fsdp, tensor)


def check_divisible(packing: PackingConfig | None, mesh: Mesh | None) -> None:
    """Raise InputError if the devices cannot share the rows, crops and chunks of a batch evenly."""
    if packing is None:  # it will be settled for these devices
        return
    fsdp = 1 if mesh is None else mesh.shape["fsdp"]
    for name, sizes in (("rows", (packing.rows,)), ("crops", packing.crops), ("chunks", packing.chunks)):
        for size in sizes:
            if size % fsdp:
                raise InputError(
                    f"data.packing.{name} is {size}, which {fsdp} devices cannot share; give a multiple of {fsdp}, or "
                    "set fsdp"
                )


def split_trainable(
    variables: Variables, patterns: Sequence[str], packing: PackingConfig, adapter: str | None = None
) -> tuple[Variables, Variables]:
    """Return the parameters that are trained, and the frozen ones, without adapters that no batch will need.

    Args:
        adapter: of all rows; by default each has that of its media.

    Raises:
        InputError: a pattern matches no parameter.
    """
    trainable, frozen = split(variables, patterns, "trainable")
    by_media = {"images": bool(packing.crops), "clips": bool(packing.chunks), None: False}
    for own in ADAPTERS.values():
        if not (by_media[own.media] if adapter is None else own.name == adapter):
            frozen.pop(own.collection, None)
    return trainable, frozen


def shard_batches(batches: Sequence[TrainingBatch], mesh: Mesh | None) -> Any:
    """Stack micro-batches, and put them on the devices: rows, crops and chunks are split like rows."""
    stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
    if mesh is None:
        return stacked
    axes = tuple(axis for axis in ROWS if axis in mesh.shape)
    count = math.prod(mesh.shape[axis] for axis in axes)

    def on_devices(x: np.ndarray) -> jax.Array:
        divides = x.shape[1] * jax.process_count() % count == 0
        return jax.make_array_from_process_local_data(NamedSharding(mesh, jax.P(None, axes if divides else None)), x)

    return jax.tree.map(on_devices, stacked)


def init_train_state(trainable: Variables, optimizer: optax.GradientTransformation, mesh: Mesh | None) -> TrainState:
    """Return the state before the first step: split as the parameters are, single numbers replicated."""
    replicated = None if mesh is None else NamedSharding(mesh, jax.P())

    def placed(x: jax.Array) -> jax.Array:
        # Where the step's results will be, in jax's eyes too: else the second step is compiled once more.
        stays = replicated is None or isinstance(x.sharding, NamedSharding)
        return jax.device_put(x, x.sharding if stays else replicated)

    return jax.tree.map(placed, initial_state(trainable, optimizer))


def compile_step(
    objective: Objective, optimizer: optax.GradientTransformation, state: TrainState
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return the training step on the state's mesh: (state, frozen, batches, key) to the next state and its metrics.

    The state is donated, and the next one lies where it was.
    """

    def step(state: TrainState, frozen: Variables, batches: Any, key: jax.Array | None):
        return train_step(objective, optimizer, state, frozen, batches, key)

    shardings = jax.tree.map(lambda x: x.sharding, state)
    options = compiler_options(jax.default_backend())
    return jit_on_mesh(
        state.trainable, step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options
    )
