"""Write a checkpoint for PyTorch: python -m convert.to_torch SRC DST --layout original|native [--adapters-only]."""

import argparse
import sys

from phi4mm_jax.checkpoint.convert import to_torch
from phi4mm_jax.commands.options import add_adapters_from, add_layout, with_layout
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser
from phi4mm_jax.utils.progress import progress_bar


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("convert.to_torch", "Write a checkpoint for PyTorch.")
    parser.add_argument("source", metavar="SRC", help="a checkpoint's folder, or its name on the Hub (org/name)")
    parser.add_argument("destination", metavar="DST", help="a folder that does not exist yet")
    add_layout(parser, "vision-lora and speech-lora alone, for PEFT")
    parser.add_argument("--fresh-adapters", action="store_true", help="accept adapters that were never trained")
    add_adapters_from(parser)
    return with_layout(parser, parser.parse_args())


@cli_entrypoint
def main() -> int:
    arguments = parse_arguments()
    with progress_bar("Converting", size=True) as advance:
        to_torch(
            arguments.source,
            arguments.destination,
            arguments.layout,
            adapters_only=arguments.adapters_only,
            fresh_adapters=arguments.fresh_adapters,
            adapters_from=arguments.adapters_from,
            progress=advance,
        )
    print(f"{arguments.destination}: ready for PyTorch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
