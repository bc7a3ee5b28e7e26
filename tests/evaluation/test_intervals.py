"""Intervals against their formulas."""

import numpy as np
import pytest

from phi4mm_jax.evaluation import intervals
from phi4mm_jax.evaluation.metrics import counts_of, make_metric


@pytest.mark.parametrize(
    ("right", "number", "low", "high"),
    [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (5, 10, 0.2366, 0.7634), (90, 100, 0.8256, 0.9448)],  # Wilson's formula
)
def test_a_share_has_wilsons_interval(right, number, low, high):
    counts = counts_of(make_metric("exact"), [["a"]] * number, ["a"] * right + ["b"] * (number - right))
    assert intervals.interval(make_metric("exact"), counts) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "wrong", "known"), [(1, 1, False), (5, 4, False), (5, 5, True), (50, 0, False)])
def test_few_items_or_such_that_are_alike_have_no_interval(right, wrong, known):
    wer = make_metric("wer")
    counts = counts_of(wer, [["a b c d"]] * (right + wrong), ["a b c d"] * right + ["a b c x"] * wrong)
    assert (intervals.interval(wer, counts) is not None) == known
    sets = [counts, counts_of(wer, [["a b"]] * 20, ["a b"] * 10 + ["a c"] * 10)]
    assert (intervals.mean_interval(wer, sets) is not None) == (right + wrong >= 10)


def bounds(found: tuple[float, float] | None) -> tuple[float, float]:
    assert found is not None
    return found


def test_a_mean_has_the_interval_of_the_normal_distribution():
    anls = make_metric("anls")
    counts = np.stack([np.random.default_rng(3).uniform(size=400), np.ones(400)], 1)
    low, high = bounds(intervals.interval(anls, counts))
    mean, error = counts[:, 0].mean(), counts[:, 0].std() / 20
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert intervals.interval(anls, counts) == (low, high)  # the same draws every time


def test_a_corpus_is_drawn_as_a_corpus():
    """One long item with all the errors: how often it is drawn decides, as both errors and words."""
    wer = make_metric("wer")
    counts = np.asarray([[90.0, 90.0], *([[0.0, 1.0]] * 10)])
    low, high = bounds(intervals.interval(wer, counts))
    assert low == 0  # in a third of the draws it is not there
    assert high == pytest.approx(3 * 90 / (3 * 90 + 8), abs=0.01)  # three times or less in 98% of them
    assert np.isfinite(intervals.bootstrap(wer, counts)).all()


def test_draws_without_a_word_do_not_count():
    wer = make_metric("wer")
    assert intervals.percentiles(intervals.bootstrap(wer, np.asarray([[1.0, 2.0], [0.0, 0.0]]))) == (0.5, 0.5)


def test_the_mean_of_sets_is_surer_than_a_set():
    anls = make_metric("anls")
    draw = np.random.default_rng(0)
    sets = [np.stack([draw.uniform(size=100), np.ones(100)], 1) for _ in range(4)]
    low, high = bounds(intervals.mean_interval(anls, sets))
    widths = [np.diff(bounds(intervals.interval(anls, s))).item() for s in sets]
    assert high - low < 0.75 * min(widths)
    low, high = bounds(intervals.mean_interval(anls, [sets[0], np.stack([1 - sets[0][:, 0], np.ones(100)], 1)]))
    assert high - low > 0.5 * min(widths)  # draws of their own: the same ones would take each other away
