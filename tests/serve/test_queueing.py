"""Turns of clients: in their order, and none is lost however requests are cancelled."""

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.paths import TINY
from helpers.played import answer, make_app

from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.serve.answering import Job, answering
from phi4mm_jax.serve.limits import Limits
from phi4mm_jax.serve.metrics import Metrics
from phi4mm_jax.serve.queueing import FairQueue


def test_clients_take_turns():
    async def run() -> list[str]:
        queue, order, go = FairQueue(1, 10), [], asyncio.Event()

        async def one(name: str) -> None:
            async with queue.turn(name[0]):
                order.append(name)
                await go.wait()

        tasks = []
        for name in ("a1", "a2", "a3", "b1", "c1", "b2", "c2"):
            tasks.append(asyncio.create_task(one(name)))
            await asyncio.sleep(0)
        assert (order, queue.waiting) == (["a1"], 6)
        tasks.pop().cancel()
        go.set()
        await asyncio.gather(*tasks)
        assert (queue.running, queue.waiting) == (0, 0)
        return order

    assert asyncio.run(run()) == ["a1", "a2", "b1", "c1", "a3", "b2"]


async def takes_turns(queue: FairQueue) -> None:
    """Check that nobody has a place, nobody waits, and a new client gets a turn."""
    assert (queue.running, queue.waiting) == (0, 0)
    async with asyncio.timeout(5), queue.turn("new"):
        assert queue.running == 1
    assert (queue.running, queue.waiting) == (0, 0)


@pytest.mark.parametrize("seed", range(100))
def test_requests_are_cancelled_at_any_moment(seed):
    """Several at once as well, some of which wait while others give their places up."""
    choose = random.Random(seed)

    async def run() -> None:
        queue, within = FairQueue(choose.randint(1, 4), 100), set()

        async def one(number: int) -> None:
            async with queue.turn("abc"[number % 3]):
                within.add(number)
                try:
                    for _ in range(choose.randint(0, 5)):
                        await asyncio.sleep(0)
                finally:
                    within.remove(number)

        tasks: list[asyncio.Task[None]] = []
        for _ in range(40):
            tasks += [asyncio.create_task(one(len(tasks) + i)) for i in range(choose.randint(0, 3))]
            running = [task for task in tasks if not task.done()]
            for task in choose.sample(running, choose.randint(0, len(running)) if choose.random() < 0.3 else 0):
                task.cancel()
            await asyncio.sleep(0)
            assert len(within) <= queue.size
        async with asyncio.timeout(5):
            done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [found for found in done if found is not None and not isinstance(found, asyncio.CancelledError)] == []
        await takes_turns(queue)

    asyncio.run(run())


@pytest.mark.parametrize("cause", ["a disconnect", "the deadline"])
def test_a_job_gives_all_its_places_back(cause):
    """Requests that run and ones that wait are cancelled at once."""

    async def run() -> None:
        queue = FairQueue(3, 100)

        async def updates(_: Any) -> Any:
            await asyncio.sleep(3600)
            yield

        host = SimpleNamespace(updates=updates, ready=True)
        service: Any = SimpleNamespace(queue=queue, host=host, metrics=Metrics())
        seconds = 3600 if cause == "a disconnect" else 0.05
        requests: Any = [None] * 8
        job = Job(requests=requests, deadline=asyncio.get_running_loop().time() + seconds, logprobs=False)
        async with answering(service, "one", job):
            while (queue.running, queue.waiting) != (3, 5):
                await asyncio.sleep(0)
            while cause == "the deadline" and queue.running:
                await asyncio.sleep(0.01)
                assert asyncio.get_running_loop().time() < job.deadline + 30, "places are not given back"
        await takes_turns(queue)

    asyncio.run(run())


def test_no_request_has_more_time_than_the_servers(tmp_path):
    async def run() -> list[float]:
        app = make_app(answer, Tokenizer.from_folder(TINY), tmp_path, Limits(timeout=100))
        now = asyncio.get_running_loop().time()
        return [app.state.service.deadline(seconds) - now for seconds in (None, 50, 150)]

    assert asyncio.run(run()) == pytest.approx([100, 50, 100], abs=20)
