"""A step of adapter tuning beside transformers and PEFT on PyTorch: same weights, losses and threads, in one run.

    python -m benchmarks.train_vs_torch [--small] [--rounds N]

The model has the release's widths and vocabulary but two decoder layers, in float32. A step is the forward and backward
pass of the speech adapter over rows of text, clipping, and AdamW; half of the positions are in the loss mask. Each side
runs in a process of its own, in turns; its fastest step counts, and the most memory that it held while stepping. Ratios
are PyTorch's figure over ours: from 1.0 on, ours is as fast, or needs as little. PyTorch is given the faster of its two
kinds of attention. The first row has the products of the step's linear maps and head alone, forward and for the
gradients of their inputs.

Needs `pip install '.[tests]'`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PRODUCTS = ((3072, 5120), (3072, 3072), (3072, 16384), (8192, 3072)) * 2  # inputs and outputs, of two layers
HEAD = (3072, 200064)
RATE, WARM = 1e-4, 2  # learning rate; steps before any counts
SIDES = ("ours", "sdpa", "eager")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the tests' tiny checkpoint: shows only that it runs")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, Path(arguments.checkpoint), arguments.small)))
        return 0
    from benchmarks.models import small_checkpoint, wide_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = (small_checkpoint if arguments.small else wide_checkpoint)(folder)
        found = {side: [] for side in SIDES}
        for _ in range(arguments.rounds):
            for side in SIDES:
                found[side].append(in_process(side, checkpoint, arguments.small))
    losses = {side: np.asarray(runs[0]["losses"]) for side, runs in found.items()}
    for side in SIDES[1:]:
        np.testing.assert_allclose(losses["ours"], losses[side], rtol=1e-3)
    print("| | ours | PyTorch | its attention | ratio |\n|---|---|---|---|---|")
    rows = (("bare products", "products", "s"), ("step", "seconds", "s"), ("peak memory", "bytes", "GiB"))
    for name, key, unit in rows:
        best = {side: min(run[key] for run in runs) / (1 if unit == "s" else 2**30) for side, runs in found.items()}
        kind = min(SIDES[1:], key=lambda side: best[side])
        print(f"| {name}, {unit} | {best['ours']:.3f} | {best[kind]:.3f} | {kind} | {best[kind] / best['ours']:.2f} |")
    return 0


def in_process(side: str, checkpoint: Path, small: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.train_vs_torch", "--side", side, "--checkpoint", str(checkpoint)]
    run = subprocess.run([*command, *["--small"] * small], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def measure(side: str, checkpoint: Path, small: bool) -> dict[str, Any]:
    """Return the seconds of the fastest step, the peak of memory while stepping, and the losses of all steps."""
    rows, length = (2, 64) if small else (2, 512)
    tokens = np.random.default_rng(0).integers(0, 600, (rows, length)).astype(np.int32)
    step = ours(checkpoint, tokens) if side == "ours" else theirs(checkpoint, tokens, side)
    losses = [step() for _ in range(WARM)]
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    seconds = fastest(lambda: losses.append(step()), 3)
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    held = int(peak[1]) * 1024 if peak else 0
    return {"seconds": seconds, "bytes": held, "losses": losses, "products": products(side, rows * length, small)}


def products(side: str, positions: int, small: bool) -> float:
    """Return the seconds of a step's products and of their transposes: linear maps, the head for half the positions."""
    random = np.random.default_rng(0)
    maps = [*((positions, *pair) for pair in PRODUCTS), (positions // 2, HEAD[0], 600 if small else HEAD[1])]
    weights = [random.standard_normal((inputs, outputs), np.float32) for _, inputs, outputs in maps]
    sizes = {(rows, size) for rows, *both in maps for size in both}
    xs = {(rows, size): random.standard_normal((rows, size), np.float32) for rows, size in sizes}
    if side == "ours":
        import jax

        program = jax.jit(lambda x, d, weight: (x @ weight, d @ weight.T))
        given = [jax.device_put((xs[n, i], xs[n, o], w)) for (n, i, o), w in zip(maps, weights, strict=True)]

        def run() -> None:
            for one in given:
                jax.block_until_ready(program(*one))
    else:
        import torch

        own = {size: torch.from_numpy(x) for size, x in xs.items()}
        kept = [torch.from_numpy(w.T.copy()) for w in weights]

        def run() -> None:
            for (rows, inputs, outputs), w in zip(maps, kept, strict=True):
                torch.nn.functional.linear(own[rows, inputs], w)
                torch.matmul(own[rows, outputs], w)

    return fastest(run, 4)


def fastest(call: Callable[[], Any], count: int) -> float:
    """Return the seconds of the fastest of so many calls."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def ours(checkpoint: Path, tokens: np.ndarray) -> Callable[[], float]:
    import phi4mm_jax
    from phi4mm_jax.testing.adapter_steps import speech_adapter_step

    model = phi4mm_jax.load(checkpoint, dtype="float32", scan=True)
    length = tokens.shape[1]
    position = np.arange(length)
    weights = np.broadcast_to((position >= length // 2) & (position < length - 1), tokens.shape).astype(np.float32)
    step = speech_adapter_step(model.module, model.variables, tokens, weights, RATE)
    return lambda: float(step())


def theirs(checkpoint: Path, tokens: np.ndarray, attention: str) -> Callable[[], float]:
    import torch

    from benchmarks.vs_transformers import use_attention
    from tests.helpers import torch_native

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA takes
    native = torch_native.load_native(checkpoint)
    use_attention(native.model, attention)
    torch_native._use_adapter(native.model, "speech")
    trained = [p.requires_grad_(True) for n, p in native.parameters().items() if ".lora_" in n and ".speech." in n]
    adamw = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.01)
    ids = torch.tensor(tokens, dtype=torch.int64)
    labels = ids.clone()
    labels[:, : tokens.shape[1] // 2 + 1] = torch_native.IGNORED

    def one() -> float:
        adamw.zero_grad()
        # The head only where it counts, as ours; the answer is the last half.
        kept = tokens.shape[1] - tokens.shape[1] // 2
        logits = native.model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, -kept + 1 :].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        return loss.item()

    return one


if __name__ == "__main__":
    sys.exit(main())
