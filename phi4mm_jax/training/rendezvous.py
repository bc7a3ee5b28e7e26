"""Rendezvous of a run's hosts, before jax connects them: who is missing is said, and what cannot work is an error.

jax waits in C++ without a word, and aborts the process in the end. So the first host listens at the coordinator's
address before jax does. The others tell it who they are, each by a line of JSON; it tells them who is missing, and
when all are here. Then all close their sockets, and start jax.
"""

import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from phi4mm_jax import __version__
from phi4mm_jax.errors import InputError
from phi4mm_jax.utils.checks import is_whole

_NOTICE = 5.0  # seconds between lines on standard error
_RETRY = 0.5  # seconds between attempts to connect, and between looks
_RESOLVE = 5.0  # seconds for a name to be found
_GRACE = 10.0  # seconds after its own limit in which a host waits for what the first one says
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a host without power is found in 25 s
_MAX_LINE = 65536  # bytes
_REMEDY = "start the same command on all of them, and check that each reaches this address"


class Meeting(NamedTuple):
    """Address at which the hosts of a run meet, their number, and that of this one."""

    address: str
    num_processes: int
    process_id: int


def meet(meeting: Meeting, seconds: float) -> None:
    """Wait until all hosts of a run are here, with a line on standard error every few seconds.

    Args:
        seconds: to wait at most.

    Raises:
        InputError: the address cannot be used, hosts are missing at the end, or one was started as part of another run.
    """
    if meeting.num_processes == 1:
        return
    place = _resolved(meeting.address)
    notice = _Notice(seconds)
    if meeting.process_id == 0:
        _Host(meeting, place, notice).wait()
    else:
        _join(meeting, place, notice)


class _Notice:
    """Tells why this host waits: at most every few seconds, and only what is left to say.

    Args:
        seconds: to wait at most.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end, self._next = time.monotonic() + seconds, time.monotonic() + _NOTICE

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end

    @property
    def is_long_over(self) -> bool:
        return time.monotonic() >= self._end + _GRACE

    def is_due(self) -> bool:
        """Return whether to say a line now; the next one is due after some seconds."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + _NOTICE
        return True


def _resolved(address: str) -> tuple[str, int]:
    """Return name and port of HOST:PORT. A name may have several addresses, of which not each has to be reached.

    Raises:
        InputError: there is no host of this name.
    """
    name, _, port = address.rpartition(":")
    end = time.monotonic() + _RESOLVE
    while True:
        try:
            socket.getaddrinfo(name.strip("[]"), int(port), type=socket.SOCK_STREAM)
            return name.strip("[]"), int(port)
        except (OSError, UnicodeError) as error:
            if time.monotonic() > end:
                raise InputError(
                    f"--coordinator is {address!r:.80}, a name that this host cannot resolve ({error}); give the "
                    "address of the first host"
                ) from error
            time.sleep(_RETRY)


def _greeting(meeting: Meeting) -> dict[str, Any]:
    versions = {"phi4mm_jax": __version__, "jax": jax.__version__}
    return {"host": meeting.process_id, "hosts": meeting.num_processes, "versions": versions}


