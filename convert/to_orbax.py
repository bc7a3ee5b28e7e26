"""Convert a checkpoint to Orbax: python -m convert.to_orbax SRC DST.

Options: --dtype float32|bfloat16, --weights int8|int4.
"""

import argparse
import sys

from phi4mm_jax.checkpoint.convert import to_orbax
from phi4mm_jax.commands.options import add_adapters_from, add_weights
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser
from phi4mm_jax.utils.progress import weights_bar


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("convert.to_orbax", "Convert a checkpoint to Orbax.")
    parser.add_argument("source", metavar="SRC", help="a checkpoint's folder, or its name on the Hub (org/name)")
    parser.add_argument("destination", metavar="DST", help="a folder that does not exist yet")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the parameters; by default the source's")
    add_weights(parser)
    parser.add_argument("--fresh-adapters", action="store_true", help="accept adapters that were never trained")
    add_adapters_from(parser)
    return parser.parse_args()


@cli_entrypoint
def main() -> int:
    arguments = parse_arguments()
    with weights_bar("Converting", "", arguments.weights) as advance:
        to_orbax(
            arguments.source,
            arguments.destination,
            dtype=arguments.dtype,
            weights=arguments.weights,
            fresh_adapters=arguments.fresh_adapters,
            adapters_from=arguments.adapters_from,
            progress=advance,
        )
    print(f"{arguments.destination}: ready for phi4mm_jax.load")
    return 0


if __name__ == "__main__":
    sys.exit(main())
