"""Checkpoints of a run: the last ones and the best one, each whole or not there."""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from phi4mm_jax.errors import CheckpointError, InputError
from phi4mm_jax.training.step import TrainState, abstract
from phi4mm_jax.utils.absl_log import absl_log_level
from phi4mm_jax.utils.files import write_atomically

_SCORE = "score"
_LATE = "late_scores.json"  # beside the checkpoints


class Checkpoints:
    """Checkpoints by step. They are written in the background; `close` waits for it.

    Args:
        folder: created if missing.
        keep: number of last ones to keep; None keeps all.
        higher_is_better: of the score. The best checkpoint is kept besides the last ones.
        read_only: write nothing, since a run may be using the folder.

    Raises:
        InputError: the folder is missing, or cannot be created.
    """

    def __init__(self, folder: Path, keep: int | None, higher_is_better: bool = False, read_only: bool = False):
        self._folder, self._higher_is_better = folder.absolute(), higher_is_better
        self._late = self._folder.with_name(_LATE)
        policies = checkpoint_managers.AnyPreservationPolicy([
            checkpoint_managers.LatestN(keep),
            _BestScored(self._late_scores, higher_is_better),
        ])  # fmt: skip
        mode = "max" if higher_is_better else "min"
        with absl_log_level(logging.ERROR):
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies, best_fn=_score, best_mode=mode, read_only=read_only,
                create=not read_only, cleanup_tmp_directories=not read_only,
            )  # fmt: skip
        if read_only and not folder.is_dir():
            raise InputError(f"{folder}: is not there; has this run saved anything yet?")
        with self._writable(), absl_log_level(logging.ERROR):
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    @property
    def last(self) -> int | None:
        """Step of the last checkpoint."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the best score; of the last one, if none has a score."""
        scores = {step: score for step in self.steps if (score := self.score(step)) is not None}
        return _best(scores, self._higher_is_better) if scores else self.last

    def score(self, step: int) -> float | None:
        """Return the score of a step's state; None if it has none."""
        late = self._late_scores().get(str(step))
        if late is not None:
            return late
        metrics = self._manager.metrics(step)
        return None if metrics is None else metrics.get(_SCORE)

    def add_score(self, step: int, score: float) -> None:
        """Add the score of a checkpoint that was saved without one, in a file beside it: none is rewritten."""
        with self._writable():
            scores = {s: x for s, x in self._late_scores().items() if int(s) in self.steps} | {str(step): score}
            if jax.process_index() == 0:
                write_atomically(self._late, json.dumps(scores, allow_nan=False))

    def _late_scores(self) -> dict[str, float]:
        return json.loads(self._late.read_text()) if self._late.is_file() else {}

    def save(self, state: TrainState, data: Mapping[str, Any], score: float | None = None) -> None:
        """Save after a step, in the background. The state may be donated at once.

        Args:
            data: state of the data, see `saved_data_state`.
            score: how good the state is.
        """
        items = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), data=ocp.args.JsonSave(dict(data)))
        with self._writable(), absl_log_level(logging.ERROR):
            self._manager.save(int(state.step), args=items, metrics=None if score is None else {_SCORE: score})

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Return a state, sharded as `like` is, and the state of the data.

        Raises:
            CheckpointError: it cannot be read, or is of another model, other trained parameters or another optimizer.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract(like._asdict())), data=ocp.args.JsonRestore()
        )  # fmt: skip
        with self._readable(step), absl_log_level(logging.ERROR):
            found = self._manager.restore(step, args=items)
            return TrainState(**found["state"]), found["data"]

    def trained(self, step: int) -> dict[str, Any]:
        """Return the trainable parameters of a checkpoint, as numpy arrays.

        Raises:
            CheckpointError: it cannot be read.
        """
        with self._readable(step), absl_log_level(logging.ERROR):
            folder = self._folder / str(step) / "state"
            metadata: Any = ocp.PyTreeCheckpointer().metadata(folder).item_metadata
            item = {"trainable": dict(metadata.tree)["trainable"]}
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)
            return ocp.PyTreeCheckpointer().restore(folder, args=args)["trainable"]

    def close(self) -> None:
        """Wait until all is written."""
        with self._writable(), absl_log_level(logging.ERROR):
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore's of a full disk are of the latter kind
            raise CheckpointError(
                f"{self._folder}: cannot be written ({str(error)[:300]}); make room, then rerun the same command to "
                "resume from the last whole checkpoint"
            ) from error

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):  # not the checkpoint's fault
            raise
        except Exception as error:  # of many kinds
            cause = str(error.__cause__ or error)[:400]
            raise CheckpointError(
                f"{self._folder / str(step)}: cannot be read as a checkpoint of this run ({cause}); if it is damaged, "
                "remove it to resume from the one before; if the recipe has changed, give another output"
            ) from error


@dataclass
class _BestScored(checkpoint_managers.PreservationPolicy):
    """Preserve the checkpoint that `Checkpoints.best` names. Orbax's own BestN ignores scores that are added later."""

    late_scores: Callable[[], Mapping[str, float]]
    higher_is_better: bool

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        late = self.late_scores()
        known = {c.step: late.get(str(c.step), (c.metrics or {}).get(_SCORE)) for c in checkpoints}
        scores = {step: score for step, score in known.items() if score is not None}
        best = _best(scores, self.higher_is_better) if scores else None
        return [c.step == best for c in checkpoints]


def _best(scores: Mapping[int, float], higher_is_better: bool) -> int:
    """Return the step with the best score; of equal ones the last. NaN is the worst."""
    sign = 1 if higher_is_better else -1
    return max(scores, key=lambda step: (-math.inf if math.isnan(scores[step]) else sign * scores[step], step))


def _score(metrics: Mapping[str, Any]) -> float:
    return metrics[_SCORE]
