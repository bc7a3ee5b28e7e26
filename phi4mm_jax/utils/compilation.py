"""Compiled programs that outlive the process."""

import contextlib
import os
from pathlib import Path

import jax

from phi4mm_jax.errors import InputError
from phi4mm_jax.utils.paths import local_path


def default_folder() -> Path:
    """Return the folder that jax is told to keep compiled programs in, else one of ours in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path(cache, "phi4mm-jax", "compiled"))


def keep_compiled_by_default() -> None:
    """Keep compiled programs in the default folder, unless jax was told where or not to, or it cannot be written to."""
    if jax.config.values["jax_compilation_cache_dir"] or not jax.config.values["jax_enable_compilation_cache"]:
        return
    with contextlib.suppress(InputError):
        keep_compiled(default_folder())


def keep_compiled(folder: str | Path) -> None:
    """Keep every program that is compiled from now on in a folder: the next start takes it from there. "" keeps none.

    Whoever can write to the folder can make its readers run what he likes; one that does not exist is made the user's
    alone.

    Raises:
        InputError: the folder cannot be written to.
    """
    if folder == "":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = local_path(folder)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        cause = None if os.access(folder, os.W_OK | os.X_OK) else "it is not writable"
    except OSError as error:
        cause = error.strerror
    if cause:
        raise InputError(f"{folder}: compiled programs cannot be kept there ({cause}); choose another folder")
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
