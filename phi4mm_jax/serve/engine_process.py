"""The places where an engine can run: a process of its own, so that serving and computing hold each other up little."""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Protocol

from phi4mm_jax.engine import Engine
from phi4mm_jax.errors import CheckpointError, ConfigError, InputError
from phi4mm_jax.serve.engine_loop import EngineLoop
from phi4mm_jax.serve.engine_messages import ModelLoaded
from phi4mm_jax.utils.cli import log_lines

_PATIENCE = 10  # seconds for the process to end when it is asked to


class EnginePlace(Protocol):
    """Place where engines run."""

    def connect(self) -> Connection:
        """Return a connection to an `EngineLoop`, after the last one has ended. It may take as long as loading does."""
        ...

    def close(self) -> None:
        """End what runs there."""
        ...


class EngineThread:
    """A thread of this process."""

    def __init__(self, make_engine: Callable[[], Engine]):
        self._make_engine = make_engine

    def connect(self) -> Connection:
        """Return a connection to a new thread."""
        ours, its = multiprocessing.Pipe()
        loop = EngineLoop(its, self._make_engine, lambda: None)
        threading.Thread(target=loop.run, name="phi4mm-engine", daemon=True).start()
        return ours

    def close(self) -> None:
        """Do nothing: the thread ends with its connection."""


class EngineProcess:
    """A process that loads the model and runs its engines; started again where it has ended.

    Args:
        load: loads the model in that process, and returns what makes its engines. It is pickled.
    """

    def __init__(self, load: Callable[[], Callable[[], Engine]]):
        self._load = load
        self._process: BaseProcess | None = None
        self._loaded = False
        self._first: Connection | None = None

    def start(self) -> None:
        """Start it, and wait until the model is loaded.

        Raises:
            InputError, ConfigError, CheckpointError: the model cannot be loaded; or another error of its.
            RuntimeError: the process has ended.
        """
        self._first = self.connect()

    def connect(self) -> Connection:
        """Return a connection to the process, once the model is loaded; see `start`."""
        if (first := self._first) is not None:
            self._first = None
            return first
        self.close()
        context = multiprocessing.get_context("spawn")  # jax has threads, which a fork would break
        ours, its = context.Pipe()
        self._process = process = context.Process(
            target=_run, args=(its, self._load), name="phi4mm-engine", daemon=True
        )
        process.start()
        its.close()
        try:
            loaded = ours.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"the engine's process has ended with status {process.exitcode}") from None
        if loaded.error is not None:
            raise loaded.error
        self._loaded = True
        return ours

    def close(self) -> None:
        """End the process."""
        if (process := self._process) is not None:
            process.join(_PATIENCE if self._loaded else 0)
            process.kill()
            process.join()
            self._process, self._loaded = None, False


def _run(connection: Connection, load: Callable[[], Callable[[], Engine]]) -> None:
    """Load the model, then run its engines. In the process."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which may reach both; the server ends this one when it is done
        signal.signal(number, signal.SIG_IGN)
    with log_lines():
        error = make_engine = None
        try:
            make_engine = load()
        except Exception as caught:
            error = caught if isinstance(caught, InputError | ConfigError | CheckpointError) else _as_sent(caught)
        with suppress(OSError):  # the server has ended meanwhile, which the loop finds
            connection.send(ModelLoaded(error))
        if make_engine is not None:
            EngineLoop(connection, make_engine, lambda: os._exit(0)).run()


def _as_sent(error: Exception) -> Exception:
    """Show where an error comes from, and return it as it can be sent."""
    traceback.print_exception(error)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
