"""Answering of parsed requests: turns, deadlines, counts; alone, streamed, and given up with their client."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from phi4mm_jax.adapters import adapter_choices
from phi4mm_jax.engine import Completion, Request, Update
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.serve.engine_host import EngineHost
from phi4mm_jax.serve.errors import ApiError, bad_input, failed
from phi4mm_jax.serve.limits import Limits
from phi4mm_jax.serve.media import MediaReader
from phi4mm_jax.serve.metrics import Metrics
from phi4mm_jax.serve.queueing import FairQueue
from phi4mm_jax.utils.strict_json import strict_json

T = TypeVar("T")
J = TypeVar("J", bound="Job")
Updates = AsyncIterator[tuple[int, Update]]  # each with its request's place
Events = AsyncIterator[list[dict[str, Any]]]  # objects that come together
_CLOSED = 499  # the client has gone, as nginx has it; nobody reads it but the metrics


@dataclass(frozen=True)
class Service:
    """All that endpoints share.

    Attributes:
        name: of the model, for clients.
        workers: threads in which bodies are parsed and media read.
    """

    name: str
    host: EngineHost
    tokenizer: Tokenizer
    queue: FairQueue
    limits: Limits
    read_media: MediaReader
    metrics: Metrics
    created: int
    workers: Executor

    def check_model(self, name: str | None) -> None:
        """Raise ApiError for a model that is not served."""
        if name not in (None, self.name, *self.host.adapters):
            names = ", ".join(repr(each) for each in (self.name, *self.host.adapters))
            raise ApiError(
                404, f"model is {name!r:.200}; this server has {names}", param="model", code="model_not_found"
            )

    def adapter_of(self, model: str | None, beneath: str | None = None) -> str | None:
        """Return the `Request.adapter` of a request for a model, on top of a built-in adapter.

        Raises:
            ApiError: the one beneath is not the model's own.
        """
        if beneath is not None and beneath not in adapter_choices():
            raise ApiError(
                400, f"adapter is {beneath!r:.60}; expected one of {', '.join(adapter_choices())}", param="adapter"
            )
        if model in (None, self.name):
            return beneath
        return model if beneath is None else f"{beneath}+{model}"

    def deadline(self, seconds: float | None) -> float:
        """Return when a request has to be answered, by the event loop's clock.

        Raises:
            ApiError: the time is none.
        """
        if seconds is not None and not seconds > 0:
            raise ApiError(400, f"timeout is {seconds!r:.60}; expected a positive number of seconds", param="timeout")
        limit = self.limits.timeout
        return asyncio.get_running_loop().time() + (limit if seconds is None else min(seconds, limit))


@dataclass(frozen=True, kw_only=True)
class Job:
    """Requests of a client that belong together, parsed.

    Attributes:
        requests: one for each answer.
        model: that was asked for; None: the server's own.
        deadline: by the event loop's clock.
        logprobs: answers have their tokens' log-probabilities.
        include_usage: a stream ends with the count of tokens.
        parallel: how many of the requests wait for the engine, or are there, at a time.
    """

    requests: list[Request]
    deadline: float
    logprobs: bool
    model: str | None = None
    include_usage: bool = False
    parallel: int | None = None
    created: int = field(default_factory=lambda: int(time.time()))


@asynccontextmanager
async def answering(service: Service, client: str, job: Job, *, unlimited: bool = False) -> AsyncIterator[Updates]:
    """Have a job's requests answered; gives their updates, each with its request's place.

    On leaving, those not answered are cancelled.

    Args:
        client: whose turn each waits for.
        unlimited: they wait however many do.

    Raises:
        ApiError: too many wait, or, by the iterator: a request cannot be served, or not in time.
    """
    requests, deadline = job.requests, job.deadline
    if not unlimited:
        service.queue.check_room(len(requests) if job.parallel is None else min(len(requests), job.parallel))
    room = asyncio.Semaphore(len(requests) + 1 if job.parallel is None else job.parallel)
    news: asyncio.Queue[tuple[int, Update] | Exception] = asyncio.Queue()

    async def answer(place: int, request: Request) -> None:
        async with room:
            await _answer(service, client, place, request, deadline, news)

    tasks = [asyncio.create_task(answer(i, request)) for i, request in enumerate(requests)]

    async def updates() -> Updates:
        left = len(requests)
        while left:
            item = await news.get()
            if isinstance(item, Exception):
                raise item
            left -= item[1].completion is not None
            yield item

    try:
        yield updates()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(
    service: Service, client: str, place: int, request: Request, deadline: float, news: asyncio.Queue
) -> None:
    began = time.monotonic()
    meter = service.metrics.meter(began)
    try:
        async with (
            asyncio.timeout_at(deadline),
            service.queue.turn(client),
            aclosing(service.host.updates(request)) as updates,
        ):
            async for update in updates:
                meter.count(update)
                if (completion := update.completion) is not None and completion.error is not None:
                    raise failed(completion)
                news.put_nowait((place, update))
    except TimeoutError:
        news.put_nowait(_too_late(began) if service.host.ready else service.host.unavailable())
    except Exception as error:
        news.put_nowait(error)


async def completions_of(service: Service, client: str, job: Job, *, unlimited: bool = False) -> list[Completion]:
    """Wait for all answers of a job; return them in the order of their requests.

    Raises:
        ApiError: as `answering`.
    """
    found: dict[int, Completion] = {}
    async with answering(service, client, job, unlimited=unlimited) as updates:
        async for place, update in updates:
            if update.completion is not None:
                found[place] = update.completion
    return [found[place] for place in range(len(job.requests))]


def events_of(service: Service, client: str, job: J, form: Callable[[Service, J, Updates], Any]) -> Callable[[], Any]:
    """Return what an `EventStream` sends: the objects that `form` makes of a job's updates."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Events]:
        async with answering(service, client, job) as updates:
            yield form(service, job, updates)

    return opened


