"""Throughput of training: tokens per second, and MFU."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.training.flops import peak_flops, step_flops
from phi4mm_jax.training.step import Metrics, Variables


class Throughput:
    """Measures throughput from the end of one step to the end of another.

    Times are the ends of the steps themselves, since metrics are written a step late.

    Args:
        step: the last one before.
        clock: seconds.
        peak: FLOP/s of one device; by default its maker's figure, where that is known.
        reference: whether the step also runs a reference model forward (DPO).
    """

    def __init__(
        self,
        config: Phi4MMConfig,
        trainable: Variables,
        step: int,
        clock: Callable[[], float] = time.monotonic,
        peak: float | None = None,
        reference: bool = False,
    ):
        self._config, self._trainable, self._clock = config, trainable, clock
        self._last_step, self._last_end = step, clock()
        self._compiled = False  # the first step is not timed
        self._ends: dict[int, float | Future[float]] = {}
        self._work: dict[int, tuple[int, float]] = {}  # by step: this host's tokens and FLOP
        self._peak = peak_flops() if peak is None else peak
        self._reference = reference
        self._watcher = ThreadPoolExecutor(1, "phi4mm-throughput")

    def record_step(self, step: int, metrics: Metrics, batches: Sequence[TrainingBatch]) -> None:
        """Record the work of a step that was just dispatched, and the time of its end."""
        arrays: Any = metrics
        ready = all(x.is_ready() for x in arrays)
        self._ends[step] = self._clock() if ready else self._watcher.submit(self._end_of, metrics)
        tokens = sum(int(batch.batch.lengths.sum()) for batch in batches)
        flops = step_flops(self._config, self._trainable, batches, self._reference) if self._peak else 0.0
        self._work[step] = tokens, flops

    def reset_timer(self) -> None:
        """Exclude the time since the last step's end, which was spent on an evaluation or a checkpoint."""
        self._last_end = self._clock()

    def since_last(self, step: int) -> dict[str, float]:
        """Return the throughput of the steps since the last call, of which `step` is the last; it has ended.

        Returns:
            seconds (per step), tokens_per_second, and mfu where the peak is known; nothing for the first call, whose
            step was compiled.
        """
        end = self._ends[step]
        end = end.result() if isinstance(end, Future) else end
        self._ends = {number: e for number, e in self._ends.items() if number > step}
        done = [self._work.pop(number) for number in sorted(self._work) if number <= step]
        tokens, flops = (sum(x) * jax.process_count() for x in zip(*done, strict=True))
        seconds, steps, timed = end - self._last_end, step - self._last_step, self._compiled
        self._last_end, self._last_step, self._compiled = end, step, True
        if not timed or seconds <= 0:
            return {}
        values = {"seconds": seconds / steps, "tokens_per_second": tokens / seconds}
        if self._peak:
            values["mfu"] = flops / seconds / self._peak / jax.device_count()
        return values

    def close(self) -> None:
        """End the thread."""
        self._watcher.shutdown()

    def _end_of(self, metrics: Metrics) -> float:
        jax.block_until_ready(metrics)
        return self._clock()
