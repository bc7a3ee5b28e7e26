"""Turns, deadlines, keys, cancelled requests and streams of tool calls: a server whose engine is played by a script."""

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soundfile
from helpers.paths import TINY
from helpers.played import Script, answer, make_app
from helpers.serving import serving, wait_for

from phi4mm_jax.engine import Completion, Request, Sampling, Update
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.serve.app import ServerSettings, create_app
from phi4mm_jax.serve.chat import choices
from phi4mm_jax.serve.engine_process import EngineThread
from phi4mm_jax.serve.limits import Limits

KEY, JSON = {"Authorization": "Bearer key"}, {"Content-Type": "application/json"}
CHAT = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(TINY)


async def never(_: Script) -> AsyncIterator[Update]:
    yield Update(0, "a", tokens=(1,), log_probabilities=(-0.5,))
    await asyncio.sleep(3600)


async def when_told(script: Script) -> AsyncIterator[Update]:
    while not script.go.is_set():
        await asyncio.sleep(0.01)
    async for update in answer(script):
        yield update


def test_too_many_wait(tokenizer, tmp_path):
    app = make_app(when_told, tokenizer, tmp_path, Limits(max_waiting=1))
    service = app.state.service
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(client.post("/v1/chat/completions", json=CHAT).status_code))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: (service.queue.running, service.queue.waiting) == (3, 1))  # three slots' worth run, one waits
        for body in (CHAT, CHAT | {"stream": True}):
            refused = client.post("/v1/chat/completions", json=body)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["code"] == "server_busy"
        service.host.go.set()
        for thread in threads:
            thread.join()
    assert found == [200] * 4


def test_a_recording_takes_no_more_room_than_the_engine_has(tokenizer, tmp_path):
    """However many clips it has; those that are answered before an earlier one are told after it."""
    second = np.concatenate([np.sin(np.arange(16000) / 5) / 5, np.zeros(24000)])
    file, loads = io.BytesIO(), []
    soundfile.write(file, np.tile(second, 8), 16000, format="WAV")

    async def play(script: Script) -> AsyncIterator[Update]:
        number = len(script.asked)
        for _ in range(1 + 4 * (number % 2)):  # every other one takes longer
            loads.append((service.queue.running + service.queue.waiting, service.queue.size))
            await asyncio.sleep(0.02)
        yield Update(0, "", Completion(f"clip {number}", [5], "stop", 3))

    app = make_app(play, tokenizer, tmp_path, Limits(clip_seconds=3, pause=1, max_waiting=1))
    service = app.state.service
    with serving(app) as url:
        options = {"data": {"stream": "true"}, "files": {"file": ("a.wav", file.getvalue())}}
        lines = httpx.post(f"{url}/v1/audio/transcriptions", **options).text.splitlines()
    *deltas, done = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert len(service.host.asked) == 8
    assert all(load <= size < 8 for load, size in loads)
    assert [event["delta"].strip() for event in deltas] == [f"clip {i}" for i in range(1, 9)]
    assert done["text"] == " ".join(f"clip {i}" for i in range(1, 9))


@pytest.mark.parametrize("path", ["chat/completions", "completions", "audio/transcriptions", "audio/translations"])
def test_requests_without_a_seed_sample_differently(tokenizer, tmp_path, path):
    """Each of several choices, clips of a recording and repeated requests."""
    second = np.concatenate([np.sin(np.arange(16000) / 5) / 5, np.zeros(24000)])
    file = io.BytesIO()
    soundfile.write(file, np.tile(second, 2), 16000, format="WAV")
    app = make_app(answer, tokenizer, tmp_path, Limits(clip_seconds=3, pause=1))
    with serving(app) as url:
        for _ in range(2):
            if path.startswith("audio"):
                options: Any = {"data": {"temperature": "1"}, "files": {"file": ("a.wav", file.getvalue())}}
            else:
                options = {"json": (CHAT if "chat" in path else {"prompt": "a"}) | {"temperature": 1, "n": 2}}
            assert httpx.post(f"{url}/v1/{path}", **options).status_code == 200
    seeds = [request.sampling.seed for request in app.state.service.host.asked]
    assert None not in seeds
    assert len(seeds) == len(set(seeds)) == 4


