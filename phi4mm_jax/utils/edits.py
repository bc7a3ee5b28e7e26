"""Edits between texts, by packages of the extra `evaluate`."""

import importlib
from collections.abc import Sequence
from typing import Any

from phi4mm_jax.errors import InputError


def edit_distance(reference: Sequence[str], answer: Sequence[str]) -> int:
    """Return how many insertions, deletions and substitutions turn one sequence into the other."""
    return optional_module("rapidfuzz.distance").Levenshtein.distance(reference, answer)


def optional_module(name: str) -> Any:
    """Import a module of the extra `evaluate`.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"evaluation needs {name.partition('.')[0]}; pip install '.[evaluate]'") from error
