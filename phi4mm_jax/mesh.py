"""The mesh, and the table from logical axes to mesh axes."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jaxtyping import Array, Float

from phi4mm_jax.config import DecoderConfig
from phi4mm_jax.errors import InputError

AXES = ("data", "fsdp", "tensor", "context")  # of meshes
ROWS, HEADS = ("data", "fsdp"), ("tensor",)  # mesh axes that split the batch, and those that split heads
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (  # logical axis of a parameter -> mesh axes
    ("vocab", ("fsdp", "tensor")),  # so the head is never gathered: each device has the logits of its own tokens
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("channels", ("tensor",)),
    ("embed", ("fsdp",)),
    ("embed_out", ("fsdp",)),
    ("rank", ("fsdp",)),
    ("head", ()),
    ("layers", ()),
)


def make_mesh(fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of fsdp * tensor devices, with automatic axes.

    fsdp splits every weight along its embedding axis; tensor splits heads and MLP; both split the vocabulary.

    Raises:
        InputError: a size below 1, or more devices asked for than there are.
    """
    if fsdp < 1 or tensor < 1 or fsdp * tensor > jax.device_count():
        raise InputError(
            f"a mesh of fsdp={fsdp} times tensor={tensor}: expected positive sizes, and at most {jax.device_count()} "
            "devices in all"
        )
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def parse_mesh(spec: str) -> dict[str, int]:
    """The axes and sizes of a mesh, written as "fsdp=4,tensor=2".

    Raises:
        InputError: it is not written so, or names an axis that there is not, or one twice.
    """
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        axis, equals, size = (word.strip() for word in part.partition("="))
        if not equals or not size.isdecimal() or not size.isascii() or int(size) < 1:
            raise InputError(f"mesh is {spec!r:.80}; expected axes with their sizes, such as tensor=8")
        if axis not in AXES:
            raise InputError(f"mesh is {spec!r:.80}, and {axis!r} is no axis; choose from {', '.join(AXES)}")
        if axis in sizes:
            raise InputError(f"mesh is {spec!r:.80}, which has {axis} twice; give it once")
        sizes[axis] = int(size)
    return sizes


def inference_mesh(spec: str | None, config: DecoderConfig) -> Mesh | None:
    """The mesh to answer on: as asked for, or of as many of this host's accelerators as can share the heads.

    Returns:
        None for one device.

    Raises:
        InputError: an axis that inference does not use, or a size that the heads or the devices do not allow.
    """
    devices = jax.local_devices()
    fitting = [n for n in range(1, config.num_kv_heads + 1) if config.num_kv_heads % n == 0 and n <= len(devices)]
    if spec is None:
        tensor = fitting[-1] if devices[0].platform != "cpu" else 1
    else:
        sizes = parse_mesh(spec)
        for axis in sizes.keys() - {"tensor"}:
            if sizes[axis] > 1:
                raise InputError(f"mesh is {spec!r}, but inference splits over tensor only; leave {axis} out")
        tensor = sizes.get("tensor", 1)
        if tensor > len(devices):
            raise InputError(
                f"mesh is {spec!r}, but there are {len(devices)} devices; tensor can be {_any_of(fitting)}"
            )
        check_heads(config, tensor)
    if tensor == 1:
        return None
    return jax.make_mesh((1, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=devices[:tensor])


def check_heads(config: DecoderConfig, tensor: int) -> None:
    """Raise InputError where the devices of the axis `tensor` cannot share the key heads evenly.

    XLA would give each device all keys and values.
    """
    heads = config.num_kv_heads
    if heads % tensor:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise InputError(f"mesh has tensor={tensor}, which does not divide {heads} key heads; give {_any_of(fitting)}")


def _any_of(sizes: Sequence[int]) -> str:
    return " or ".join(map(str, sizes))


def shardings(abstract: Any, mesh: Mesh | None) -> dict[tuple[str, ...], jax.sharding.Sharding]:
    """Where each parameter lies, by path; on the first device without a mesh.

    An axis that its mesh axes do not divide is not split, and a mesh axis splits the first axis it can.

    Raises:
        InputError: a mesh without any axis of `RULES`, over which nothing would be split.
    """
    if mesh is not None and not (
        isinstance(mesh, Mesh) and set(mesh.axis_names) & {a for _, axes in RULES for a in axes}
    ):
        raise InputError(f"mesh is {mesh!r}; expected one with the axes fsdp and tensor: use make_mesh(fsdp, tensor)")
    boxed = flatten_dict(abstract, is_leaf=lambda _, x: not isinstance(x, dict))
    if mesh is None:
        return dict.fromkeys(boxed, SingleDeviceSharding(jax.devices()[0]))

    def spec(leaf) -> NamedSharding:
        axes = leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * leaf.ndim
        return NamedSharding(mesh, _split(axes, nn.unbox(leaf).shape, mesh.shape))

    return {path: spec(leaf) for path, leaf in boxed.items()}


def constrain_param(x: Float[Array, "..."], axes: Sequence[str | None]) -> Float[Array, "..."]:
    """A parameter where it is used: split as `shardings` says, then gathered over the mesh axes that split the batch.

    Said of both, XLA gathers one layer's weights, where else it would sum activations of the whole batch over those
    axes. The gradient lies as the parameter does. Without a mesh in context, just the parameter.
    """
    sizes = automatic_axes()
    if math.prod(sizes.values()) == 1:
        return x
    split = _split(axes, x.shape, sizes)
    batch = () if "vocab" in axes else batch_axes()  # each device has the logits of its own part of the vocabulary
    whole = _split(axes, x.shape, sizes, gathered=batch)
    return _constrain(x, split, whole) if whole != split else jax.lax.with_sharding_constraint(x, split)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _constrain(x: Float[Array, "..."], split: jax.P, whole: jax.P) -> Float[Array, "..."]:
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, split), whole)


