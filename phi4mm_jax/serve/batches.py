"""/v1/batches: files of requests, answered beside those of clients who wait, each line as its endpoint answers it."""

import asyncio
import codecs
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from phi4mm_jax.serve.errors import ApiError, server_failed
from phi4mm_jax.serve.files import Store, new_id
from phi4mm_jax.serve.models import BatchRequest
from phi4mm_jax.utils.strict_json import parse_json, strict_json

_log = logging.getLogger(__name__)
_ENDED = ("completed", "failed", "cancelled")
_KEYS = {"custom_id", "method", "url", "body"}

Answer = Callable[[str, dict[str, Any], str], Awaitable[dict[str, Any]]]


class Batches:
    """Batches of all clients. Those that a server's end interrupts are resumed by the next one.

    One server at a time has the store (`Store.lock`), so that each line has one answer.

    Args:
        answer: answers a body for an endpoint; its third argument is the owner.
        parallel: lines of a batch that are asked at once.
    """

    def __init__(self, store: Store, answer: Answer, parallel: int):
        self._store, self._answer, self._parallel = store, answer, parallel
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._running: dict[str, dict[str, Any]] = {}

    def resume(self) -> None:
        """Begin to answer what is not answered yet."""
        for value in self._store.all("batch"):
            if value["status"] not in _ENDED:
                self._start(value, value.pop("owner"))

    async def close(self) -> None:
        """Stop; the next server resumes them."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def create(self, body: BatchRequest, owner: str) -> dict[str, Any]:
        """Begin to answer a file.

        Raises:
            ApiError: there is no such file.
        """
        file = self._store.read(body.input_file_id, owner)
        now = int(time.time())
        value = {
            "id": new_id("batch"), "object": "batch", "endpoint": body.endpoint, "errors": None,
            "input_file_id": file["id"], "completion_window": body.completion_window, "status": "in_progress",
            "output_file_id": new_id("file"), "error_file_id": new_id("file"), "created_at": now,
            "in_progress_at": now, "expires_at": None, "finalizing_at": None, "completed_at": None,
            "failed_at": None, "expired_at": None, "cancelling_at": None, "cancelled_at": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0}, "metadata": body.metadata,
        }  # fmt: skip
        self._store.write(value, owner)
        self._start(value, owner)
        return _shown(value)

    def read(self, name: str, owner: str) -> dict[str, Any]:
        """Return a batch. Raises ApiError: there is none of that name."""
        return _shown(self._store.read(name, owner) | self._running.get(name, {}))

    def list(self, owner: str) -> list[dict[str, Any]]:
        """Return an owner's batches, the newest first."""
        return [_shown(value | self._running.get(value["id"], {})) for value in self._store.list("batch", owner)]

    def cancel(self, name: str, owner: str) -> dict[str, Any]:
        """End a batch soon; its answers so far stay. Raises ApiError: there is none of that name."""
        self._store.read(name, owner)
        if (value := self._running.get(name)) is not None and value["status"] == "in_progress":
            value |= {"status": "cancelling", "cancelling_at": int(time.time())}
            self._store.write(value, owner)
            self._tasks[name].cancel()
        return self.read(name, owner)

    def _start(self, value: dict[str, Any], owner: str) -> None:
        self._running[value["id"]] = value
        self._tasks[value["id"]] = asyncio.create_task(self._run(value, owner))

    async def _run(self, value: dict[str, Any], owner: str) -> None:
        name = value["id"]
        try:
            if value["status"] == "in_progress":
                await self._answer_lines(value, owner)
            value["status"] = "cancelled" if value["status"] == "cancelling" else "completed"
        except asyncio.CancelledError:
            if value["status"] != "cancelling":
                raise  # the server ends
            value["status"] = "cancelled"
        except Exception as error:
            _log.exception("%s has failed", name)
            value |= {"status": "failed", "errors": {"object": "list", "data": [_failure(error)]}}
        finally:
            self._tasks.pop(name, None)
            self._running.pop(name, None)
        value[f"{value['status']}_at"] = int(time.time())
        for kind in ("output", "error"):
            file = value[f"{kind}_file_id"]
            if self._store.content(file).exists():
                self._store.describe_file(file, f"{name}_{kind}.jsonl", "batch_output", owner)
            else:
                value[f"{kind}_file_id"] = None
        self._store.write(value, owner)

    async def _answer_lines(self, value: dict[str, Any], owner: str) -> None:
        output, errors = (self._store.content(value[f"{kind}_file_id"]) for kind in ("output", "error"))
        counts = value["request_counts"]
        done: set[str] = set()
        for path, key in ((output, "completed"), (errors, "failed")):
            found = _read_names(path)
            counts[key] = len(found)
            done |= found
        counts["total"] = len(done)
        places = asyncio.Semaphore(self._parallel)

        async def answer(name: str, line: bytes, seen: bool) -> None:
            try:
                response = await self._response(value, line, seen, owner)
            finally:
                places.release()
            failed = response["status_code"] != 200
            record = {"id": f"batch_req_{value['id']}_{name}", "custom_id": name, "response": response, "error": None}
            with (errors if failed else output).open("a") as file:
                file.write(strict_json(record) + "\n")
            counts["failed" if failed else "completed"] += 1

        names: set[str] = set()
        with self._store.content(value["input_file_id"]).open("rb") as lines:
            async with asyncio.TaskGroup() as group:
                for number, line in enumerate(lines, 1):
                    line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                    if not line.strip():
                        continue
                    name = _name_of(line) or f"line {number}"
                    name, seen = (f"line {number}", True) if name in names else (name, False)
                    names.add(name)
                    if name in done:
                        continue
                    counts["total"] += 1
                    await places.acquire()
                    group.create_task(answer(name, line, seen))

    async def _response(self, value: dict[str, Any], line: bytes, seen: bool, owner: str) -> dict[str, Any]:
        """Return the response to a line: as its endpoint would answer, errors included."""
        try:
            if seen:
                raise ApiError(400, "custom_id is that of an earlier line; give each its own", param="custom_id")
            body = await self._answer(value["endpoint"], _body_of(line, value["endpoint"]), owner)
            return {"status_code": 200, "request_id": new_id("req"), "body": body}
        except ApiError as caught:
            error = caught
        except Exception:
            _log.exception("a line of %s has failed", value["id"])
            error = server_failed()
        return {"status_code": error.status_code, "request_id": new_id("req"), "body": error.body}