def _read_greeting(line: bytes) -> tuple[int, int, dict[str, str]] | None:
    """Return host, hosts and versions of a greeting; None where it is none."""
    try:
        greeting = json.loads(line)
        host, hosts, versions = greeting["host"], greeting["hosts"], greeting["versions"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    is_greeting = all(is_whole(number, 0, 2**31 - 1) for number in (host, hosts)) and isinstance(versions, dict)
    return (host, hosts, versions) if is_greeting else None


def _keep_alive(connection: socket.socket) -> socket.socket:
    """Have the system look whether the other end is still there."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


@dataclass(eq=False)
class _Guest:
    """A connection of another host, or of who knows what, before its greeting."""

    socket: socket.socket
    received: bytearray = field(default_factory=bytearray)
    host: int | None = None


class _Host:
    """The first host, which the others come to."""

    def __init__(self, meeting: Meeting, place: tuple[str, int], notice: _Notice):
        self._meeting, self._place, self._notice = meeting, place, notice
        self._guests: list[_Guest] = []
        self._announced: list[int] = []  # the missing ones, as the others know them

    def wait(self) -> None:
        """Wait for the other hosts, and tell them when all are here."""
        with _listen(self._meeting.address) as listener, selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            try:
                while missing := self._missing():
                    self._announce(missing)
                    for key, _ in selector.select(_RETRY):
                        if key.data is None:
                            guest = _Guest(_keep_alive(listener.accept()[0]))
                            guest.socket.settimeout(_RETRY)
                            self._guests.append(guest)
                            selector.register(guest.socket, selectors.EVENT_READ, guest)
                        elif not self._receive(key.data):
                            selector.unregister(key.data.socket)
                            self._guests.remove(key.data)
                            key.data.socket.close()
                self._broadcast({"all": True})
                for guest in self._guests:  # they close first: the port is free for jax then
                    with suppress(OSError):
                        guest.socket.recv(1)
            except InputError as error:
                self._broadcast({"error": str(error)})
                raise
            finally:
                for guest in self._guests:
                    guest.socket.close()

    def _missing(self) -> list[int]:
        here = {0, *(guest.host for guest in self._guests)}
        return [host for host in range(self._meeting.num_processes) if host not in here]

    def _announce(self, missing: Sequence[int]) -> None:
        """Tell the hosts that are here, and the user, who is missing.

        Raises:
            InputError: the time is over.
        """
        if missing != self._announced:
            self._announced = list(missing)
            self._broadcast({"missing": self._announced})
        if not self._notice.is_over:
            if self._notice.is_due():
                _print(f"waiting for {_names(missing)} at {self._meeting.address}{self._own_reach()}")
            return
        raise InputError(
            f"{_names(missing)} of {self._meeting.num_processes} did not come to {self._meeting.address} within "
            f"{self._notice.seconds:g} seconds{self._own_reach()}; {_REMEDY}"
        )

    def _own_reach(self) -> str:
        """Return why this host does not reach itself at the address, which is another one's then; '' if it does."""
        try:
            with socket.create_connection(self._place, 2):
                return ""
        except OSError as error:
            return f", where this host does not reach itself ({error.strerror or error}): is it another's address?"

    def _receive(self, guest: _Guest) -> bool:
        """Read what a guest sends; return whether it stays.

        Raises:
            InputError: it was started as part of another run.
        """
        try:
            found = guest.socket.recv(_MAX_LINE)
        except OSError:
            return False
        guest.received += found
        if not found or len(guest.received) > _MAX_LINE:
            return False
        if b"\n" in guest.received and guest.host is None:
            greeting = _read_greeting(bytes(guest.received.partition(b"\n")[0]))
            if greeting is None:
                return False
            self._check(*greeting)
            guest.host = greeting[0]
            with suppress(OSError):
                guest.socket.sendall(_line({"missing": self._announced}))
        return True

    def _check(self, host: int, hosts: int, versions: dict[str, str]) -> None:
        own = _greeting(self._meeting)
        if hosts != own["hosts"]:
            raise InputError(
                f"host {host} was started as one of {hosts}, and host 0 as one of {own['hosts']}; give the same "
                "--num-processes to all"
            )
        if host >= hosts:
            raise InputError(f"a host was started as number {host} of {hosts}, counted from 0; check --process-id")
        if host in {0, *(guest.host for guest in self._guests)}:
            raise InputError(f"two hosts were started as number {host}; give each its own --process-id")
        if versions != own["versions"]:
            raise InputError(
                f"host {host} has {_versions(versions)}, and host 0 {_versions(own['versions'])}; install the same "
                "on all"
            )

    def _broadcast(self, value: dict[str, Any]) -> None:
        for guest in self._guests:
            with suppress(OSError):  # it has gone, as will be seen when it is read
                guest.socket.sendall(_line(value))


def _listen(address: str) -> socket.socket:
    """Return a socket that listens at the port of an address, as jax will.

    Raises:
        InputError: the port is taken.
    """
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f"[::]:{address.rpartition(':')[2]}")
    name, _, port = bind.rpartition(":")
    try:
        if name == "[::]":
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            return socket.create_server(("", int(port)), family=family, dualstack_ipv6=both)
        family = socket.AF_INET6 if ":" in name else socket.AF_INET
        return socket.create_server((name.strip("[]"), int(port)), family=family)
    except OSError as error:
        raise InputError(
            f"port {port} of this host cannot be listened at ({error.strerror or error}); is another run there? "
            "Give --coordinator another port, on all hosts"
        ) from error


def _join(meeting: Meeting, place: tuple[str, int], notice: _Notice) -> None:
    """Come to the first host, and wait until all are here."""
    reason = ""
    while not notice.is_over:
        try:
            with _keep_alive(socket.create_connection(place, max(_RETRY, 2))) as host:
                host.settimeout(_RETRY)
                host.sendall(_line(_greeting(meeting)))
                if _is_complete(host, meeting, notice):
                    return
            reason = "it has ended, or is none of this run"
        except OSError as error:
            reason = error.strerror or str(error)
        if notice.is_due():
            _print(f"waiting for host 0 at {meeting.address} ({reason})")
        time.sleep(_RETRY)
    raise InputError(
        f"host 0 of {meeting.num_processes} was not at {meeting.address} within {notice.seconds:g} seconds ({reason}); "
        f"{_REMEDY}"
    )


def _is_complete(host: socket.socket, meeting: Meeting, notice: _Notice) -> bool:
    """Wait until the first host says that all are here; return False when it goes, or what it says is not understood.

    Raises:
        InputError: it says that the run cannot begin.
    """
    received, missing = b"", []
    while True:
        line, newline, rest = received.partition(b"\n")
        if newline:
            received = rest
            try:
                message = json.loads(line)
                missing = message.get("missing", missing)
            except (ValueError, AttributeError):
                return False
            if "error" in message:
                raise InputError(message["error"])
            if message.get("all"):
                return True
            continue
        if missing and notice.is_due():
            _print(f"waiting for {_names(missing)} at {meeting.address}")
        try:
            found = host.recv(_MAX_LINE)
        except TimeoutError:
            if notice.is_long_over or (notice.is_over and not missing):  # it hangs, or something else listens there
                return False
            continue
        received += found
        if not found or len(received) > _MAX_LINE:
            return False


def _names(hosts: Sequence[int]) -> str:
    shown = [*map(str, hosts[:8]), *(["..."] if len(hosts) > 8 else [])]
    return f"host{'s' if len(hosts) > 1 else ''} {', '.join(shown)}"


def _versions(versions: dict[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in versions.items())


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
