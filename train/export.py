"""Write what a run has trained as a checkpoint that PyTorch's tools load.

    python -m train.export RUN DESTINATION --layout original|native [--step N|best|last]
    python -m train.export RUN DESTINATION --adapters-only [--step N|best|last]

RUN is a recipe's output. The whole checkpoint is the model that the run began with, with what was trained in place of
its own; --adapters-only writes the folders of the adapters that were trained (speech-lora), for PEFT, and for the
programs here beside the base: --adapter-folder speech=DESTINATION. README.md is the export's card: base, recipe, data,
steps, scores.
"""

import argparse
import sys

from phi4mm_jax.commands.options import add_layout, with_layout
from phi4mm_jax.training.export import export
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser
from phi4mm_jax.utils.progress import progress_bar


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("train.export", __doc__)
    parser.add_argument("run", metavar="RUN", help="the output of a recipe")
    parser.add_argument("destination", metavar="DESTINATION", help="a folder that does not exist")
    add_layout(parser, "the folders of the adapters that were trained alone, for PEFT and --adapter-folder")
    parser.add_argument(
        "--step", metavar="N|best|last", default="best", help="of the checkpoint (default: %(default)s)"
    )
    return with_layout(parser, parser.parse_args())


@cli_entrypoint
def main() -> int:
    arguments = parse_arguments()
    with progress_bar("Writing", size=True) as advance:
        step = export(
            arguments.run, arguments.destination, arguments.layout, step=arguments.step,
            adapters_only=arguments.adapters_only, progress=advance,
        )  # fmt: skip
    print(f"{arguments.destination}: written, of step {step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
