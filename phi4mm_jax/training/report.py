"""Report at the end of a run: a plot of the losses, the data and the trained parameters."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from phi4mm_jax.training.metrics_log import read_log
from phi4mm_jax.training.recipe import Recipe
from phi4mm_jax.training.step import Variables
from phi4mm_jax.utils.files import write_atomically

REPORT = "report.md"  # in a run's folder


def run_facts(
    recipe: Recipe, trainable: Variables, steps: int, best_step: int | None, skipped: Mapping[str, int]
) -> dict[str, Any]:
    """Return what a report says of a run, besides its metrics.

    Args:
        skipped: samples that could not be used, by cause.
    """
    packing, count = recipe.data.sizes, sum(x.size for x in jax.tree.leaves(trainable))
    return {
        "model": recipe.model,
        "manifests": ", ".join(source.path for source in recipe.data.sources),
        "trained": f"{', '.join(recipe.trainable)}: {count:,} parameters",
        "steps": f"{steps} of {recipe.accumulate} x {packing.rows} rows of {packing.lengths[-1]}",
        "optimizer": ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(recipe.optimizer).items()),
        "best checkpoint": f"step {best_step}",
        "skipped samples": skipped or "none",
    }


def draw_losses(folder: Path) -> None:
    """Write loss.png: the loss by step, and that of the evaluations."""
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


def write_report(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write report.md: what was trained, on what, and how it ended."""
    lines = read_log(folder)
    steps = [line for line in lines if "loss" in line]
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    if steps:
        rows += [f"| loss, first and last | {steps[0]['loss']:.4f}, {steps[-1]['loss']:.4f} |"]
        counted = "pairs" if "pairs" in steps[0] else "targets"
        rows += [f"| {counted} of a step | {sum(line[counted] for line in steps) / len(steps):,.1f} |"]
    evaluations = [line for line in lines if "evaluation_loss" in line]
    for name in sorted({key for line in evaluations for key in line if key != "step"}):
        values = [line[name] for line in evaluations if name in line]
        rows += [f"| {name.replace('_', ' ')}, first and last | {values[0]:.4f}, {values[-1]:.4f} |"]
    skeleton = ["# Report", "", "| | |", "|---|---|", *rows, "", "![loss](loss.png)", ""]
    write_atomically(folder / REPORT, "\n".join(skeleton))  # which says that the run has ended
