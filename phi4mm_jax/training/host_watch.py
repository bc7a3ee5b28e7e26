"""Watch over the hosts of a run, which end together.

Where one fails, it leaves its error with the coordinator (`jax.distributed`, on the first host), and the others end
with it; one that is killed is missed after a few seconds without a heartbeat. Then jax aborts the process, which is
held up to say what was lost.
"""

import ctypes
import os
import re
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import jax

from phi4mm_jax.errors import ConfigError, InputError
from phi4mm_jax.utils.cli import ending

_POLL = 1.0  # seconds between looks for another host's failure
_LINGER = 10.0  # seconds that a failed host stays for the others to read its error
_SILENT = 5.0  # seconds without a sign of life, after which a host is the cause of an error that there is
_STUCK = 2.0  # seconds of a look, after which jax may be ending the process
_RERUN = "Rerun the same command on all hosts: it resumes from what was saved last, or begins where nothing was"
_FAILURE, _SEEN, _ALIVE = "phi4mm/failure", "phi4mm/seen", "phi4mm/alive"  # keys in the coordinator's store


def coordinator_client() -> Any:
    """Return the client of the coordinator's key-value store."""
    from jax._src.distributed import global_state  # no public way leads there

    return global_state.client


class HostWatch:
    """Watch over the other hosts, by threads: the process ends as soon as one has failed or gone.

    Attributes:
        done: set it to stop.
    """

    def __init__(self):
        self.done = threading.Event()
        self._me, self._count = jax.process_index(), jax.process_count()
        self._ending = threading.RLock()  # one thread has the last word
        self._looked = time.monotonic()
        self._signs: dict[str, str] = {}  # of life, by host
        self._heard = dict.fromkeys(range(self._count), self._looked)
        _hold_up_abort()
        for body in (self._look, self._guard):
            threading.Thread(target=body, name="phi4mm-hosts", daemon=True).start()

    def fail(self, error: BaseException) -> NoReturn:
        """Tell the other hosts of an error, wait until they know, and end the process with it.

        An error that another host's end has caused is said to be that.
        """
        patience = time.monotonic() + _SILENT + 2 * self._pause() + _STUCK
        own = isinstance(error, InputError | ConfigError | KeyboardInterrupt)
        while not own and time.monotonic() < patience:  # `_look` ends the process where another has failed
            if gone := self._gone():
                self._end(f"error: {gone}")
            time.sleep(0.1)
        self.done.set()
        with self._ending:
            client, message = coordinator_client(), str(error) or type(error).__name__
            try:
                client.key_value_set(_FAILURE, f"{self._me} {message}")
            except Exception:  # another host was first, or the coordinator has gone
                with suppress(Exception):
                    client.key_value_set(f"{_SEEN}/{self._me}", "")
            with suppress(Exception):
                _wait_until_seen(client)
            if (found := ending(error)) is None:
                traceback.print_exception(error)
                end_process(1)
            line, status = found
            print(line, file=sys.stderr, flush=True)
            end_process(status)

    def _look(self) -> None:
        """Give signs of life, and look for the others' and for their failures."""
        client, beat = coordinator_client(), 0
        while not self.done.wait(self._pause()):
            beat += 1
            failure = None
            try:
                client.key_value_set(f"{_ALIVE}/{self._me}", f"{beat}", allow_overwrite=True)
                signs = dict(client.key_value_dir_get(_ALIVE))
                with suppress(jax.errors.JaxRuntimeError):  # there is none
                    failure = client.key_value_try_get(_FAILURE)
            except Exception:
                if not self.done.is_set():
                    self._end(f"error: {self._gone() or self._cause_unseen()}")
                return
            self._looked = time.monotonic()
            for key in signs.keys() - {k for k, sign in self._signs.items() if signs.get(k) == sign}:
                self._heard[int(key.rpartition("/")[2])] = self._looked
            self._signs = signs
            number, _, message = (failure or f"{self._me}").partition(" ")
            if int(number) != self._me:
                with self._ending:  # before the other host ends, which this one's collectives fail at
                    with suppress(Exception):
                        client.key_value_set(f"{_SEEN}/{self._me}", "")
                        if self._me == 0:  # the others would lose the coordinator
                            _wait_until_seen(client)
                    self._end(f"error: host {number} has failed: {message}")

    def _guard(self) -> None:
        """Say what was lost while jax ends the process, which it does with its own locks held: `_look` waits then."""
        while not self.done.wait(_POLL / 2):
            if time.monotonic() - self._looked > _STUCK + self._pause() and _is_aborting():
                self._end(f"error: {self._gone() or self._cause_unseen()}")

    def _pause(self) -> float:
        """Return the seconds between looks, each of which reads as many signs as there are hosts."""
        return max(_POLL, self._count / 50)

    def _gone(self) -> str | None:
        """Say which hosts had given no sign of life for a while at the last look; None if all had."""
        before = self._looked - _SILENT - self._pause()
        silent = [f"{host}" for host, heard in self._heard.items() if heard < before and host != self._me]
        return f"host {', '.join(silent)} has gone: was it killed, or is it cut off? {_RERUN}" if silent else None

    def _cause_unseen(self) -> str:
        who = "another host" if self._me == 0 else "host 0, which coordinates the run,"
        return f"{who} has gone. {_RERUN}"

    def _end(self, line: str) -> NoReturn:
        with self._ending:
            print(line, file=sys.stderr, flush=True)
            end_process(2)


def _hold_up_abort() -> None:
    """Let a thread that aborts the process sleep before: for SIGABRT's number of seconds, 6.

    jax aborts in C++ when a host is lost. The handler is C as well, since one in Python could wait forever.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _is_aborting() -> bool:
    """Return whether a thread handles SIGABRT, which is blocked in it meanwhile. Known on Linux alone."""
    bit = 1 << (signal.SIGABRT - 1)
    for status in Path("/proc/self/task").glob("*/status"):
        with suppress(OSError):  # the thread has ended
            blocked = re.search(r"SigBlk:\s*(\w+)", status.read_text())
            if blocked and int(blocked[1], 16) & bit:
                return True
    return False


def _wait_until_seen(client: Any) -> None:
    """Wait until all hosts but the one that failed know it; the first one longer, since it is the coordinator."""
    end = time.monotonic() + _LINGER
    while len(client.key_value_dir_get(_SEEN)) < jax.process_count() - 1 and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(2 * _POLL if jax.process_index() == 0 else 0)


def end_process(status: int) -> NoReturn:
    """End at once, without waiting for threads of jax or for the other hosts."""
    sys.stdout.flush()
    os._exit(status)
