"""Parsed JSON files, and typed access to their keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi4mm_jax.errors import CheckpointError, ConfigError
from phi4mm_jax.utils.checks import is_number, is_whole
from phi4mm_jax.utils.strict_json import parse_json


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file; a missing or broken one is a CheckpointError that names it."""
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        shown = path.absolute() if path.parent == Path() else path  # a name alone would not say where
        raise CheckpointError(f"{shown}: no such file. Give the folder of a Phi-4-multimodal checkpoint.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). See who may read it.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}). Download the file again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, expected an object. Download the file again.")
    return values


def read_optional_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file as `read_json` does; {} where there is none."""
    return read_json(path) if path.exists() else {}


class Keys:
    """Typed access to the keys of a parsed file, with errors that name the key's whole path."""

    def __init__(self, values: Mapping[str, Any], name: str):
        self.values, self.name = values, name

    def error(self, key: str, problem: str) -> ConfigError:
        """Return an error that names the file and the key."""
        return ConfigError(f"{self.name}: {key} {problem}")

    def has(self, key: str) -> bool:
        """Return whether the key is there and not null."""
        return self.values.get(key) is not None

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a value of a type, or the default where there is none; whole numbers are floats as well."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing; the file is incomplete or of another model")
        if kind is float and is_whole(value):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(key, f"is {value!r}; expected {kind.__name__}")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        """Return a positive whole number."""
        value = self.get(key, int, default)
        if value <= 0:
            raise self.error(key, f"is {value}; expected a positive whole number")
        return value

    def above_zero(self, key: str, default: Any = None) -> float:
        """Return a positive number."""
        value = self.get(key, float, default)
        if not value > 0.0:
            raise self.error(key, f"is {value}; expected a positive number")
        return value

    def below_one(self, key: str, default: Any = None) -> float:
        """Return a share, from 0 on."""
        value = self.get(key, float, default)
        if not 0.0 <= value < 1.0:
            raise self.error(key, f"is {value}; expected a number from 0 on, and below 1")
        return value

    def expect(self, key: str, *supported: Any, required: bool = False) -> None:
        """Reject any other value; an absent key is accepted unless required."""
        value = self.values.get(key)
        if value is None and None not in supported and required:
            raise self.error(key, f"is missing; supported: {_one_of(supported)}")
        if value is not None and value not in supported:
            raise self.error(
                key, f"is {value!r}, which this implementation does not support; supported: {_one_of(supported)}"
            )

    def section(self, key: str) -> "Keys":
        """Return the object at a key, whose errors name the key before theirs."""
        return Keys(self.get(key, Mapping), f"{self.name}: {key}")

    def factors(self, key: str) -> tuple[float, ...]:
        """Return a list of positive numbers."""
        values = self.get(key, list)
        numbers = [v for v in values if is_number(v) and v > 0]
        if len(numbers) != len(values):
            raise self.error(key, "must hold positive numbers")
        return tuple(float(v) for v in values)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return one token id, or a list of them, as a tuple."""
        value = self.values.get(key)
        ids = [i for i in (value if isinstance(value, list) else [value]) if is_whole(i)]
        if not ids or len(ids) != (len(value) if isinstance(value, list) else 1):
            raise self.error(key, f"is {value!r}; expected a token id or a list of them")
        return tuple(ids)


def _one_of(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(v) for v in values)
