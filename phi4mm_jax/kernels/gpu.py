"""NVIDIA GPU that kernels are traced for: the one at hand, or one that is assumed, to lower or interpret without it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import jax

from phi4mm_jax.mesh import target_device

AMPERE, HOPPER = (8, 0), (9, 0)


@dataclass(frozen=True)
class Target:
    """GPU that a kernel is traced for.

    Attributes:
        capability: CUDA's compute capability, (9, 0) on Hopper.
        cores: multiprocessors, which decide how many parts decoding splits the keys into.
        interpret: whether Pallas kernels are interpreted by XLA, on any platform. cuDNN cannot be.
    """

    capability: tuple[int, int] = HOPPER
    cores: int = 132
    interpret: bool = False


_ASSUMED: ContextVar[Target | None] = ContextVar("assumed", default=None)


@contextmanager
def assumed(target: Target) -> Iterator[None]:
    """Trace for this GPU in this context, whatever the device: to lower for CUDA without a GPU, or to interpret.

    The context is read when a function is traced: do not share a jitted function across it.
    """
    token = _ASSUMED.set(target)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def target() -> Target | None:
    """Return the NVIDIA GPU that kernels are traced for, of the mesh in context or the default; None elsewhere."""
    if (chosen := _ASSUMED.get()) is not None:
        return chosen
    if getattr(target_device(), "platform", None) not in ("gpu", "cuda"):
        return None
    device = jax.devices()[0]  # an abstract one of a mesh does not say these
    capability = getattr(device, "compute_capability", None)
    if not isinstance(capability, str) or "." not in capability:
        return None
    major, minor = capability.split(".")
    return Target((int(major), int(minor)), getattr(device, "core_count", None) or Target.cores)


def is_assumed() -> bool:
    """Return whether the target is assumed, so that libraries of this machine say nothing about it."""
    return _ASSUMED.get() is not None