def _shown(value: dict[str, Any]) -> dict[str, Any]:
    """Return a batch as clients see it: its files are named once they are there."""
    return value if value["status"] in _ENDED else {**value, "output_file_id": None, "error_file_id": None}


def _failure(error: Exception) -> dict[str, Any]:
    while isinstance(error, ExceptionGroup):  # of the lines that were asked at once: the first one ended the others
        error = error.exceptions[0]
    # Whatever else it says may name a place on the server's machine.
    message = server_failed().detail
    if isinstance(error, OSError) and error.strerror:
        message = f"[Errno {error.errno}] {error.strerror}"
    return {"code": type(error).__name__, "message": message, "param": None, "line": None}


def _read_names(path: Path) -> set[str]:
    """Return the names of the lines that are answered; cut off what a killed server left of a last one."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return {json.loads(line)["custom_id"] for line in whole.splitlines()}


def _name_of(line: bytes) -> str | None:
    try:
        name = parse_json(line.decode()).get("custom_id")
    except (ValueError, RecursionError, AttributeError):
        return None
    return name if isinstance(name, str) else None


def _body_of(line: bytes, endpoint: str) -> dict[str, Any]:
    """Return the body of a line.

    Raises:
        ApiError: the line is none of this endpoint.
    """
    try:
        values = parse_json(line.decode())
    except UnicodeDecodeError as error:
        message = f"the line is not UTF-8 (at byte {error.start}); save the file as UTF-8"
        raise ApiError(400, message) from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the line is not JSON ({error}); expected one object a line") from None
    if not isinstance(values, dict) or not isinstance(values.get("custom_id"), str):
        raise ApiError(400, "the line has no custom_id that is a string; give each its own", param="custom_id")
    if unknown := sorted(values.keys() - _KEYS):
        raise ApiError(400, f"{unknown[0]!r} is not known; expected {', '.join(sorted(_KEYS))}", param=unknown[0])
    given = values.get("method", "POST"), values.get("url", endpoint)
    if given != ("POST", endpoint):
        raise ApiError(400, f"url is {given[0]} {given[1]!r:.80}, but the batch is for POST {endpoint}", param="url")
    if not isinstance(values.get("body"), dict):
        raise ApiError(400, "body is no object; give that of a request to the endpoint", param="body")
    if values["body"].get("stream"):
        raise ApiError(400, "stream is true, but a line of a batch is answered at once; leave it out", param="stream")
    return values["body"]