def test_bodies_are_bounded_together(tokenizer, tmp_path):
    """The first request holds its bytes until it is answered; the next one has room then."""
    app = make_app(when_told, tokenizer, tmp_path, Limits(held_bytes=1500))
    body = {"messages": [{"role": "user", "content": "a" * 1000}]}
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        found = []
        first = threading.Thread(
            target=lambda: found.append(client.post("/v1/chat/completions", json=body).status_code)
        )
        first.start()
        wait_for(lambda: app.state.service.host.asked)
        refused = client.post("/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "server_busy")
        app.state.service.host.go.set()
        first.join()
        assert found == [200]
        assert client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("application/x-www-form-urlencoded", "is 'application/x-www-form-urlencoded'"),  # as of curl -d
        ("text/plain; charset=utf-8", "is 'text/plain'"),  # as of a page of another site, which needs no leave for it
        (None, "is missing"),
    ],
)
def test_a_body_that_is_not_said_to_be_json(tokenizer, tmp_path, given, found):
    headers = {} if given is None else {"content-type": given}
    with serving(make_app(answer, tokenizer, tmp_path)) as url, httpx.Client(base_url=url) as client:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/batches"):
            refused = client.post(path, content=json.dumps(CHAT), headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (415, "unsupported_media_type")
            assert f"Content-Type {found}; send Content-Type: application/json" in refused.json()["error"]["message"]
        taken = client.post(
            "/v1/chat/completions",
            content=json.dumps(CHAT),
            headers={"content-type": "application/json; charset=utf-8"},
        )
        assert taken.status_code == 200


class PlayedEngine:
    """Gives every request one answer, once it is warmed up."""

    compiled = threading.Event()
    config = SimpleNamespace(slots=1)
    scheduler = SimpleNamespace(resident=[], allocator=SimpleNamespace(num_pages=0, in_use=0))
    runner = SimpleNamespace(num_prefilled_tokens=0)
    asked = 0

    def warm_up(self, progress):
        progress(1, 2)
        self.compiled.wait(60)
        progress(2, 2)

    def submit(self, _) -> int:
        self.asked += 1
        return 0

    @property
    def idle(self) -> bool:
        return not self.asked

    def step(self) -> list[Update]:
        asked, self.asked = self.asked, 0
        return [Update(0, "yes", Completion("yes", [1], "stop", 3, content="yes"), (1,), (-0.5,))] * asked


def test_requests_wait_while_programs_are_compiled(tokenizer, tmp_path, caplog):
    """One with a time of its own ends by it."""

    def ask(client: openai.OpenAI, **options: Any) -> Any:
        return client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}], **options)

    caplog.set_level("INFO", "phi4mm_jax")
    app = create_app(EngineThread(PlayedEngine), tokenizer, 1, ServerSettings("m", tmp_path))
    with (
        serving(app, until_ready=False) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        found = []
        thread = threading.Thread(target=lambda: found.append(ask(client)))
        thread.start()
        wait_for(lambda: app.state.service.queue.running == 1)
        with pytest.raises(openai.InternalServerError, match="program 1 of 2 is compiled") as caught:
            ask(client, extra_body={"timeout": 0.3})
        assert (caught.value.status_code, caught.value.code) == (503, "not_ready")
        assert httpx.get(f"{url}/ready").status_code == 503
        PlayedEngine.compiled.set()
        thread.join()
        assert found[0].choices[0].message.content == "yes"
        assert httpx.get(f"{url}/ready").status_code == 200
    said = [record.getMessage() for record in caplog.records if record.name.startswith("phi4mm_jax.serve")]
    assert said[:2] == [f"warming up: program {n} of 2 is compiled; requests wait" for n in (1, 2)]
    assert said[2].startswith("ready after ")


def test_requests_do_not_wait_for_an_engine_that_cannot_be_made(tokenizer, tmp_path):
    def broken():
        raise MemoryError("too large")

    app = create_app(EngineThread(broken), tokenizer, 1, ServerSettings("m", tmp_path))
    with serving(app, until_ready=False) as url:
        wait_for(lambda: "could not be started" in app.state.service.host.cause)
        refused = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
    assert refused.status_code == 503
    assert "it could not be started (MemoryError: too large)" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", ['{"messages": [], "messages": []}', "{", '{"temperature": NaN}', "[" * 100_000, b"\xff"]
)
def test_bodies_are_strict_json(tokenizer, tmp_path, body):
    headers = {"content-type": "application/json"}
    with serving(make_app(answer, tokenizer, tmp_path)) as url:
        found = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers)
    assert found.status_code == 400
    assert found.json()["error"]["message"].startswith("the body is not JSON (")


def test_the_document_describes_what_is_answered(tokenizer, tmp_path):
    paths = make_app(answer, tokenizer, tmp_path).openapi()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/audio/transcriptions", "/v1/audio/translations",
            "/v1/files", "/v1/batches", "/v1/models", "/health", "/ready", "/metrics"} <= paths.keys()  # fmt: skip
    assert all("422" not in operation["responses"] for path in paths.values() for operation in path.values())
    described = paths["/v1/completions"]["post"]["responses"]["200"]["content"]
    assert described.keys() == {"application/json", "text/event-stream"}
    assert {"400", "413", "429", "503", "504"} <= paths["/v1/chat/completions"]["post"]["responses"].keys()


