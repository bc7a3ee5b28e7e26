"""Fair queue in front of the engine: clients take turns, however many requests each has."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from phi4mm_jax.serve.errors import ApiError


class FairQueue:
    """Lets so many requests at once into the engine; the rest wait, and get turns by round-robin over the clients.

    Of one event loop.

    Attributes:
        size: how many requests it lets in at once.
        running: requests that the engine has.
        waiting: requests that wait.
    """

    def __init__(self, size: int, max_waiting: int):
        self.size, self._max_waiting = size, max_waiting
        self._clients: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # the next one first
        self.running = self.waiting = 0

    def check_room(self, count: int) -> None:
        """Raise ApiError where so many more requests would be too many."""
        room = max(self.size - self.running, 0) + self._max_waiting - self.waiting
        if count > room:
            raise ApiError(
                429, f"{self.waiting} requests are waiting, and {self._max_waiting} may; send it again later",
                kind="rate_limit_error", code="server_busy", retry_after=max(1, self.waiting // self.size),
            )  # fmt: skip

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait for this client's turn; the engine has the request within."""
        if self.running < self.size:
            self.running += 1
        else:
            await self._wait(client)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, client: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clients.setdefault(client, deque()).append(turn)
        self.waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self.waiting -= 1
                self._remove(client, turn)
            else:  # its turn came at the same moment
                self._pass_on()
            raise

    def _remove(self, client: str, turn: asyncio.Future[None]) -> None:
        queue = self._clients.get(client, deque())
        if turn in queue:  # `_pass_on` may have come upon it before its task ran
            queue.remove(turn)
            if not queue:
                del self._clients[client]

    def _pass_on(self) -> None:
        """Give the place of a request that has ended to the next client."""
        while self._clients:
            client, queue = self._clients.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._clients[client] = queue  # at the end
            if not turn.cancelled():  # else its task counts itself out when it runs
                self.waiting -= 1
                turn.set_result(None)
                return
        self.running -= 1
