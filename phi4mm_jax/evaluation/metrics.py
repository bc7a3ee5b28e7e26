"""Metrics of a corpus, each a function of sums over its items, so that bootstrap samples are cheap."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from phi4mm_jax.errors import InputError
from phi4mm_jax.utils.edits import edit_distance, optional_module

MetricName = Literal["wer", "cer", "bleu", "exact", "anls"]
NormalizerName = Literal["none", "english", "basic", "letters"]
NORMALIZERS: tuple[NormalizerName, ...] = get_args(NormalizerName)
Normalizer = Callable[[str], str]

_ANLS_THRESHOLD = 0.5


@dataclass(frozen=True)
class Metric:
    """Metric of answers.

    Attributes:
        title: its name in reports.
        scale: the factor of reports.
        higher_is_better: whether a higher value is better.
        counts: an item's contribution to the sums, from the accepted answers and the one that was given. None stands
            for an item that failed: it is wrong whatever is accepted.
        score: the metric, from sums of counts; NaN where there is nothing to measure by.
        item: likewise of a single item, where that needs another rule.
        is_share: an item is right or wrong: the first count is 1 or 0, the second 1.
        signature: the settings that make the figure comparable, from all references.
    """

    title: str
    scale: float
    higher_is_better: bool
    counts: Callable[[Sequence[str], str | None], tuple[float, ...]]
    score: Callable[[Sequence[float]], float]
    item: Callable[[Sequence[float]], float] | None = None
    is_share: bool = False
    signature: Callable[[Sequence[Sequence[str]]], str] | None = None


def make_metric(name: MetricName, tokenize: str = "13a") -> Metric:
    """Make a metric by its name.

    wer, cer: edits by the words, or characters, of the references; of several, the one that fits best counts. White
    space of any length is one space.
    bleu: sacreBLEU, 0 to 100.
    exact: the share of answers that are an accepted one, white space around them aside.
    anls: 1 - the edit distance over the length of the longer text, where that is less than half, else 0; the
    maximum over the accepted answers, case-insensitive (arXiv:1907.00490, equation 1).

    Args:
        tokenize: sacreBLEU's tokeniser, for bleu.

    Raises:
        InputError: there is no such tokeniser, or a package is missing.
    """
    if name == "bleu":
        return _bleu(tokenize)
    optional_module("rapidfuzz.distance")  # a missing one is reported before anything is measured
    return {
        "wer": Metric("WER", 100, False, _word_counts, _ratio),
        "cer": Metric("CER", 100, False, _character_counts, _ratio),
        "exact": Metric("exact match", 100, True, _exact_counts, _ratio, is_share=True),
        "anls": Metric("ANLS", 100, True, _anls_counts, _ratio),
    }[name]


def counts_of(
    metric: Metric,
    references: Sequence[Sequence[str]],
    answers: Sequence[str | None],
    normalize: Normalizer = str,
) -> Float[np.ndarray, "N K"]:
    """Return each item's contribution to the sums, after texts are normalised."""
    counts = [
        metric.counts([normalize(r) for r in accepted], None if answer is None else normalize(answer))
        for accepted, answer in zip(references, answers, strict=True)
    ]
    return np.asarray(counts, np.float64)


def corpus_score(
    metric: Metric,
    references: Sequence[Sequence[str]],
    answers: Sequence[str | None],
    normalize: Normalizer = str,
) -> float:
    """Return the metric of all answers together."""
    return metric.score(counts_of(metric, references, answers, normalize).sum(0).tolist())


def make_normalizer(name: NormalizerName) -> Normalizer:
    """Make the function that normalises references and answers before they are compared.

    english: Whisper's rules for English (arXiv:2212.04356, appendix C): case, punctuation, fillers, contractions,
    numbers, American spelling.
    basic: Whisper's for other languages: case, punctuation, text in brackets.
    letters: basic, and no spaces, for scripts that write none between words.

    Raises:
        InputError: a package is missing.
    """
    if name == "none":
        return str
    basic = _stripped(optional_module("whisper_normalizer.basic").BasicTextNormalizer())
    if name == "basic":
        return basic
    if name == "letters":
        return lambda text: "".join(basic(text).split())
    english = _stripped(optional_module("whisper_normalizer.english").EnglishTextNormalizer())

    def normalize(text: str) -> str:
        try:
            return english(text)
        except (AssertionError, ValueError):  # thousands of digits, by a model that repeats itself
            return basic(text)

    return normalize


def _stripped(rules: Normalizer) -> Normalizer:
    return lambda text: rules(text).strip()


def _ratio(sums: Sequence[float]) -> float:
    return sums[0] / sums[1] if sums[1] else math.nan


def _word_counts(references: Sequence[str], answer: str | None) -> tuple[float, float]:
    return _edits([r.split() for r in references], (answer or "").split())


def _character_counts(references: Sequence[str], answer: str | None) -> tuple[float, float]:
    return _edits([" ".join(r.split()) for r in references], " ".join((answer or "").split()))


def _edits(references: Sequence[Sequence[str]], answer: Sequence[str]) -> tuple[float, float]:
    counts = [(edit_distance(r, answer), len(r)) for r in references]
    return min(counts, key=lambda c: c[0] / max(c[1], 1))


def _exact_counts(references: Sequence[str], answer: str | None) -> tuple[float, float]:
    return float(answer is not None and answer.strip() in {r.strip() for r in references}), 1.0


def _anls_counts(references: Sequence[str], answer: str | None) -> tuple[float, float]:
    if answer is None:
        return 0.0, 1.0
    distance = optional_module("rapidfuzz.distance").Levenshtein.normalized_distance
    min_distance = min(distance(_folded(r), _folded(answer)) for r in references)
    return 1.0 - min_distance if min_distance < _ANLS_THRESHOLD else 0.0, 1.0


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _bleu(tokenize: str) -> Metric:
    bleu = optional_module("sacrebleu.metrics.bleu").BLEU
    if tokenize not in bleu.TOKENIZERS:
        raise InputError(f"tokenize is {tokenize!r}; expected one of sacreBLEU's: {', '.join(sorted(bleu.TOKENIZERS))}")
    try:
        sentence, corpus = (bleu(tokenize=tokenize, effective_order=by_item) for by_item in (True, False))
    except (ImportError, RuntimeError, AssertionError) as error:  # a package of its own is missing, or another one's
        raise InputError(f"the tokeniser {tokenize!r} cannot be used ({' '.join(str(error).split())})") from error

    def counts(references: Sequence[str], answer: str | None) -> tuple[float, ...]:
        found = sentence.sentence_score(answer or "", list(references))
        return found.sys_len, found.ref_len, *found.counts, *found.totals

    def score(sums: Sequence[float], by_item: bool = False) -> float:
        lengths, ngrams = [int(n) for n in sums[:2]], [int(n) for n in sums[2:]]
        half = len(ngrams) // 2
        return bleu.compute_bleu(ngrams[:half], ngrams[half:], *lengths, "exp", effective_order=by_item).score

    def signature(references: Sequence[Sequence[str]]) -> str:
        columns = [[r[i] if i < len(r) else None for r in references] for i in range(max(map(len, references)))]
        corpus.corpus_score([""] * len(references), columns)  # it wants to have seen how many there are
        return str(corpus.get_signature())

    return Metric("BLEU", 1, True, counts, score, lambda sums: score(sums, by_item=True), signature=signature)
