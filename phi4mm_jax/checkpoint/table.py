"""Weight tables: which tensor of a checkpoint is which parameter, as a bijection.

A tensor's rows are split into parts (q, k, v of a fused matrix; mostly there is one); each part is viewed, transposed
and reshaped into one parameter. All three steps have inverses, so a table converts in both directions.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

_STRIP = 32  # rows; of 16, 32, 64 and 256 the fastest

UNUSED = "unused"  # the collection of what the model never reads
ParamPath = tuple[str, ...]  # collection, then module names, then the parameter's
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One parameter's share of a tensor: `rows.reshape(view).transpose(axes).reshape(shape)`."""

    path: ParamPath
    view: Shape
    axes: tuple[int, ...]
    shape: Shape  # of the parameter (of one layer's, where layers are stacked)

    def to_parameter(self, rows: np.ndarray) -> np.ndarray:
        return _transpose(rows.reshape(self.view), self.axes).reshape(self.shape)

    def to_rows(self, parameter: np.ndarray) -> np.ndarray:
        """The inverse, flat beyond the first axis."""
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
        """Each part with its rows: where they start and stop."""
        start, row = 0, math.prod(self.shape[1:])
        for part in self.parts:
            stop = start + math.prod(part.view) // row
            yield part, start, stop
            start = stop

    def join(self, parameters: Iterable[np.ndarray]) -> np.ndarray:
        """The whole tensor from the parameters of its parts."""
        rows = [p.to_rows(x).reshape(-1, *self.shape[1:]) for p, x in zip(self.parts, parameters, strict=True)]
        return rows[0] if len(rows) == 1 else np.concatenate(rows)


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
    """A tensor that the model never reads; it travels through conversions in a collection of its own."""
    return Tensor(name, shape, (Part((UNUSED, name), shape, tuple(range(len(shape))), shape),))


def _transpose(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """As np.transpose; a matrix is copied in strips, which is five times as fast as copying numpy's strided view."""
    if axes != (1, 0):
        return x.transpose(axes)
    bits = x.view(f"u{x.itemsize}")  # numpy copies integers faster than bfloat16
    out = np.empty(bits.shape[::-1], bits.dtype)
    for start in range(0, len(bits), _STRIP):
        out[:, start : start + _STRIP] = bits[start : start + _STRIP].T
    return out.view(x.dtype)
