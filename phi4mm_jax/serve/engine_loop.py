"""The engine's end of a connection to the server: rounds, and between them what the server's messages ask for."""

import gc
import queue
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from phi4mm_jax.engine import Engine
from phi4mm_jax.errors import CheckpointError, ConfigError, InputError
from phi4mm_jax.serve.engine_messages import (
    Cancel,
    Done,
    EngineMade,
    EngineStats,
    Failure,
    LoadAdapter,
    MakeEngine,
    Round,
    Submit,
    UnloadAdapter,
    WarmingUp,
)
from phi4mm_jax.utils.queues import take_all


class EngineLoop:
    """Makes engines and runs them as the messages of a connection ask, until one is None or it is closed.

    Args:
        make_engine: makes an engine; called again after one has stopped by an error.
        closed: called in a thread as soon as the server wants no more, whatever the engine does.
    """

    def __init__(self, connection: Connection, make_engine: Callable[[], Engine], closed: Callable[[], None]):
        self._connection, self._make_engine, self._closed = connection, make_engine, closed
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()  # None: the connection is closed
        self._open = True

    def run(self) -> None:
        """Serve until the connection is closed."""
        threading.Thread(target=self._receive, name="phi4mm-receive", daemon=True).start()
        while (message := self._messages.get()) is not None:
            if isinstance(message, MakeEngine):  # others were for an engine that has stopped
                self._run_engine(message)
                gc.unfreeze()
                gc.collect()  # its memory is free before the next takes its own

    def _receive(self) -> None:
        message = self
        while message is not None:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):  # the server has ended without a word
                message = None
            self._open = message is not None
            self._messages.put(message)
        self._connection.close()
        self._closed()

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError:  # the server has gone
            self._open = False

    def _run_engine(self, asked: MakeEngine) -> None:
        """Make an engine and run it until it stops by an error, or the connection is closed."""
        try:
            engine = self._make_engine()
            for name, adapter in asked.adapters.items():
                engine.load_adapter(name, adapter)
            if asked.warm_up:
                engine.warm_up(self._progress)
            gc.collect()
            gc.freeze()  # else each full collection walks through all that was compiled, and all wait for seconds
            self._send(EngineMade(stats_of(engine)))
            numbers: dict[int, int] = {}  # of the server, by the engine's
            while self._take_messages(engine, numbers):
                updates = [(numbers[update.id], update) for update in engine.step() if update.id in numbers]
                for _, update in updates:
                    if update.completion is not None:
                        del numbers[update.id]
                self._send(Round(updates, stats_of(engine)))
        except BaseException as error:
            self._send(Failure(type(error).__name__, str(error)))

    def _progress(self, done: int, total: int) -> None:
        if not self._open:
            raise InputError("the server ends")
        self._send(WarmingUp(done, total))

    def _take_messages(self, engine: Engine, numbers: dict[int, int]) -> bool:
        """Do what the messages so far ask for; wait for one if the engine is idle. Return False at the end."""
        for message in take_all(self._messages, wait=engine.idle):
            match message:
                case Submit(number, request):
                    numbers[engine.submit(request)] = number
                case Cancel(number):
                    for own, other in numbers.items():
                        if other == number:
                            engine.cancel(own)
                            break
                case LoadAdapter(number, adapter):
                    self._do(number, lambda: engine.load_adapter(adapter.name, adapter))
                case UnloadAdapter(number, name):
                    self._do(number, lambda: engine.unload_adapter(name))
                case None:
                    return False
        return True

    def _do(self, number: int, work: Callable[[], None]) -> None:
        error = None
        try:
            work()
        except (InputError, CheckpointError, ConfigError) as caught:
            error = caught
        self._send(Done(number, error))


def stats_of(engine: Engine) -> EngineStats:
    """Return what is in use of an engine."""
    allocator = engine.scheduler.allocator
    return EngineStats(
        engine.config.slots, len(engine.scheduler.resident), allocator.num_pages, allocator.in_use,
        engine.runner.num_prefilled_tokens,
    )  # fmt: skip
