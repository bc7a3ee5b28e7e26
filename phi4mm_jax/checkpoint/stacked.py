"""Parameters made of the tensors of files, with layers stacked, read when asked for."""

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np

from phi4mm_jax.checkpoint.safetensors_io import DTYPES
from phi4mm_jax.checkpoint.tensor_types import ParamPath, Part, Tensor, parameter_shapes
from phi4mm_jax.errors import CheckpointError

_ALIGNMENT = 64  # bytes
Row = tuple[Tensor, Part, int, int]  # a part of a tensor, with its rows


class Rows(Protocol):
    """A tensor that is read by rows; `dtype` as in `DTYPES`."""

    @property
    def dtype(self) -> str: ...

    def rows(self, start: int, stop: int, buffer: np.ndarray | None = None) -> np.ndarray: ...


class StackedTensors:
    """The parameters that some tensors make up.

    Attributes:
        tensors: those of the weight table, each once.
        stored: what each of them is read from, by `Tensor.key`.
        parameters: shape, with layers stacked, and dtype of each: float32 where its tensors have several dtypes.
    """

    def __init__(self, tensors: Iterable[Tensor], stored: Mapping[str, Rows]):
        self.tensors, self.stored = list(tensors), stored
        self._rows = _rows_by_parameter(self.tensors)
        dtypes = {path: {stored[t.key].dtype for t, *_ in rows} for path, rows in self._rows.items()}
        self.parameters = {
            path: jax.ShapeDtypeStruct(shape, DTYPES["F32" if len(dtypes[path]) > 1 else next(iter(dtypes[path]))])
            for path, shape in parameter_shapes(self.tensors).items()
        }

    def read(self, path: ParamPath, dtype: Any = None) -> np.ndarray:
        """A parameter, stacked over layers where it belongs to a layer, in its own dtype by default."""
        abstract = self.parameters[path]
        out = _empty(abstract.shape, np.dtype(dtype or abstract.dtype))

        def fill(row: Row) -> None:
            tensor, part, start, stop = row
            target = out if tensor.layer is None else out[tensor.layer, ...]
            part.fill(target, range(start, stop), self.stored[tensor.key].rows)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(fill, self._rows[path]))
        return out


def mismatch(summary: str, problems: Sequence[str], remedy: str) -> CheckpointError:
    """Return the error of tensors that are not those expected; it lists the first 20 problems."""
    shown = "\n  ".join(sorted(problems)[:20])
    more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
    return CheckpointError(f"{summary} ({len(problems)} problems):\n  {shown}{more}\n{remedy}")


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an empty array, aligned like jax's buffers: on a CPU jax takes such an array without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _rows_by_parameter(tensors: Iterable[Tensor]) -> dict[ParamPath, list[Row]]:
    """Parts of tensors that each parameter is made of."""
    rows: dict[ParamPath, list[Row]] = {}
    for tensor in tensors:
        for part, start, stop in tensor.spans():
            rows.setdefault(part.path, []).append((tensor, part, start, stop))
    return rows
