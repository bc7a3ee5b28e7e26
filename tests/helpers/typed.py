"""Checks of the types, shapes and dtypes in signatures."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def check(function: Callable) -> Callable:
    """Check a function's arguments and result, but for dataclasses: settings check theirs themselves."""
    return function if function.__name__ == "__init__" else _check(function)
