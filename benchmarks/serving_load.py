"""The server under load, beside the engine alone on the same requests: python -m benchmarks.serving_load.

Clients of the OpenAI API send held-out questions about text, pictures and clips to `infer.serve`, a process of its own.
A third of them asks for one of two adapters beside the model's own: copies of its own two, on top of what the media
ask for. A tenth of the requests is cancelled after the first token, a tenth is malformed. Every other one has to be
answered as the engine alone answers it; what is not is counted, and the exit status is then 1.

An accelerator's engine does not compute on the cores that serve; on a CPU it does, and what the server and the clients
take is then missing on one side of the comparison only. With --device-cores N the engine's process has N cores of the
host, and XLA as many threads, on both sides; the server's other process and the clients have the other cores. What the
engine's process does beside computing (tokenising, decoding of media, messages) is done on its cores on both sides.
"""

import argparse
import asyncio
import base64
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import phi4mm_jax
from benchmarks.machine import processor
from benchmarks.paths import HELD, ROOT, SMALL_MODEL
from phi4mm_jax.engine import Engine, EngineConfig, Request
from phi4mm_jax.evaluation.items import read_items

TYPES = {".jpg": "image/jpeg", ".png": "image/png", ".ogg": "audio/ogg", ".wav": "audio/wav", ".flac": "audio/flac"}
ADAPTERS, RANK = ("one", "two"), 16  # names of the adapters beside the model's own, and room for their ranks
TURNS = 2  # of the engine alone and the server
Asked = tuple[int, str | None]  # a chat and an adapter
MALFORMED: list[tuple[dict[str, Any], int]] = [
    ({"messages": []}, 400),
    ({"messages": [{"role": "user", "content": "one"}], "temperature": -1}, 400),
    ({"messages": [{"role": "user", "content": "one"}], "model": "another"}, 404),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]}, 400),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AAAA"}}]}]}, 400),
    ({"messages": [{"role": "user", "content": "one"}], "unknown": True}, 400),
]


