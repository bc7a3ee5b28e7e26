"""Tiles of the flash-attention kernels for TPUs: the plan of a step's visits, and their streaming."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from phi4mm_jax.kernels.limits import LOG2_E, MASKED, Limits
from phi4mm_jax.kernels.tpu import LANES, Target, stream
from phi4mm_jax.precision import precision_of

MASKED_CHUNK = 256  # keys at a time where there is a mask: small, to stop close to the diagonal
NT = (((1,), (1,)), ((), ()))  # a @ b.T
NN = (((1,), (0,)), ((), ()))


class Call(NamedTuple):
    """Static arguments of one call."""

    causal: bool
    scale: float
    out_dtype: Any
    target: Target


# --- which tiles a step visits ---


class Plan(NamedTuple):
    """Prefetched scalars: of each row, of each block that a step stays with, X = B * blocks, and Y = B * tiles.

    It visits the tiles first <= t < stop; in those with clear <= t < clear_stop no pair is masked, unless by segments:
    then the minimum and maximum id of the block (`own`) and of the tile (`streamed`) decide.
    """

    first: Int[Array, " X"]
    clear: Int[Array, " X"]
    clear_stop: Int[Array, " X"]
    stop: Int[Array, " X"]
    q_offset: Int[Array, " B"]
    kv_lengths: Int[Array, " B"]
    own: tuple[Int[Array, " X"], Int[Array, " X"]] | None
    streamed: tuple[Int[Array, " Y"], Int[Array, " Y"]] | None


def plan_over_keys(limits: Limits, causal: bool, q_len: int, rows: int, keys: int) -> Plan:
    """Plan for blocks of queries that stay, and tiles of keys that are streamed."""
    start = jnp.arange(0, q_len, rows, dtype=jnp.int32) + limits.q_offset[:, None]  # (B, blocks)
    length = jnp.broadcast_to(limits.kv_lengths[:, None], start.shape)
    last = jnp.minimum(length, start + rows) if causal else length
    stop = lax.div(jnp.maximum(last, 0) + keys - 1, keys)
    # A row's own key is never in a clear tile: its maximum is known before the first of them.
    clear_stop = lax.div(jnp.maximum(jnp.minimum(length, start) if causal else length, 0), keys)
    first = jnp.zeros_like(stop)
    return _with_segments(limits, rows, keys, 2, first, first, clear_stop, stop)


def plan_over_queries(limits: Limits, causal: bool, q_len: int, kv_len: int, rows: int, keys: int) -> Plan:
    """Plan for blocks of keys that stay, and tiles of queries that are streamed."""
    start = jnp.arange(0, kv_len, keys, dtype=jnp.int32) + jnp.zeros_like(limits.q_offset)[:, None]  # (B, blocks)
    offset, length, tiles = limits.q_offset[:, None], limits.kv_lengths[:, None], q_len // rows
    first = clear = jnp.zeros_like(start)
    if causal:
        first = jnp.minimum(lax.div(jnp.maximum(start - offset, 0), rows), tiles)
        clear = lax.div(jnp.maximum(start + keys - 1 - offset, 0) + rows - 1, rows)
    clear = jnp.where(start + keys <= length, clear, tiles)
    stop = jnp.where(start < length, tiles, first)
    return _with_segments(limits, rows, keys, 1, first, clear, stop, stop)


def _with_segments(limits: Limits, rows: int, keys: int, streamed_axis: int, first, clear, clear_stop, stop) -> Plan:
    own = streamed = None
    if limits.segments is not None:
        q_bounds, k_bounds = _bounds(limits.segments[0], rows), _bounds(limits.segments[1], keys)
        (q_min, q_max), (k_min, k_max) = q_bounds, k_bounds
        meet = (q_min[:, :, None] <= k_max[:, None]) & (k_min[:, None] <= q_max[:, :, None])  # may share an id
        index = lax.broadcasted_iota(jnp.int32, meet.shape, streamed_axis)
        stop = jnp.minimum(stop, jnp.where(meet, index + 1, 0).max(streamed_axis))
        first = jnp.minimum(jnp.maximum(first, jnp.where(meet, index, meet.size).min(streamed_axis)), stop)
        own, streamed = (q_bounds, k_bounds) if streamed_axis == 2 else (k_bounds, q_bounds)
    plan = Plan(first, clear, clear_stop, stop, limits.q_offset, limits.kv_lengths, own, streamed)
    return jax.tree.map(lambda x: x.astype(jnp.int32).reshape(-1), plan)


def _bounds(segments: Int[Array, "B T"], size: int):
    """Return the minimum and the maximum id of each block, (B, blocks)."""
    blocks = segments.reshape(len(segments), -1, size)
    return blocks.min(-1), blocks.max(-1)


# --- the way through the tiles, common to the three kernels ---


class Grid(NamedTuple):
    """Grid of a kernel.

    A step is one block of one key head of one row; the cores take turns, so that each has as much to do.
    """

    heads: int
    blocks: int  # of the side that a step stays with
    tiles: int  # of the side that it streams
    cores: int
    steps: int  # of each core

    def place(self, step):
        """Return row, key head and block of a step."""
        row, rest = lax.div(step, self.heads * self.blocks), lax.rem(step, self.heads * self.blocks)
        return row, lax.div(rest, self.blocks), lax.rem(rest, self.blocks)

    def this_step(self):
        """Return the number of the step that is being computed."""
        return pl.program_id(1) * self.cores + pl.program_id(0)

    def spec(self, shape: tuple[int | None, ...], index) -> pl.BlockSpec:
        """Return the spec of a block of these sizes at index(row, head, block)."""
        return pl.BlockSpec(shape, lambda core, i, plan: index(*self.place(i * self.cores + core)))


def make_grid(batch: int, heads: int, blocks: int, tiles: int, target: Target) -> Grid:
    """Lay out the steps of blocks of queries, on the chip's cores where they share them evenly."""
    steps = batch * heads * blocks
    cores = target.cores if steps % target.cores == 0 else 1
    return Grid(heads, blocks, tiles, cores, steps // cores)


def stream_tiles(grid: Grid, plan: Any, free_slot, copies, visit) -> None:
    """Call visit(tile, slot, is_clear) for every tile of this step; copies(row, head, tile, slot) bring it."""
    i, core = pl.program_id(1), pl.program_id(0)

    def extent(i):
        row, head, block = grid.place(i * grid.cores + core)
        table = row * grid.blocks + block
        return (row, head, table), plan.first[table], plan.stop[table]

    def start(place, tile, slot):
        for copy in copies(*place[:2], tile, slot):
            copy.start()

    def wait(place, tile, slot):
        for copy in copies(*place[:2], tile, slot):
            copy.wait()

    def visit_tile(place, tile, slot):
        row, _, table = place
        is_clear = (plan.clear[table] <= tile) & (tile < plan.clear_stop[table])
        if plan.own is not None:
            at = row * grid.tiles + tile
            for bound in (plan.own[1][table], plan.streamed[0][at], plan.streamed[1][at]):
                is_clear &= bound == plan.own[0][table]
        visit(tile, slot, is_clear)

    stream(i, grid.steps, extent, free_slot, start, wait, visit_tile)


SAFE_SUM = 2.0**100  # of weights: far from overflow, also after the product with the values


class Softmax(NamedTuple):
    """Online softmax of a block of queries, to the base 2: references to its maxima, sums and weighted values.

    Maxima and sums are (rows, 128): a maximum is the same in every lane, and a sum is the sum of its lanes.
    """

    largest: Any
    total: Any
    weighted: Any  # (rows, H)

    @staticmethod
    def scratch(rows: int, size: int) -> "Softmax":
        """Shapes to allocate."""
        stats = pltpu.VMEM((rows, LANES), jnp.float32)
        return Softmax(stats, stats, pltpu.VMEM((rows, size), jnp.float32))

    def begin(self) -> None:
        """Start a block of queries: without keys."""
        self.largest[...] = jnp.full_like(self.largest, MASKED)
        self.total[...] = jnp.zeros_like(self.total)
        self.weighted[...] = jnp.zeros_like(self.weighted)

    def add_exact(self, scores, values, factors=None) -> None:
        """Take masked scores (rows, keys) and their values, with the running maximum; `factors` (1, keys) of values."""
        old = self.largest[...]
        new = jnp.maximum(old, scores.max(-1, keepdims=True))
        weights = jnp.exp2(scores - wide(new, scores.shape[1]))
        decay = jnp.exp2(old - new)
        self.largest[...] = new
        self.total[...] = self.total[...] * decay + folded(weights)
        added = _weighted(weights, values, factors)
        self.weighted[...] = self.weighted[...] * wide(decay, values.shape[1]) + added

    def add_clear(self, scores, values, factors=None) -> None:
        """Take scores of which none is masked, with the maximum as it is."""
        weights = jnp.exp2(scores - wide(self.largest[...], scores.shape[1]))
        self.total[...] += folded(weights)
        self.weighted[...] += _weighted(weights, values, factors)

    @property
    def is_safe(self):
        """Return whether no sum has left the range in which maxima need not be exact."""
        return jnp.max(self.total[...]) < SAFE_SUM

    def result(self):
        """Return the output (rows, H) and its log-sum-exp (1, rows)."""
        largest, total = self.largest[...], self.total[...].sum(-1, keepdims=True)
        empty = largest < MASKED / 2
        out = jnp.where(wide(empty, self.weighted.shape[1]), 0.0, self.weighted[...] / total)
        return out, jnp.where(empty, -jnp.inf, largest / LOG2_E + jnp.log(total)).T[:1]


def _weighted(weights, values, factors):
    weights = weights if factors is None else weights * factors
    return dot(weights.astype(values.dtype), values, NN)


def dot(a, b, dimensions):
    """Multiply in the precision of the dtype, into float32."""
    return lax.dot_general(a, b, dimensions, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def folded(x):
    """Add up the lanes, in pairs: (rows, n * 128) -> (rows, 128)."""
    parts = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def wide(x, width: int):
    """Widen (rows, 128), the same in every lane, to (rows, width)."""
    return x[:, :width] if width <= LANES else jnp.tile(x, (1, width // LANES))


def columns(row):
    """Turn (1, n) into (n, 128), the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def cleared(x, length):
    """Zero the rows from `length` on, which may hold any value: a weight of 0 times NaN would be NaN."""
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < length, x.astype(jnp.float32), 0.0).astype(x.dtype)  # v5e selects in float32 only


def positions(group: int, block: int, width: int):
    """Return for each row of a block the position of its query in the block, (group * block, width)."""
    return lax.broadcasted_iota(jnp.int32, (group, block, width), 1).reshape(group * block, width)


# --- settings of the calls ---


def compiler_params(call: Call) -> pltpu.CompilerParams:
    """Return the parameters of a call: steps of a core in order, and its vector memory."""
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=call.target.blocks.vmem)


def estimate_cost(call: Call, q, k, products: int) -> pl.CostEstimate:
    """Estimate the cost of the products, for XLA's scheduler; a causal half counts as half."""
    batch, kv_heads, group, q_len, size = q.shape
    pairs = batch * kv_heads * group * q_len * k.shape[2] // (2 if call.causal else 1)
    moved = 2 * (q.size * q.dtype.itemsize + k.size * k.dtype.itemsize)
    return pl.CostEstimate(flops=2 * products * size * pairs, transcendentals=pairs, bytes_accessed=moved)


def pad_to(x, axis: int, length: int):
    """Append zeros to an axis up to a length."""
    missing = length - x.shape[axis]
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
