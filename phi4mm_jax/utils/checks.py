"""Checks of numbers and texts that users give."""

import math
import numbers
from typing import Any, TypeGuard

from phi4mm_jax.errors import InputError


def is_whole(value: Any, min_value: float = -math.inf, max_value: float = math.inf) -> TypeGuard[int]:
    """Return whether a value is a whole number, of Python or numpy and no bool, within the bounds (both included)."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and min_value <= int(value) <= max_value


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a value is a real number, of Python or numpy and no bool; NaN and infinities are."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded; one with half a surrogate pair, as Python holds other bytes, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_whole(name: str, value: Any, min_value: int) -> None:
    """Check a setting.

    Raises:
        InputError: it is not a whole number from `min_value` on; the message begins with the name.
    """
    if not is_whole(value, min_value):
        raise InputError(f"{name} is {value!r:.80}; expected a whole number from {min_value} on")


def check_positive(name: str, value: Any) -> None:
    """Check a setting.

    Raises:
        InputError: it is not a positive whole number; the message begins with the name.
    """
    if not is_whole(value, 1):
        raise InputError(f"{name} is {value!r:.80}; expected a positive whole number")
