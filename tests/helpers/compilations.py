"""The programs that this process compiled."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax


class Compilation(NamedTuple):
    function: str
    thread: str


_compilations: list[Compilation] = []


def _listen(event: str, _seconds: float, fun_name: str = "", **_) -> None:
    if event.endswith("backend_compile_duration"):
        _compilations.append(Compilation(fun_name, threading.current_thread().name))


jax.monitoring.register_event_duration_secs_listener(_listen)


def count_compilations() -> int:
    """Return how many programs were compiled so far."""
    return len(_compilations)


def compilations_since(count: int) -> list[Compilation]:
    """Return the compilations after the first `count`."""
    return _compilations[count:]


@contextmanager
def optimized() -> Iterator[None]:
    """Compile as for users: for programs that run longer than that takes."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, False)
    try:
        yield
    finally:
        jax.config.update(name, before)
