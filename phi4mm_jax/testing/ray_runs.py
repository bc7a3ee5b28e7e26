"""Runs of infer.ray: their answers and their engines' processes."""

import json
from pathlib import Path
from typing import Any


def answers_in(folder: Path) -> list[dict[str, Any]]:
    """Return all answers of an output, part by part."""
    return [json.loads(line) for part in sorted(folder.glob("part-*")) for line in part.read_text().splitlines()]


def engine_processes(pid: int, *, at_work: bool = False) -> list[int]:
    """Return the engines' processes of the run that is process `pid`, or only of those that hold lines."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:  # it has ended
            continue
    below = {pid}
    for _ in range(4):
        below |= {child for child, parent in parents.items() if parent in below}
    name = "ray::MapWorker(MapBatches(AnswerLines))" + (".submit" if at_work else "")  # the call that it is in
    return [child for child in below if names.get(child, "").startswith(name)]
