"""Preemption: on SIGTERM or Ctrl-C a run saves after its step, and ends."""

import signal
import threading
from types import TracebackType
from typing import Any, Self

import jax

PREEMPTED_EXIT_CODE = 143  # 128 + SIGTERM, as of a program that the signal killed
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class PreemptionSignal:
    """SIGTERM and Ctrl-C, noted within `with` instead of ending the process.

    On several hosts jax's own handler notes SIGTERM, and they agree on a step to stop after; Ctrl-C becomes SIGTERM.
    Outside the main thread nothing else is noted.
    """

    def __init__(self):
        self._noted = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        several = jax.process_count() > 1
        handlers = {signal.SIGINT: _as_sigterm} if several else dict.fromkeys(_SIGNALS, self._note)
        if threading.current_thread() is not threading.main_thread():  # as Ray Train has it; Python allows none there
            handlers = {}
        self._handlers = {s: signal.signal(s, handler) for s, handler in handlers.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, *_: Any) -> None:
        self._noted = True

    def requested(self) -> bool:
        """Return whether the run was told to end, at any time; on several hosts False, only `should_stop` can tell."""
        return self._noted and jax.process_count() == 1

    def should_stop(self, step: int) -> bool:
        """Return whether to stop after a step: the same on all hosts, once any of them was told to end."""
        if jax.process_count() == 1:
            return self._noted
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)


def _as_sigterm(*_: Any) -> None:
    signal.raise_signal(signal.SIGTERM)
