"""The program infer.serve, as users start and end it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from infer import serve
from phi4mm_jax import InputError

ROOT = Path(__file__).parents[2]


def parsed(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["serve", "--model", "m", *arguments])
    return serve.parse_arguments()


def test_another_address_needs_a_key(monkeypatch):
    for host in ("0.0.0.0", "192.168.1.2", "::", "example.org"):
        arguments = parsed(monkeypatch, "--host", host)
        with pytest.raises(InputError, match="give an --api-key"):
            serve.check_address(arguments, [])
        serve.check_address(arguments, ["key"])
    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1"):
        serve.check_address(parsed(monkeypatch, "--host", host), [])
    with pytest.raises(InputError, match="--port is 70000"):
        serve.check_address(parsed(monkeypatch, "--port", "70000"), [])


@pytest.mark.slow
@pytest.mark.subprocess
def test_it_answers_and_ends_by_sigterm(tmp_path):
    command = [sys.executable, "-m", "infer.serve", "--model", "assets/tiny", "--dtype", "float32", "--slots", "1",
               "--cache-tokens", "1024", "--port", "0", "--no-warmup"]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, stderr=log, env=os.environ | {"PHI4MM_API_KEY": "a,b"})
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"http://127.0.0.1:\d+", (tmp_path / "log").read_text())):
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        with httpx.Client(base_url=found[0], headers={"Authorization": "Bearer b"}, timeout=120) as client:
            while client.get("/ready").status_code != 200:
                time.sleep(0.1)
            body = {"messages": [{"role": "user", "content": "number five two"}], "max_tokens": 8, "stream": True}
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                server.send_signal(signal.SIGTERM)
                assert answer.read().endswith(b"data: [DONE]\n\n")
        assert server.wait(60) == 0
    finally:
        server.kill()