@dataclass
class Counts:
    """Outcomes of the requests."""

    equal: int = 0
    other: int = 0
    cancelled: int = 0
    refused: int = 0
    wrong_status: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first token, of those answered


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving_load", description=__doc__)
    parser.add_argument("--model", default=str(SMALL_MODEL), help="a checkpoint's folder")
    parser.add_argument("--items", type=Path, nargs="+", help="manifests of questions",
                        default=sorted(HELD.glob("*.jsonl")))  # fmt: skip
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument(
        "--device-cores", metavar="N", type=int, help="that only the engine's process has, on each side"
    )
    parser.add_argument("--small", action="store_true", help="a few requests, without warm-up; its times mean nothing")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.clients, arguments.requests, arguments.slots = 4, 40, 2
    cores = sorted(os.sched_getaffinity(0))
    if arguments.device_cores is None:
        arguments.engine_on = arguments.others_on = cores
    elif not 0 < arguments.device_cores < len(cores):
        parser.error(f"--device-cores is {arguments.device_cores}; expected 1 to {len(cores) - 1}")
    else:
        arguments.engine_on, arguments.others_on = cores[: arguments.device_cores], cores[arguments.device_cores :]
        os.environ["PJRT_NPROC"] = str(arguments.device_cores)  # threads of XLA, here and in the server's engine
    chats = [item.prompt for path in arguments.items for item in read_items(path)]
    chats = chats[:: len(chats) // 8] if arguments.small else chats
    drawn = random.Random(0)
    plan = [drawn.choices(["answer", "cancel", "malformed"], [8, 1, 1])[0] for _ in range(arguments.requests)]
    asked = [(drawn.randrange(len(chats)), drawn.choice([None, None, None, None, *ADAPTERS])) for _ in plan]

    with tempfile.TemporaryDirectory() as folder:
        adapters = copied_adapters(Path(arguments.model), Path(folder))
        return measure(arguments, chats, plan, asked, adapters)


def measure(
    arguments: argparse.Namespace, chats: Sequence[Any], plan: Sequence[str], asked: Sequence[Asked],
    adapters: dict[str, Path],
) -> int:  # fmt: skip
    """Answer by the engine alone and by the server, in turns, and print the figures."""
    sent, counts, tokens = [as_sent(chat) for chat in chats], Counts(), 0
    seconds: dict[str, float] = {"alone": 0.0, "server": 0.0}
    used: dict[str, float] = {"alone": 0.0, "engine": 0.0, "server": 0.0, "clients": 0.0}
    bind(os.getpid(), arguments.others_on)
    with server(arguments, adapters) as (process, url_when_ready):
        bind(os.getpid(), arguments.engine_on)  # meanwhile
        own, engine = engine_alone(arguments, chats, asked, adapters)
        url, its_engine = url_when_ready(), children(process)
        for child in its_engine:
            bind(child, arguments.engine_on)
        before = memory([process, *its_engine])
        for turn in range(TURNS):  # the machine's speed drifts
            part = slice(turn * len(plan) // TURNS, (turn + 1) * len(plan) // TURNS)
            bind(os.getpid(), arguments.engine_on)
            requests = [
                (kind, request_of(arguments, chats, *each))
                for kind, each in zip(plan[part], asked[part], strict=True) if kind != "malformed"
            ]  # fmt: skip
            began, own_used = time.perf_counter(), time.process_time()
            tokens += tokens_of(engine, requests)
            seconds["alone"] += time.perf_counter() - began
            used["alone"] += time.process_time() - own_used
            bind(os.getpid(), arguments.others_on)
            then = cpu_seconds(its_engine), cpu_seconds([process]), time.process_time()
            seconds["server"] += asyncio.run(load(url, sent, own, plan[part], asked[part], arguments, counts))
            now = cpu_seconds(its_engine), cpu_seconds([process]), time.process_time()
            for name, start, end in zip(("engine", "server", "clients"), then, now, strict=True):
                used[name] += end - start
        figures = httpx.get(f"{url}/metrics").text
        after = memory([process, *its_engine])
        left = {name: figure(figures, name) for name in ("running", "waiting", "cache_pages_in_use", "slots_in_use")}
    answered, served = plan.count("answer"), len(plan) - plan.count("malformed")
    p50, p99 = np.percentile(counts.first, [50, 99])
    each = {name: f"{1e3 * value / served:.1f} ms" for name, value in used.items()}
    print(f"{len(plan)} requests of {arguments.clients} clients, {arguments.slots} slots, {processor()}")
    print(f"the engine's process has cores {arguments.engine_on}, the server's and the clients {arguments.others_on}")
    print("| | requests/s | tokens/s |\n|---|---|---|")
    for name, what in (
        ("alone", "engine alone, with cancelled ones"),
        ("server", "server, with malformed ones as well"),
    ):
        print(f"| {what} beside | {answered / seconds[name]:.1f} | {tokens / seconds[name]:.0f} |")
    ratio = seconds["alone"] / seconds["server"]
    print(f"server / engine alone: {ratio:.2f}; first token p50 {p50:.2f} s, p99 {p99:.2f} s")
    print(f"processor time of a request: the engine alone {each['alone']}, the server's engine {each['engine']}, "
          f"its other process {each['server']}, the clients {each['clients']}")  # fmt: skip
    print(f"answers equal to the engine's: {counts.equal}, others: {counts.other}; cancelled: {counts.cancelled}")
    print(f"refused as expected: {counts.refused}, otherwise: {len(counts.wrong_status)} {counts.wrong_status[:3]}")
    print(f"left over: {left}; resident memory {before:.0f} MiB before, {after:.0f} MiB after")
    return 1 if counts.other or counts.wrong_status or any(left.values()) else 0


def copied_adapters(model: Path, folder: Path) -> dict[str, Path]:
    """Copy the model's two adapters, as users' that are on top of others, not in their place."""
    sources = dict(zip(ADAPTERS, ("speech-lora", "vision-lora"), strict=True))
    return {name: Path(shutil.copytree(model / source, folder / name)) for name, source in sources.items()}


def engine_alone(
    arguments: argparse.Namespace, chats: Sequence[Any], asked: Sequence[Asked], adapters: dict[str, Path]
) -> tuple[dict[Asked, str], Engine]:
    """Return the answer to each that is asked, and an engine whose caches are empty, as the server's are."""
    model = phi4mm_jax.load(arguments.model, dtype="float32")
    config = EngineConfig(
        slots=arguments.slots, cache_tokens=16384, top_logprobs=20, max_adapters=len(adapters), max_adapter_rank=RANK
    )

    def fresh_engine() -> Engine:
        engine = model.engine(config)
        for name, folder in adapters.items():
            engine.load_adapter(name, folder)
        if not arguments.small:
            engine.warm_up()
        return engine

    kinds = sorted(set(asked), key=str)
    requests = (request_of(arguments, chats, *kind) for kind in kinds)
    own = {kinds[i]: completion.text for i, completion in fresh_engine().run(requests)}
    engine = fresh_engine()
    gc.collect()
    gc.freeze()  # as the server's engine does
    return own, engine


def request_of(arguments: argparse.Namespace, chats: Sequence[Any], place: int, adapter: str | None) -> Request:
    return Request(chats[place], max_new_tokens=arguments.max_new_tokens, adapter=adapter)


def tokens_of(engine: Engine, requests: Sequence[tuple[str, Request]]) -> int:
    """Serve requests, and cancel those to "cancel" after the first token; return the tokens of the others.

    A client knows of a token at the end of a round, and is heard at the end of the next one; so it is here.
    """
    incoming, kinds, tokens, unwanted = iter(requests), {}, 0, []
    while True:
        while len(engine.queue) + len(engine.scheduler.resident) < 2 * engine.config.slots:
            if (given := next(incoming, None)) is None:
                break
            kinds[engine.submit(given[1])] = given[0]
        if engine.idle:
            return tokens
        updates, cancelled, unwanted = engine.step(), unwanted, []
        for request_id in cancelled:
            engine.cancel(request_id)
        for update in updates:
            if kinds[update.id] == "cancel":
                unwanted.append(update.id)
            elif update.completion is not None:
                tokens += len(update.completion.tokens)


@contextmanager
def server(arguments: argparse.Namespace, adapters: dict[str, Path]) -> Iterator[tuple[int, Callable[[], str]]]:
    """Start the server; gives its process, and what waits until it is ready and returns its URL."""
    command = [
        sys.executable, "-m", "infer.serve", "--model", arguments.model, "--dtype", "float32", "--slots",
        str(arguments.slots), "--cache-tokens", "16384", "--port", "0", "--max-waiting", str(2 * arguments.clients),
        "--max-adapter-rank", str(RANK), *(f"--adapter={name}={folder}" for name, folder in adapters.items()),
        *(["--no-warmup"] if arguments.small else []),
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stderr=log)

        def url_when_ready() -> str:
            while not (found := re.search(r"http://[\d.]+:\d+", contents(log))):
                if process.poll() is not None:
                    raise RuntimeError(contents(log))
                time.sleep(0.1)
            while httpx.get(f"{found[0]}/ready").status_code != 200:
                time.sleep(0.5)
            return found[0]

        try:
            yield process.pid, url_when_ready
            process.send_signal(signal.SIGTERM)
            process.wait(120)
        finally:
            process.kill()


def contents(log: Any) -> str:
    return os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace")


def as_sent(chat: Sequence[Any]) -> list[dict[str, Any]]:
    """Return a chat as clients send it: media as data URLs."""

    def part(given: dict[str, Any]) -> dict[str, Any]:
        kind = given["type"]
        if kind == "text":
            return given
        path = Path(given[kind])
        url = f"data:{TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
        return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}

    def content(given: Any) -> Any:
        return given if isinstance(given, str) else [part(each) for each in given]

    return [{**message, "content": content(message["content"])} for message in chat]


async def load(
    url: str, chats: Sequence[Any], own: dict[Asked, str], plan: Sequence[str], asked: Sequence[Asked],
    arguments: argparse.Namespace, counts: Counts,
) -> float:  # fmt: skip
    """Send all requests; so many clients, each one after the other. Count their outcomes; return the seconds."""
    left = iter(enumerate(zip(plan, asked, strict=True)))
    limits = httpx.Limits(max_connections=arguments.clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:

        async def client() -> None:
            for number, (kind, (place, adapter)) in left:
                if kind == "malformed":
                    body, expected = MALFORMED[number % len(MALFORMED)]
                    status = (await http.post("/v1/chat/completions", json=body)).status_code
                    if status == expected:
                        counts.refused += 1
                    else:
                        counts.wrong_status.append(f"{body} got {status}"[:200])
                    continue
                body = {"messages": chats[place], "max_tokens": arguments.max_new_tokens, "stream": True}
                body |= {} if adapter is None else {"model": adapter}
                began, text = time.perf_counter(), ""
                async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                    if answer.status_code != 200:
                        counts.wrong_status.append(f"{answer.status_code} {(await answer.aread())[:200]!r}")
                        continue
                    async for line in answer.aiter_lines():
                        piece = content_of(line)
                        if piece and not text:
                            if kind == "cancel":
                                break
                            counts.first.append(time.perf_counter() - began)
                        text += piece
                if kind == "cancel":
                    counts.cancelled += 1
                elif text == own[place, adapter]:
                    counts.equal += 1
                else:
                    counts.other += 1

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(arguments.clients)))
        seconds = time.perf_counter() - began
        await asyncio.sleep(1)  # the last ones that were cancelled end
    return seconds


