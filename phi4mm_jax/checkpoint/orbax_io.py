"""Parameters as an Orbax checkpoint: written one at a time, restored straight onto a mesh.

Two int4 values are a byte, which Orbax and TensorStore would give each: an array of uint8 is one of int4 with twice as
many values in its last axis, of which those at even places are in the lower bits.
"""

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Int4, UInt8

from phi4mm_jax.checkpoint.tensor_types import ParamPath, parameter_bytes
from phi4mm_jax.config import read_json
from phi4mm_jax.errors import CheckpointError
from phi4mm_jax.utils.absl_log import absl_log_level

FOLDER = "parameters"  # within a converted checkpoint
_WRITER = "np_type_handler"  # Orbax's name of its thread
_ZARR_DTYPES = "<f4", "<f2", "bfloat16", "|i1", "|u1", "int4"  # zarr's names
CHUNK_BYTES = 8 << 20  # small enough that a share of a layer is many chunks, large enough for fast files


class OrbaxCheckpoint:
    """The parameters below a folder, restored when asked for.

    Attributes:
        folder: where it is.
        parameters: shape, with layers stacked, and dtype of each parameter, "unused" ones included.
        files: what holds them.

    Raises:
        CheckpointError: the folder is not a whole Orbax checkpoint, or lacks one of the parameters expected.
    """

    def __init__(self, folder: Path, expected: Iterable[ParamPath]):
        import orbax.checkpoint as ocp  # takes a while, and most checkpoints are PyTorch's

        self._ocp, self.folder = ocp, folder
        self.files = {folder}
        self._checkpointer = ocp.PyTreeCheckpointer()
        for path in sorted({*expected, *_paths_written(folder / "_METADATA")}):
            _check_array(_folder_of(folder, path) / ".zarray", path)  # Orbax would not say which one is damaged
        with _readable(folder, "the checkpoint"):
            metadata: Any = self._checkpointer.metadata(folder).item_metadata
            leaves: dict[ParamPath, Any] = dict(flatten_dict(metadata.tree))
            self._stored = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
            self.parameters = {path: _unpacked(x) for path, x in self._stored.items()}

    def read(self, path: ParamPath, dtype: Any = None) -> np.ndarray:
        """A parameter, whole, in memory; in its own dtype by default."""
        packed = self._is_packed(path)
        array = self._restore(path, self._ocp.RestoreArgs(restore_type=np.ndarray, dtype=None if packed else dtype))
        return unpack_int4(array) if packed else array

    def place(self, path: ParamPath, dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        """A parameter on the devices; each host reads only the chunks that its devices hold a share of."""
        packed, shape = self._is_packed(path), self.parameters[path].shape
        if packed and sharding.shard_shape(shape)[-1] % 2:  # a byte would be on two devices
            array = self.read(path)
            return jax.make_array_from_callback(shape, sharding, lambda share: array[share])
        how = self._ocp.ArrayRestoreArgs(
            sharding=sharding, global_shape=self._stored[path].shape, dtype=None if packed else dtype
        )
        placed = self._restore(path, how)
        if not packed:
            return placed
        shares = [jax.device_put(unpack_int4(np.asarray(x.data)), x.device) for x in placed.addressable_shards]
        return jax.make_array_from_single_device_arrays(shape, sharding, shares)

    def _is_packed(self, path: ParamPath) -> bool:
        return self._stored[path] != self.parameters[path]

    def _restore(self, path: ParamPath, how: Any) -> Any:
        item = unflatten_dict({path: self._stored[path]})
        args = self._ocp.args.PyTreeRestore(item, restore_args=unflatten_dict({path: how}), partial_restore=True)
        with _readable(_folder_of(self.folder, path), "/".join(path)):
            return flatten_dict(self._checkpointer.restore(self.folder, args=args))[path]


def _paths_written(metadata: Path) -> set[ParamPath]:
    try:
        leaves = read_json(metadata)["tree_metadata"].values()
        return {tuple(part["key"] for part in leaf["key_metadata"]) for leaf in leaves}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{metadata}: does not list the parameters; convert again") from error


def _check_array(array: Path, path: ParamPath) -> None:
    if not array.is_file():
        raise CheckpointError(f"{array}: no such file, so that {'/'.join(path)} is missing; convert again")
    written = read_json(array)
    shape, dtype = (written.get(key) for key in ("shape", "dtype"))
    if not isinstance(shape, list) or not all(isinstance(n, int) for n in shape):
        raise CheckpointError(f"{array}: its shape is {shape!r:.60}, expected a list of integers; convert again")
    if dtype not in _ZARR_DTYPES or written.get("order") != "C":
        raise CheckpointError(
            f"{array}: its dtype is {dtype!r:.60} and its order {written.get('order')!r:.60}, expected one of "
            f"{', '.join(_ZARR_DTYPES)} and C; convert again"
        )


def pack_int4(values: Int4[np.ndarray, "*N I"]) -> UInt8[np.ndarray, "*N I//2"]:
    bits = values.astype(np.int8).view(np.uint8)
    return (bits[..., ::2] & 15) | (bits[..., 1::2] << 4)


def unpack_int4(packed: UInt8[np.ndarray, "*N I//2"]) -> Int4[np.ndarray, "*N I"]:
    values = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.int8)
    values[..., ::2] = (packed << 4).view(np.int8) >> 4  # with its sign
    values[..., 1::2] = packed.view(np.int8) >> 4
    return values.astype(jnp.int4)


