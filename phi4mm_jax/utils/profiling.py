"""Profiles of programs: jax traces, with the model's phases by name."""

import argparse
from pathlib import Path
from types import TracebackType

from phi4mm_jax.utils.files import check_writable, make_folder, writing
from phi4mm_jax.utils.paths import path_argument


def add_profile(parser: argparse.ArgumentParser, traced: str) -> None:
    """Give a program the option --profile, a folder for `Profile`; `traced` says of which part it is."""
    parser.add_argument(
        "--profile", metavar="DIR", type=path_argument,
        help=f"write a profile of {traced} there, for TensorBoard, XProf or Perfetto",
    )  # fmt: skip


def check_profile(folder: Path | None) -> None:
    """Make the folder of --profile, if it is given, before work that takes long.

    Raises:
        InputError: it cannot be written to.
    """
    if folder is None:
        return
    with writing(folder, "a profile cannot be written there", "choose another folder"):
        make_folder(folder)
        check_writable(folder)


class Profile:
    """Trace of some items in the middle of the work, after everything is compiled; a context manager.

    Args:
        folder: where to write; None traces nothing.
        total: items of the work, those that are done included.
        count: items to trace.

    Raises:
        InputError: the folder cannot be written to; on entering.
    """

    def __init__(self, folder: Path | None, total: int = 1, done: int = 0, count: int = 1):
        self._folder, self._done = folder, done
        self._start = done + (total - done) // 2
        self._stop = self._start + count
        self._running = False

    def __enter__(self) -> "Profile":
        if self._folder is not None:
            check_profile(self._folder)
            self.advance(0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._end()

    def advance(self, items: int = 1) -> None:
        """Count items as done."""
        import jax

        self._done += items
        if self._running and self._done >= self._stop:
            self._end()
        elif self._folder is not None and self._start <= self._done < self._stop and not self._running:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # a host's Python calls would be most of the trace
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._running = True

    def _end(self) -> None:
        import jax

        if self._running:
            self._running, self._folder = False, None
            jax.profiler.stop_trace()
