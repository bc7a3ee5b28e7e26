"""Device mesh, and the rules from logical to mesh axes: RULES for parameters, ACTIVATIONS for activations."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Shaped

from phi4mm_jax.config import DecoderConfig, Phi4MMConfig
from phi4mm_jax.errors import InputError

AXES = ("data", "fsdp", "context", "tensor")  # of a mesh, the innermost last: it has the most communication
ROWS, LENGTH, HEADS = ("data", "fsdp"), ("context",), ("tensor",)
LOGICAL_AXES: Mapping[str, str | None] = {  # by the letter of an axis in einsums
    "D": "embed",
    "E": "embed_out",  # another embedding, where one linear map has two
    "N": "heads",
    "K": "kv_heads",
    "H": "head",
    "F": "mlp",
    "V": "vocab",
    "R": "rank",
    "U": None,  # places of users' adapters
    "C": "channels",
    "P": None,  # bands of a log-mel frame
    "S": None,  # rows of a table of positions
    "W": None,  # short axes: windows, colours
    "X": None,
}
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (  # logical axis of a parameter -> mesh axes
    ("vocab", ("fsdp", "context", "tensor")),  # so the LM head is never all-gathered
    ("heads", HEADS),
    ("kv_heads", HEADS),
    ("mlp", HEADS),
    ("channels", HEADS),
    ("embed", ("fsdp", "context")),
    ("embed_out", ("fsdp", "context")),
    ("rank", ("fsdp", "context")),
    ("head", ()),
    ("layers", ()),
)
ACTIVATIONS: tuple[tuple[str, tuple[str, ...]], ...] = (  # likewise of an activation, in training
    ("batch", ROWS),
    ("length", LENGTH),
    ("media", (*ROWS, *LENGTH)),  # crops and chunks of clips
)
PREFILL: tuple[tuple[str, tuple[str, ...]], ...] = (("batch", ()), ("length", LENGTH))  # likewise, of a chunk
ENCODING: tuple[tuple[str, tuple[str, ...]], ...] = (("media", AXES),)  # likewise, of media alone


def make_mesh(
    fsdp: int = 1, tensor: int = 1, *, data: int = 1, context: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Return a mesh of data * fsdp * context * tensor devices, with automatic axes.

    Args:
        fsdp: splits every weight along its embedding axis, with context, and the rows of a batch.
        tensor: splits heads and MLP; with fsdp and context, the vocabulary.
        data: splits rows alone; the only axis across slices, which data-centre networks connect.
        context: splits the tokens of each row.
        devices: all by default.

    Raises:
        InputError: a size below 1, too few devices, or `data` is not a multiple of the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    count = math.prod(sizes.values())
    if min(sizes.values()) < 1 or count > len(devices):
        asked = " times ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "fsdp=1"
        raise InputError(f"a mesh of {asked}: expected positive sizes, and at most {len(devices)} devices in all")
    slices = _num_slices(devices)
    if slices > 1:
        if data % slices or count != len(devices):
            raise InputError(
                f"mesh has data={data}, and the {len(devices)} devices are of {slices} slices; give data="
                f"{slices} or a multiple of it, and sizes that take all devices: only data may cross slices"
            )
        within = (data // slices, fsdp, context, tensor)
        grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return jax.make_mesh((data, fsdp, context, tensor), AXES, (AxisType.Auto,) * len(AXES), devices=devices[:count])


def _num_slices(devices: Sequence[Any]) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


def mesh_of_sizes(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Make a mesh of the sizes by axis; see `make_mesh`."""
    fsdp, tensor, data, context = (sizes.get(axis, 1) for axis in ("fsdp", "tensor", "data", "context"))
    return make_mesh(fsdp, tensor, data=data, context=context, devices=devices)


