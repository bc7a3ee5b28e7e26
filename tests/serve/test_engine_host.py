"""Users' adapters of the engine and of its host stay the same, whenever engines stop and clients give up."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from helpers.paths import TINY
from helpers.serving import serving, wait_for

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.serve.app import ServerSettings, create_app
from phi4mm_jax.serve.engine_host import EngineHost
from phi4mm_jax.serve.engine_process import EngineThread
from phi4mm_jax.serve.limits import Limits


class PlayedEngine:
    """Has adapters, by events of its place; stops by an error where a request comes."""

    config, idle = SimpleNamespace(slots=1), True
    scheduler = SimpleNamespace(resident=[], allocator=SimpleNamespace(num_pages=0, in_use=0))
    runner = SimpleNamespace(num_prefilled_tokens=0)

    def __init__(self, place: "Place"):
        self.place, self.adapters = place, set()

    def warm_up(self, _: Any) -> None:
        self.place.compiled.wait(60)

    def step(self) -> list[Any]:
        return []

    def submit(self, _: Any) -> int:
        raise MemoryError("stopped")

    def load_adapter(self, name: str, _: Any) -> None:
        if name in self.adapters:
            raise InputError(f"{name} is loaded already")
        self.change(lambda: self.adapters.add(name))

    def unload_adapter(self, name: str) -> None:
        if name not in self.adapters:
            raise InputError(f"{name} is not loaded")
        self.change(lambda: self.adapters.remove(name))

    def change(self, work: Callable[[], None]) -> None:
        self.place.begun.set()
        self.place.go.wait(60)
        work()


class Place(EngineThread):
    """Makes played engines.

    Attributes:
        compiled: engines are ready.
        begun: an engine has begun to load or unload an adapter.
        go: it ends that.
    """

    def __init__(self):
        super().__init__(self.make)
        self.engines: list[PlayedEngine] = []
        self.compiled, self.begun, self.go = (threading.Event() for _ in range(3))
        self.compiled.set()
        self.go.set()

    def make(self) -> Any:
        self.engines.append(PlayedEngine(self))
        return self.engines[-1]


@asynccontextmanager
async def hosting(place: Place):
    def read(name: str, _: Path) -> Any:
        return SimpleNamespace(name=name)

    host = EngineHost(place, read_adapter=read)
    host.start()
    try:
        yield host
    finally:
        await host.close()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_an_adapter_is_unloaded_while_an_engine_is_made():
    """The one that is made has it from the last one, and gives its place back."""

    async def run() -> None:
        place = Place()
        async with hosting(place) as host:
            await host.load_adapter("a", Path())
            place.compiled.clear()
            async for _ in host.updates(None):  # type: ignore[arg-type]
                pass
            await until(lambda: len(place.engines) == 2 and place.engines[1].adapters == {"a"})
            unloading = asyncio.create_task(host.unload_adapter("a"))
            await asyncio.sleep(0.05)
            assert not unloading.done()
            place.compiled.set()
            await unloading
            assert place.engines[1].adapters == set(host.adapters) == set()
            await host.load_adapter("a", Path())
            assert place.engines[1].adapters == set(host.adapters) == {"a"}

    asyncio.run(run())


def test_clients_that_give_up_leave_the_adapters_consistent():
    """The engine ends what it was asked for, and the host finds out."""

    async def run() -> None:
        place = Place()

        async def given_up(work: Awaitable[None]) -> None:
            place.begun.clear()
            place.go.clear()
            task = asyncio.ensure_future(work)
            await until(place.begun.is_set)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()

        async with hosting(place) as host:
            await given_up(host.load_adapter("a", Path()))
            place.go.set()
            await until(lambda: set(host.adapters) == {"a"})
            assert place.engines[0].adapters == {"a"}
            await given_up(host.unload_adapter("a"))
            again = asyncio.create_task(host.unload_adapter("a"))  # it is gone when its turn comes
            await asyncio.sleep(0.05)
            place.go.set()
            await again
            assert place.engines[0].adapters == set(host.adapters) == set()
            await host.load_adapter("a", Path())
            assert place.engines[0].adapters == set(host.adapters) == {"a"}

    asyncio.run(run())


def test_changes_of_adapters_wait_no_longer_than_requests(tmp_path):
    place = Place()
    place.compiled.clear()
    adapters: Any = {"a": SimpleNamespace(name="a")}
    settings = ServerSettings("m", tmp_path, Limits(timeout=0.3), adapters=adapters, adapter_root=tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "adapter_config.json").touch()
    app = create_app(place, Tokenizer.from_folder(TINY), 1, settings, lambda name, _: adapters[name])
    with serving(app, until_ready=False) as url, httpx.Client(base_url=url, timeout=30) as client:
        for body in ({"lora_name": "b", "lora_path": "b"}, {"lora_name": "a"}):
            path = "/v1/load_lora_adapter" if "lora_path" in body else "/v1/unload_lora_adapter"
            told = client.post(path, json=body)
            assert (told.status_code, told.json()["error"]["code"]) == (503, "not_ready")
        place.compiled.set()
        wait_for(lambda: client.post("/v1/unload_lora_adapter", json={"lora_name": "a"}).status_code == 404)
        assert place.engines[0].adapters == set()
        place.go.clear()  # there is an engine, which takes too long
        told = client.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "b"})
        place.go.set()
        assert (told.status_code, told.json()["error"]["code"]) == (504, "timeout")
