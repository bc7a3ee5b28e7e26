"""Kernels on a mesh. XLA cannot split a kernel over devices by itself: each device is given its rows and heads."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType

ROWS, HEADS = ("data", "fsdp"), ("tensor",)  # mesh axes that split the batch, and those that split heads


def over_mesh(function: Callable[..., Any], arguments: tuple, inputs: Any, outputs: Any, *, rows: int, heads: int):
    """function(*arguments), on each device of the mesh in context its part of it; without such a mesh, just that.

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
