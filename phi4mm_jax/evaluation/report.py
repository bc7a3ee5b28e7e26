"""Reports: the metrics of each task, the table of figures, and the files."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from phi4mm_jax.errors import InputError
from phi4mm_jax.evaluation.answers import Answer, Settings
from phi4mm_jax.evaluation.intervals import MIN_ITEMS, interval, mean_interval
from phi4mm_jax.evaluation.items import Item
from phi4mm_jax.evaluation.metrics import (
    Metric,
    MetricName,
    NormalizerName,
    counts_of,
    make_metric,
    make_normalizer,
)
from phi4mm_jax.evaluation.published import Published, published_mean
from phi4mm_jax.utils.files import write_atomically
from phi4mm_jax.utils.strict_json import strict_json

TASKS: Mapping[str, tuple[tuple[MetricName, ...], NormalizerName]] = {  # metrics, normaliser
    "asr": (("wer", "cer"), "english"),
    "ast": (("bleu",), "none"),
    "ocr": (("exact", "anls"), "none"),
    "vqa": (("exact", "anls"), "none"),
    "exact": (("exact",), "none"),
}
_SEPARATOR = "<sep>"  # of a translation by chain of thought from the transcript before it


@dataclass(frozen=True)
class Figure:
    """Metric of a set, as reports show it, with its 95% confidence interval and the published figure, if any.

    Attributes:
        low: of the interval; None where there is none, see `phi4mm_jax.evaluation.intervals`.
        high: likewise.
    """

    value: float
    low: float | None
    high: float | None
    published: float | None = None


@dataclass(frozen=True)
class SetReport:
    """Figures of a manifest.

    Attributes:
        errors: items that failed and count as wrong.
        cut: answers that reached `max_new_tokens`.
    """

    name: str
    items: int
    errors: int
    cut: int
    figures: dict[str, Figure]


@dataclass(frozen=True)
class Report:
    """Figures of all sets, and of several their mean with equal weights."""

    task: str
    normalizer: str
    signatures: dict[str, str]
    sets: tuple[SetReport, ...]
    mean: dict[str, Figure] | None
    source: str | None


class Measure:
    """Metrics of a task.

    Raises:
        InputError: a package is missing, or there is no such tokeniser.
    """

    def __init__(self, task: str, normalizer: NormalizerName | None = None, tokenize: str = "13a"):
        names, usual = TASKS[task]
        self.task, self.normalizer = task, normalizer or usual
        self.metrics: dict[str, Metric] = {name: make_metric(name, tokenize) for name in names}
        if self.normalizer == "letters":  # they have no words
            self.metrics.pop("wer", None)
        self._normalize = functools.cache(make_normalizer(self.normalizer))

    def check(self, path: Path, items: Sequence[Item]) -> None:
        """Raise an InputError where the references leave nothing to measure by."""
        by_length = {"wer", "cer"} & self.metrics.keys()
        if by_length and not any(self._normalize(r) for item in items for r in item.references):
            raise InputError(
                f"{path}: nothing is left of any reference by the normaliser {self.normalizer!r}; repair the "
                "references, or choose another normaliser"
            )

    def counts(self, metric: Metric, items: Sequence[Item], answers: Sequence[Answer]) -> np.ndarray:
        """Return each item's contribution to the metric's sums."""
        return counts_of(metric, [item.references for item in items], list(map(self._text, answers)), self._normalize)

    def _text(self, answer: Answer) -> str | None:
        """Return the part of an answer that is measured."""
        if self.task == "ast" and answer.text is not None:
            return answer.text.rpartition(_SEPARATOR)[2]
        return answer.text

    def __call__(
        self, sets: Mapping[str, tuple[Sequence[Item], Sequence[Answer]]], published: Published | None = None
    ) -> Report:
        """Return the report of sets, by their names."""
        counts = {
            metric: {name: self.counts(self.metrics[metric], *of_set) for name, of_set in sets.items()}
            for metric in self.metrics
        }

        def figure(metric: str, name: str) -> Figure:
            found, scale = counts[metric][name], self.metrics[metric].scale
            low, high = _scaled(interval(self.metrics[metric], found), scale)
            known = None if published is None else published.figure(name, metric)
            return Figure(self.metrics[metric].score(found.sum(0).tolist()) * scale, low, high, known)

        reports = tuple(
            SetReport(
                name, len(items), sum(a.text is None for a in answers), sum(a.cut for a in answers),
                {metric: figure(metric, name) for metric in self.metrics},
            )
            for name, (items, answers) in sets.items()
        )  # fmt: skip
        mean = None
        if len(reports) > 1:
            mean = {
                name: _mean(metric, [r.figures[name] for r in reports], list(counts[name].values()))
                for name, metric in self.metrics.items()
            }
        references = [item.references for items, _ in sets.values() for item in items]
        signatures = {n: m.signature(references) for n, m in self.metrics.items() if m.signature is not None}
        source = None if published is None else published.source
        return Report(self.task, self.normalizer, signatures, reports, mean, source)


def _mean(metric: Metric, figures: Sequence[Figure], counts: Sequence[np.ndarray]) -> Figure:
    low, high = _scaled(mean_interval(metric, counts), metric.scale)
    known = [f.published for f in figures if f.published is not None]
    published = published_mean(known) if len(known) == len(figures) else None
    return Figure(float(np.mean([f.value for f in figures])), low, high, published)


def _scaled(bounds: tuple[float, float] | None, scale: float) -> tuple[float, float] | tuple[None, None]:
    return (None, None) if bounds is None else (bounds[0] * scale, bounds[1] * scale)


def table(report: Report, measure: Measure) -> Table:
    """Return the table, a row a set, and their mean."""
    made = Table(title=f"{report.task}, texts normalised: {report.normalizer}", title_justify="left")
    made.add_column("set")
    for column in ("items", "errors"):
        made.add_column(column, justify="right")
    rows = [(escape(s.name), str(s.items), str(s.errors), s.figures) for s in report.sets]
    rows += [("mean of sets", "", "", report.mean)] if report.mean is not None else []
    shown = [(name, any(figures[name].published is not None for *_, figures in rows)) for name in measure.metrics]
    for name, has_published in shown:
        metric = measure.metrics[name]
        made.add_column(f"{metric.title}{' %' if metric.scale == 100 else ''}", justify="right")
        made.add_column("95% interval", justify="right")
        if has_published:
            made.add_column("published", justify="right")
    for *labels, figures in rows:
        cells = list(labels)
        for name, has_published in shown:
            found = figures[name]
            cells += [f"{found.value:.2f}", "-" if found.low is None else f"{found.low:.2f} to {found.high:.2f}"]
            cells += [("" if found.published is None else f"{found.published:.2f}")] if has_published else []
        made.add_row(*cells)
    return made


def notes(report: Report, answers: Sequence[Answer], max_new_tokens: int, max_errors: int = 10) -> Iterator[str]:
    """Return the notes below the table: errors, answers that were cut, signatures, the source of published figures."""
    errors = [a.error for a in answers if a.error is not None]
    if errors:
        yield f"{len(errors)} of {len(answers)} items failed and count as wrong:"
        yield from (f"  {error}" for error in errors[:max_errors])
        if len(errors) > max_errors:
            yield f"  and {len(errors) - max_errors} more"
    if cut := sum(a.cut for a in answers):
        yield f"{cut} answers were cut at {max_new_tokens} tokens; --max-new-tokens allows more"
    figures = [f for figures in [*(s.figures for s in report.sets), report.mean or {}] for f in figures.values()]
    if any(figure.low is None for figure in figures):
        yield f"-: no interval, of fewer than {MIN_ITEMS} items in a set, or of items that are all alike"
    yield from report.signatures.values()
    if report.source is not None:
        yield f"published: {report.source}"


def write_report(
    folder: Path,
    report: Report,
    measure: Measure,
    settings: Settings,
    sets: Mapping[str, tuple[Sequence[Item], Sequence[Answer]]],
) -> None:
    """Write report.json, the figures with their settings, and items.jsonl, each item with its own metrics."""
    lines = []
    for name, (items, answers) in sets.items():
        counts = {n: (m, measure.counts(m, items, answers)) for n, m in measure.metrics.items()}
        for i, (item, answer) in enumerate(zip(items, answers, strict=True)):
            values = {
                "set": name, "where": item.where, "id": item.id, "prompt": _shown(item.prompt),
                "references": item.references, "answer": answer.text,
                "metrics": {n: _of_item(metric, of_set[i].tolist()) for n, (metric, of_set) in counts.items()},
            }  # fmt: skip
            lines.append(strict_json(values | ({} if answer.error is None else {"error": answer.error})))
    write_atomically(folder / "items.jsonl", "".join(f"{line}\n" for line in lines))
    write_atomically(
        folder / "report.json", strict_json({**asdict(report), "settings": asdict(settings)}, indent=1) + "\n"
    )


def _of_item(metric: Metric, counts: Sequence[float]) -> float | None:
    score = (metric.item or metric.score)(counts)
    return None if math.isnan(score) else score * metric.scale


def _shown(value: Any) -> Any:
    """Return a prompt without the bytes of its media."""
    if isinstance(value, Mapping):
        return {key: _shown(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shown(inner) for inner in value]
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return f"{value[:40]}..." if isinstance(value, str) and value.startswith("data:") else value
