"""What programs have in common: how they end, and options of several."""

import argparse
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from phi4mm_jax.errors import CheckpointError, ConfigError, InputError

Arguments = ParamSpec("Arguments")


def ends_well(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """A program whose errors, and Ctrl-C, are one line on standard error; its status is then 2, or 130."""

    @wraps(main)
    def program(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except (InputError, ConfigError, CheckpointError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return program


def add_adapter_folder(parser: argparse.ArgumentParser) -> None:
    """Give a program the option --adapter-folder, which `adapter_folders_of` reads."""
    parser.add_argument(
        "--adapter-folder", metavar="NAME=FOLDER", action="append", default=[],
        help="an adapter's folder, of PEFT or train.export, in place of the checkpoint's own: speech=FOLDER or "
        "vision=FOLDER; may be given for both",
    )  # fmt: skip


def adapter_folders_of(arguments: argparse.Namespace) -> dict[str, str]:
    """The adapters that --adapter-folder names, as `phi4mm_jax.load` takes them.

    Raises:
        InputError: one is not NAME=FOLDER, or a name is there twice.
    """
    folders: dict[str, str] = {}
    for given in arguments.adapter_folder:
        name, equals, folder = given.partition("=")
        if not equals or not folder or name not in ("vision", "speech"):
            raise InputError(f"--adapter-folder is {given!r:.200}; expected vision=FOLDER or speech=FOLDER")
        if name in folders:
            raise InputError(f"--adapter-folder has {name} twice: {folders[name]} and {folder}; give it once")
        folders[name] = folder
    return folders
