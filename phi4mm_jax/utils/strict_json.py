"""JSON as its standard has it: without NaN and infinities, which other readers refuse."""

import json
import math
from collections.abc import Mapping
from typing import Any


def strict_json(value: Any, **options: Any) -> str:
    """`json.dumps`, with null for every number that is not finite."""
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
