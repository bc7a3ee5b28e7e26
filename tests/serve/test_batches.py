"""Files of clients and batches of their lines: answered once, whatever the lines, the folder and the servers do."""

import asyncio
import codecs
import errno
import io
import json
import os

import pytest
from helpers.paths import TINY
from helpers.serving import serving

from phi4mm_jax import InputError
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.serve.app import ServerSettings, create_app
from phi4mm_jax.serve.batches import Answer, Batches
from phi4mm_jax.serve.engine_process import EngineThread
from phi4mm_jax.serve.errors import ApiError
from phi4mm_jax.serve.files import Store, new_id
from phi4mm_jax.serve.limits import Limits
from phi4mm_jax.serve.models import BatchRequest
from phi4mm_jax.utils.files import INCOMPLETE


def test_one_server_at_a_time_has_a_folder(tmp_path):
    def make_app():
        return create_app(
            EngineThread(lambda: None), Tokenizer.from_folder(TINY), 1, ServerSettings("m", tmp_path / "files")
        )

    first = make_app()
    for _ in range(2):
        with pytest.raises(InputError, match="files: another server uses it; stop that one, or give another --files"):
            make_app()
    with serving(first, until_ready=False), pytest.raises(InputError, match="another server uses it"):
        make_app()
    make_app()


def test_files_may_vanish_while_they_are_listed(tmp_path):
    """As where a batch is written, or another client deletes: names are there that lead nowhere."""
    store = Store(tmp_path, Limits(stored_bytes=1000))
    first = store.add_file(io.BytesIO(bytes(500)), "a", "batch", "me")["id"]
    for name in (f"{new_id('file')}.json", f".{new_id('batch')}.json{INCOMPLETE}", f"{new_id('file')}.content"):
        (tmp_path / name).symlink_to("gone")
    assert [found["id"] for found in store.list("file", "me")] == [first]
    with pytest.raises(ApiError) as caught:  # those that are there count
        store.add_file(io.BytesIO(bytes(500)), "b", "batch", "me")
    assert caught.value.status_code == 413
    store.delete_file(first, "me")
    second = store.add_file(io.BytesIO(bytes(500)), "c", "batch", "me")["id"]
    third = store.add_file(io.BytesIO(b""), "d", "batch", "me")["id"]
    os.utime(tmp_path / f"{second}.json", (0, 0))
    assert [found["id"] for found in store.list("file", "me")] == [third, second]  # the newest first


async def answered(store: Store, lines: bytes, respond: Answer) -> tuple[dict, dict[str, dict]]:
    """Answer a file; return the batch and the responses by the lines' names."""
    file = store.add_file(io.BytesIO(lines), "a.jsonl", "batch", "me")["id"]
    batches = Batches(store, respond, 2)
    name = batches.create(BatchRequest(input_file_id=file, endpoint="/v1/completions"), "me")["id"]
    async with asyncio.timeout(60):
        while (batch := batches.read(name, "me"))["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.01)
    written = [batch[key] for key in ("output_file_id", "error_file_id") if batch[key] is not None]
    records = [json.loads(line) for name in written for line in store.content(name).read_text().splitlines()]
    return batch, {record["custom_id"]: record["response"] for record in records}


def line_of(name: str, prompt: str) -> str:
    return json.dumps({"custom_id": name, "url": "/v1/completions", "body": {"prompt": prompt}}, ensure_ascii=False)


async def echo(_, body, owner) -> dict:
    if body["prompt"] == "fail":
        raise ZeroDivisionError("a secret of the server's")
    return {"of": body["prompt"]}


def test_a_line_that_fails_unexpectedly_leaves_the_others(tmp_path, caplog):
    """It is told as a single request is, and the log has the cause."""
    names = [f"a{i}" for i in range(6)]
    lines = [line_of(name, "fail" if name == "a2" else name) for name in names]
    batch, found = asyncio.run(answered(Store(tmp_path, Limits()), "\n".join(lines).encode(), echo))
    assert (batch["status"], batch["errors"]) == ("completed", None)
    assert batch["request_counts"] == {"total": 6, "completed": 5, "failed": 1}
    assert {name: found[name]["status_code"] for name in names} == dict.fromkeys(names, 200) | {"a2": 500}
    error = found["a2"]["body"]["error"]
    assert (error["type"], error["message"]) == ("server_error", "the server failed; its log has the cause")
    assert "a secret of the server's" in caplog.text


def test_a_batch_that_fails_tells_the_cause(tmp_path, monkeypatch):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "secret"))

    monkeypatch.setattr("phi4mm_jax.serve.batches.strict_json", full)  # as a record is written
    batch, _ = asyncio.run(answered(Store(tmp_path, Limits()), line_of("a", "b").encode(), echo))
    assert batch["status"] == "failed"
    assert batch["errors"]["data"][0] == {
        "code": "OSError", "message": "[Errno 28] No space left on device", "param": None, "line": None,
    }  # fmt: skip


