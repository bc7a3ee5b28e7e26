"""Linear maps of a call by PyTorch, multiplied alone on both sides: the ratio that its products leave to be had."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

CALLS = 0.3  # seconds of the calls of a product in a round; the fastest counts


class LinearMap(NamedTuple):
    """Sizes of a product: rows of activations, inputs and outputs of the weight."""

    rows: int
    inputs: int
    outputs: int


@contextmanager
def recorded(model: torch.nn.Module) -> Iterator[Counter[LinearMap]]:
    """Count the linear maps that a model computes, and its convolutions of all channels as what they are: products."""
    found: Counter[LinearMap] = Counter()

    def record(module: Any, _: tuple[torch.Tensor, ...], given: torch.Tensor) -> None:
        outputs, *window = module.weight.shape
        found[LinearMap(given.numel() // outputs, math.prod(window), outputs)] += 1

    maps = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d)]
    hooks = [module.register_forward_hook(record) for module in maps if getattr(module, "groups", 1) == 1]
    yield found
    for hook in hooks:
        hook.remove()


def ratio(maps: Counter[LinearMap], rounds: int) -> float:
    """PyTorch's time for all products over XLA's; the sides take turns, product by product."""
    ours = theirs = 0.0
    for sizes, count in maps.items():
        mine, its = both(sizes, rounds)
        ours, theirs = ours + count * mine, theirs + count * its
    return theirs / ours


def both(sizes: LinearMap, rounds: int) -> tuple[float, float]:
    """Seconds of one product by XLA and by PyTorch, of a weight that lies as each has it: by inputs, by outputs."""
    random = np.random.default_rng(0)
    x, weight = (random.standard_normal(shape, np.float32) for shape in (sizes[:2], sizes[1:]))
    product, x_own, weight_own = jax.jit(lambda x, weight: x @ weight), jax.device_put(x), jax.device_put(weight)
    x_its, weight_its = torch.from_numpy(x), torch.from_numpy(weight.T.copy())
    sides = (
        lambda: jax.block_until_ready(product(x_own, weight_own)),
        lambda: torch.nn.functional.linear(x_its, weight_its),
    )
    ours, theirs = (np.asarray(side()) for side in sides)  # compiled by now
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    if not error < 1e-3:
        raise SystemExit(f"product {sizes}: both sides must give the same result, but differ by {error:.2g}")
    best = [float("inf")] * 2
    for _ in range(rounds):
        for i, side in enumerate(sides):
            time.sleep(0.1)  # until the other side's threads have stopped spinning
            best[i] = min(best[i], fastest(side))
    return best[0], best[1]


def fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of the calls within `CALLS` seconds."""
    best, end = float("inf"), time.perf_counter() + CALLS
    while (start := time.perf_counter()) < end:
        call()
        best = min(best, time.perf_counter() - start)
    return best
