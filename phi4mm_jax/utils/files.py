"""Files that are whole or not there."""

import os
from pathlib import Path

INCOMPLETE = ".incomplete"  # ends the name of a file that is being written


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    aside = path.with_name(f".{path.name}{INCOMPLETE}")
    try:
        aside.write_text(text, errors="backslashreplace")
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
