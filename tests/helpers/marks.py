"""Marks of parametrised tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def fast_are(fast: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Return all values as parameters, a tuple being several; those not among the fast ones are marked slow."""
    fast, values = list(fast), list(values)
    unknown = [value for value in fast if value not in values]
    assert not unknown, f"{unknown} are not among {values}"

    def slow(value: Any) -> Any:
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)

    return [value if value in fast else slow(value) for value in values]
