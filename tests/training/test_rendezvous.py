"""Rendezvous of hosts: all meet, or each is told who is missing and what does not fit."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from phi4mm_jax import InputError
from phi4mm_jax.testing.host_runs import free_port
from phi4mm_jax.training import rendezvous
from phi4mm_jax.training.rendezvous import Meeting, meet


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(rendezvous, "_NOTICE", 0.2)
    monkeypatch.setattr(rendezvous, "_RETRY", 0.05)
    return f"127.0.0.1:{free_port()}"


def outcomes(*hosts: Meeting, seconds: float = 30) -> list[str]:
    """Return the error of each host, in threads of this process; "" where it met the others."""

    def outcome(host: Meeting) -> str:
        try:
            meet(host, seconds)
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(outcome, hosts))


def connected(place: tuple[str, int]) -> socket.socket:
    """Connect as soon as somebody listens there."""
    end = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(place, 5)
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_all_hosts_meet_and_leave_the_port_free(address):
    assert outcomes(*(Meeting(address, 3, host) for host in (2, 0, 1))) == ["", "", ""]
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        pass


def test_hosts_that_are_missing_are_named(address, capfd):
    host, guest = outcomes(Meeting(address, 3, 0), Meeting(address, 3, 1), seconds=1)
    assert host.startswith(f"host 2 of 3 did not come to {address} within 1 seconds; start the same command on all")
    assert guest == host
    assert f"waiting for host 2 at {address}" in capfd.readouterr().err.splitlines()


def test_a_first_host_that_is_missing_is_named(address, capfd):
    (error,) = outcomes(Meeting(address, 2, 1), seconds=1)
    assert error.startswith(f"host 0 of 2 was not at {address} within 1 seconds (Connection refused); start the same")
    assert f"waiting for host 0 at {address} (Connection refused)" in capfd.readouterr().err.splitlines()


def test_a_name_that_does_not_resolve(monkeypatch):
    monkeypatch.setattr(rendezvous, "_RESOLVE", 0.0)
    with pytest.raises(InputError, match=r"'no-such-host\.invalid:8476', a name that this host cannot resolve"):
        meet(Meeting("no-such-host.invalid:8476", 2, 1), 300)


def test_something_else_at_the_address(address):
    """It accepts, and says nothing that a first host would."""
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        guest, host = outcomes(Meeting(address, 2, 1), Meeting(address, 2, 0), seconds=1)
    assert "was not at" in guest
    assert "cannot be listened at (Address already in use" in host


def test_a_first_host_that_hangs_holds_no_other(address, monkeypatch):
    """It says once who is missing, and then nothing."""
    monkeypatch.setattr(rendezvous, "_GRACE", 0.5)
    with (
        socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        guest = pool.submit(outcomes, Meeting(address, 3, 1), seconds=1)
        connection = server.accept()[0]
        with connection:
            connection.sendall(b'{"missing": [2]}\n')
            assert "was not at" in guest.result(10)[0]


@pytest.mark.parametrize(
    "line",
    [b"GET / HTTP/1.1\r\n", b"[]\n", b'{"host": "1", "hosts": 2, "versions": {}}\n', b"[" * 60_000 + b"\n",
     b'{"host": 1, "hosts": 2, "versions": 3}\n', b'{"host": -1, "hosts": 2, "versions": {}}\n', b"\xff\n"],
)  # fmt: skip
def test_what_is_no_greeting_is_not_counted(address, line):
    with ThreadPoolExecutor(1) as pool:
        host = pool.submit(outcomes, Meeting(address, 2, 0), seconds=10)
        place = "127.0.0.1", int(address.rpartition(":")[2])
        with connected(place) as connection:
            connection.sendall(line)
            assert connection.recv(1) == b""
        assert outcomes(Meeting(address, 2, 1)) == [""]
        assert host.result(10) == [""]


@pytest.mark.parametrize(
    ("count", "others", "message"),
    [
        (2, [(3, 1)], "host 1 was started as one of 3, and host 0 as one of 2; give the same --num-processes to all"),
        (2, [(2, 2)], "a host was started as number 2 of 2, counted from 0; check --process-id"),
        (3, [(3, 1), (3, 1)], "two hosts were started as number 1; give each its own --process-id"),
    ],
)
def test_hosts_that_do_not_fit_together(address, count, others, message):
    found = outcomes(Meeting(address, count, 0), *(Meeting(address, *other) for other in others))
    assert found == [message] * len(found)


def test_another_version_on_a_host(address, monkeypatch):
    versions = iter(("1.0", "2.0", "1.0"))
    monkeypatch.setattr(
        rendezvous,
        "_greeting",
        lambda meeting: {"host": meeting.process_id, "hosts": 2, "versions": {"jax": next(versions)}},
    )
    found = outcomes(Meeting(address, 2, 0), Meeting(address, 2, 1))
    assert found == ["host 1 has jax 1.0, and host 0 jax 2.0; install the same on all"] * 2
