"""Metrics of steps, written a step late: the host reads them while the devices are busy with the next step."""

from collections.abc import Callable, Mapping
from typing import Any

from phi4mm_jax.data.pipeline import Kind
from phi4mm_jax.training.divergence import ZeroGradientCheck, check_finite
from phi4mm_jax.training.metrics_log import MetricsLog
from phi4mm_jax.training.step import Metrics
from phi4mm_jax.training.throughput import Throughput


def metric_values(metrics: Metrics, kind: Kind) -> dict[str, float]:
    """Return a step's metrics by name, as they are logged. Waits for the step."""
    values = {name: float(value) for name, value in metrics._asdict().items()}
    if kind == "preferences":
        values |= {"margin": -values.pop("cross_entropy"), "pairs": values.pop("targets")}
    return values


class StepLog:
    """Buffers metrics until they are written, with the learning rate and the throughput.

    Args:
        log: the run's.
        advance: the progress bar: called with each step that is written, and its values.
        lr_schedule: by the number of updates before a step.
    """

    def __init__(
        self,
        log: MetricsLog,
        throughput: Throughput,
        lr_schedule: Callable[[int], Any],
        kind: Kind,
        zero_gradients: ZeroGradientCheck,
        advance: Callable[[int, Mapping[str, float]], None],
    ):
        self._log, self._throughput, self._lr_schedule = log, throughput, lr_schedule
        self._kind: Kind = kind
        self._zero_gradients, self._advance = zero_gradients, advance
        self._pending: dict[int, Metrics] = {}

    def add(self, step: int, metrics: Metrics) -> None:
        """Take a step's metrics, to be written by the next `flush`."""
        self._pending[step] = metrics

    def flush(self) -> None:
        """Write the buffered metrics.

        Raises:
            InputError: a step has diverged, or all first steps were without a gradient.
        """
        pending, self._pending = self._pending, {}
        for step, metrics in pending.items():
            values = metric_values(metrics, self._kind) | {"learning_rate": float(self._lr_schedule(step - 1))}
            values |= self._throughput.since_last(step)
            check_finite(step, values)
            self._zero_gradients.observe(step, values["gradient_norm"])
            self._log.write(step, values)
            self._advance(step, values)
