"""Progress bars for programs."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_LOG_EVERY = 30.0  # seconds between lines in a log file


@contextmanager
def progress_bar(description: str, size: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Bar on standard error; it is indeterminate until the yielded function is called with (done, of all).

    Args:
        size: counts bytes; shows size, speed and the remaining time.
    """
    columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()]
    if size:
        columns[3:] = [DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=None)
        try:
            yield lambda done, total: progress.update(task, completed=done, total=total)
        except BaseException:
            if progress.tasks[0].total is None:  # nothing was begun
                progress.update(task, visible=False)
                progress.live.transient = True
                progress.live.stop()
                progress.disable = True  # its own end is an empty line
            raise
        progress.update(task, completed=1, total=1) if not progress.tasks[0].total else None


def weights_bar(doing: str, what: str, quantized: str | None) -> AbstractContextManager[Callable[[int, int], None]]:
    """Bar of work on weights: of bytes; or, where they are quantised, which takes longer than to read, of a share."""
    words = (doing, what) if quantized is None else (doing, "and quantising", what)
    return progress_bar(" ".join(filter(None, words)), size=quantized is None)


@contextmanager
def count_bar(description: str, unit: str, total: int, done: int) -> Iterator[Callable[[int, int], None]]:
    """Bar of items on standard error, with the speed in units, and the time that is left.

    Where that is no terminal, a line every 30 seconds stands for the bar.

    Yields:
        A function to call with how many items, and units, came to an end.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}")
    console, first = Console(stderr=True), done

    def line() -> str:
        if progress.tasks[0].completed == first:
            return f"{description}: programs are being compiled"
        return f"{description}: {progress.tasks[0].completed:g} of {total}, {progress.tasks[0].fields['speed']}"

    with (
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
        nullcontext() if console.is_terminal else _repeated(line),
    ):
        task = progress.add_task(description, total=total, completed=done, speed="")
        start, units = time.monotonic(), 0

        def advance(items: int, more: int) -> None:
            nonlocal units
            units += more
            progress.update(task, advance=items, speed=f"{units / (time.monotonic() - start):.1f} {unit}/s")

        yield advance


@contextmanager
def _repeated(line: Callable[[], str]) -> Iterator[None]:
    """Print a line every 30 seconds on standard error, while the body runs."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(_LOG_EVERY):
            print(line(), file=sys.stderr, flush=True)

    thread = threading.Thread(target=repeat, name="phi4mm-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def seconds_bar(description: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """Bar of seconds of recordings on standard error, with how much faster than they last they are worked on.

    Args:
        total: of all recordings; None, where it is not known, shows no bar.

    Yields:
        A function to call with the seconds that were done.
    """
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}")
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, status="")
        start, done = time.monotonic(), 0.0

        def advance(seconds: float) -> None:
            nonlocal done
            done += seconds
            position = clock(done) if total is None else f"{clock(done)}/{clock(total)}"
            speed = done / max(time.monotonic() - start, 1e-9)
            progress.update(task, advance=seconds, status=f"{position} {speed:.1f}x")

        yield advance


def clock(seconds: float) -> str:
    """Return hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


@contextmanager
def step_bar(total: int, done: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Bar of training steps on standard error, with the loss, the speed, and the time that is left.

    Yields:
        A function to call with the number of a step and its metrics.
    """
    columns = TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}")
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, completed=done, status="")

        def advance(step: int, values: Mapping[str, float]) -> None:
            status = [f"loss {values['loss']:.4f}"]
            status += [f"{values['tokens_per_second']:,.0f} tokens/s"] if values.get("tokens_per_second") else []
            status += [f"MFU {values['mfu']:.1%}"] if "mfu" in values else []
            progress.update(task, completed=step, status=", ".join(status))

        yield advance
