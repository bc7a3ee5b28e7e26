"""Servers whose engine is played by a script."""

import threading
from collections.abc import AsyncIterator

from phi4mm_jax.engine import Completion, Update
from phi4mm_jax.serve.app import ServerSettings, create_app
from phi4mm_jax.serve.engine_messages import EngineStats
from phi4mm_jax.serve.engine_process import EngineThread
from phi4mm_jax.serve.limits import Limits


class Script:
    """Plays the engine's host: gives a request the updates of its script, and keeps what was asked and left."""

    ready, cause, restarts, stats, adapters = True, "", 0, EngineStats(), ()

    def __init__(self, play):
        self.play, self.asked, self.left = play, [], []
        self.go = threading.Event()

    def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def updates(self, request) -> AsyncIterator[Update]:
        self.asked.append(request)
        try:
            async for update in self.play(self):
                yield update
        finally:
            self.left.append(request)


def make_app(play, tokenizer, folder, limits=None, **settings):
    app = create_app(
        EngineThread(lambda: None), tokenizer, 1, ServerSettings("m", folder, limits or Limits(), **settings)
    )
    object.__setattr__(app.state.service, "host", Script(play))
    return app


async def answer(_: Script) -> AsyncIterator[Update]:
    yield Update(0, "yes", Completion("yes", [1], "stop", 3, (-0.5,), content="yes"), (1,), (-0.5,))
