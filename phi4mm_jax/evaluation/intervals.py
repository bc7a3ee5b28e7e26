"""How far a figure would move with other items: intervals of 95% confidence."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from phi4mm_jax.evaluation.metrics import Metric

_DRAWS = 1000
_Z = 1.959964  # of the normal distribution, two-sided 95%


def interval(metric: Metric, counts: Float[np.ndarray, "N K"]) -> tuple[float, float]:
    """Of a share Wilson's, which is no point where all items are right; else by drawing the items again.

    E. B. Wilson, Journal of the American Statistical Association 22 (1927); B. Efron, Annals of Statistics 7 (1979).
    """
    if metric.is_share:
        return wilson(float(counts[:, 0].sum()), len(counts))
    return percentiles(redrawn(metric, counts))


def mean_interval(metric: Metric, sets: Sequence[Float[np.ndarray, "N K"]]) -> tuple[float, float]:
    """Of the mean over sets, each of whose items are drawn again."""
    return percentiles(np.mean([redrawn(metric, counts, seed) for seed, counts in enumerate(sets)], axis=0))


def redrawn(metric: Metric, counts: Float[np.ndarray, "N K"], seed: int = 0) -> Float[np.ndarray, " D"]:
    """The metric of as many items as there are, drawn with replacement, again and again; by one seed the same draws."""
    number = len(counts)
    draw = np.random.default_rng(seed)
    share = np.full(number, 1 / number)
    return np.asarray([metric.score((draw.multinomial(number, share) @ counts).tolist()) for _ in range(_DRAWS)])


def percentiles(scores: Float[np.ndarray, " D"]) -> tuple[float, float]:
    """What 95% of the scores lie between; draws without anything to measure by do not count."""
    low, high = np.nanpercentile(scores, [2.5, 97.5])
    return float(low), float(high)


def wilson(right: float, number: int) -> tuple[float, float]:
    """Of `right` out of `number`."""
    share, z2 = right / number, _Z**2 / number
    middle, half = share + z2 / 2, _Z * math.sqrt(share * (1 - share) / number + z2 / (4 * number))
    return max((middle - half) / (1 + z2), 0.0), min((middle + half) / (1 + z2), 1.0)
