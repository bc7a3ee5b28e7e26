"""What the TPU kernels share: which chip they are compiled for, their block sizes, lengths and interpretation."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax

LANES = 128  # of a vector register; the head size of the decoder, and the unit of lengths
LOG2_E = 1.4426950408889634  # softmax is computed to the base 2, which is what the hardware has


@dataclass(frozen=True)
class Blocks:
    """How much a kernel takes at a time.

    Attributes:
        rows: query rows of a forward tile, those of a group's heads together.
        keys: keys of a forward tile: one transfer from main memory.
        chunk: keys of one pair of products inside of a tile.
        backward_rows, backward_keys, backward_chunk: the same in the backward kernels.
        decode_keys: keys of one transfer in decoding.
        vmem: bytes of vector memory that a kernel may take.
    """

    rows: int = 768
    keys: int = 2048
    chunk: int = 512
    backward_rows: int = 768
    backward_keys: int = 1024
    backward_chunk: int = 512
    decode_keys: int = 512
    vmem: int = 48 << 20


# By `benchmarks/kernels_static`: the largest tiles that still gain, within the vector memory of the chip. See
# docs/kernels.md. Chips that are not listed take those of v5e.
_BLOCKS = {
    "TPU v5 lite": Blocks(),
    "TPU v5": Blocks(),
    "TPU v6 lite": Blocks(keys=4096, chunk=1024, decode_keys=1024),
    "TPU7x": Blocks(keys=4096, chunk=1024, decode_keys=2048),
}


@dataclass(frozen=True)
class Target:
    """What a kernel is traced for; `interpret` is what `pallas_call` takes by this name."""

    blocks: Blocks
    cores: int = 1  # that work as one device
    interpret: Any = False


_INTERPRETED: ContextVar[Target | None] = ContextVar("interpreted", default=None)


@contextmanager
def interpreted(interpret: Any = True, blocks: Blocks | None = None, cores: int = 1) -> Iterator[None]:
    """Traces of TPU kernels in this context are interpreted: by XLA (True) or as `pltpu.InterpretParams` say."""
    token = _INTERPRETED.set(Target(blocks or Blocks(), cores, interpret))
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def target() -> Target | None:
    """The TPU that kernels are traced for, from the mesh in context or the default device; None on other platforms."""
    if (chosen := _INTERPRETED.get()) is not None:
        return chosen
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device or jax.devices()[0]
    if getattr(device, "platform", None) != "tpu":
        return None
    return Target(_BLOCKS.get(device.device_kind, Blocks()), getattr(device, "num_cores", None) or 1)


def padded(length: int) -> int:
    """The length rounded up so that a large block divides it: to a quarter of an octave, a multiple of 128.

    Buckets of lengths (see `phi4mm_jax.processing`) are such already, from 512 on.
    """
    granule = min(max((1 << (length.bit_length() - 1)) // 4, LANES), 2048)
    return -(-length // granule) * granule


def block(length: int, most: int) -> int:
    """The largest multiple of 128 that divides a padded length and is at most `most`."""
    return max(n for n in range(LANES, max(min(length, most), LANES) + 1, LANES) if length % n == 0)
