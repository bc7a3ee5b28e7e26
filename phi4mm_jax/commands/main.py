"""Start a program of the installed package: phi4mm COMMAND [arguments].

The programs are infer/, convert/ and train/ of a clone; setup.py puts them into the wheel as phi4mm_jax.commands.infer,
.convert and .train.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from phi4mm_jax.errors import InputError
from phi4mm_jax.utils.cli import COMMANDS, handle_errors, version_line

_SHORT = {command.split()[-1]: command for command in COMMANDS}  # "dpo" is enough for "train dpo"


def main() -> int:
    """Run the program that the arguments name, and import no other."""
    handle_errors()
    words = sys.argv[1:]
    if words in ([], ["-h"], ["--help"]):
        print(usage())
        return 0 if words else 2
    if words == ["--version"]:
        print(version_line())
        return 0
    command, arguments = find_command(words)
    sys.argv = [f"phi4mm {command}", *arguments]
    module, _ = COMMANDS[command]
    return import_module(f"phi4mm_jax.commands.{module}").main()


def find_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the command that the words begin with, and its arguments.

    Raises:
        InputError: they begin with none.
    """
    for length in (2, 1):
        command = " ".join(words[:length])
        if (command := _SHORT.get(command, command)) in COMMANDS:
            return command, list(words[length:])
    second = [command.split()[1] for command in COMMANDS if command.startswith(f"{words[0]} ")]
    if second and len(words) > 1:
        raise InputError(f"phi4mm {words[0]} has no {words[1]!r:.60}; expected {' or '.join(second)}")
    if second:
        raise InputError(f"phi4mm {words[0]} needs another word: {' or '.join(second)}")
    raise InputError(f"phi4mm has no command {words[0]!r:.60}; expected {', '.join(COMMANDS)}")


def usage() -> str:
    """Return the commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {command:{width}}  {summary}" for command, (_, summary) in COMMANDS.items()]
    head = "usage: phi4mm COMMAND [argument]...\n\nPhi-4-multimodal in JAX: text, images and speech in, text out.\n"
    return "\n".join([head, *lines, "\nphi4mm COMMAND --help shows a command's arguments; --version is for all."])