def _packed(parameter: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Return shape and dtype as they are stored."""
    *axes, last = parameter.shape
    if parameter.dtype != jnp.int4 or last % 2:
        return parameter
    return jax.ShapeDtypeStruct((*axes, last // 2), np.uint8)


def _unpacked(stored: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    *axes, last = stored.shape or (1,)
    return stored if stored.dtype != np.uint8 else jax.ShapeDtypeStruct((*axes, 2 * last), jnp.int4)


def _folder_of(folder: Path, path: ParamPath) -> Path:
    return folder / ".".join(path)


@contextlib.contextmanager
def _readable(folder: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # not the file's fault
        raise
    except Exception as error:  # of many kinds; TensorStore's own names the file
        cause = str(error.__cause__ or error)[:400]
        raise CheckpointError(f"{folder}: {what} cannot be read ({cause}); convert again") from error


def write(
    folder: Path,
    parameters: Mapping[ParamPath, jax.ShapeDtypeStruct],
    read: Callable[[ParamPath], np.ndarray],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write parameters to a folder, one at a time: memory is bounded by the largest, not the model.

    Args:
        parameters: shape and dtype of each.
        read: gives a parameter's values.
        progress: called with the bytes written so far, and in all.

    Raises:
        OSError: the folder cannot be written to.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint import type_handlers

    leaves = {path: _Unread(path, _packed(abstract)) for path, abstract in parameters.items()}
    total = sum(parameter_bytes(leaf.abstract) for leaf in leaves.values())
    done = 0

    class Handler(type_handlers.NumpyHandler):
        """Reads a parameter lazily when it is written, and waits until it is."""

        async def serialize(self, values: Any, infos, args=None):
            nonlocal done
            for value, info, arg in zip(values, infos, args or (), strict=True):
                array = read(value.path)
                if value.dtype == np.uint8:
                    array = pack_int4(array)
                with _writable():
                    for future in await super().serialize([array], [info], [arg]):
                        future.result()
                del array
                done += parameter_bytes(value.abstract)
                if progress is not None:
                    progress(done, total)
            return []

    # Layers in chunks of their own: a host that holds a share of each reads no other.
    chunks = {
        path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if "layers" in path else ())
        for path in parameters
    }
    registry = type_handlers.create_type_handler_registry((_Unread, Handler(deepcopy_host_arrays=False)))
    arguments = ocp.args.PyTreeSave(unflatten_dict(leaves), save_args=unflatten_dict(chunks))
    # Orbax warns of what does not apply to one host's numpy arrays, and prints errors that are raised as well.
    with absl_log_level(logging.CRITICAL + 1):
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False,  # a folder for each parameter, a file for each chunk
            use_compression=False,  # weights hardly shrink
            type_handler_registry=registry,
        )
        with ocp.Checkpointer(handler) as checkpointer:
            try:
                checkpointer.save(folder.absolute(), args=arguments)
            except KeyboardInterrupt:
                for thread in threading.enumerate():
                    if thread.name == _WRITER:  # it writes to a folder that will be removed
                        thread.join()
                raise


@contextlib.contextmanager
def _writable() -> Iterator[None]:
    """Convert TensorStore's ValueErrors to OSErrors."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        raise OSError(int(code[1]) if code else 0, str(error)) from error


class _Unread:
    """A leaf of the tree to write, whose values are not in memory."""

    def __init__(self, path: ParamPath, abstract: jax.ShapeDtypeStruct):
        self.path, self.abstract = path, abstract
        self.shape, self.dtype = abstract.shape, abstract.dtype
