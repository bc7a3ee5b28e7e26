"""Patterns of parameter paths, for trainable parameters, weight decay and exports.

A path is a parameter's names joined by "/", its collection first: "lora_speech/decoder/layers/mlp/down/a". A pattern
matches a path from its first name on, and everything below it: "*" is any part of a name, "**" any names. One that
begins with "!" excludes matches of the patterns before it.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from phi4mm_jax.errors import InputError
from phi4mm_jax.quantization import ParamPath, Weights, is_quantized, scales_of, weight_of


def matching(paths: Collection[ParamPath], patterns: Sequence[str], what: str) -> set[ParamPath]:
    """Return the paths that match the patterns.

    Args:
        what: name of the setting, for errors.

    Raises:
        InputError: a pattern matches, or excludes, no path.
    """
    if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
        raise InputError(f"{what} is {patterns!r}; expected a list of patterns, such as ['lora_speech']")
    found: set[ParamPath] = set()
    for pattern in patterns:
        expression = _expression(pattern.removeprefix("!"))
        of_pattern = {path for path in paths if expression.fullmatch("/".join(path))}
        excludes = pattern.startswith("!")
        if not (of_pattern & found if excludes else of_pattern):
            raise InputError(
                f"{what}: the pattern {pattern!r} {'excludes nothing' if excludes else 'matches no parameter'}; the "
                f"parameters lie under {', '.join(sorted({'/'.join(path[:2]) for path in paths}))}"
            )
        found = found - of_pattern if excludes else found | of_pattern
    return found


def not_quantized(
    parameters: Mapping[ParamPath, Any], trainable: Sequence[str], weights: Weights | None
) -> set[ParamPath]:  # fmt: skip
    """Return the trainable parameters, which stay floats where `weights` quantises the others.

    Args:
        parameters: of a checkpoint, of any type with a shape.
        trainable: their patterns.

    Raises:
        InputError: as `matching`; all linear maps are trained; or one is trained that the checkpoint has quantised.
    """
    floats = matching(parameters.keys(), trainable, "trainable")
    stored = next((p for p in sorted(floats) if scales_of(p) in parameters or weight_of(p) != p), None)
    if stored is not None:
        raise InputError(
            f"trainable has {'/'.join(stored)}, which this checkpoint has quantised; begin with the float one that it "
            "was made from"
        )
    if weights is not None and not any(
        is_quantized(path, len(x.shape)) for path, x in parameters.items() if path not in floats
    ):
        raise InputError(
            f"weights is {weights}, and trainable={list(trainable)} has all linear maps: none is frozen, to be "
            "quantised; leave weights out, or train less"
        )
    return floats


def _expression(pattern: str) -> re.Pattern[str]:
    parts = {"**": ".*", "*": "[^/]*"}
    translated = "".join(parts.get(p) or re.escape(p) for p in re.split(r"(\*\*|\*)", pattern.strip("/")))
    return re.compile(f"{translated}(/.*)?")


def split(variables: dict[str, Any], patterns: Sequence[str], what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the variables that match the patterns, and the others.

    Raises:
        InputError: as `matching`.
    """
    flat = flatten_dict(variables)
    found = matching(flat.keys(), patterns, what)
    return (
        unflatten_dict({path: x for path, x in flat.items() if path in found}),
        unflatten_dict({path: x for path, x in flat.items() if path not in found}),
    )


def join(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Merge the two parts of `split`."""
    return unflatten_dict({**flatten_dict(one), **flatten_dict(other)})
