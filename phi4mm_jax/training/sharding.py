"""Devices of a run: its mesh, its state and batches on them, and the step compiled for them."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.batch import Batch, TrainingBatch
from phi4mm_jax.data.packing import PackingConfig
from phi4mm_jax.errors import InputError
from phi4mm_jax.mesh import AXES, LENGTH, ROWS, activation_sharding, jit_on_mesh
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


def order_by_host(mesh: Mesh | None) -> Mesh | None:
    """Return a mesh whose rows are those of the first host, then of the second, and so on.

    Each host then loads exactly the rows of its own devices.

    Raises:
        InputError: not all devices of several hosts are used.
    """
    if jax.process_count() == 1:
        return mesh
    if mesh is None or mesh.size != jax.device_count():
        raise InputError(
            f"mesh is of {1 if mesh is None else mesh.size} devices, and the hosts have {jax.device_count()}; leave "
            "fsdp out, which then takes all"
        )
    axes = [i for i, name in enumerate(mesh.axis_names) if name in ROWS]
    moved = np.moveaxis(np.asarray(mesh.devices), axes, range(len(axes)))
    rows = moved.reshape(math.prod(moved.shape[: len(axes)]), -1)
    hosts = np.vectorize(lambda device: device.process_index)(rows)
    if (hosts != hosts[:, :1]).any():  # jax has put chips of two hosts into one row
        ordered = sorted(rows.ravel(), key=lambda device: (device.process_index, device.id))
        rows = np.asarray(ordered).reshape(rows.shape)
    else:
        rows = rows[np.argsort(hosts[:, 0], kind="stable")]
    devices = np.moveaxis(rows.reshape(moved.shape), range(len(axes)), axes)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def on_own_devices(variables: Variables) -> Variables:
    """Return variables that each host has whole, on a mesh of its own devices, from those of a mesh of all hosts.

    Shapes of variables become such shapes.
    """
    if jax.process_count() == 1:
        return variables
    mesh = jax.tree.leaves(variables)[0].sharding.mesh
    rows = math.prod(mesh.shape[axis] for axis in ROWS) // jax.process_count()
    fsdp = math.gcd(rows, mesh.shape["fsdp"])  # divides what the mesh's own divides
    sizes = (jax.process_count(), rows // fsdp, fsdp, mesh.shape["context"], mesh.shape["tensor"])
    by_host = Mesh(mesh.devices.reshape(sizes), ("hosts", *AXES), axis_types=(AxisType.Auto,) * (1 + len(AXES)))
    (ours,) = (part for part in by_host.devices if part.flat[0].process_index == jax.process_index())
    own = Mesh(ours, AXES, axis_types=mesh.axis_types)

    def spread(x: Any) -> Any:
        return NamedSharding(by_host, x.sharding.spec)

    def keep(x: Any) -> Any:
        place = NamedSharding(own, x.sharding.spec)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        return jax.make_array_from_single_device_arrays(x.shape, place, [part.data for part in x.addressable_shards])

    if not isinstance(jax.tree.leaves(variables)[0], jax.ShapeDtypeStruct):
        variables = jax.jit(lambda x: x, out_shardings=jax.tree.map(spread, variables))(variables)
    return jax.tree.map(keep, variables)


def check_divisible(packing: PackingConfig | None, mesh: Mesh | None) -> None:
    """Raise InputError if the rows, crops and chunks of a batch do not divide evenly over the devices."""
    if packing is None:  # auto: it will be sized for these devices
        return
    rows, parts = divisors(mesh)
    for name, sizes, devices in (
        ("rows", (packing.rows,), rows),
        ("lengths", packing.lengths, 2 * parts if parts > 1 else 1),
        ("crops", packing.crops, rows * parts),
        ("chunks", packing.chunks, rows * parts),
    ):
        for size in sizes:
            if size % devices:
                raise InputError(
                    f"data.packing.{name} is {size}, which {rows * parts} devices cannot share; give a multiple of "
                    f"{devices}, or set mesh"
                )


def divisors(mesh: Mesh | None) -> tuple[int, int]:
    """Return the numbers of devices that split the rows of a batch, and each row (context)."""
    sizes = {} if mesh is None else mesh.shape
    return math.prod(sizes.get(axis, 1) for axis in ROWS), math.prod(sizes.get(axis, 1) for axis in LENGTH)


def split_trainable(
    variables: Variables, patterns: Sequence[str], packing: PackingConfig, adapter: str | None = None
) -> tuple[Variables, Variables]:
    """Return the trainable parameters, and the frozen ones without adapters that no batch will need.

    Args:
        adapter: of all rows; by default each has that of its media.

    Raises:
        InputError: a pattern matches no parameter, or a quantised one.
    """
    trainable, frozen = split(variables, patterns, "trainable")
    leaves: dict[Any, Any] = flatten_dict(trainable)
    for path, parameter in leaves.items():
        if not jnp.issubdtype(parameter.dtype, jnp.floating):
            raise InputError(
                f"trainable has {'/'.join(path)}, which is quantised: by weights, which leaves out only what trainable "
                "names, without auto, or in the checkpoint. Name it, leave weights out or begin with a float "
                "checkpoint; or train adapters alone, such as [lora_speech]"
            )
    by_media = {"images": bool(packing.crops), "clips": bool(packing.chunks), None: False}
    for own in ADAPTERS.values():
        if not (by_media[own.media] if adapter is None else own.name == adapter):
            frozen.pop(own.collection, None)
    return trainable, frozen


def shard_batches(batches: Sequence[TrainingBatch], mesh: Mesh | None) -> Any:
    """Stack micro-batches, and put them on the devices with the sharding of the activations."""
    stacked: Any = jax.tree.map(lambda *x: np.stack(x), *batches)
    if mesh is None:
        return stacked

    def spread(*axes: str) -> Callable[[Any], Any]:
        def on_devices(x: np.ndarray) -> jax.Array:
            shape = (x.shape[0], x.shape[1] * jax.process_count(), *x.shape[2:])
            return jax.make_array_from_process_local_data(activation_sharding(mesh, shape, None, *axes), x)

        return partial(jax.tree.map, on_devices)

    return spread_batch(stacked, rows=spread("batch"), tokens=spread("batch", "length"), media=spread("media"))


def spread_batch(
    batch: TrainingBatch, *, rows: Callable[[Any], Any], tokens: Callable[[Any], Any], media: Callable[[Any], Any]
) -> TrainingBatch:
    """Apply one function each to a batch's arrays per row, per token, and per crop or chunk."""
    inner = batch.batch
    spread = Batch(
        tokens(inner.tokens), rows(inner.lengths), rows(inner.adapters), tokens(inner.media), media(inner.images),
        media(inner.audio), tokens(inner.segments),
    )  # fmt: skip
    return TrainingBatch(spread, tokens(batch.targets), tokens(batch.weights))


def init_train_state(trainable: Variables, optimizer: optax.GradientTransformation, mesh: Mesh | None) -> TrainState:
    """Return the state before the first step: sharded like the parameters, scalars replicated."""
    replicated = None if mesh is None else NamedSharding(mesh, jax.P())

    def placed(x: jax.Array) -> jax.Array:
        # With the very sharding of the step's results, or else the second step would compile again.
        stays = replicated is None or isinstance(x.sharding, NamedSharding)
        return jax.device_put(x, x.sharding if stays else replicated)

    return jax.tree.map(placed, initial_state(trainable, optimizer))


def compile_step(
    objective: Objective, optimizer: optax.GradientTransformation, state: TrainState
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return the training step on the state's mesh: (state, frozen, batches, key) to the next state and its metrics.

    The state is donated, and the next one has its sharding.
    """

    def step(state: TrainState, frozen: Variables, batches: Any, key: jax.Array | None):
        return train_step(objective, optimizer, state, frozen, batches, key)

    shardings = jax.tree.map(lambda x: x.sharding, state)
    (device, *_) = jax.tree.leaves(shardings)[0].device_set
    options = compiler_options(device)
    return jit_on_mesh(
        state.trainable, step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options
    )
