"""What a run tells while it goes: lines of JSON, TensorBoard, and in the end a picture and a report."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from phi4mm_jax.errors import InputError
from phi4mm_jax.utils.files import write_atomically
from phi4mm_jax.utils.strict_json import strict_json

LINES, REPORT = "metrics.jsonl", "report.md"


class Log:
    """Metrics by step, in the run's folder.

    Args:
        step: the run goes on from here; what an earlier process has logged after it is taken out.
    """

    def __init__(self, folder: Path, step: int):
        self._path = folder / LINES
        folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(folder) if line["step"] <= step]
        write_atomically(self._path, "".join(strict_json(line) + "\n" for line in kept))
        self._file = self._path.open("a")
        try:
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        except OSError as error:
            raise InputError(f"{folder / 'tensorboard'}: cannot be written ({error.strerror}); move it away") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(strict_json({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines so far, with NaN for null; one that a killed process has left half-written is left out."""
    path = folder / LINES
    if not path.exists():
        return []
    content, lines = path.read_bytes(), []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            found = dict(json.loads(line))
            lines.append({key: math.nan if value is None else value for key, value in found.items()})
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: line {number} is no line of metrics; take it out") from error
    return lines


def draw(folder: Path) -> None:
    """loss.png: the loss by step, and that of the evaluations."""
    from matplotlib.figure import Figure

    figure = Figure((8, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = read_log(folder)
    for name, style in (("loss", "-"), ("evaluation_loss", "o-")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "), linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)


def report(folder: Path, facts: Mapping[str, Any]) -> None:
    """report.md: what was trained, on what, and how it ended."""
    lines = read_log(folder)
    steps = [line for line in lines if "loss" in line]
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    if steps:
        rows += [f"| loss, first and last | {steps[0]['loss']:.4f}, {steps[-1]['loss']:.4f} |"]
        counted = "pairs" if "pairs" in steps[0] else "targets"
        rows += [f"| {counted} | {sum(line[counted] for line in steps):,.0f} |"]
    evaluations = [line for line in lines if "evaluation_loss" in line]
    for name in sorted({key for line in evaluations for key in line if key != "step"}):
        values = [line[name] for line in evaluations if name in line]
        rows += [f"| {name.replace('_', ' ')}, first and last | {values[0]:.4f}, {values[-1]:.4f} |"]
    skeleton = ["# Report", "", "| | |", "|---|---|", *rows, "", "![loss](loss.png)", ""]
    (folder / REPORT).write_text("\n".join(skeleton))
