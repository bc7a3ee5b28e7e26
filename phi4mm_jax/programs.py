"""What all programs have in common: how they end."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from phi4mm_jax.errors import CheckpointError, ConfigError, InputError

Arguments = ParamSpec("Arguments")


def ends_well(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """A program whose errors, and Ctrl-C, are one line on standard error; its status is then 2, or 130."""

    @wraps(main)
    def program(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except (InputError, ConfigError, CheckpointError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return program
