"""Linear maps that a call by PyTorch computes, to be multiplied alone."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


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