def test_errors_are_those_of_the_document(tokenizer, tmp_path):
    """Of every operation, asked without a body, with one of another type and with an empty one."""
    app = make_app(answer, tokenizer, tmp_path, adapter_root=tmp_path, api_keys=["key"])
    asked = [({}, None), (KEY, None), (KEY | JSON, "{}"), (KEY | {"Content-Type": "a"}, "{}")]
    found = set()
    with serving(app) as url:
        wrong = httpx.request("TRACE", f"{url}/health")
        assert (wrong.status_code, wrong.headers.get("allow"), "error" in wrong.json()) == (405, "GET", True)
        for path, operations in httpx.get(f"{url}/openapi.json", headers=KEY).json()["paths"].items():
            for method, operation in operations.items():
                assert method != "post" or "408" in operation["responses"]
                for headers, content in asked:
                    told = httpx.request(method, url + path, headers=headers, content=content)
                    described = operation["responses"].get(str(told.status_code))
                    assert described is not None, (method, path, told.status_code)
                    assert told.headers["content-type"].partition(";")[0] in described["content"], (path, told)
                    found.add(told.status_code)
    assert found == {200, 400, 401, 404, 415}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_cancels_its_request(tokenizer, tmp_path, stream):
    app = make_app(never, tokenizer, tmp_path)
    host = app.state.service.host
    with serving(app) as url:
        with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=url, timeout=0.5) as client:
            client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
        wait_for(lambda: len(host.left) == 1)
        assert app.state.service.queue.running == 0


def test_a_deadline_ends_a_request(tokenizer, tmp_path):
    app = make_app(never, tokenizer, tmp_path)
    with serving(app) as url, httpx.Client(base_url=url) as client:
        whole = client.post("/v1/chat/completions", json=CHAT | {"timeout": 0.2})
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
        streamed = client.post("/v1/chat/completions", json=CHAT | {"timeout": 0.2, "stream": True})
        *_, error, end = [line for line in streamed.text.splitlines() if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
        assert end == "data: [DONE]"
        assert client.post("/v1/chat/completions", json=CHAT | {"timeout": 0}).status_code == 400
    assert len(app.state.service.host.left) == 2


def test_a_shutdown_finishes_what_runs(tokenizer, tmp_path):
    app = make_app(when_told, tokenizer, tmp_path)
    found = []
    with serving(app) as url:
        ask = threading.Thread(
            target=lambda: found.append(httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60))
        )
        ask.start()
        wait_for(lambda: app.state.service.host.asked)
        threading.Timer(0.3, app.state.service.host.go.set).start()
    ask.join()
    assert found[0].json()["choices"][0]["message"]["content"] == "yes"
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_keys_and_names(tokenizer, tmp_path):
    app = make_app(answer, tokenizer, tmp_path / "a", api_keys=["right", "other"])
    with serving(app) as url, httpx.Client(base_url=url) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}):
            for path in ("/v1/models", "/metrics"):
                refused = client.get(path, headers=headers)
                assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert client.get("/health").status_code == client.get("/").status_code == 200
        one = openai.OpenAI(base_url=f"{url}/v1", api_key="right")
        two = openai.OpenAI(base_url=f"{url}/v1", api_key="other")
        file = one.files.create(file=("a.jsonl", b"{}"), purpose="batch")
        assert [found.id for found in one.files.list()] == [file.id]
        assert list(two.files.list()) == []
        with pytest.raises(openai.NotFoundError):
            two.files.content(file.id)
    with serving(make_app(answer, tokenizer, tmp_path / "b")) as url:
        assert httpx.get(f"{url}/v1/models", headers={"Host": "localhost:8000"}).status_code == 200
        for name in ("example.org", "localhost.example.org:8000"):  # as where a page has its own name point here
            assert httpx.get(f"{url}/v1/models", headers={"Host": name}).status_code == 403


