"""From a checkpoint folder to the model's variables, one parameter at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from phi4mm_jax.checkpoint import table as tables
from phi4mm_jax.checkpoint.native import native_table
from phi4mm_jax.checkpoint.original import original_table
from phi4mm_jax.checkpoint.shards import Shards
from phi4mm_jax.config import Phi4MMConfig, read_json
from phi4mm_jax.errors import CheckpointError

Rows = tuple[tables.Tensor, tables.Part, int, int]  # rows start to stop of a tensor are (a layer of) a parameter


def load_variables(
    folder: str | Path,
    config: Phi4MMConfig,
    dtype: Any,
    *,
    place: Callable[[tables.Path, np.ndarray], jax.Array],
    fresh_adapters: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Read all parameters of a checkpoint in either published layout, with layers stacked.

    Args:
        dtype: what the parameters are cast to.
        place: puts one parameter, given its path, on the devices.
        fresh_adapters: accept an adapter whose B matrices are all zero, which changes nothing until it is trained.
        progress: called with the number of parameters read so far, and of all.

    Raises:
        CheckpointError: a missing, extra, misshapen or unreadable tensor, or an all-zero adapter; it names them.
    """
    folder = Path(folder)
    layout = read_json(folder / "config.json").get("model_type")
    table = original_table(config) if layout == "phi4mm" else native_table(config)
    parameters: dict[tables.Path, list[Rows]] = {}
    for tensor in table:
        for part, start, stop in tensor.spans():
            parameters.setdefault(part.path, []).append((tensor, part, start, stop))

    variables = {}
    with Shards(folder, sorted({t.folder for t in table if t.folder})) as shards:
        shards.check(table)
        for path, rows in parameters.items():
            array = _read(shards, rows, dtype)
            if path[0] != "params" and path[-1] != "a" and not fresh_adapters:
                _check_trained(shards, rows, array)
            variables[path] = place(path, array)
            if progress is not None:
                progress(len(variables), len(parameters))
    return unflatten_dict(variables)


def _read(shards: Shards, rows: list[Rows], dtype: Any) -> np.ndarray:
    """A parameter, cast; stacked over layers where it belongs to a layer."""
    if rows[0][0].layer is None:
        ((tensor, part, start, stop),) = rows
        return np.ascontiguousarray(part.to_parameter(shards.rows(tensor, start, stop)), dtype)
    stacked = np.empty((len(rows), *rows[0][1].shape), dtype)
    for tensor, part, start, stop in rows:
        stacked[tensor.layer] = part.to_parameter(shards.rows(tensor, start, stop))
    return stacked


def _check_trained(shards: Shards, rows: list[Rows], b: np.ndarray) -> None:
    for (tensor, *_), layer in zip(rows, b, strict=True):
        if not layer.any() and not shards.rows(tensor, 0, tensor.shape[0]).any():
            raise CheckpointError(
                f"{tensor.key}: all zero, so the adapter does nothing there. The checkpoint was probably converted "
                "wrongly; pass fresh_adapters=True if an untrained adapter is meant."
            )


def check_structure(variables: Any, abstract: Any) -> None:
    """The variables are those that the model declares: a guard against a table that drifts from the modules.

    Raises:
        CheckpointError: a parameter is missing, undeclared or misshapen.
    """
    found: dict[tables.Path, Any] = dict(flatten_dict(variables))
    declared: dict[tables.Path, Any] = dict(flatten_dict(abstract))
    for path in found.keys() | declared.keys():
        shapes = [tree[path].shape if path in tree else None for tree in (found, declared)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(f"{'/'.join(path)}: read with shape {shapes[0]}, declared with {shapes[1]}")