def content_of(line: str) -> str:
    """Return the text of an event."""
    data = line.removeprefix("data: ")
    if not data.startswith("{"):
        return ""
    event = json.loads(data)
    return "".join(choice["delta"].get("content") or "" for choice in event.get("choices", []))


def figure(metrics: str, name: str) -> float:
    found = re.search(rf"^phi4mm_{name} (\S+)$", metrics, re.M)
    assert found is not None, name
    return float(found[1])


def children(process: int) -> list[int]:
    """Return the processes that one has started: the server has the engine's."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def bind(process: int, cores: Sequence[int]) -> None:
    """Leave a process, all its threads and those that they start to these cores."""
    for thread in Path(f"/proc/{process}/task").iterdir():
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread.name), cores)


def memory(processes: Sequence[int]) -> float:
    """Return the resident memory of processes in MiB."""
    statuses = [Path(f"/proc/{process}/status").read_text() for process in processes]
    return sum(int(kib) for status in statuses for kib in re.findall(r"VmRSS:\s+(\d+) kB", status)) / 1024


def cpu_seconds(processes: Sequence[int]) -> float:
    """Return the processor time that processes have taken."""
    texts = [Path(f"/proc/{process}/stat").read_text() for process in processes]
    stats = [text.rpartition(")")[2].split() for text in texts]
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
