"""The program infer.serve, as users start and end it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from helpers.paths import TINY

from infer import serve
from phi4mm_jax import InputError
from phi4mm_jax.serve.files import Store
from phi4mm_jax.serve.limits import Limits

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


def test_keys_are_stripped_and_none_is_empty(monkeypatch):
    monkeypatch.setenv("PHI4MM_API_KEY", " a, b,, ")
    assert serve.read_keys(parsed(monkeypatch, "--api-key", "c ", "--api-key", "d e")) == ["c", "d e", "a", "b"]
    for empty in ("", " "):  # as of "$KEY" where there is no such variable
        with pytest.raises(InputError, match="--api-key is empty"):
            serve.read_keys(parsed(monkeypatch, "--api-key", "c", "--api-key", empty))


def test_what_can_be_checked_is_checked_before_the_weights_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("phi4mm_jax.load", None)  # not called
    (tmp_path / "speech").mkdir()
    for name in ("vision-lora", "speech-lora"):
        (tmp_path / "both" / name).mkdir(parents=True)
        (tmp_path / "both" / name / "adapter_config.json").write_text("{}")
    (tmp_path / "file").touch()
    used = Store(tmp_path / "used", Limits())
    used.lock()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, told in (
            (["--adapter", f"mine={tmp_path / 'speech'}"], "speech: holds no adapter"),
            (["--adapter", f"mine={tmp_path / 'both'}"], "both: holds 2 adapters; give the one that is meant"),
            (["--adapter-root", str(tmp_path / "none")], "--adapter-root is "),
            (["--host", "0.0.0.0", "--api-key", ""], "--api-key is empty"),
            (["--files", str(tmp_path / "file")], "file: cannot be made (File exists)"),
            (["--files", str(tmp_path / "used"), "--port", "0"], "used: another server uses it; stop that one"),
            (["--port", str(port)], f"--port is {port}, which cannot be listened at on 127.0.0.1 (Address already"),
        ):
            monkeypatch.setattr(sys, "argv", ["serve", "--model", str(TINY), "--compilation-cache", "", *arguments])
            assert serve.main() == 2
            error = capsys.readouterr().err
            assert told in error, error
            assert error.startswith("error: ")


BODY = {"messages": [{"role": "user", "content": "number five two"}], "max_tokens": 8}


@contextmanager
def started(folder, *options):
    """Start the program; gives its process and a client that waits until it is ready."""
    command = [sys.executable, "-m", "infer.serve", "--model", "assets/tiny", "--dtype", "float32", "--slots", "2",
               "--cache-tokens", "1024", "--port", "0", "--no-warmup", *map(str, options)]  # fmt: skip
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, stderr=log)
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"http://127.0.0.1:\d+", (folder / "log").read_text())):
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        with httpx.Client(base_url=found[0], timeout=120) as client:
            while client.get("/ready").status_code != 200:
                time.sleep(0.1)
            yield server, client
    finally:
        server.kill()
        server.wait()


def outcome(client, begun: threading.Semaphore, **options) -> str:
    """Ask; the answer's text, or "error" where the client is told that there is none."""
    try:
        with client.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True} | options) as answer:
            lines = []
            for line in answer.iter_lines():
                begun.release()
                lines.append(line)
    except httpx.TransportError:
        return "error"
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] is not None
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


def engines_of(server: int) -> list[int]:
    """Return the processes of a server's engines."""
    children = map(int, Path(f"/proc/{server}/task/{server}/children").read_text().split())
    return [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def threads_of(process: int) -> list[str]:
    return [(task / "comm").read_text() for task in Path(f"/proc/{process}/task").iterdir()]


@pytest.mark.slow
@pytest.mark.subprocess
def test_no_request_is_lost_silently_when_it_is_killed(tmp_path):
    """Clients of one that is killed are told; its batch is answered by the next one, each line once. Where the engine's
    process alone is killed, clients are told, and another is started. SIGTERM lets all that run be answered."""
    lines = [{"custom_id": f"a{i}", "method": "POST", "url": "/v1/chat/completions", "body": BODY} for i in range(40)]
    files = "--files", tmp_path / "files"
    with started(tmp_path, *files) as (server, client), ThreadPoolExecutor(6) as clients:
        content = "\n".join(map(json.dumps, lines))
        file = client.post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "batch"}).json()["id"]
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = client.post("/v1/batches", json=body).json()["id"]
        begun = threading.Semaphore(0)
        endless = {"max_tokens": 900, "structured_outputs": {"regex": "[a-z ]{800}"}}  # it is killed before
        asked = [clients.submit(outcome, client, begun, **endless) for _ in range(6)]
        begun.acquire()
        while client.get(f"/v1/batches/{batch}").json()["request_counts"]["completed"] < 2:
            time.sleep(0.05)
        server.kill()
        assert [found.result(60) for found in asked] == ["error"] * 6
    with started(tmp_path, *files) as (server, client), ThreadPoolExecutor(6) as clients:
        while (found := client.get(f"/v1/batches/{batch}").json())["status"] != "completed":
            time.sleep(0.1)
        answers = map(json.loads, client.get(f"/v1/files/{found['output_file_id']}/content").text.splitlines())
        told = [(x["custom_id"], x["response"]["body"]["choices"][0]["message"]["content"]) for x in answers]
        assert sorted(told) == sorted((line["custom_id"], "52") for line in lines)
        (engine,) = engines_of(server.pid)
        assert any(name.startswith("tf_") for name in threads_of(engine))
        assert not any(name.startswith("tf_") for name in threads_of(server.pid))  # which never asks for a device
        unanswered = clients.submit(client.post, "/v1/chat/completions", json=BODY | endless)
        while "phi4mm_slots_in_use 1.0" not in client.get("/metrics").text:
            time.sleep(0.05)
        os.kill(engine, signal.SIGKILL)
        found = unanswered.result(60)
        assert (found.status_code, found.json()["error"]["code"]) == (503, "engine_stopped")
        while client.get("/ready").status_code != 200:
            time.sleep(0.1)
        assert "phi4mm_engine_restarts 1.0" in client.get("/metrics").text
        begun = threading.Semaphore(0)
        asked = [clients.submit(outcome, client, begun) for _ in range(4)]
        for _ in range(4):
            begun.acquire()
        server.send_signal(signal.SIGTERM)
        assert [found.result(60) for found in asked] == ["52"] * 4
        assert server.wait(60) == 0


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
        assert (tmp_path / "log").read_text().endswith("\nended by SIGTERM, with all requests answered\n")
    finally:
        server.kill()