def parse_mesh(spec: str) -> dict[str, int]:
    """Parse the axes and sizes of a mesh, such as "fsdp=4,tensor=2".

    Raises:
        InputError: invalid syntax, an unknown axis, or one twice.
    """
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        axis, equals, size = (word.strip() for word in part.partition("="))
        if not equals or not size.isdecimal() or not size.isascii() or int(size) < 1:
            raise InputError(f"mesh is {spec!r:.80}; expected axes with their sizes, such as tensor=8")
        if axis not in AXES:
            raise InputError(f"mesh is {spec!r:.80}, and {axis!r} is not a mesh axis; choose from {', '.join(AXES)}")
        if axis in sizes:
            raise InputError(f"mesh is {spec!r:.80}, which has {axis} twice; give it once")
        sizes[axis] = int(size)
    return sizes


def training_mesh(spec: str | None, config: Phi4MMConfig, chips: Sequence[Any] | None = None) -> Mesh | None:
    """Return the training mesh; fsdp takes the remaining devices, by default all.

    Args:
        chips: all devices, by default jax's; others are those of a slice that is compiled for.

    Returns:
        None for one device.

    Raises:
        InputError: an invalid spec, too few devices, or sizes that do not divide the model.
    """
    sizes = {} if spec is None else parse_mesh(spec)
    chips = jax.devices() if chips is None else chips
    devices = len(chips)
    sizes.setdefault("data", _num_slices(chips))
    within_host = sizes.get("tensor", 1) * sizes.get("context", 1)
    if jax.process_count() > 1 and jax.local_device_count() % within_host:
        raise InputError(
            f"mesh is {spec!r}, whose tensor times context of {within_host} does not divide a host's "
            f"{jax.local_device_count()} devices; tensor x context must fit in one host"
        )
    others = math.prod(size for axis, size in sizes.items() if axis != "fsdp")
    if others > devices or ("fsdp" not in sizes and devices % others):
        raise InputError(f"mesh is {spec!r}, which {devices} devices cannot make; give sizes whose product divides it")
    sizes.setdefault("fsdp", devices // others)
    mesh = mesh_of_sizes(sizes, chips)
    check_sizes(config, mesh.shape)
    return None if mesh.size == 1 else mesh


def inference_mesh(spec: str | None, config: DecoderConfig) -> Mesh | None:
    """Return the inference mesh; by default as many of this host's accelerators as divide the heads.

    Its axes are tensor and, where asked for, context, whose devices share the tokens of every page.

    Returns:
        None for one device.

    Raises:
        InputError: an axis that inference does not use, or a size that the heads or the devices do not allow.
    """
    devices = jax.local_devices()
    fitting = [n for n in range(1, config.num_kv_heads + 1) if config.num_kv_heads % n == 0 and n <= len(devices)]
    if spec is None:
        tensor, context = fitting[-1] if devices[0].platform != "cpu" else 1, 1
    else:
        sizes = parse_mesh(spec)
        for axis in sizes.keys() - {"tensor", "context"}:
            if sizes[axis] > 1:
                raise InputError(f"mesh is {spec!r}, but inference splits over tensor and context; leave {axis} out")
        tensor, context = sizes.get("tensor", 1), sizes.get("context", 1)
        if tensor * context > len(devices):
            fitting = [n for n in fitting if n * context <= len(devices)]
            raise InputError(
                f"mesh is {spec!r}, but there {'is' if len(devices) == 1 else 'are'} {len(devices)} "
                f"device{'s' * (len(devices) > 1)}; "
                + (f"tensor can be {_any_of(fitting)}" if fitting else f"context can be at most {len(devices)}")
            )
        check_heads(config, tensor)
        _check_divides("context", context, config.embed_dim, "{} values of the embedding", 2 * context - 1)
    if tensor * context == 1:
        return None
    return make_mesh(tensor=tensor, context=context, devices=devices)


def check_heads(config: DecoderConfig, tensor: int) -> None:
    """Raise InputError if the axis `tensor` does not divide the KV heads.

    XLA would replicate all keys and values.
    """
    _check_divides("tensor", tensor, config.num_kv_heads, "{} KV heads", config.num_kv_heads)


def check_sizes(config: Phi4MMConfig, sizes: Mapping[str, int]) -> None:
    """Raise InputError if a mesh axis does not divide a dimension that `RULES` would split over it.

    XLA would replicate it silently.
    """
    decoder, vision, speech = config.decoder, config.vision, config.speech
    stacks = [("decoder", decoder)]
    stacks += [("image encoder", vision)] if config.has_vision else []
    stacks += [("speech encoder", speech)] if config.has_speech else []
    tensor, embed = sizes.get("tensor", 1), sizes.get("fsdp", 1) * sizes.get("context", 1)
    checks = [  # the encoders' heads and MLP are divided by what divides the decoder's
        ("tensor", tensor, "KV heads", decoder.num_kv_heads, "decoder"),
        ("tensor", tensor, "MLP columns", decoder.mlp_dim, "decoder"),
    ]
    for name, stack in stacks:
        checks.append(("fsdp times context", embed, "values of the embedding", stack.embed_dim, name))
    vocabulary = "fsdp times context times tensor", embed * tensor, "tokens of the vocabulary"
    checks.append((*vocabulary, decoder.vocab_size, "decoder"))
    for axis, size, what, count, name in checks:
        _check_divides(axis, size, count, f"the {name}'s {{}} {what}", 2 * size - 1)


def _check_divides(axis: str, size: int, count: int, what: str, max_size: int) -> None:
    """Raise InputError if a mesh axis's size does not divide a count, naming sizes up to `max_size` that do."""
    if count % size:
        fitting = [n for n in range(1, max_size + 1) if count % n == 0]
        raise InputError(f"mesh has {axis}={size}, which does not divide {what.format(count)}; give {_any_of(fitting)}")


def _any_of(sizes: Sequence[int]) -> str:
    return " or ".join(map(str, sizes))


def shardings(abstract: Any, mesh: Mesh | None) -> dict[tuple[str, ...], jax.sharding.Sharding]:
    """Return each parameter's sharding, by path; this host's first device without a mesh.

    A dimension is left replicated if not divisible, and a mesh axis splits the first dimension that it can.

    Raises:
        InputError: a mesh without any axis of `RULES`.
    """
    if mesh is not None and not (
        isinstance(mesh, Mesh) and set(mesh.axis_names) & {a for _, axes in RULES for a in axes}
    ):
        raise InputError(f"mesh is {mesh!r}; expected one with the axes fsdp and tensor: use make_mesh(fsdp, tensor)")
    boxed = flatten_dict(abstract, is_leaf=lambda _, x: not isinstance(x, dict))
    if mesh is None:
        return dict.fromkeys(boxed, SingleDeviceSharding(jax.local_devices()[0]))

    def spec(leaf) -> NamedSharding:
        axes = leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * leaf.ndim
        return NamedSharding(mesh, _split(axes, nn.unbox(leaf).shape, mesh.shape))

    return {path: spec(leaf) for path, leaf in boxed.items()}


def sharding_within(sharding: Sharding, axis: int) -> Sharding:
    """Return the sharding of what one index of an axis has, an axis that is not split."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = [names for i, names in enumerate(sharding.spec) if i != axis]
    return NamedSharding(sharding.mesh, jax.P(*spec))


def param_split(letters: str, shape: Sequence[int]) -> list[tuple[str, ...]]:
    """Return the mesh axes that split each axis of a parameter where it is used, as `constrain_param` leaves it."""
    sizes, gathered = automatic_axes(), activation_axes()
    split = _split_axes([LOGICAL_AXES[letter] for letter in letters], shape, dict(RULES), sizes)
    return [tuple(name for name in names if name not in gathered and sizes[name] > 1) for names in split]


def constrain_param(x: Shaped[Array, "..."], axes: Sequence[str | None]) -> Shaped[Array, "..."]:
    """Constrain a parameter on use: sharded as by `shardings`, then gathered over the axes that split the batch.

    With both constraints XLA all-gathers one layer's weights (FSDP) instead of all-reducing activations. The gradient
    has the parameter's sharding. Without a mesh in context, return the parameter.
    """
    sizes = automatic_axes()
    if math.prod(sizes.values()) == 1:
        return x
    split = _split(axes, x.shape, sizes)
    batch = () if "vocab" in axes else activation_axes()  # each device has the logits of its own part of the vocabulary
    whole = _split(axes, x.shape, sizes, gathered=batch)
    return _constrain(x, split, whole) if whole != split else jax.lax.with_sharding_constraint(x, split)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _constrain(x: Shaped[Array, "..."], split: jax.P, whole: jax.P) -> Shaped[Array, "..."]:
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, split), whole)


_constrain.defvjp(
    lambda x, split, whole: (_constrain(x, split, whole), None),
    lambda split, whole, _, gradient: (jax.lax.with_sharding_constraint(gradient, split),),
)


def constrain(x: Float[Array, "..."], *axes: str | None) -> Float[Array, "..."]:
    """Constrain the first axes of an activation as `ACTIVATIONS` says, and leave the others to XLA.

    Within `split_batch`, if divisible; else return the activation.
    """
    sizes, table = automatic_axes(), dict(nn.get_logical_axis_rules())
    split = _split_axes(axes, x.shape[: len(axes)], table, sizes) if table else []
    if not any(split) or math.prod(sizes.values()) == 1:
        return x
    spec = [names or jax.P.UNCONSTRAINED for names in split]
    return jax.lax.with_sharding_constraint(x, jax.P(*spec, *[jax.P.UNCONSTRAINED] * (x.ndim - len(spec))))


def activation_sharding(mesh: Mesh, shape: Sequence[int], *axes: str | None) -> NamedSharding:
    """Return the sharding of an array with these first axes; a dimension that is not divisible is replicated."""
    split = _split_axes(axes, shape[: len(axes)], dict(ACTIVATIONS), mesh.shape)
    return NamedSharding(mesh, jax.P(*(names or None for names in split)))


def logits_sharding(mesh: Any, shape: Sequence[int]) -> NamedSharding:
    """Return where an array (..., V) lies beside logits, of which each device has its part of the vocabulary."""
    return NamedSharding(mesh, _split([*[None] * (len(shape) - 1), "vocab"], shape, mesh.shape))


def vocabulary_parts(size: int) -> int:
    """Return how many devices of the mesh in context share a vocabulary."""
    sizes = automatic_axes()
    (names,) = _split_axes(["vocab"], [size], dict(RULES), sizes)
    return math.prod(sizes[name] for name in names)


def replicate(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Replicate an activation, whose gradient is then all-reduced; within `split_batch`."""
    if not activation_axes() or math.prod(automatic_axes().values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, jax.P())


def split_batch(table: Sequence[tuple[str, tuple[str, ...]]] = ACTIVATIONS) -> Any:
    """A context in which a table splits activations, and weights are gathered where they are used over its axes."""
    return nn.logical_axis_rules(table)


def activation_axes() -> tuple[str, ...]:
    """Return the mesh axes that split activations, by the rules in context; none outside of `split_batch`."""
    return tuple(dict.fromkeys(name for axes in dict(nn.get_logical_axis_rules()).values() for name in axes or ()))


def context_size() -> int:
    """Return the number of devices that split each row's tokens, by the mesh and the rules in context."""
    return math.prod(automatic_axes().get(name, 1) for name in LENGTH) if LENGTH[0] in activation_axes() else 1


def _split(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mapping[str, int], gathered: Sequence[str] = ()
) -> jax.P:
    """Return the mesh axes that split each axis of an array, without those over which it is gathered."""
    split = _split_axes(axes, shape, dict(RULES), mesh)
    return jax.P(*(tuple(n for n in names if n not in gathered) or None for names in split))


def _split_axes(
    axes: Sequence[str | None], shape: Sequence[int], table: Mapping[str, Any], mesh: Mapping[str, int]
) -> list[tuple[str, ...]]:
    """Return the mesh axes that split each axis of an array by a table: each once, and none that do not divide it."""
    split: list[tuple[str, ...]] = []
    for axis, size in zip(axes, shape, strict=True):
        taken = {name for names in split for name in names}
        names = tuple(n for n in (table[axis] if axis is not None else ()) if n in mesh and n not in taken)
        split.append(names if size % math.prod(mesh[n] for n in names) == 0 else ())
    return split


def jit_on_mesh(variables: Any, function: Callable[..., Any], **options: Any) -> Any:
    """Jit a function of these variables with their mesh in context, so that kernels are split over its devices."""
    place = jax.tree.leaves(variables)[0].sharding

    @wraps(function)
    def on_mesh(*arguments: Any, **named: Any) -> Any:
        if not isinstance(place, NamedSharding):
            return function(*arguments, **named)
        with jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh):
            return function(*arguments, **named)

    return jax.jit(on_mesh, **options)


