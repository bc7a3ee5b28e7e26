"""Common parts of the TPU kernels: the chip they are compiled for, block sizes, lengths and interpret mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from jax import lax

from phi4mm_jax.mesh import target_device

LANES = 128  # of a vector register; the head size of the decoder, and the unit of lengths


@dataclass(frozen=True)
class Blocks:
    """Amounts that a kernel takes at a time.

    Attributes:
        rows: query rows of a forward tile, those of a group's heads together.
        keys: keys of a forward tile: one transfer from main memory.
        chunk: keys of one pair of matmuls inside of a tile.
        backward_rows, backward_keys, backward_chunk: the same in the backward kernels.
        decode_bytes: of keys that are transferred at a time in decoding, over all heads; of values as many.
        append_bytes: of tiles that are held at a time in writing new tokens.
        int4_bytes: of packed weights that are transferred at a time.
        converts_int4: whether the chip has an instruction from int4 to bfloat16.
        vmem: bytes of vector memory that a kernel may take.
    """

    rows: int = 768
    keys: int = 2048
    chunk: int = 512
    backward_rows: int = 768
    backward_keys: int = 1024
    backward_chunk: int = 512
    decode_bytes: int = 1 << 20
    append_bytes: int = 8 << 20
    int4_bytes: int = 512 << 10
    converts_int4: bool = False
    vmem: int = 48 << 20


# By `benchmarks/kernels_static`: the largest tiles that still gain, within the vector memory of the chip. See
# docs/kernels.md. Chips that are not listed take those of v5e.
BLOCKS = {
    "TPU v5 lite": Blocks(),
    "TPU v5": Blocks(int4_bytes=1 << 20),
    "TPU v6 lite": Blocks(keys=4096, chunk=1024, decode_bytes=2 << 20, int4_bytes=1 << 20, converts_int4=True),
    "TPU7x": Blocks(keys=4096, chunk=1024, decode_bytes=4 << 20, int4_bytes=1 << 20, converts_int4=True),
}

_ALIASES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}


@dataclass(frozen=True)
class Target:
    """Chip that a kernel is traced for; `interpret` is the argument of `pallas_call`."""

    blocks: Blocks
    cores: int = 1  # that work as one device
    interpret: Any = False


_INTERPRETED: ContextVar[Target | None] = ContextVar("interpreted", default=None)


@contextmanager
def interpreted(interpret: Any = True, blocks: Blocks | None = None, cores: int = 1) -> Iterator[None]:
    """Run TPU kernels traced in this context in Pallas interpret mode (True, or `pltpu.InterpretParams`)."""
    token = _INTERPRETED.set(Target(blocks or Blocks(), cores, interpret))
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def target() -> Target | None:
    """Return the TPU that kernels are traced for, of the mesh in context or the default device; None elsewhere."""
    if (chosen := _INTERPRETED.get()) is not None:
        return chosen
    device = target_device()
    if getattr(device, "platform", None) != "tpu":
        return None
    blocks = BLOCKS.get(chip_name(device.device_kind), Blocks())
    return Target(blocks, getattr(device, "num_cores", None) or 1)


def chip_name(device_kind: str) -> str:
    """Return the one name by which tables have a TPU; jax has two for some."""
    return _ALIASES.get(device_kind, device_kind)


def padded(length: int) -> int:
    """Round a length up so that a large block divides it: to a quarter of a power of two, a multiple of 128.

    Buckets of lengths (see `phi4mm_jax.processing`) are such already, from 512 on.
    """
    granule = min(max((1 << (length.bit_length() - 1)) // 4, LANES), 2048)
    return -(-length // granule) * granule


def block(length: int, max_size: int) -> int:
    """Return the largest multiple of 128 that divides a padded length and is at most `max_size`."""
    return max(n for n in range(LANES, max(min(length, max_size), LANES) + 1, LANES) if length % n == 0)


def stream(i, steps: int, extent: Callable, free_slot, start: Callable, wait: Callable, visit: Callable) -> None:
    """Visit the tiles of step i of a kernel, while the next tile is on its way; call it in each step.

    Args:
        steps: how many there are.
        extent: extent(i) returns the place of step i, as the next three take it, and its tiles' first and stop.
        free_slot: a scalar in memory that stays from step to step: which of two slots the next tile goes to.
        start, wait: start(place, tile, slot) starts the transfer of a tile, wait(place, tile, slot) waits for it.
        visit: visit(place, tile, slot), for the tiles of this step from the last to the first.

    On return the slot that `free_slot` does not name is free.
    """
    from jax.experimental import pallas as pl  # takes a while, and other devices need none of it

    place, first, stop = extent(i)

    def start_first_of(i, slot):
        @pl.when(i < steps)
        def _():
            place, first, stop = extent(lax.min(i, steps - 1))

            @pl.when(first < stop)
            def _():
                start(place, stop - 1, slot)

    @pl.when(i == 0)
    def _():
        free_slot[0] = 0
        start_first_of(i, 0)

    def one_tile(n, slot):
        tile = stop - 1 - n
        wait(place, tile, slot)

        @pl.when(tile > first)
        def _():
            start(place, tile - 1, 1 - slot)

        @pl.when(tile == first)
        def _():
            start_first_of(i + 1, 1 - slot)

        visit(place, tile, slot)
        return 1 - slot

    slot = lax.fori_loop(0, stop - first, one_tile, free_slot[0])
    free_slot[0] = slot

    @pl.when(first == stop)
    def _():
        start_first_of(i + 1, slot)
