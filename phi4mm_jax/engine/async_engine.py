"""Asynchronous engine for servers and notebooks: requests from any thread or coroutine."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from phi4mm_jax.engine.engine import Engine
from phi4mm_jax.engine.output_processor import Update
from phi4mm_jax.engine.request import Completion, Request
from phi4mm_jax.errors import InputError
from phi4mm_jax.utils.queues import take_all

T = TypeVar("T")


class Answer:
    """Pending answer.

    Attributes:
        future: of the completion, also one with an error or of a cancelled request.
    """

    def __init__(self, engine: "AsyncEngine", listen: Callable[[Update], None] | None):
        self._engine, self._listen = engine, listen
        self.future: Future[Completion] = Future()

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the whole answer, in a thread.

        That of a request that cannot be served is a completion with an `error`: check it, or call `raise_for_error`.

        Raises:
            TimeoutError: it takes longer; the request continues.
        """
        return self.future.result(timeout)

    def cancel(self) -> None:
        """Cancel the request soon; the tokens so far are its answer. From any thread, any number of times."""
        with contextlib.suppress(InputError):  # a closed engine has no request to cancel
            self._engine._enqueue(lambda: self._engine._cancel(self))


class AsyncEngine:
    """Runs an engine in a thread of its own; a context manager, whose exit cancels unanswered requests.

        with AsyncEngine(model.engine(EngineConfig(slots=16))) as engine:
            answer = engine.submit(Request(chat))          # from any thread
            completion = answer.result()
            completion.raise_for_error()                   # as of a clip that cannot be read
            print(completion.text)
            async for piece in engine.stream(Request(chat)):  # in a coroutine
                print(piece, end="", flush=True)

    Nothing else may use the engine meanwhile.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._answers: dict[int, Answer] = {}  # by request id; used by the engine's thread only
        self._lock = threading.Lock()
        self._closed: str | None = None  # why no more requests are accepted
        self._thread = threading.Thread(target=self._serve, name="phi4mm-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Answer:
        """Queue a request, from any thread. One that cannot be served has an answer with an `error`.

        Raises:
            InputError: the engine is closed, or was stopped by an error.
        """
        return self._submit(request, None)

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Call a function of the engine in its thread, between two rounds; from any thread.

        Raises:
            InputError: the engine is closed, or was stopped by an error.
        """
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(self._engine))
                except Exception as error:  # the caller's, as of a folder that cannot be loaded
                    future.set_exception(error)

        self._enqueue(run)
        return future

    async def generate(self, request: Request) -> Completion:
        """Return the whole answer, as `Answer.result` does. Cancelling the coroutine cancels the request.

        Raises:
            InputError: the engine is closed, or was stopped by an error; not that of the request, which is the
                completion's `error`.
        """
        answer = self.submit(request)
        try:
            return await asyncio.wrap_future(_uncancelled(answer.future))
        except asyncio.CancelledError:
            answer.cancel()
            raise

    async def stream(self, request: Request) -> AsyncIterator[str]:
        """Yield the answer in pieces of whole characters. Leaving the loop cancels the request.

        Raises:
            InputError: the request cannot be served; see `Completion.raise_for_error`.
        """
        async with contextlib.aclosing(self.updates(request)) as updates:
            async for update in updates:
                if update.text:
                    yield update.text
                if update.completion is not None:
                    update.completion.raise_for_error()

    async def updates(self, request: Request) -> AsyncGenerator[Update, None]:
        """Yield the answer as it comes, with its tokens; the last update has the completion, also one with an error.

        Leaving the loop cancels the request.

        Raises:
            InputError: the engine is closed, or has stopped by an error.
        """
        loop = asyncio.get_running_loop()
        updates: asyncio.Queue[Update] = asyncio.Queue()

        def listen(update: Update) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so that nobody listens
                loop.call_soon_threadsafe(updates.put_nowait, update)

        answer = self._submit(request, listen)
        try:
            done = False
            while not done:
                update = await updates.get()
                done = update.completion is not None
                yield update
        finally:
            if not answer.future.done():
                answer.cancel()

    @property
    def running(self) -> bool:
        """Return whether requests are accepted: it is neither closed nor stopped by an error."""
        return self._closed is None

    def close(self) -> None:
        """Cancel unanswered requests, and end the thread. From any thread, any number of times."""
        with self._lock:
            if self._closed is None:
                self._closed = "is closed; make another"
                self._calls.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "AsyncEngine":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    # The rest runs in the engine's thread, except `_submit` and `_enqueue`.

    def _submit(self, request: Request, listen: Callable[[Update], None] | None) -> Answer:
        answer = Answer(self, listen)

        def begin() -> None:
            self._answers[self._engine.submit(request)] = answer

        self._enqueue(begin)
        return answer

    def _enqueue(self, call: Callable[[], None]) -> None:
        """Have the engine's thread call something; raise InputError where the engine is closed, or was stopped."""
        with self._lock:
            if self._closed is not None:
                raise InputError(f"this engine {self._closed}")
            self._calls.put(call)

    def _serve(self) -> None:
        error = None
        try:
            while self._take_calls():
                for update in self._engine.step():
                    if (answer := self._answers.get(update.id)) is not None:
                        self._deliver(update, answer)
        except BaseException as caught:
            error = caught
            with self._lock:
                self._closed = f"was stopped by {type(caught).__name__} ({caught}); make another"
        self._end(error)

    def _take_calls(self) -> bool:
        """Run the queued calls; wait for one if the engine is idle. Return False at the end."""
        for call in take_all(self._calls, wait=self._engine.idle):
            if call is None:
                return False
            call()
        return True

    def _cancel(self, answer: Answer) -> None:
        for number, other in self._answers.items():
            if other is answer:
                return self._engine.cancel(number)

    def _deliver(self, update: Update, answer: Answer) -> None:
        if update.completion is not None:
            del self._answers[update.id]
            if answer.future.set_running_or_notify_cancel():  # else nobody waits for it
                answer.future.set_result(update.completion)
        if answer._listen is not None:
            answer._listen(update)

    def _end(self, error: BaseException | None) -> None:
        """Complete all pending answers, those not yet submitted included."""
        if error is None:
            for number in list(self._answers):
                self._engine.cancel(number)
            while self._answers:
                for update in self._engine.updates_of(set(self._answers)):
                    self._deliver(update, self._answers[update.id])
        else:
            cause = f"the engine was stopped by {type(error).__name__}: {error}"
            for call in take_all(self._calls, wait=False):
                if call is not None:
                    call()
            for number, answer in list(self._answers.items()):
                completion = Completion("", [], "error", 0, error=cause, error_type="EngineStopped")
                self._deliver(Update(number, "", completion), answer)


def _uncancelled(future: Future[Completion]) -> Future[Completion]:
    """Return a future whose cancellation does not cancel the given one."""
    other: Future[Completion] = Future()

    def done(found: Future[Completion]) -> None:
        if not found.cancelled() and other.set_running_or_notify_cancel():
            other.set_result(found.result())

    future.add_done_callback(done)
    return other