def over_mesh(function: Callable[..., Any], arguments: tuple, inputs: Any, outputs: Any, *, rows: int, heads: int):
    """Call function(*arguments) under `shard_map` on the mesh in context; without a mesh, call it directly.

    XLA cannot partition a kernel by itself: each device gets its rows and heads. With rows=1 the batch is not
    sharded, whatever its size.

    Args:
        inputs, outputs: for each array of the arguments and results what its axes are: "rows", "heads", "length" or
            None.
        rows, heads: how many there are. What its mesh axes do not divide is not split over them.
    """
    automatic = automatic_axes()
    if math.prod(automatic.values()) == 1:
        return function(*arguments)
    axes: dict[str | None, Any] = {None: None, "length": tuple(n for n in LENGTH if n in automatic) or None}
    everything = (AXES,) if set(activation_axes()) == set(AXES) else ()
    for name, candidates, count in (("rows", (*everything, (*ROWS, *LENGTH), ROWS), rows), ("heads", (HEADS,), heads)):
        present = [
            tuple(n for n in names if n in automatic and n not in (axes.get("rows") or ())) for names in candidates
        ]
        axes[name] = next((p for p in present if p and count % math.prod(automatic[n] for n in p) == 0), None)

    def specs(tree):
        return jax.tree.map(lambda a: jax.P(*(axes[n] for n in a)), tree, is_leaf=lambda a: isinstance(a, Axes))

    return jax.shard_map(
        function, in_specs=specs(inputs), out_specs=specs(outputs), axis_names=set(automatic), check_vma=False
    )(*arguments)


def context_part() -> tuple[Any, int]:
    """Within `over_mesh`: which part of every page's tokens this device has, and of how many."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = {n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Manual}
    size = mesh.shape[LENGTH[0]] if LENGTH[0] in manual else 1
    return (jax.lax.axis_index(LENGTH[0]), size) if size > 1 else (0, 1)


def automatic_axes() -> dict[str, int]:
    """Return the automatic axes of the mesh in context, over which XLA splits arrays, with their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}


def target_device() -> Any:
    """Return the device that a program is traced for: the mesh's in context, which is abstract, or the default one."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def on_one_cpu() -> bool:
    """Return whether a program is traced for one CPU: nothing is sharded then."""
    return math.prod(automatic_axes().values()) == 1 and getattr(target_device(), "platform", None) == "cpu"


class Axes(tuple[str | None, ...]):
    """Kinds of one array's axes, for `over_mesh`: "rows", "length", "heads" or None."""

    def __new__(cls, *names: str | None):
        return super().__new__(cls, names)
