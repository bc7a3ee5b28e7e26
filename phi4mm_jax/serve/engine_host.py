"""The engine of a server: made and warmed up in the background, and made anew when it stops by an error."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path

from phi4mm_jax.engine import Request, Update
from phi4mm_jax.engine.user_adapters import UserAdapter
from phi4mm_jax.errors import InputError
from phi4mm_jax.serve.engine_client import EngineClient, EngineStopped
from phi4mm_jax.serve.engine_messages import EngineStats
from phi4mm_jax.serve.engine_process import EnginePlace
from phi4mm_jax.serve.errors import ApiError

ReadAdapter = Callable[[str, Path], UserAdapter]
_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.1  # between looks at whether the engine still runs
_LOG_SECONDS = 5.0  # between lines about a warm-up
_STABLE_SECONDS = 60.0  # after which an engine's end is no sign that the next one ends at once
_MAX_BACKOFF = 30.0  # seconds


class EngineHost:
    """Owns the engine. Of one event loop.

    Args:
        place: where engines run.
        warm_up: compile everything before it takes requests.
        adapters: of users, by name.
        read_adapter: reads a user's adapter, by its name and folder, in a thread; raises as `read_user_adapter`.

    Attributes:
        cause: why it is not ready.
        restarts: how often it was made anew.
        adapters: of users, by name; every engine that is made has them.
    """

    def __init__(
        self, place: EnginePlace, *, warm_up: bool = True, adapters: Mapping[str, UserAdapter] | None = None,
        read_adapter: ReadAdapter | None = None,
    ):  # fmt: skip
        self._place, self._warm_up, self._read_adapter = place, warm_up, read_adapter
        self._client: EngineClient | None = None
        self.cause = "it is being compiled"
        self._failed = False  # the last try to make an engine
        self._logged = 0.0
        self._task: asyncio.Task[None] | None = None
        self.adapters: dict[str, UserAdapter] = dict(adapters or {})
        self._loading = asyncio.Lock()
        self.restarts = 0

    @property
    def ready(self) -> bool:
        return self._client is not None and self._client.running

    @property
    def stats(self) -> EngineStats:
        """Stats of the engine; zeros where there is none."""
        return self._client.stats if self._client is not None and self._client.running else EngineStats()

    def start(self) -> None:
        """Make the engine in the background."""
        self._task = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        """Cancel what is not answered, and end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._client is not None:
            self._client.close()
        await asyncio.to_thread(self._place.close)
        self._client = None
        self.cause, self._failed = "the server ends", True

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Load a user's adapter, which requests then ask for by its name; it waits for an engine that is being made.

        Raises:
            ApiError: there is no engine, and the last try to make one has failed; or it stopped.
            InputError, CheckpointError, ConfigError: see `Engine.load_adapter`.
        """
        assert self._read_adapter is not None
        async with self._loading:
            client = await self._running()
            adapter = await asyncio.to_thread(self._read_adapter, name, folder)
            try:
                await client.load_adapter(adapter, lambda: self.adapters.update({name: adapter}))
            except EngineStopped:
                raise self.unavailable() from None

    async def unload_adapter(self, name: str) -> None:
        """Unload a user's adapter; it waits for an engine that is being made.

        Requests that have it already are answered with it. Nothing is done where there is no such adapter.

        Raises:
            ApiError: there is no engine, and the last try to make one has failed; or it stopped. The adapter stays.
        """
        async with self._loading:
            if name not in self.adapters:
                return
            client = await self._running()
            try:
                await client.unload_adapter(name, lambda: self.adapters.pop(name))
            except EngineStopped:
                raise self.unavailable() from None
            except InputError:  # an earlier try, which was given up, has done it
                return

    async def updates(self, request: Request) -> AsyncGenerator[Update, None]:
        """Answer a request, as `AsyncEngine.updates` does; it waits for an engine that is being made.

        Raises:
            ApiError: there is no engine, and the last try to make one has failed.
        """
        client = await self._running()
        try:
            async with aclosing(client.updates(request)) as updates:
                async for update in updates:
                    yield update
        except EngineStopped:
            raise self.unavailable() from None

    async def _running(self) -> EngineClient:
        """Wait for an engine that is being made.

        Raises:
            ApiError: the last try to make one has failed.
        """
        while (client := self._client) is None or not client.running:
            if self._failed:
                raise self.unavailable()
            await asyncio.sleep(_POLL_SECONDS)
        return client

    def unavailable(self) -> ApiError:
        """Return the error of a request where there is no engine."""
        return ApiError(503, f"the model cannot answer yet: {self.cause}; send the request again later",
                        kind="server_error", code="not_ready", retry_after=5)  # fmt: skip

    async def _supervise(self) -> None:
        backoff = 0.0
        while True:
            began = time.monotonic()
            try:
                await self._make()
                self._failed = False
                _log.info("ready after %.0f s: requests are answered", time.monotonic() - began)
            except Exception as error:
                self._failed = True
                self.cause = f"it could not be started ({error})"
                _log.error("the engine could not be started: %s", error)
            while self.ready:
                await asyncio.sleep(_POLL_SECONDS)
            if not self._failed:
                self.cause = "it is being restarted"
                _log.error("the engine has stopped by an error; it is made anew")
            stable = time.monotonic() - began > _STABLE_SECONDS
            backoff = 0.0 if stable else min(max(2 * backoff, 0.5), _MAX_BACKOFF)
            self.restarts += 1
            await asyncio.sleep(backoff)

    async def _make(self) -> None:
        if self._client is None or not self._client.connected:
            self._client = EngineClient(await asyncio.to_thread(self._place.connect))
        await self._client.make(warm_up=self._warm_up, adapters=self.adapters, progress=self._progress)

    def _progress(self, done: int, total: int) -> None:
        self.cause = f"program {done} of {total} is compiled"
        if done == total or time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            _log.info("warming up: program %d of %d is compiled; requests wait", done, total)
