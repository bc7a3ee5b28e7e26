"""Types of the tables that say which tensor of a checkpoint is which parameter, as a bijection.

The tables are in `layouts/original.py` and `layouts/native.py`.

A tensor's rows are split into parts (q, k, v of a fused matrix; mostly there is one); each part is viewed, transposed
and reshaped into one parameter. All three steps have inverses, so a table converts in both directions.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

_STRIP = 128  # rows; of 16, 32, 64, 128 and 256 the fastest
_STRIP_BYTES = 1 << 20  # of narrow rows; stays in a core's cache
_MAX_ITEMSIZE = 4  # of a checkpoint's dtypes

UNUSED = "unused"  # the collection of what the model never reads
ParamPath = tuple[str, ...]  # collection, then module names, then the parameter's
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Part of a tensor that is one parameter: `rows.reshape(view).transpose(axes).reshape(shape)`."""

    path: ParamPath
    view: Shape
    axes: tuple[int, ...]
    shape: Shape  # of the parameter (of one layer's, where layers are stacked)

    def to_parameter(self, rows: np.ndarray) -> np.ndarray:
        return _transpose(rows.reshape(self.view), self.axes).reshape(self.shape)

    def fill(self, parameter: np.ndarray, rows: range, read: Callable[..., np.ndarray]) -> None:
        """Write `to_parameter` into a contiguous array of any dtype; only a strip of rows is held beside it.

        Args:
            rows: the part's, of its tensor.
            read: gives the tensor's rows from the first to before the second, in the third, a buffer, if it can.
        """
        plain = self.axes == tuple(range(len(self.view)))
        if self.view[0] != len(rows) or not (plain or self.axes == (1, 0)):  # small ones
            parameter[...] = self.to_parameter(read(rows.start, rows.stop))
            return
        width = math.prod(self.view[1:])
        target = parameter.reshape((len(rows), width) if plain else (width, len(rows)))
        step = max(_STRIP, _STRIP_BYTES // (width * parameter.itemsize))
        buffer = np.empty(step * width * _MAX_ITEMSIZE, np.uint8)
        for start in rows[::step]:
            strip = read(start, min(start + step, rows.stop), buffer)
            strip = strip.reshape(-1, width).astype(target.dtype, copy=False)
            if plain:
                target[start - rows.start :][: len(strip)] = strip
            else:
                _put_columns(target, start - rows.start, strip)

    def to_rows(self, parameter: np.ndarray) -> np.ndarray:
        """Undo `to_parameter`; flat beyond the first axis."""
        transposed = parameter.reshape([self.view[a] for a in self.axes])
        return _transpose(transposed, tuple(np.argsort(self.axes))).reshape(self.view)


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint. `layer` is its place in a stack of layers."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]
    layer: int | None = None
    folder: str = ""  # within the checkpoint, where it is not in the main shards

    @property
    def collection(self) -> str:
        return self.parts[0].path[0]

    @property
    def key(self) -> str:
        """Its name among all tensors of the checkpoint."""
        return f"{self.folder}/{self.name}" if self.folder else self.name

    def spans(self) -> Iterator[tuple[Part, int, int]]:
        """Yield each part with its rows: where they start and stop."""
        start, row = 0, math.prod(self.shape[1:])
        for part in self.parts:
            stop = start + math.prod(part.view) // row
            yield part, start, stop
            start = stop


def parameter_shapes(tensors: Iterable[Tensor]) -> dict[ParamPath, Shape]:
    """The parameters that tensors make up; those of layers are stacked."""
    stacks: dict[ParamPath, list[Tensor]] = {}
    shapes: dict[ParamPath, Shape] = {}
    for tensor in tensors:
        for part in tensor.parts:
            stacks.setdefault(part.path, []).append(tensor)
            shapes[part.path] = part.shape if tensor.layer is None else (len(stacks[part.path]), *part.shape)
    return shapes


def parameter_bytes(parameter: jax.ShapeDtypeStruct) -> int:
    """Return its bytes in a file or on a TPU, where two int4 values are one."""
    if np.dtype(parameter.dtype).name == "int4":
        return -(-parameter.size // 2)
    return parameter.size * np.dtype(parameter.dtype).itemsize


def part(path: str, view: Shape, axes: tuple[int, ...] | None = None, shape: Shape | None = None) -> Part:
    """A part at "collection/module/.../name"; by default it is only viewed."""
    axes = tuple(range(len(view))) if axes is None else axes
    return Part(tuple(path.split("/")), view, axes, tuple(view[a] for a in axes) if shape is None else shape)


def linear(path: str, outputs: Shape, inputs: Shape) -> Part:
    """PyTorch's (outputs, inputs) matrix as a kernel of axes inputs + outputs."""
    return part(path, (math.prod(outputs), math.prod(inputs)), (1, 0), inputs + outputs)


def tensor(name: str, shape: Shape, *parts: Part, layer: int | None = None) -> Tensor:
    return Tensor(name, shape, parts, layer)


def unused(name: str, shape: Shape) -> Tensor:
    """A tensor that the model never reads; conversions keep it in a collection of its own."""
    return Tensor(name, shape, (Part((UNUSED, name), shape, tuple(range(len(shape))), shape),))


def _transpose(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Transpose like numpy, but copy a matrix in strips, five times as fast as copying numpy's strided view."""
    if axes != (1, 0):
        return x.transpose(axes)
    out = np.empty(x.shape[::-1], x.dtype)
    for start in range(0, len(x), _STRIP):
        _put_columns(out, start, x[start : start + _STRIP])
    return out


def _put_columns(matrix: np.ndarray, start: int, rows: np.ndarray) -> None:
    bits = f"u{rows.itemsize}"  # numpy copies integers faster than bfloat16
    matrix.view(bits)[:, start : start + len(rows)] = rows.view(bits).T
