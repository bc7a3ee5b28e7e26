"""Parameters as an Orbax checkpoint: written one at a time, restored straight onto a mesh."""

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from phi4mm_jax.checkpoint.tensor_types import ParamPath, parameter_bytes
from phi4mm_jax.config import read_json
from phi4mm_jax.errors import CheckpointError
from phi4mm_jax.utils.absl_log import absl_log_level

FOLDER = "parameters"  # within a converted checkpoint
_WRITER = "np_type_handler"  # Orbax's name of its thread
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
        read_json(folder / "_METADATA")
        for path in expected:  # Orbax would not say which one is missing
            array = _folder_of(folder, path) / ".zarray"
            if not array.is_file():
                raise CheckpointError(f"{array}: no such file, so that {'/'.join(path)} is missing; convert again")
            read_json(array)
        with _readable(folder, "the checkpoint"):
            metadata: Any = self._checkpointer.metadata(folder).item_metadata
            leaves: dict[ParamPath, Any] = dict(flatten_dict(metadata.tree))
            self.parameters = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}

    def read(self, path: ParamPath, dtype: Any = None) -> np.ndarray:
        """A parameter, whole, in memory; in its own dtype by default."""
        return self._restore(path, self._ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype))

    def place(self, path: ParamPath, dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        """A parameter on the devices; each host reads only the chunks that its devices hold a share of."""
        shape = self.parameters[path].shape
        return self._restore(path, self._ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, dtype=dtype))

    def _restore(self, path: ParamPath, how: Any) -> Any:
        item = unflatten_dict({path: self.parameters[path]})
        args = self._ocp.args.PyTreeRestore(item, restore_args=unflatten_dict({path: how}), partial_restore=True)
        with _readable(_folder_of(self.folder, path), "/".join(path)):
            return flatten_dict(self._checkpointer.restore(self.folder, args=args))[path]


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

    total = sum(parameter_bytes(p) for p in parameters.values())
    done = 0

    class Handler(type_handlers.NumpyHandler):
        """Reads a parameter lazily when it is written, and waits until it is."""

        async def serialize(self, values: Any, infos, args=None):
            nonlocal done
            for value, info, arg in zip(values, infos, args or (), strict=True):
                array = read(value.path)
                with _writable():
                    for future in await super().serialize([array], [info], [arg]):
                        future.result()
                del array
                done += parameter_bytes(value.abstract)
                if progress is not None:
                    progress(done, total)
            return []

    leaves = {path: _Unread(path, abstract) for path, abstract in parameters.items()}
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