async def in_thread(service: Service, work: Callable[[], T], deadline: float) -> T:
    """Run what takes long or blocks in a thread.

    Raises:
        ApiError: an InputError of the work, or it takes too long.
    """
    began = time.monotonic()
    try:
        async with asyncio.timeout_at(deadline):
            return await asyncio.get_running_loop().run_in_executor(service.workers, work)
    except InputError as error:
        raise bad_input(error) from error
    except TimeoutError:
        raise _too_late(began) from None


def _too_late(began: float) -> ApiError:
    taken = time.monotonic() - began
    message = f"not answered within {taken:.3g} seconds; allow more time, ask for fewer tokens, or send it again"
    return ApiError(504, message, kind="timeout_error", code="timeout")


async def while_connected(http: HttpRequest, work: Awaitable[T]) -> T | None:
    """Wait for the work; cancel it when the client has gone, and return None."""
    task, gone = asyncio.ensure_future(work), asyncio.create_task(_disconnected(http.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def response_of(http: HttpRequest, work: Awaitable[dict[str, Any] | str]) -> Response:
    """Return the response that the work makes, an object or a text; the work ends when its client has gone."""
    body = await while_connected(http, work)
    if body is None:
        return Response(status_code=_CLOSED)
    if isinstance(body, str):
        return Response(body, media_type="text/plain")
    return Response(strict_json(body), media_type="application/json")


class EventStream(Response):
    """Server-sent events, one for each object. An error before the first one is a response of its own.

    Args:
        events: a context whose value yields the objects, those together that are sent at once; left when the client has
            gone.
        last: what ends the stream, or None.
    """

    def __init__(self, events: Callable[[], AbstractAsyncContextManager[Events]], last: str | None = "[DONE]"):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events, self._last = events, last

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        work = self._send(scope, receive, send)
        await while_connected(HttpRequest(scope, receive), work)

    async def _send(self, scope: Any, receive: Any, send: Any) -> None:
        begun = False

        async def write(*data: str, more: bool = True) -> None:
            nonlocal begun
            if not begun:
                begun = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            body = "".join(f"data: {each}\n\n" for each in data).encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        last = [] if self._last is None else [self._last]
        try:
            async with self._events() as events:
                async for together in events:
                    await write(*map(strict_json, together))
        except ApiError as error:
            if not begun:
                return await error.response()(scope, receive, send)
            last = [strict_json(error.body), *last]
        await write(*last, more=False)