_constrain.defvjp(
    lambda x, split, whole: (_constrain(x, split, whole), None),
    lambda split, whole, _, gradient: (jax.lax.with_sharding_constraint(gradient, split),),
)


def constrain_batch(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """An activation with its rows over the mesh axes that split the batch; its other axes lie as XLA sees fit."""
    sizes = automatic_axes()
    names = tuple(n for n in batch_axes() if n in sizes)
    devices = math.prod(sizes[n] for n in names)
    if devices == 1 or x.shape[0] % devices:
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(names, *[jax.P.UNCONSTRAINED] * (x.ndim - 1)))


def batch_axes() -> tuple[str, ...]:
    """The mesh axes that split the batch, by the rules in context: none but within `split_batch`."""
    axes = dict(nn.get_logical_axis_rules()).get("batch") or ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def split_batch() -> Any:
    """A context in which activations are split by rows, as in training: weights are gathered where they are used."""
    return nn.logical_axis_rules((("batch", ROWS),))


def _split(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mapping[str, int], gathered: Sequence[str] = ()
) -> jax.P:
    """The mesh axes that split each axis of an array, but for those over which it is gathered."""
    table = dict(RULES)
    split: list[tuple[str, ...]] = []
    for axis, size in zip(axes, shape, strict=True):
        taken = {name for names in split for name in names}
        names = tuple(n for n in (table[axis] if axis is not None else ()) if n in mesh and n not in taken)
        split.append(names if size % math.prod(mesh[n] for n in names) == 0 else ())
    return jax.P(*(tuple(n for n in names if n not in gathered) or None for names in split))


def jit_on_mesh(variables: Any, function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` of a function of these variables, with their mesh in context: kernels are split over its devices."""
    place = jax.tree.leaves(variables)[0].sharding

    @wraps(function)
    def on_mesh(*arguments: Any, **named: Any) -> Any:
        if not isinstance(place, NamedSharding):
            return function(*arguments, **named)
        with jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh):
            return function(*arguments, **named)

    return jax.jit(on_mesh, **options)


def over_mesh(function: Callable[..., Any], arguments: tuple, inputs: Any, outputs: Any, *, rows: int, heads: int):
    """function(*arguments), on each device of the mesh in context its part of it; without such a mesh, just that.

    XLA cannot split a kernel over devices by itself: each device is given its rows and heads.

    Args:
        inputs, outputs: for each array of the arguments and results what its axes are: "rows", "heads" or None.
        rows, heads: how many there are. What a mesh axis does not divide is not split over it.
    """
    automatic = automatic_axes()
    if math.prod(automatic.values()) == 1:
        return function(*arguments)
    axes: dict[str | None, Any] = {None: None}
    for name, candidates, count in (("rows", ROWS, rows), ("heads", HEADS, heads)):
        present = tuple(n for n in candidates if n in automatic)
        axes[name] = present if present and count % math.prod(automatic[n] for n in present) == 0 else None

    def specs(tree):
        return jax.tree.map(lambda a: jax.P(*(axes[n] for n in a)), tree, is_leaf=lambda a: isinstance(a, Axes))

    return jax.shard_map(
        function, in_specs=specs(inputs), out_specs=specs(outputs), axis_names=set(automatic), check_vma=False
    )(*arguments)


def automatic_axes() -> dict[str, int]:
    """The axes of the mesh in context over which XLA splits arrays, and how many devices each has."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}


class Axes(tuple[str | None, ...]):
    """What the axes of one array are."""

    def __new__(cls, *names: str | None):
        return super().__new__(cls, names)
