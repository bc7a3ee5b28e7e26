"""Published figures of Phi-4-multimodal, to be shown beside measured ones.

The model card shows its speech results as pictures, so these are from the tables of the technical report,
arXiv:2503.01743v2: 4 (ASR; character error rates for Japanese and Chinese) and 5 (AST; "-cot": by chain of thought).
The vision results are the card's own. Details that are not published (splits, normalisation, some prompts) may differ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum

from phi4mm_jax.errors import InputError
from phi4mm_jax.evaluation.metrics import MetricName

_ASR, _AST = "arXiv:2503.01743v2, table 4", "arXiv:2503.01743v2, table 5"
_CARD = "the card of microsoft/Phi-4-multimodal-instruct"


@dataclass(frozen=True)
class Published:
    """Figures of a benchmark.

    Attributes:
        source: where they are from.
        metric: the metric of the figures.
        figures: by the names of the benchmark's sets.
        others: sets of another metric.
    """

    source: str
    metric: MetricName
    figures: Mapping[str, float]
    others: Mapping[str, MetricName]

    def check(self, name: str, metrics: Sequence[str]) -> None:
        """Raise an InputError where there is no figure of a set in any of the metrics."""
        if name not in self.figures:
            raise InputError(
                f"{name}: is not a set of the reference; name the manifests after its sets: {', '.join(self.figures)}"
            )
        if self._metric(name) not in metrics:
            raise InputError(
                f"{name}: the reference has its {self._metric(name)}, which is not measured here "
                f"({', '.join(metrics)}); choose another reference, task or normaliser"
            )

    def figure(self, name: str, metric: str) -> float | None:
        """Return the figure of a set in a metric, if there is one."""
        return self.figures.get(name) if self._metric(name) == metric else None

    def _metric(self, name: str) -> MetricName:
        return self.others.get(name, self.metric)


def published_mean(figures: Sequence[float]) -> float:
    """Return the mean as the report has it, which rounds half up: 49.08 / 8 is 6.14."""
    return round(fsum(figures) / len(figures) + 1e-9, 2)


def _speech(*figures: float) -> dict[str, float]:
    return dict(zip(("en", "de", "es", "fr", "it", "ja", "pt", "zh"), figures, strict=True))


def _translation(*figures: float) -> dict[str, float]:
    names = ("de", "es", "fr", "it", "ja", "pt", "zh") if len(figures) == 7 else ("de", "ja", "zh")
    return dict(zip(names, figures, strict=True))


_LETTERS: dict[str, MetricName] = {"ja": "cer", "zh": "cer"}

PUBLISHED = {
    "open-asr": Published(
        _ASR,
        "wer",
        {
            "ami": 11.69, "earnings22": 10.16, "gigaspeech": 9.78, "spgispeech": 3.13, "tedlium": 2.90,
            "librispeech-clean": 1.68, "librispeech-other": 3.83, "voxpopuli": 5.91,
        },
        {},
    ),
    "common-voice-15": Published(_ASR, "wer", _speech(7.61, 5.13, 4.47, 8.08, 3.78, 10.98, 6.97, 7.35), _LETTERS),
    "fleurs": Published(_ASR, "wer", _speech(3.38, 3.96, 3.02, 4.35, 1.98, 4.50, 3.98, 6.83), _LETTERS),
    "covost2-x-en": Published(_AST, "bleu", _translation(39.81, 43.60, 42.24, 41.42, 30.54, 55.28, 22.39), {}),
    "covost2-x-en-cot": Published(_AST, "bleu", _translation(40.83, 44.84, 43.42, 42.45, 31.87, 56.25, 25.64), {}),
    "covost2-en-x": Published(_AST, "bleu", _translation(34.22, 32.93, 46.30), {}),
    "covost2-en-x-cot": Published(_AST, "bleu", _translation(34.87, 34.04, 47.28), {}),
    "fleurs-x-en": Published(_AST, "bleu", _translation(37.71, 25.33, 35.10, 26.06, 21.62, 40.80, 22.37), {}),
    "fleurs-x-en-cot": Published(_AST, "bleu", _translation(39.43, 27.56, 37.42, 28.45, 25.22, 42.85, 25.49), {}),
    "fleurs-en-x": Published(_AST, "bleu", _translation(34.44, 23.66, 37.92, 23.44, 30.67, 37.79, 37.10), {}),
    "fleurs-en-x-cot": Published(_AST, "bleu", _translation(35.94, 25.09, 40.12, 24.85, 30.81, 38.94, 39.19), {}),
    "vision": Published(_CARD, "anls", {"docvqa": 93.2, "infovqa": 72.7}, {}),
    "vision-speech": Published(_CARD, "anls", {"docvqa": 87.3, "infovqa": 63.7}, {}),
}  # fmt: skip
