"""Loading: a checkpoint folder of any layout becomes the model's variables, one parameter at a time."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from phi4mm_jax.adapters import ADAPTERS, adapter_indices
from phi4mm_jax.checkpoint import orbax_io
from phi4mm_jax.checkpoint.layouts.original import original_table
from phi4mm_jax.checkpoint.orbax_io import OrbaxCheckpoint
from phi4mm_jax.checkpoint.peft import PeftAdapter
from phi4mm_jax.checkpoint.pytorch import PyTorchCheckpoint, layout_of, tensors_of
from phi4mm_jax.checkpoint.safetensors_io import DTYPES
from phi4mm_jax.checkpoint.tensor_types import UNUSED, ParamPath, Tensor, parameter_bytes, parameter_shapes
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.errors import CheckpointError
from phi4mm_jax.quantization import SCALES, Weights, quantize, quantized_parameters, scales_of, stored_weights

Checkpoint = PyTorchCheckpoint | OrbaxCheckpoint
_PIECE = 1 << 18  # values, which stay in a cache


def open_checkpoint(folder: Path, config: Phi4MMConfig) -> Checkpoint:
    """The parameters of a folder in the original, the native or the converted layout.

    Raises:
        CheckpointError: a file, tensor or parameter is missing, extra, misshapen or unreadable; it names them.
    """
    if not (folder / orbax_io.FOLDER).exists():
        return PyTorchCheckpoint(folder, config)
    shapes = parameter_shapes(original_table(config))
    checkpoint = OrbaxCheckpoint((folder / orbax_io.FOLDER).absolute(), shapes)
    expected = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    if (stored := stored_weights(checkpoint.parameters)) is not None:
        expected = quantized_parameters(expected, stored)
    for path in sorted(expected.keys() | checkpoint.parameters.keys()):
        found = checkpoint.parameters.get(path)
        name = f"{folder / orbax_io.FOLDER}: {'/'.join(path)}"
        if path not in expected or found is None or found.shape != expected[path].shape:
            has, needed = ("nothing" if x is None else x.shape for x in (found, expected.get(path)))
            raise CheckpointError(f"{name}: is {has}, expected {needed}; convert again")
        wanted = expected[path].dtype
        if wanted == np.float32 and not path[-1].endswith(SCALES):
            if found.dtype not in DTYPES.values():
                raise CheckpointError(f"{name}: has dtype {found.dtype}, expected a floating one; convert again")
        elif found.dtype != wanted:  # integers, or their scales
            raise CheckpointError(f"{name}: has dtype {found.dtype}, expected {wanted}; convert again")
    return checkpoint


def load_variables(
    folder: Path,
    checkpoint: Checkpoint,
    config: Phi4MMConfig,
    dtype: Any,
    shardings: Mapping[ParamPath, jax.sharding.Sharding] | None = None,
    *,
    weights: Weights | None = None,
    floats: Collection[ParamPath] = (),
    adapters: Sequence[PeftAdapter] = (),
    fresh_adapters: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Read the parameters of a checkpoint onto the devices, with layers stacked.

    Args:
        checkpoint, config: of the folder alone.
        dtype: that parameters are cast to.
        shardings: of the parameters; by default on the first device.
        weights: quantise linear maps, each after it has been read; but `floats`.
        adapters: that take the place of the folder's own.
        fresh_adapters: accept an adapter whose B matrices are all zero, which changes nothing until it is trained.
        progress: called with the number of bytes read so far, and of all.

    Raises:
        CheckpointError: a missing, extra, misshapen or unreadable tensor, one with values that are not finite, or an
            all-zero adapter; it names them.
    """
    replaced = {ADAPTERS[adapter.kind].collection for adapter in adapters}
    sources: dict[ParamPath, Checkpoint | PeftAdapter] = {
        p: checkpoint for p in checkpoint.parameters if p[0] not in replaced
    }
    sources |= {path: adapter for adapter in adapters for path in adapter.parameters}
    table = [t for t in tensors_of(layout_of(folder), config) if t.collection not in replaced]
    table += [tensor for adapter in adapters for tensor in adapter.tensors]
    used = {path: source.parameters[path] for path, source in sources.items() if path[0] != UNUSED}
    stored = stored_weights(used)
    results = used if weights in (None, stored) else quantized_parameters(used, weights, floats)
    if shardings is None:
        shardings = dict.fromkeys(results, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    for path in shardings.keys() ^ results.keys():
        raise CheckpointError(f"{'/'.join(path)}: in the weight table or in the model, but not in both")
    total, done = sum(parameter_bytes(p) for p in used.values()), 0
    variables: dict[ParamPath, Any] = {}  # arrays on their devices
    checked: Future[tuple[ParamPath, list[np.ndarray]] | None] | None = None  # beside the reading of the next one
    with ThreadPoolExecutor(1) as pool:
        for path, abstract in used.items():
            variables[path], values = _place(
                sources[path], path, _dtype_in_memory(path, abstract, dtype), shardings[path]
            )
            if weights is not None and results[path].dtype != abstract.dtype:
                variables[path], scales = quantize(path, variables[path], weights)
                variables[scales_of(path)] = jax.device_put(scales, shardings[scales_of(path)])
            _refuse_infinite(checked, sources, table)
            checked = pool.submit(lambda p, found: None if all(map(is_finite, found)) else (p, found), path, values)
            done += parameter_bytes(abstract)
            if progress is not None:
                progress(done, total)
        _refuse_infinite(checked, sources, table)
    if not fresh_adapters:
        check_trained(table, lambda path: _layers_used(variables[path]))
    return unflatten_dict(variables)


def _dtype_in_memory(path: ParamPath, stored: jax.ShapeDtypeStruct, dtype: Any) -> Any:
    """The dtype that a parameter is read in: that of the model, but for integers and their scales."""
    is_float = np.dtype(stored.dtype) in DTYPES.values() and not path[-1].endswith(SCALES)
    return dtype if is_float else stored.dtype


def _place(
    checkpoint: Checkpoint | PeftAdapter, path: ParamPath, dtype: Any, sharding: jax.sharding.Sharding
) -> tuple[jax.Array, list[np.ndarray]]:
    """Return a parameter on its devices, and this host's values of it."""
    if isinstance(checkpoint, OrbaxCheckpoint):
        placed = checkpoint.place(path, dtype, sharding)
        shares = {str(share.index): share.data for share in placed.addressable_shards}
        return placed, [np.asarray(share) for share in shares.values()]
    array = checkpoint.read(path, dtype)
    return jax.make_array_from_callback(array.shape, sharding, lambda share: array[share]), [array]


def is_finite(values: np.ndarray) -> bool:
    """Return whether none is NaN or infinite, from their bits, a piece at a time: nine times as fast as numpy's."""
    if values.dtype not in DTYPES.values():
        return True
    signed, unsigned = np.dtype(f"i{values.itemsize}"), np.dtype(f"u{values.itemsize}")
    positive, negative = np.array([np.inf, -np.inf], values.dtype).view(unsigned)
    flat = values.reshape(-1)
    pieces = (flat[i : i + _PIECE] for i in range(0, flat.size, _PIECE))
    return not any(x.view(signed).max() >= positive or x.view(unsigned).max() >= negative for x in pieces)


def _refuse_infinite(
    checked: Future[tuple[ParamPath, list[np.ndarray]] | None] | None,
    sources: Mapping[ParamPath, Checkpoint | PeftAdapter],
    table: Iterable[Tensor],
) -> None:
    if checked is None or (found := checked.result()) is None:
        return
    path, shares = found
    tensors = [t for t in table if path in [part.path for part in t.parts]]
    layers = 1 + max(-1 if t.layer is None else t.layer for t in tensors)
    whole = [share for share in shares if len(share) == layers]  # one with fewer does not tell which these are
    infinite = [t for t in tensors if not all(is_finite(share[t.layer]) for share in whole)] or tensors
    names = ", ".join(str(t.key) for t in infinite[:3])
    more = f" and {len(infinite) - 3} more" if len(infinite) > 3 else ""
    raise CheckpointError(
        f"{sources[path].folder}: {names}{more}: holds NaN or infinity; the checkpoint is damaged, or its "
        "training diverged. Copy it again, or use an earlier one"
    )


def _layers_used(stacked: jax.Array) -> np.ndarray:
    if [device.platform for device in stacked.devices()] == ["cpu"]:  # by the host, which compiles nothing
        return layers_used(np.asarray(stacked))
    return np.asarray(_layers_used_on_devices(stacked))


@jax.jit
def _layers_used_on_devices(stacked: jax.Array) -> jax.Array:
    return jnp.any(stacked != 0, axis=tuple(range(1, stacked.ndim)))


def layers_used(stacked: np.ndarray) -> np.ndarray:
    """Return whether a layer has a value that is not zero, for each."""
    bits = stacked.view(f"u{stacked.itemsize}").reshape(len(stacked), -1)
    return np.array([any((x[i : i + _PIECE] << 1).any() for i in range(0, x.size, _PIECE)) for x in bits])  # -0 is zero


def check_trained(tensors: Iterable[Tensor], layers_used: Callable[[ParamPath], np.ndarray]) -> None:
    """Check that no adapter is untrained: a B matrix of zeros whose A is not, or a whole adapter of zeros.

    Where both are zero, the adapter is on other modules only.

    Args:
        layers_used: tells, for a stacked parameter, which layers have a value that is not zero.

    Raises:
        CheckpointError: one is; it names the tensor.
    """
    used: dict[ParamPath, np.ndarray] = {}

    def is_used(path: ParamPath, layer: int | None) -> bool:
        if path not in used:
            used[path] = layers_used(path)
        return bool(used[path][layer])

    first: dict[str, Tensor] = {}  # of each adapter
    trained: set[str] = set()
    for tensor in tensors:
        adapter, paths = tensor.collection, [part.path for part in tensor.parts]
        if adapter not in adapter_indices() or paths[0][-1] == "a":
            continue
        first.setdefault(adapter, tensor)
        if any(is_used(path, tensor.layer) for path in paths):
            trained.add(adapter)
        elif is_used((*paths[0][:-1], "a"), tensor.layer):
            raise _untrained(tensor)
    for adapter in first.keys() - trained:
        raise _untrained(first[adapter])


def _untrained(tensor: Tensor) -> CheckpointError:
    return CheckpointError(
        f"{tensor.key}: all zero, so the adapter does nothing there. The checkpoint was probably converted wrongly; if "
        "an untrained adapter is meant, pass fresh_adapters=True to load, write fresh_adapters: true in a recipe, give "
        "--fresh-adapters to a converter."
    )