def test_no_key_is_empty_and_any_other_is_taken(tokenizer, tmp_path):
    def asked(url: str, value: str) -> int:
        return httpx.get(f"{url}/v1/models", headers=[(b"authorization", value.encode())]).status_code

    with serving(make_app(answer, tokenizer, tmp_path, api_keys=["", "voilà", "a b"])) as url:
        assert [asked(url, value) for value in ("Bearer", "bearer voil")] == [401] * 2
        assert [asked(url, value) for value in ("Bearer voilà", "Bearer a b")] == [200] * 2


@pytest.mark.parametrize("skip", [False, True])
def test_tool_calls_are_streamed(tokenizer, tmp_path, skip):
    """Special tokens before a call are part of the content, unless they are to be skipped."""
    begin, end = (tokenizer.special_tokens[name] for name in ("<|tool_call|>", "<|/tool_call|>"))
    call = '[{"name": "add", "arguments": {"a": 1}}]'
    sure = "Sure. " if skip else "Sure. <|tag|>"
    before, inside = tokenizer.encode("Sure. <|tag|>", special=True), tokenizer.encode(call)
    text = f"{sure}<|tool_call|>{call}<|/tool_call|>"
    tokens = [*before, begin, *inside, end]

    async def play(_: Script) -> AsyncIterator[Update]:
        yield Update(0, "Su", tokens=())
        yield Update(0, f"{sure[2:]}<|tool_call|>[", tokens=(*before, begin, inside[0]))
        yield Update(0, call[1:], tokens=tuple(inside[1:]))
        completion = Completion.of(tokenizer, text, tokens, "stop", 3, skip_special_tokens=skip)
        yield Update(0, "<|/tool_call|>", completion, (end,))

    with serving(make_app(play, tokenizer, tmp_path)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        asked: Any = {"messages": CHAT["messages"], "extra_body": {"skip_special_tokens": skip}}
        whole: Any = client.chat.completions.create(model="m", **asked).choices[0]
        deltas = [c.choices[0] for c in client.chat.completions.create(model="m", **asked, stream=True)]
    assert (whole.message.content, whole.finish_reason) == (sure, "tool_calls")
    assert json.loads(whole.message.tool_calls[0].function.arguments) == {"a": 1}
    assert [delta.delta.content for delta in deltas if delta.delta.content] == ["Su", sure[2:]]
    (called,) = [delta.delta.tool_calls[0] for delta in deltas if delta.delta.tool_calls]
    assert (called.function.name, json.loads(called.function.arguments)) == ("add", {"a": 1})
    assert deltas[-1].finish_reason == "tool_calls"


def test_streamed_texts_have_offsets_and_a_count_of_tokens(tokenizer, tmp_path):
    """Counted by hand: two prompts of 3 tokens, with two answers of 3 tokens each, whose text comes late."""
    tokens = [tokenizer.encode(letter)[0] for letter in "abc"]

    async def play(_: Script) -> AsyncIterator[Update]:
        yield Update(0, "", tokens=(tokens[0],), log_probabilities=(-0.5,))
        yield Update(0, "a", tokens=(tokens[1],), log_probabilities=(-0.5,))
        yield Update(0, "bc", Completion("abc", tokens, "length", 3), (tokens[2],), (-0.5,))

    with serving(make_app(play, tokenizer, tmp_path)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        options: Any = {"stream": True, "stream_options": {"include_usage": True}, "n": 2, "logprobs": 0}
        *chunks, last = client.completions.create(model="m", prompt=["x", "y"], **options)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (6, 12, 18)
    for index in range(4):
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.text for choice in choices) == "abc"
        assert [choice.logprobs.text_offset for choice in choices] == [[0], [1], [2]]
        assert choices[-1].finish_reason == "length"


def test_a_file_for_batches_has_a_bound_of_its_own(tokenizer, tmp_path):
    app = make_app(answer, tokenizer, tmp_path, Limits(max_body_bytes=1000, file_bytes=5000))
    with serving(app) as url, httpx.Client(base_url=f"{url}/v1", timeout=60) as client:
        files = {"file": ("a.jsonl", bytes(4000))}
        assert client.post("/files", data={"purpose": "batch"}, files=files).status_code == 200
        assert client.post("/chat/completions", content=bytes(4000), headers=JSON).status_code == 413


def test_answers_to_a_prompt_with_a_seed_draw_differently():
    asked = choices(Request("a", sampling=Sampling(temperature=1.0, seed=5)), 3)
    assert [(request.sampling.seed, request.sampling.stream) for request in asked] == [(5, 0), (5, 1), (5, 2)]
