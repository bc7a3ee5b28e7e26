"""Convert a checkpoint to Orbax: python -m convert.to_orbax SRC DST.

Options: --dtype float32|bfloat16, --weights int8|int4, --calibrate MANIFEST.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from phi4mm_jax.checkpoint.convert import to_orbax
from phi4mm_jax.commands.options import add_adapters_from, add_weights
from phi4mm_jax.errors import InputError
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser, named_options
from phi4mm_jax.utils.paths import path_argument
from phi4mm_jax.utils.progress import progress_bar, weights_bar


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("convert.to_orbax", "Convert a checkpoint to Orbax.")
    parser.add_argument("source", metavar="SRC", help="a checkpoint's folder, or its name on the Hub (org/name)")
    parser.add_argument("destination", metavar="DST", help="a folder that does not exist yet")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the parameters; by default the source's")
    add_weights(parser)
    parser.add_argument(
        "--calibrate", metavar="MANIFEST", type=path_argument,
        help="round to int4 with the least error on examples, in the form of training or evaluation",
    )  # fmt: skip
    parser.add_argument(
        "--max-examples", metavar="N", type=int, help="of --calibrate, from all over the manifest (default: 128)",
    )  # fmt: skip
    parser.add_argument("--fresh-adapters", action="store_true", help="accept adapters that were never trained")
    add_adapters_from(parser)
    return parser.parse_args()


@cli_entrypoint
def main() -> int:
    arguments = parse_arguments()
    if arguments.calibrate is not None and arguments.weights != "int4":
        asked = "" if arguments.weights is None else f", but --weights is {arguments.weights}"
        raise InputError(f"--calibrate is for --weights int4{asked}; give that, or leave --calibrate out")
    if arguments.calibrate is None and arguments.max_examples is not None:
        raise InputError("--max-examples is of --calibrate, which is not given; give it, or leave --max-examples out")
    limit = {} if arguments.max_examples is None else {"max_examples": arguments.max_examples}
    shared: dict[str, Any] = {name: getattr(arguments, name) for name in ("fresh_adapters", "adapters_from")}

    def calibrate(source: Path) -> Any:
        from phi4mm_jax.calibration import input_moments  # it imports the whole library

        with progress_bar("Measuring inputs") as advance, named_options(arguments):
            return input_moments(source, arguments.calibrate, progress=advance, **limit, **shared)

    with ExitStack() as shown:
        bar: Callable[[int, int], None] | None = None

        def advance(done: int, total: int) -> None:  # a bar of its own, when that of calibration has ended
            nonlocal bar
            bar = bar or shown.enter_context(weights_bar("Converting", "", arguments.weights))
            bar(done, total)

        to_orbax(
            arguments.source,
            arguments.destination,
            dtype=arguments.dtype,
            weights=arguments.weights,
            calibrate=None if arguments.calibrate is None else calibrate,
            progress=advance,
            **shared,
        )
    print(f"{arguments.destination}: ready for phi4mm_jax.load")
    return 0


if __name__ == "__main__":
    sys.exit(main())
