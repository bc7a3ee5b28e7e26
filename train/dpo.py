"""Train on preferences: of two answers to each prompt, the chosen one and the rejected one.

    python -m train.dpo RECIPE [key=value]... [--dry-run]

As train.sft, with data.kind=preferences. The reference is the model as it was before the first step.
"""

import sys

from phi4mm_jax.training.command import parse_arguments, start
from phi4mm_jax.training.dpo import preference
from phi4mm_jax.utils.cli import cli_entrypoint


@cli_entrypoint
def main() -> int:
    arguments, recipe = parse_arguments("train.dpo", __doc__, "preferences")
    return start(arguments, recipe, lambda module: preference(module, recipe.dpo))


if __name__ == "__main__":
    sys.exit(main())
