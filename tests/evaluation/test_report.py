"""Reports: the metrics of tasks, tables, and published figures."""

import pytest

from phi4mm_jax import InputError
from phi4mm_jax.evaluation.answers import Answer
from phi4mm_jax.evaluation.items import Item
from phi4mm_jax.evaluation.published import PUBLISHED, published_mean
from phi4mm_jax.evaluation.report import TASKS, Measure, notes, table


def measured(task: str, *pairs, **options):
    """The report of (reference, answer) pairs, in one set."""
    items = [Item(f"m: line {i}", None, [], (reference,)) for i, (reference, _) in enumerate(pairs)]
    answers = [Answer(answer, None if answer is not None else "failed") for _, answer in pairs]
    return Measure(task, **options)({"m": (items, answers)})


def test_tasks_have_their_metrics_and_normalisation():
    found = {task: list(measured(task, ("a", "a")).sets[0].figures) for task in TASKS}
    assert found == {
        "asr": ["wer", "cer"], "ast": ["bleu"], "ocr": ["exact", "anls"], "vqa": ["exact", "anls"], "exact": ["exact"],
    }  # fmt: skip
    assert measured("asr", ("It's 2.", "it is two")).sets[0].figures["wer"].value == 0
    assert measured("exact", ("It's 2.", "it's 2")).sets[0].figures["exact"].value == 0
    assert measured("exact", ("It's 2.", "it's 2"), normalizer="basic").sets[0].figures["exact"].value == 100


def test_letters_have_no_words():
    (only,) = measured("asr", ("今日は、晴れ。", "今日は晴 れ"), normalizer="letters").sets
    assert list(only.figures) == ["cer"]
    assert only.figures["cer"].value == 0


def test_a_translation_comes_after_the_transcript():
    text = "it was very late in the evening"
    assert measured("ast", (text, f"es war spät <sep> {text}")).sets[0].figures["bleu"].value == pytest.approx(100)
    assert measured("asr", ("a b", "x <sep> a b")).sets[0].figures["wer"].value > 0


def test_figures_are_percentages_with_intervals():
    (only,) = measured("exact", *[("a", "a")] * 8, ("a", "b"), ("a", None)).sets
    figure = only.figures["exact"]
    assert (only.items, only.errors) == (10, 1)
    assert figure.value == pytest.approx(80)
    assert (figure.low, figure.high) == pytest.approx((49.02, 94.33), abs=0.005)


def test_a_table_without_an_interval_says_so():
    measure, report = Measure("asr"), measured("asr", ("a b", "a b"), ("a b", "a c"))
    figure = report.sets[0].figures["wer"]
    assert (figure.value, figure.low, figure.high) == (25, None, None)
    assert list(table(report, measure).columns[4].cells) == ["-"]
    assert list(notes(report, [], 5)) == [
        "-: no interval, of fewer than 10 items in a set, or of items that are all alike"
    ]


# ---------------------------------------------------------------------------------------------- published figures

AVERAGES = {  # as the report prints them
    "open-asr": 6.14, "common-voice-15": 6.80, "fleurs": 4.00, "covost2-x-en": 39.33, "covost2-x-en-cot": 40.76,
    "covost2-en-x": 37.82, "covost2-en-x-cot": 38.73, "fleurs-x-en": 29.86, "fleurs-x-en-cot": 32.35,
    "fleurs-en-x": 32.15, "fleurs-en-x-cot": 33.56,
}  # fmt: skip


@pytest.mark.parametrize("name", AVERAGES)
def test_figures_have_the_averages_that_are_printed_beside_them(name):
    assert published_mean(list(PUBLISHED[name].figures.values())) == AVERAGES[name]


def test_figures_of_letters_are_character_error_rates():
    fleurs = PUBLISHED["fleurs"]
    assert fleurs.figure("de", "wer") == 3.96
    assert fleurs.figure("ja", "wer") is None
    assert fleurs.figure("ja", "cer") == 4.50
    with pytest.raises(InputError, match=r"ja: the reference has its cer, which is not measured here \(bleu\)"):
        fleurs.check("ja", ["bleu"])
    with pytest.raises(InputError, match=r"held: is not a set of the reference; .* en, de, es"):
        fleurs.check("held", ["wer", "cer"])