def test_lines_are_read_as_utf_8(tmp_path):
    """With a mark at the file's beginning or without; others are refused instead of changed, as by infer.batch."""
    lines = [line_of("a", "café").encode(), line_of("b", "café").encode("latin-1"), b" \r", line_of("c", "é").encode()]
    content = codecs.BOM_UTF8 + b"\n".join(lines)
    batch, found = asyncio.run(answered(Store(tmp_path, Limits()), content, echo))
    assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert [found[name]["body"] for name in ("a", "c")] == [{"of": "café"}, {"of": "é"}]
    assert found["line 2"]["status_code"] == 400
    at = lines[1].index(b"\xe9")
    told = f"the line is not UTF-8 (at byte {at}); save the file as UTF-8"
    assert found["line 2"]["body"]["error"]["message"] == told


def test_a_batch_is_resumed_by_the_next_server(tmp_path):
    """The first server is ended while it answers; no line is answered twice, and none is left out."""
    lines = [{"custom_id": f"a{i}", "url": "/v1/completions", "body": {"prompt": str(i)}} for i in range(5)]
    store, asked = Store(tmp_path, Limits()), []
    (tmp_path / "input").write_text("\n".join(map(json.dumps, lines)))
    with (tmp_path / "input").open("rb") as source:
        file = store.add_file(source, "a.jsonl", "batch", "me")["id"]

    async def first() -> str:
        async def respond(_, body, owner):
            if body["prompt"] == "2":
                await asyncio.sleep(3600)
            asked.append(body["prompt"])
            return {"of": body["prompt"]}

        batches = Batches(store, respond, 1)
        name = batches.create(BatchRequest(input_file_id=file, endpoint="/v1/completions"), "me")["id"]
        while len(asked) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        await batches.close()
        return name

    async def second(name: str) -> dict:
        async def respond(_, body, owner):
            asked.append(body["prompt"])
            return {"of": body["prompt"]}

        batches = Batches(store, respond, 2)
        batches.resume()
        while batches.read(name, "me")["status"] != "completed":
            await asyncio.sleep(0.01)
        return batches.read(name, "me")

    name = asyncio.run(first())
    (output,) = [path for path in tmp_path.glob("file-*.content") if b"custom_id" in path.read_bytes()
                 and b"response" in path.read_bytes()]  # fmt: skip
    with output.open("a") as written:
        written.write('{"id": "half a li')  # as where the first one was killed
    done = asyncio.run(second(name))
    assert asked == ["0", "1", "2", "3", "4"]
    answers = [json.loads(line) for line in store.content(done["output_file_id"]).read_text().splitlines()]
    assert {x["custom_id"]: x["response"]["body"]["of"] for x in answers} == {f"a{i}": str(i) for i in range(5)}
    assert done["request_counts"] == {"total": 5, "completed": 5, "failed": 0}


def test_a_batch_that_was_being_cancelled_is_cancelled_by_the_next_server(tmp_path):
    store = Store(tmp_path, Limits())
    file = store.add_file(io.BytesIO(line_of("a", "b").encode()), "a.jsonl", "batch", "me")["id"]

    async def first() -> str:
        body = BatchRequest(input_file_id=file, endpoint="/v1/completions")
        return Batches(store, echo, 1).create(body, "me")["id"]

    async def second() -> dict:
        batches = Batches(store, echo, 1)
        batches.resume()
        await asyncio.gather(*batches._tasks.values())
        return batches.read(name, "me")

    name = asyncio.run(first())
    store.write(store.read(name, "me") | {"status": "cancelling"}, "me")  # as where the first one was killed
    done = asyncio.run(second())
    assert (done["status"], done["output_file_id"], done["cancelled_at"] is None) == ("cancelled", None, False)
