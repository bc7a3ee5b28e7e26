"""Paths as users write them."""

import argparse
import errno
import os
import re
from pathlib import Path

from phi4mm_jax.errors import InputError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # a Path has one slash of the two
_COPY = {"gs": "gcloud storage cp -r", "s3": "aws s3 cp --recursive"}


def local_path(given: str | os.PathLike[str]) -> Path:
    """Return a path of this machine; "~" and "~user" at its beginning are home folders.

    Raises:
        InputError: it is empty, a URL, or a name that no file can have; says what to give instead.
    """
    text = os.fsdecode(given)
    if not text.strip() or (isinstance(given, str) and "\0" in text):
        raise InputError(f"{text!r:.200} is not a path; give that of a file or folder")
    path = Path(text)
    first = path.parts[0] if path.parts else "."
    url = _URL.match(text)
    if url and not os.path.lexists(first):
        scheme, rest = url[1].lower(), text[url.end() :]
        raise InputError(
            f"{scheme}://{rest}: is a URL, and only files of this machine are used; {_remedy(scheme, rest)}"
        )
    try:
        path = path.expanduser() if not os.path.lexists(first) else path
        os.lstat(path)
    except RuntimeError as error:
        raise InputError(f"{text}: {first} is nobody's home folder here; write it out") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise InputError(f"{text!r:.200} is not a path ({error.strerror}); give another") from error
    return path


def path_argument(given: str) -> Path:
    """Return `local_path` of a program's argument, as its type."""
    try:
        return local_path(given)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _remedy(scheme: str, rest: str) -> str:
    if scheme == "file":
        return f"give /{rest}"
    if scheme == "hf":
        return f"give a model as org/name: {'/'.join(rest.split('/')[:2])}"
    mount = ", or mount it," if scheme in _COPY else ""
    output = "; an output is copied there when it is written" if scheme in _COPY else ""
    return f"copy it here ({_COPY.get(scheme, 'download')} {scheme}://{rest} FOLDER){mount} and give that path{output}"
