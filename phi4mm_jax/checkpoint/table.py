"""Weight tables: which tensor of a checkpoint is which parameter, as a bijection.

A tensor's rows are split into parts (q, k, v of a fused matrix; mostly there is one); each part is viewed, transposed
and reshaped into one parameter. All three steps have inverses, so a table converts in both directions.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

Path = tuple[str, ...]  # collection, then module names, then the parameter's
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One parameter's share of a tensor: `rows.reshape(view).transpose(axes).reshape(shape)`."""

    path: Path
    view: Shape
    axes: tuple[int, ...]
    shape: Shape  # of the parameter (of one layer's, where layers are stacked)

    def to_parameter(self, rows: np.ndarray) -> np.ndarray:
        return rows.reshape(self.view).transpose(self.axes).reshape(self.shape)

    def to_rows(self, parameter: np.ndarray) -> np.ndarray:
        """The inverse, flat beyond the first axis."""
        transposed = parameter.reshape([self.view[a] for a in self.axes])
        return transposed.transpose(np.argsort(self.axes)).reshape(self.view)


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint. `layer` is its place in a stack of layers; one without parts is never used."""

    name: str
    shape: Shape
    parts: tuple[Part, ...] = ()
    layer: int | None = None
    folder: str = ""  # within the checkpoint, where it is not in the main shards

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


def part(path: str, view: Shape, axes: tuple[int, ...] | None = None, shape: Shape | None = None) -> Part:
    """A part at "collection/module/.../name"; by default it is only viewed."""
    axes = tuple(range(len(view))) if axes is None else axes
    return Part(tuple(path.split("/")), view, axes, tuple(view[a] for a in axes) if shape is None else shape)


def linear(path: str, outputs: Shape, inputs: Shape) -> Part:
    """PyTorch's (outputs, inputs) matrix as a kernel of axes inputs + outputs."""
    n, m = len(outputs), len(inputs)
    return part(path, outputs + inputs, tuple(range(n, n + m)) + tuple(range(n)))


def tensor(name: str, shape: Shape, *parts: Part, layer: int | None = None) -> Tensor:
    return Tensor(name, shape, parts, layer)
