"""Append kernel for TPUs: writes one new token per row into a paged cache, in place.

Tokens are packed in tiles, two or four to a word, so that none can be written alone: each row's tile is read, changed
and written back. The transfers of many rows' tiles overlap, unlike sequential writes. Into int8 pages tokens are
quantised here: by XLA that is several small operations in each layer.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from phi4mm_jax.kernels.pages import quantized
from phi4mm_jax.kernels.tpu import LANES, Target

_TILE = 32  # tokens that are brought at once: a multiple of the tile of any dtype


def unsupported(pages: Array) -> str | None:
    """Return why this kernel cannot take a cache (L, P, K, S, H), if so."""
    if pages.shape[3] % LANES or pages.shape[4] % LANES:
        return f"k {pages.shape}: implementation 'pallas_tpu' takes pages and head sizes that are multiples of {LANES}"
    return None


def append(
    caches: Sequence[Array], new: Sequence[Array], layer: Int[Array, ""], pages: Int[Array, " B"],
    slots: Int[Array, " B"], *, target: Target,
) -> tuple[Array, ...]:  # fmt: skip
    """Write a token of each of B rows.

    Args:
        caches: keys and values (L, P, K, S, H), and their scales (L, P, K, S) where they are int8; the results alias
            them.
        new: keys and values (B, K, H).
        pages, slots: int32 (B,), where each row's token goes. No two rows share a page, but for the last one of the
            cache, the scratch page: nothing is written there.
    """
    rows = len(pages)
    shapes = [(c.shape[2], _TILE, c.shape[4]) if c.ndim == 5 else c.shape[2:] for c in caches]
    held = sum(2 * math.prod(s) * c.dtype.itemsize for s, c in zip(shapes, caches, strict=True))
    at_once = max(min(rows, target.blocks.append_bytes // held), 1)
    steps = -(-rows // at_once)
    missing = steps * at_once - rows
    pages = jnp.pad(pages, (0, missing), constant_values=caches[0].shape[1] - 1)
    slots = jnp.pad(slots, (0, missing))
    new = [jnp.pad(n, ((0, missing), (0, 0), (0, 0))) for n in new]
    main_memory = pl.BlockSpec(memory_space=pltpu.HBM)
    (written,) = pl.pallas_call(
        partial(_kernel, at_once=at_once),
        name="phi4mm_append",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(steps,),
            in_specs=[
                [pl.BlockSpec((at_once, *n.shape[1:]), lambda i, *_: (i, 0, 0)) for n in new],
                [main_memory for _ in caches],
            ],
            out_specs=[[main_memory for _ in caches]],
            scratch_shapes=[
                [pltpu.VMEM((at_once, *s), c.dtype) for s, c in zip(shapes, caches, strict=True)],
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[[jax.ShapeDtypeStruct(c.shape, c.dtype) for c in caches]],
        input_output_aliases={3 + len(new) + i: i for i in range(len(caches))},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=target.blocks.vmem),
        interpret=target.interpret,
    )(layer.reshape(1), pages, slots, new, list(caches))
    return tuple(written)


def _kernel(layer_ref, pages_ref, slots_ref, new_refs, _, cache_refs, tile_refs, sems, *, at_once: int):
    first, layer = pl.program_id(0) * at_once, layer_ref[0]

    def of_rows(act):
        """Call act(row in the block, its page, its slot) for each row that writes."""

        def one(b, _):
            page = pages_ref[first + b]

            @pl.when(page < cache_refs[0].shape[1] - 1)
            def _():
                act(b, page, slots_ref[first + b])

        lax.fori_loop(0, at_once, one, None)

    def places(b, page, slot):
        """Yield the tiles of each array, in the cache and in vector memory."""
        start = pl.multiple_of(lax.div(slot, _TILE) * _TILE, _TILE)
        for cache, tile in zip(cache_refs, tile_refs, strict=True):
            place = cache.at[layer, page]
            yield (place.at[:, pl.ds(start, _TILE), :] if len(cache.shape) == 5 else place), tile.at[b]

    def bring(b, page, slot):
        for there, here in places(b, page, slot):
            pltpu.make_async_copy(there, here, sems.at[0]).start()

    def brought(b, page, slot):
        for there, here in places(b, page, slot):
            pltpu.make_async_copy(there, here, sems.at[0]).wait()

    def put(tile, b, at, value):
        """Put a token (K, H) into its bits of the words of a tile (K, S, H)."""
        bits = 8 * tile.dtype.itemsize
        words = pltpu.bitcast(tile[b], jnp.int32)
        first = lax.rem(at, 32 // bits) * bits
        mask = lax.shift_left(jnp.int32((1 << bits) - 1 if bits < 32 else -1), first)
        if tile.dtype == jnp.int8:
            value = value.astype(jnp.int32)
        else:  # a float of 16 bits is the upper half of one of 32
            value = lax.shift_right_logical(
                pltpu.bitcast(value.astype(tile.dtype).astype(jnp.float32), jnp.int32), jnp.int32(32 - bits)
            )
        new = lax.shift_left(value, first)[:, None]
        is_here = lax.broadcasted_iota(jnp.int32, words.shape, 1) == lax.div(at, 32 // bits)
        changed = (words & ~mask) | (jnp.broadcast_to(new, words.shape) & mask)
        tile[b] = pltpu.bitcast(jnp.where(is_here, changed, words), tile.dtype)

    def change(b, page, slot):
        for new, tile, scale_tile in zip_longest(new_refs, tile_refs[:2], tile_refs[2:]):
            value = new[b].astype(jnp.float32)  # (K, H)
            if scale_tile is not None:
                value, scale = quantized(value)
                token = lax.broadcasted_iota(jnp.int32, scale_tile.shape[1:], 1)
                scale_tile[b] = jnp.where(token == slot, scale, scale_tile[b])
            put(tile, b, lax.rem(slot, _TILE), value)
        for there, here in places(b, page, slot):
            pltpu.make_async_copy(here, there, sems.at[1]).start()

    def sent(b, page, slot):
        for there, here in places(b, page, slot):
            pltpu.make_async_copy(here, there, sems.at[1]).wait()

    for act in (bring, brought, change, sent):
        of_rows(act)
