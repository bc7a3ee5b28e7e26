"""Arguments of the training programs."""

import argparse

from phi4mm_jax.data.pipeline import Kind
from phi4mm_jax.errors import InputError
from phi4mm_jax.training.hosts import add_host_options
from phi4mm_jax.training.recipe import Recipe, load_recipe
from phi4mm_jax.training.settings import NOTES, setting_names, suggest_setting
from phi4mm_jax.utils.cli import make_parser
from phi4mm_jax.utils.profiling import add_profile


def parse_arguments(program: str, description: str | None, kind: Kind) -> tuple[argparse.Namespace, Recipe]:
    """Return a program's arguments, and the recipe that they name.

    Raises:
        InputError: the recipe cannot be used, or its data are of another kind.
    """
    parser = make_parser(program, description, _as_setting)
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of one in train/recipes")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change")
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained, its memory, a batch; end")
    add_host_options(parser)
    add_profile(parser, "some steps in the middle")
    arguments = parser.parse_intermixed_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.data.kind != kind:
        given = [override for override in arguments.overrides if override.partition("=")[0] in ("data.kind", "data")]
        origin = repr(given[-1]) if given else arguments.recipe
        raise InputError(f"{origin}: data.kind is {recipe.data.kind!r}; {program} needs {kind!r}")
    return arguments, recipe


def _as_setting(option: str) -> str | None:
    """Return what to write for an option that is a setting, here or in another tool; None if it is neither."""
    name, names = option.replace("-", "_"), list(setting_names(Recipe))
    if name in NOTES:
        return NOTES[name]
    found = name if name in names else suggest_setting(name, names, alike=False)
    if found is None:
        return None
    setting, _, hint = found.partition(" ")
    return f"settings are written without dashes: {setting}=... {hint}".rstrip()
