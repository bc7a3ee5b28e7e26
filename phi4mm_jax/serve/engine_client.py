"""The server's end of a connection to an engine: requests go out, updates come back to those who wait for them."""

import asyncio
import contextlib
import itertools
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from phi4mm_jax.engine import Completion, Request, Update
from phi4mm_jax.engine.user_adapters import UserAdapter
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

_GONE = Failure("EOFError", "its process has ended")


class EngineStopped(Exception):
    """Error where there is no engine, or it stopped before it took what was asked."""


class EngineClient:
    """An engine at the other end of a connection. Of one event loop, in which it is made.

    Attributes:
        running: whether requests are accepted.
        connected: whether the other end is there, be there an engine or not.
        stats: of the engine after its last round.
    """

    def __init__(self, connection: Connection):
        self._connection, self._loop = connection, asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._updates: dict[int, asyncio.Queue[Update]] = {}
        self._changes: dict[int, tuple[asyncio.Future[None], Callable[[], object]]] = {}  # of adapters, pending
        self._made: asyncio.Future[None] | None = None
        self._progress: Callable[[int, int], None] = lambda done, total: None
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.running, self.connected, self.stats = False, True, EngineStats()
        for work, name in ((self._send_all, "phi4mm-send"), (self._receive_all, "phi4mm-receive")):
            threading.Thread(target=work, name=name, daemon=True).start()

    async def make(
        self, *, warm_up: bool, adapters: Mapping[str, UserAdapter], progress: Callable[[int, int], None]
    ) -> None:
        """Have an engine made, and wait for it.

        Args:
            progress: called with the number of programs that are compiled, and of all.

        Raises:
            RuntimeError: it could not be made, or its process has ended.
        """
        self._made, self._progress = self._loop.create_future(), progress
        self._outgoing.put(MakeEngine(warm_up, dict(adapters)))
        await self._made

    async def updates(self, request: Request) -> AsyncGenerator[Update, None]:
        """Yield the answer as it comes, as `AsyncEngine.updates` does. Leaving the loop cancels the request.

        Raises:
            EngineStopped: there is no engine.
        """
        if not self.running:
            raise EngineStopped
        number, updates = next(self._numbers), asyncio.Queue()
        self._updates[number] = updates
        self._outgoing.put(Submit(number, request))
        done = False
        try:
            while not done:
                update = await updates.get()
                done = update.completion is not None
                yield update
        finally:
            self._updates.pop(number, None)
            if not done:
                self._outgoing.put(Cancel(number))

    async def load_adapter(self, adapter: UserAdapter, done: Callable[[], object]) -> None:
        """Load a user's adapter.

        Args:
            done: called when the engine has it, be the wait for that cancelled or not.

        Raises:
            InputError: see `Engine.load_adapter`.
            EngineStopped: there is no engine.
        """
        await self._change(lambda number: LoadAdapter(number, adapter), done)

    async def unload_adapter(self, name: str, done: Callable[[], object]) -> None:
        """Unload a user's adapter.

        Args:
            done: called when the engine no longer has it, be the wait for that cancelled or not.

        Raises:
            InputError: there is no such adapter.
            EngineStopped: there is no engine.
        """
        await self._change(lambda number: UnloadAdapter(number, name), done)

    async def _change(self, message: Callable[[int], Any], done: Callable[[], object]) -> None:
        if not self.running:
            raise EngineStopped
        number, waiting = next(self._numbers), self._loop.create_future()
        self._changes[number] = waiting, done
        self._outgoing.put(message(number))
        await waiting

    def close(self) -> None:
        """Tell the other end to go; what is not answered is cancelled."""
        self.running = False
        self._outgoing.put(None)

    # ------------------------------------------------------------------------------------------ threads

    def _send_all(self) -> None:
        message = self
        with contextlib.suppress(OSError):  # the other end has gone, as `_receive_all` finds
            while message is not None:
                message = self._outgoing.get()
                self._connection.send(message)

    def _receive_all(self) -> None:
        message = None
        while message is not _GONE:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                message = _GONE
            try:
                self._loop.call_soon_threadsafe(self._take, message)
            except RuntimeError:  # the loop is closed: nobody waits
                break
        self._connection.close()

    # ------------------------------------------------------------------------------------------ the event loop

    def _take(self, message: Any) -> None:
        match message:
            case Round(updates, stats):
                self.stats = stats
                for number, update in updates:
                    if (waiting := self._updates.get(number)) is not None:
                        waiting.put_nowait(update)
            case EngineMade(stats):
                self.stats, self.running = stats, True
                if self._made is not None and not self._made.done():
                    self._made.set_result(None)
            case WarmingUp(done, total):
                self._progress(done, total)
            case Done(number, error):
                if number in self._changes:
                    self._end_change(number, error)
            case Failure():
                self._stop(message)

    def _stop(self, failure: Failure) -> None:
        """Tell all who wait that there is no engine."""
        self.running, self.connected = False, self.connected and failure is not _GONE
        if self._made is not None and not self._made.done():
            self._made.set_exception(RuntimeError(f"{failure.kind}: {failure.message}"))
        cause = f"the engine was stopped by {failure.kind}: {failure.message}"
        completion = Completion("", [], "error", 0, error=cause, error_type="EngineStopped")
        for updates in self._updates.values():
            updates.put_nowait(Update(-1, "", completion))
        for number in list(self._changes):
            self._end_change(number, EngineStopped(cause))

    def _end_change(self, number: int, error: Exception | None) -> None:
        waiting, done = self._changes.pop(number)
        if error is None:
            done()
        if not waiting.done():  # it may be cancelled
            waiting.set_result(None) if error is None else waiting.set_exception(error)
