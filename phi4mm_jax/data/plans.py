"""Plans of batches from a stream of measured samples, which can be resumed, and the order of that stream."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np

from phi4mm_jax.data.examples import BadSample, Size
from phi4mm_jax.data.packing import PendingSample, Plan, Planner
from phi4mm_jax.errors import InputError


class Tally(NamedTuple):
    """Counts of samples seen, and of those skipped."""

    seen: int = 0
    skipped: Mapping[str, int] = {}  # by cause
    last: str = ""  # error of the last one

    def plus(self, other: "Tally") -> "Tally":
        """Return the counts of both."""
        skipped = Counter(self.skipped) + Counter(other.skipped)
        return Tally(self.seen + other.seen, dict(skipped), other.last or self.last)


@dataclass(frozen=True)
class BadSampleLimit:
    """Limit of the fraction of bad samples, checked once `min_seen` samples were seen."""

    share: float
    min_seen: int

    def skip(self, tally: Tally, error: BadSample) -> Tally:
        """Count a bad sample; raise its error if none may be skipped."""
        if not self.share:
            raise error
        return tally.plus(Tally(0, {error.cause: 1}, str(error)))

    def check(self, tally: Tally) -> None:
        """Raise InputError if too many were skipped."""
        skipped = sum(tally.skipped.values())
        if tally.seen >= self.min_seen and skipped > self.share * tally.seen:
            causes = ", ".join(f"{cause}: {n}" for cause, n in sorted(tally.skipped.items()))
            raise InputError(
                f"{skipped} of {tally.seen} samples are unusable ({causes}), more than the fraction {self.share} that "
                f"bad_samples allows; repair or remove them, or raise it. The last one: {tally.last}"
            )


def sample_order(
    lengths: Sequence[int], weights: Sequence[float], *, epochs: int | None, shuffle: bool, seed: int
) -> grain.MapDataset[tuple[int, int]]:
    """Return the stream: at each position a source and the number of a sample in it.

    Args:
        lengths: samples of each source.
        weights: of each source; empty for one set of all samples.
        epochs: None for an endless stream.
    """
    sources = [
        grain.MapDataset.range(length).map(functools.partial(_of_source, number))
        for number, length in enumerate(lengths)
    ]

    def shuffled(data: grain.MapDataset, number: int) -> grain.MapDataset:
        own = np.random.SeedSequence((seed, number)).generate_state(1)[0]
        return data.shuffle(seed=int(own)) if shuffle else data

    if not weights:
        return shuffled(grain.MapDataset.concatenate(sources), 0).repeat(epochs)
    mixed = grain.MapDataset.mix([shuffled(data, i).repeat() for i, data in enumerate(sources)], weights)
    return mixed if epochs is None else mixed[: epochs * sum(lengths)]


def _of_source(source: int, number: int) -> tuple[int, int]:
    return source, number


class Plans(grain.IterDataset[tuple[Plan, Tally]]):
    """Plans from a stream of measured samples. The state is the stream's, and the pending samples."""

    def __init__(self, measured: grain.IterDataset, planner: Callable[[], Planner], limit: BadSampleLimit):
        super().__init__(measured)
        self._planner, self._limit = planner, limit

    def __iter__(self) -> grain.DatasetIterator[tuple[Plan, Tally]]:
        return _PlanIterator(iter(self.parents[0]), self._planner, self._limit)


class _PlanIterator(grain.DatasetIterator[tuple[Plan, Tally]]):
    def __init__(self, measured: Any, planner: Callable[[], Planner], limit: BadSampleLimit):
        super().__init__(measured)
        self._measured, self._new_planner, self._limit = measured, planner, limit
        self._begin([], Tally())

    def _begin(self, pending: Iterable[PendingSample], tally: Tally) -> None:
        self._planner, self._tally, self._ended = self._new_planner(), tally, False
        for sample in pending:
            self._planner.check_media(sample.size)  # the state may be of fewer hosts
            self._planner.add(sample)

    def __next__(self) -> tuple[Plan, Tally]:
        while (plan := self._planner.next(self._ended)) is None:
            if self._ended:
                raise StopIteration
            measured = next(self._measured, None)
            if measured is None:
                self._ended = True
                continue
            self._tally = self._tally._replace(seen=self._tally.seen + 1)
            if isinstance(measured, BadSample):
                self._tally = self._limit.skip(self._tally, measured)
            else:
                self._planner.add(measured)
            self._limit.check(self._tally)
        return plan, self._tally

    def get_state(self) -> dict[str, Any]:
        pending = [[w.position, *w.size] for w in self._planner.pending]
        return {"measured": self._measured.get_state(), "pending": pending, "tally": self._tally._asdict()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._measured.set_state(state["measured"])
        pending = [PendingSample(at, Size(tuple(tokens), *rest)) for at, tokens, *rest in state["pending"]]
        self._begin(pending, Tally(**state["tally"]))
