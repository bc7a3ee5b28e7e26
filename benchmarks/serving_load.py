"""The server under load, beside the engine alone on the same requests: python -m benchmarks.serving_load.

Clients of the OpenAI API send held-out questions about text, pictures and clips to `infer.serve`, a process of its own.
A third of them asks for one of two adapters beside the model's own: copies of its own two, on top of what the media
ask for. A tenth of the requests is cancelled after the first token, a tenth is malformed. Every other one has to be
answered as the engine alone answers it; what is not is counted, and the exit status is then 1.
"""

import argparse
import asyncio
import base64
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import phi4mm_jax
from phi4mm_jax.engine import Engine, EngineConfig, Request
from phi4mm_jax.evaluation.items import read_items

ROOT = Path(__file__).parent.parent
TYPES = {".jpg": "image/jpeg", ".png": "image/png", ".ogg": "audio/ogg", ".wav": "audio/wav", ".flac": "audio/flac"}
ADAPTERS, RANK = ("one", "two"), 16  # names of the adapters beside the model's own, and room for their ranks
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
    parser.add_argument("--model", default=str(ROOT / "assets" / "tiny"), help="a checkpoint's folder")
    parser.add_argument("--items", type=Path, nargs="+", help="manifests of questions",
                        default=sorted((ROOT / "tests" / "fixtures" / "held").glob("*.jsonl")))  # fmt: skip
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--small", action="store_true", help="a few requests, without warm-up; its times mean nothing")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.clients, arguments.requests, arguments.slots = 4, 40, 2
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
    """Answer by the engine alone, then by the server, and print the figures."""
    own, tokens, alone = engine_alone(arguments, chats, plan, asked, adapters)
    with server(arguments, adapters) as (url, process):
        before, used, own_used = memory(process), cpu_seconds(process), time.process_time()
        counts, seconds = asyncio.run(load(url, [as_sent(chat) for chat in chats], own, plan, asked, arguments))
        used, own_used = cpu_seconds(process) - used, time.process_time() - own_used
        figures = httpx.get(f"{url}/metrics").text
        after = memory(process)
        left = {name: figure(figures, name) for name in ("running", "waiting", "cache_pages_in_use", "slots_in_use")}
    rate, own_rate, answered = tokens / seconds, tokens / alone, plan.count("answer")
    p50, p99 = np.percentile(counts.first, [50, 99])
    print(f"{len(plan)} requests of {arguments.clients} clients, {arguments.slots} slots, {processor()}")
    print("| | requests/s | tokens/s |\n|---|---|---|")
    print(f"| engine alone, with cancelled ones beside | {answered / alone:.1f} | {own_rate:.0f} |")
    print(f"| server, with cancelled and malformed ones beside | {answered / seconds:.1f} | {rate:.0f} |")
    print(f"of {os.cpu_count()} cores the server took {used / seconds:.2f}, and its clients {own_used / seconds:.2f}")
    print(f"server / engine alone: {rate / own_rate:.2f}; first token p50 {p50:.2f} s, p99 {p99:.2f} s")
    print(f"answers equal to the engine's: {counts.equal}, others: {counts.other}; cancelled: {counts.cancelled}")
    print(f"refused as expected: {counts.refused}, otherwise: {len(counts.wrong_status)} {counts.wrong_status[:3]}")
    print(f"left over: {left}; resident memory {before:.0f} MiB before, {after:.0f} MiB after")
    return 1 if counts.other or counts.wrong_status or any(left.values()) else 0


def copied_adapters(model: Path, folder: Path) -> dict[str, Path]:
    """Copy the model's two adapters, as users' that are on top of others, not in their place."""
    sources = dict(zip(ADAPTERS, ("speech-lora", "vision-lora"), strict=True))
    return {name: Path(shutil.copytree(model / source, folder / name)) for name, source in sources.items()}


def engine_alone(
    arguments: argparse.Namespace, chats: Sequence[Any], plan: Sequence[str], asked: Sequence[Asked],
    adapters: dict[str, Path],
) -> Any:  # fmt: skip
    """Return the answer to each that is asked, the tokens of those that are to be answered, and the seconds of all."""
    model = phi4mm_jax.load(arguments.model, dtype="float32")
    config = EngineConfig(
        slots=arguments.slots, cache_tokens=16384, top_logprobs=20, max_adapters=len(adapters), max_adapter_rank=RANK
    )

    def fresh_engine() -> Engine:  # with empty caches, as the server has it
        engine = model.engine(config)
        for name, folder in adapters.items():
            engine.load_adapter(name, folder)
        if not arguments.small:
            engine.warm_up()
        return engine

    def request(place: int, adapter: str | None) -> Request:
        return Request(chats[place], max_new_tokens=arguments.max_new_tokens, adapter=adapter)

    kinds = sorted(set(asked), key=str)
    own = {kinds[i]: completion.text for i, completion in fresh_engine().run(request(*kind) for kind in kinds)}
    kept = [(kind, request(*each)) for kind, each in zip(plan, asked, strict=True) if kind != "malformed"]
    engine = fresh_engine()
    began = time.perf_counter()
    return own, tokens_of(engine, kept), time.perf_counter() - began


def tokens_of(engine: Engine, requests: Sequence[tuple[str, Request]]) -> int:
    """Serve requests, and cancel those to "cancel" after the first token; return the tokens of the others."""
    incoming, kinds, tokens = iter(requests), {}, 0
    while True:
        while len(engine.queue) + len(engine.scheduler.resident) < 2 * engine.config.slots:
            if (given := next(incoming, None)) is None:
                break
            kinds[engine.submit(given[1])] = given[0]
        if engine.idle:
            return tokens
        for update in engine.step():
            if kinds[update.id] == "cancel":
                engine.cancel(update.id)
            elif update.completion is not None:
                tokens += len(update.completion.tokens)


@contextmanager
def server(arguments: argparse.Namespace, adapters: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Start the server; gives its URL and process once it is ready."""
    command = [
        sys.executable, "-m", "infer.serve", "--model", arguments.model, "--dtype", "float32", "--slots",
        str(arguments.slots), "--cache-tokens", "16384", "--port", "0", "--max-waiting", str(2 * arguments.clients),
        "--max-adapter-rank", str(RANK), *(f"--adapter={name}={folder}" for name, folder in adapters.items()),
        *(["--no-warmup"] if arguments.small else []),
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stderr=log)
        try:
            while not (found := re.search(r"http://[\d.]+:\d+", contents(log))):
                if process.poll() is not None:
                    raise RuntimeError(contents(log))
                time.sleep(0.1)
            while httpx.get(f"{found[0]}/ready").status_code != 200:
                time.sleep(0.5)
            yield found[0], process.pid
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
    arguments: argparse.Namespace,
) -> tuple[Counts, float]:  # fmt: skip
    """Send all requests; so many clients, each one after the other."""
    counts, left = Counts(), iter(enumerate(zip(plan, asked, strict=True)))
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
    return counts, seconds


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


def with_children(process: int) -> list[int]:
    """Return a process and those that it has started: the engine's."""
    return [process, *map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())]


def memory(process: int) -> float:
    """Return the resident memory of a process and its children in MiB."""
    statuses = [Path(f"/proc/{each}/status").read_text() for each in with_children(process)]
    return sum(int(kib) for status in statuses for kib in re.findall(r"VmRSS:\s+(\d+) kB", status)) / 1024


def cpu_seconds(process: int) -> float:
    """Return the processor time that a process and its children have taken."""
    stats = [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split() for each in with_children(process)]
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / os.sysconf("SC_CLK_TCK")


def processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else 'unknown processor'}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())
