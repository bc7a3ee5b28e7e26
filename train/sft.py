"""Train on answers that are given.

    python -m train.sft RECIPE [key=value]... [--dry-run]

RECIPE is a YAML file, such as those in train/recipes; key=value overrides a setting: optimizer.learning_rate=1e-4.
Where the recipe's output has checkpoints, the run goes on from the last one. SIGTERM and Ctrl-C save, then end.
"""

import sys

from phi4mm_jax.training.command import parse_arguments, start
from phi4mm_jax.training.step import supervised
from phi4mm_jax.utils.cli import cli_entrypoint


@cli_entrypoint
def main() -> int:
    arguments, recipe = parse_arguments("train.sft", __doc__, "answers")
    return start(arguments, recipe, lambda module: supervised(module, recipe.loss))


if __name__ == "__main__":
    sys.exit(main())
