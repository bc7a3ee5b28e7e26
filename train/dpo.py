"""Direct preference optimization (DPO): of two answers to each prompt, the chosen and the rejected one.

    python -m train.dpo RECIPE [key=value]... [--dry-run]

Runs the loop of train.sft, with data.kind=preferences. The reference is the model before the first step: a copy of the
trainable parameters, among the frozen ones.
"""

import sys

from phi4mm_jax.training.arguments import parse_arguments
from phi4mm_jax.training.dpo import preference, with_reference
from phi4mm_jax.training.hosts import connected_hosts, coordination_of
from phi4mm_jax.utils.cli import cli_entrypoint

from .sft import TrainingMethod, train

DPO = TrainingMethod(lambda module, recipe: preference(module, recipe.dpo), with_reference)


@cli_entrypoint
def main() -> int:
    arguments, recipe = parse_arguments("train.dpo", __doc__, "preferences")
    with connected_hosts(coordination_of(arguments)):
        return train(recipe, DPO, dry_run=arguments.dry_run, profile=arguments.profile)


if __name__ == "__main__":
    sys.exit(main())
