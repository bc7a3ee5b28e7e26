"""Checks of numbers that users give."""

from typing import Any

import numpy as np
import pytest

from phi4mm_jax import InputError
from phi4mm_jax.utils.checks import check_positive, check_whole, is_number, is_whole

WHOLE = [0, 1, -3, 2**70, np.int8(5), np.uint64(7)]
OTHERS: list[Any] = [True, False, np.bool_(True), None, "1", 1j, [1]]
REALS = [1.0, 0.5, float("nan"), float("inf"), np.float32(2)]


def test_kinds_of_numbers():
    assert [is_whole(x) for x in WHOLE + REALS + OTHERS] == [True] * 6 + [False] * 12
    assert [is_number(x) for x in WHOLE + REALS + OTHERS] == [True] * 11 + [False] * 7


def test_bounds_are_included():
    assert [is_whole(x, 1, 3) for x in range(5)] == [False, True, True, True, False]


@pytest.mark.parametrize("value", [0, True, 1.0, "2", None])
def test_errors_name_the_setting(value: Any):
    with pytest.raises(InputError, match=f"^steps is {value!r}; expected a positive whole number$"):
        check_positive("steps", value)
    with pytest.raises(InputError, match=f"^seed is {value!r}; expected a whole number from 1 on$"):
        check_whole("seed", value, 1)


def test_good_settings_pass():
    check_positive("steps", np.int64(1))
    check_whole("seed", 0, 0)
