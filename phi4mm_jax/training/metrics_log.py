"""Metrics of a run by step: lines of JSON, and TensorBoard."""

import json
import math
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from phi4mm_jax.errors import InputError
from phi4mm_jax.training.run_folder import writable
from phi4mm_jax.utils.files import make_folder, write_atomically
from phi4mm_jax.utils.strict_json import strict_json

# tensorboardX imports torch where it is installed, which takes two seconds and is of no use here.
_torch_is_imported = "torch" in sys.modules
if not _torch_is_imported:
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.summary import scalar
finally:
    if not _torch_is_imported:
        del sys.modules["torch"]

LINES = "metrics.jsonl"


class MetricsLog:
    """Writer of metrics, in the run's folder.

    Args:
        step: the run resumes after it; an earlier process's lines of later steps are removed.
        writes: only on the first host; elsewhere nothing is written.

    Raises:
        InputError: the folder cannot be written into.
    """

    def __init__(self, folder: Path, step: int, writes: bool = True):
        self._file = None
        if not writes:
            return
        self._path = folder / LINES
        make_folder(folder)
        kept = [line for line in read_log(folder) if line["step"] <= step]
        with writable(folder / "tensorboard"):
            (folder / "tensorboard").mkdir(exist_ok=True)
            self._board = EventsWriter(str(folder / "tensorboard" / "events"))  # unlike SummaryWriter, none waits
            start = SessionLog(status=SessionLog.START)  # hides what an earlier process has written of later steps
            self._board.write_event(Event(step=step + 1, session_log=start))
            self._board.flush()
        with writable(self._path):
            write_atomically(self._path, "".join(strict_json(line) + "\n" for line in kept))
            self._file = self._path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line at once.

        Raises:
            InputError: it cannot be written.
        """
        if self._file is None:
            return
        with writable(self._path):
            self._file.write(strict_json({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._board.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
            self._board.flush()

    def close(self) -> None:
        """Close the files."""
        if self._file is None:
            return
        with writable(self._path), closing(self._file):
            self._board.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the lines so far, with NaN for null; a last line that a killed process left incomplete is ignored.

    Raises:
        InputError: a line is damaged.
    """
    path = folder / LINES
    if not path.exists():
        return []
    content, lines = path.read_bytes(), []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            found = dict(json.loads(line))
            lines.append({key: math.nan if value is None else value for key, value in found.items()})
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: line {number} is not a line of metrics; remove it") from error
    return lines
