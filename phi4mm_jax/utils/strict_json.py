"""JSON as its standard has it: without NaN and infinities, which other readers refuse."""

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn


def parse_json(text: str) -> Any:
    """`json.loads` for what users bring: a key that is in an object twice, of which one would be lost, is an error.

    Raises:
        ValueError: as json.loads; or a key is there twice, or a number is NaN or infinite.
        RecursionError: lists or objects are nested too deeply.
    """
    return json.loads(text, object_pairs_hook=unique_keys, parse_constant=_refuse_constant)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; as json.loads' `object_pairs_hook`.

    Raises:
        ValueError: a key is there twice.
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice!r:.80} is in one object twice")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def strict_json(value: Any, **options: Any) -> str:
    """`json.dumps`, with null for every number that is not finite."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except (ValueError, TypeError):  # a number that is not finite, or a mapping that is no dict
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_finite_key(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _finite_key(key: Any) -> Any:
    return str(key) if isinstance(key, float) and not math.isfinite(key) else key
