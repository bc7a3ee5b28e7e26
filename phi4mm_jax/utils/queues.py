"""Queues between threads."""

import queue
from typing import TypeVar

T = TypeVar("T")


def take_all(source: "queue.SimpleQueue[T]", wait: bool) -> list[T]:
    """Take what is queued, in its order.

    Args:
        wait: for the first one, if there is none.
    """
    taken = [source.get()] if wait else []
    while True:
        try:
            taken.append(source.get_nowait())
        except queue.Empty:
            return taken
