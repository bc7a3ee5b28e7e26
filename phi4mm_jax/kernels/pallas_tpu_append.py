"""Append kernel for TPUs: writes one new token per row into a paged cache, in place.

Tokens are packed in tiles, two or four to a word, so that none can be written alone: each row's tile is read, changed
and written back. The transfers of many rows' tiles overlap, unlike sequential writes.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

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
        caches: arrays (L, P, K, S, H), or (L, P, K, S) for scales; the results alias them.
        new: for each (B, K, H), or (B, K).
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
    # With an axis for the tokens of a tile: (B, K, 1, H), or (B, K, 1).
    new = [jnp.expand_dims(jnp.pad(n, ((0, missing), *[(0, 0)] * (n.ndim - 1))), 2) for n in new]
    main_memory = pl.BlockSpec(memory_space=pltpu.HBM)
    (written,) = pl.pallas_call(
        partial(_kernel, at_once=at_once),
        name="phi4mm_append",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(steps,),
            in_specs=[
                [pl.BlockSpec((at_once, *n.shape[1:]), lambda i, *_, n=n: (i, *[0] * (n.ndim - 1))) for n in new],
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

    def change(b, page, slot):
        for new, tile in zip(new_refs, tile_refs, strict=True):
            at = lax.rem(slot, _TILE) if len(tile.shape) == 4 else slot
            shape = tile.shape[1:]
            token = lax.broadcasted_iota(jnp.int32, shape, 1)
            value = jnp.broadcast_to(new[b].astype(jnp.float32), shape)
            tile[b] = jnp.where(token == at, value, tile[b].astype(jnp.float32)).astype(tile.dtype)
        for there, here in places(b, page, slot):
            pltpu.make_async_copy(here, there, sems.at[1]).start()

    def sent(b, page, slot):
        for there, here in places(b, page, slot):
            pltpu.make_async_copy(here, there, sems.at[1]).wait()

    for act in (bring, brought, change, sent):
        of_rows(act)
