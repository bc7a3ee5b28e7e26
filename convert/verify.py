"""Prove parity: python -m convert.verify CHECKPOINT --goldens DIR.

Runs every case of the goldens, and every image and clip by itself, and compares with what the reference computed: see
`phi4mm_jax/testing/compare.py` for the comparisons and the bounds. Compares the two copies of the adapters that the
original layout has, and says what no case exercises. The exit status is 0 if all pass, 1 if anything differs, 2 if
nothing could be compared.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from rich.console import Console
from rich.table import Table

import phi4mm_jax
from phi4mm_jax.checkpoint.contents import check_copies, folder_adapters, read_config
from phi4mm_jax.checkpoint.hub import local_folder
from phi4mm_jax.checkpoint.load import open_checkpoint
from phi4mm_jax.checkpoint.pytorch import PyTorchCheckpoint
from phi4mm_jax.commands.options import adapter_folders_of, add_adapter_folder
from phi4mm_jax.processing.prompt import KINDS, Kind
from phi4mm_jax.quantization import stored_weights
from phi4mm_jax.testing.compare import Check, is_exact, unexercised, verify_cases, verify_medium
from phi4mm_jax.testing.goldens import read_goldens
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser
from phi4mm_jax.utils.progress import progress_bar


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("convert.verify", "Compare a checkpoint with goldens.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="whatever phi4mm_jax.load takes")
    parser.add_argument("--goldens", metavar="DIR", required=True, help="a folder that convert.record has written")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="only float32 is a proof")
    add_adapter_folder(parser)
    return parser.parse_args(arguments)


def table_of(checks: Sequence[Check], exact: bool) -> Table:
    table = Table("case", "tensor", box=None)
    for header in ("max error" if exact else "error", "bound", "tokens identical", "pass"):
        table.add_column(header, justify="right", no_wrap=True)
    subject = ""
    for check in checks:
        values = [f"{x:.1e}" if x is not None else "" for x in (check.error, check.bound)]
        identical = f"{check.identical[0]}/{check.identical[1]}" if check.identical else ""
        name = "" if check.subject == subject else check.subject
        table.add_row(name, check.tensor, *values, identical, "yes" if check.passed else "NO")
        subject = check.subject
    return table


def compare_copies(folder: Path) -> None:
    """Compare all of the adapters that the original layout has twice, of which `load` compares some values only."""
    config = read_config(folder)
    checkpoint = open_checkpoint(folder, config)
    if isinstance(checkpoint, PyTorchCheckpoint):
        check_copies(checkpoint, config, folder_adapters(folder, lambda: checkpoint, config))


@cli_entrypoint
def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    goldens = read_goldens(parsed.goldens)
    folder = local_folder(parsed.checkpoint)
    if parsed.adapters_from is None:
        compare_copies(folder)
    with progress_bar("Reading the weights", size=True) as advance:
        model = phi4mm_jax.load(
            folder, dtype=parsed.dtype, adapters=adapter_folders_of(parsed), adapters_from=parsed.adapters_from,
            progress=advance,
        )  # fmt: skip
    media: list[tuple[Kind, int]] = [(kind, number) for kind in KINDS for number in goldens.media[kind]]
    checks: list[Check] = []
    with progress_bar("Comparing") as advance:
        total = len(goldens.cases) + len(media)
        advance(0, total)
        for done, found in enumerate(verify_cases(model, goldens), 1):
            checks += found
            advance(done, total)
        for done, (kind, number) in enumerate(media, len(goldens.cases) + 1):
            checks += verify_medium(model, goldens, kind, number)
            advance(done, total)
    exact = is_exact(model, goldens)
    Console(markup=False, highlight=False).print(table_of(checks, exact))
    for check in checks:
        if check.note:
            print(f"{check.subject} {check.tensor}: {check.note}")
    if missed := unexercised(model.config, goldens):
        print(f"No case exercises {', '.join(missed)}: nothing is said of that.")
    parameters: Any = flatten_dict(model.variables)
    if (weights := stored_weights(parameters)) is not None:
        print(f"The weights are {weights}: what they compute differs from what the goldens' floats do.")
    failed = [check for check in checks if not check.passed]
    if not exact:
        print("Errors are root mean squares, since one side is bfloat16: this finds mistakes, and proves no parity.")
    print(f"FAIL: {len(failed)} of {len(checks)} differ" if failed else f"PASS: all {len(checks)} agree")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
