"""The engine of a server: made and warmed up in the background, and made anew when it stops by an error."""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path

from phi4mm_jax.engine import AsyncEngine, Engine, Request, Update
from phi4mm_jax.engine.user_adapters import UserAdapter
from phi4mm_jax.errors import InputError
from phi4mm_jax.serve.errors import ApiError

_log = logging.getLogger(__name__)
_LOOK = 0.1  # seconds between looks at whether the engine still runs
_SAID = 5.0  # seconds between lines about a warm-up
_STEADY = 60.0  # seconds after which an engine's end is no sign that the next one ends at once
_LONGEST_PAUSE = 30.0


class EngineHost:
    """Owns the engine. Of one event loop.

    Args:
        make_engine: makes an engine; called in a thread, and again after it has stopped by an error.
        warm_up: compile everything before it takes requests.
        adapters: of users, by name.

    Attributes:
        restarts: how often it was made anew.
        engine: the one that runs; None until it is ready.
        adapters: of users, by name; every engine that is made has them.
    """

    def __init__(self, make_engine: Callable[[], Engine], *, warm_up: bool = True,
        adapters: Mapping[str, UserAdapter] | None = None,
    ):  # fmt: skip
        self._make_engine, self._warm_up = make_engine, warm_up
        self._runner: AsyncEngine | None = None
        self._cause = "it is being compiled"
        self._failed = False  # the last try to make an engine
        self._said = 0.0
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self.engine: Engine | None = None
        self.adapters: dict[str, UserAdapter] = dict(adapters or {})
        self._loading = asyncio.Lock()
        self.restarts = 0

    @property
    def ready(self) -> bool:
        return self._runner is not None and self._runner.running

    @property
    def cause(self) -> str:
        """Reason why it is not ready."""
        return "it is being restarted" if self._runner is not None and not self._runner.running else self._cause

    def start(self) -> None:
        """Make the engine in the background."""
        self._task = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        """Cancel what is not answered, and end."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._runner is not None:
            await asyncio.to_thread(self._runner.close)
        self._runner = self.engine = None
        self._cause, self._failed = "the server ends", True

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Load a user's adapter, which requests then ask for by its name; it waits for an engine that is being made.

        Raises:
            ApiError: there is no engine, and the last try to make one has failed.
            InputError, CheckpointError, ConfigError: see `Engine.load_adapter`.
        """
        async with self._loading:
            await self._running()
            if (engine := self.engine) is None:
                raise self.unavailable()
            adapter = await asyncio.to_thread(engine.read_adapter, name, folder)
            await self._call(lambda engine: engine.load_adapter(name, adapter))
            self.adapters[name] = adapter

    async def unload_adapter(self, name: str) -> None:
        """Unload a user's adapter. Requests that have it already are answered with it.

        Raises:
            ApiError: there is no engine at the moment.
        """
        async with self._loading:
            if self.adapters.pop(name, None) is not None:
                await self._call(lambda engine: engine.unload_adapter(name))

    async def _call(self, function: Callable[[Engine], None]) -> None:
        runner = self._runner
        if runner is None or not runner.running:
            raise self.unavailable()
        await asyncio.wrap_future(runner.call(function))

    async def updates(self, request: Request) -> AsyncGenerator[Update, None]:
        """Answer a request, as `AsyncEngine.updates` does; it waits for an engine that is being made.

        Raises:
            ApiError: there is no engine, and the last try to make one has failed.
        """
        runner = await self._running()
        try:
            async with aclosing(runner.updates(request)) as updates:
                async for update in updates:
                    yield update
        except InputError:  # it has stopped before it took the request
            raise self.unavailable() from None

    async def _running(self) -> AsyncEngine:
        """Wait for an engine that is being made.

        Raises:
            ApiError: the last try to make one has failed.
        """
        while (runner := self._runner) is None or not runner.running:
            if self._failed:
                raise self.unavailable()
            await asyncio.sleep(_LOOK)
        return runner

    def unavailable(self) -> ApiError:
        """Return what a client is told where there is no engine."""
        return ApiError(503, f"the model cannot answer yet: {self.cause}; send the request again later",
                        kind="server_error", code="not_ready", retry_after=5)  # fmt: skip

    async def _supervise(self) -> None:
        pause = 0.0
        while True:
            began = time.monotonic()
            try:
                await asyncio.to_thread(self._make)
                self._failed = False
                _log.info("ready after %.0f s: requests are answered", time.monotonic() - began)
            except Exception as error:
                self._failed = True
                self._cause = f"it could not be started ({type(error).__name__}: {error})"
                _log.error("the engine could not be started: %s: %s", type(error).__name__, error)
            while self.ready:
                await asyncio.sleep(_LOOK)
            if self._runner is not None:
                _log.error("the engine has stopped by an error; it is made anew")
            steady = time.monotonic() - began > _STEADY
            pause = 0.0 if steady else min(max(2 * pause, 0.5), _LONGEST_PAUSE)
            self._runner = self.engine = None  # their memory is free before the next takes its own
            self._cause = self._cause if self._failed else "it is being restarted"
            gc.collect()
            self.restarts += 1
            await asyncio.sleep(pause)

    def _make(self) -> None:
        engine = self._make_engine()
        for name, adapter in list(self.adapters.items()):
            engine.load_adapter(name, adapter)
        if self._warm_up:
            engine.warm_up(self._progress)
        if not self._closed:
            self.engine, self._runner = engine, AsyncEngine(engine)

    def _progress(self, done: int, total: int) -> None:
        if self._closed:
            raise InputError("the server ends")
        self._cause = f"program {done} of {total} is compiled"
        if done == total or time.monotonic() - self._said > _SAID:
            self._said = time.monotonic()
            _log.info("warming up: program %d of %d is compiled; requests wait", done, total)
