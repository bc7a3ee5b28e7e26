"""Runs of train.sft by two processes of this machine, which are hosts of one run, on the small model."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

ROOT = Path(__file__).parents[2]


def write_recipe(folder: Path, model: Path, **data: Any) -> Path:
    """Write a recipe of texts whose evaluation is the loss, four short steps for two devices; return its path.

    Args:
        data: settings of `data` that differ.
    """
    for name, count in (("train", 32), ("held", 8)):
        samples = [
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x " * (12 + i % 8)}]}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    settings = {
        "model": str(model), "output": str(folder / "run"), "dtype": "float32", "mesh": "fsdp=2", "save_every": 2,
        "trainable": ["params/decoder/norm", "params/decoder/layers/mlp/down"],
        "data": {
            "sources": [{"path": str(folder / "train.jsonl")}], "steps": 4, "threads": 1,
            "packing": {"rows": 4, "lengths": [64], "window": 1},
        } | data,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
        "evaluation": {"sources": [{"path": str(folder / "held.jsonl")}], "every": 2},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def host_options(address: str, host: int) -> list[str]:
    """Return the options of one of two hosts; `address` is the first one's."""
    return ["--coordinator", address, "--num-processes", "2", "--process-id", f"{host}"]


def start_hosts(
    command: Callable[[str, int], Sequence[object]],
    environment: Callable[[int], dict[str, str]] = lambda host: {},
    count: int = 2,
) -> list[subprocess.Popen[str]]:
    """Start processes at once; `command` gives a host's arguments of Python, by the first one's address."""
    ours = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    address = f"localhost:{free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command(address, host))], env=ours | environment(host), cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for host in range(count)
    ]  # fmt: skip


def outcomes(hosts: Sequence[subprocess.Popen[str]], seconds: float = 300) -> list[tuple[int, str, str]]:
    """Return status, output and error of each process as it ends; one that takes longer is killed.

    Raises:
        subprocess.TimeoutExpired: one takes longer.
    """
    try:
        found = [host.communicate(timeout=seconds) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    return [
        (host.returncode, "".join(x for x in out.splitlines(True) if not x.startswith("[Gloo]")), error)
        for host, (out, error) in zip(hosts, found, strict=True)
    ]


def tensorboard_steps(path: Path) -> list[int]:
    """Return the steps of the losses in a file of TensorBoard's; its last record may be cut off."""
    content, at, steps = path.read_bytes(), 0, []
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 8], "little")  # a length with its checksum, then the event
        if end + 4 > len(content):
            break
        event = Event.FromString(content[at + 12 : end])
        steps += [event.step for value in event.summary.value if value.tag == "loss"]
        at = end + 4
    return steps
