"""Recipes that come with the package, by their names."""

from pathlib import Path

from phi4mm_jax.errors import InputError
from phi4mm_jax.utils.paths import local_path

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = _PACKAGE / "commands" / "train" / "recipes", _PACKAGE.parent / "train" / "recipes"  # of a wheel, of a clone


def recipe_path(recipe: str | Path) -> Path:
    """Return the file of a recipe: itself, or for a name, such as "small", that of the package.

    Raises:
        InputError: there is neither.
    """
    path = local_path(recipe)
    if path.exists():
        return path
    recipes = {file.stem: file for folder in _FOLDERS for file in folder.glob("*.yaml")}
    if path.suffix or len(path.parts) > 1:
        named = f"; the package's is named {path.stem!r}" if path.stem in recipes else ""
        raise InputError(f"{path}: there is no such file{named}")
    if path.name not in recipes:
        raise InputError(
            f"{path}: there is no such file, and no such recipe in the package; expected a YAML file, or one of "
            f"{', '.join(sorted(recipes))}"
        )
    return recipes[path.name]
