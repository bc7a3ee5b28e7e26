"""Linear maps of few rows with int4 weights for TPUs: bound by the transfer of the packed weights.

They are unpacked to bfloat16 in vector memory, and the product of each group of inputs is scaled in float32. Chips of
the sixth generation on unpack by one instruction for a register. Before, that takes five for one of bfloat16, and here
three: a word of four weights in int8 is shifted, masked and completed by an exponent, so that two of them at a time are
the numbers 24 + weight. The product is corrected by 24 times the sum of the group's inputs. Words have the inputs in an
order of their own; rows are brought into the same by a product with a permutation, which is exact.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from phi4mm_jax.kernels.tpu import LANES, Target

GROUP = 128  # inputs that share a scale
MAX_ROWS = 128
MAX_GROUPS = 64  # whose products are one piece of straight code: those of the decoder's widest map
_STEPS = 4  # blocks of a core, at least
_ACCUMULATED, _WIDEST = 16384, 512  # outputs that are summed in registers, and of one row
_WORDS = 32  # inputs of a register of int8
# Of the two pairs of weights in a word: shifts to the left that bring them to bits 3 to 6 of its halves. There, with
# this exponent, 0 to 15 stand for 16 to 31 in bfloat16; the sign of a weight is flipped, which adds 8.
_SHIFTS, _BITS, _EXPONENT, _OFFSET = (3, -5), 0x00780078, 0x41C041C0, 24


def unsupported(rows: int, dtype: Any, values: Any, scales: Any) -> str | None:
    """Return why this kernel cannot take so many rows, or weights (N, I, O) with scales (N, G, O), if so."""
    if dtype != jnp.bfloat16 or values.dtype != jnp.int4:
        return f"implementation 'pallas_tpu' multiplies bfloat16 by int4, not {dtype} by {values.dtype}"
    if values.shape[1] != GROUP * scales.shape[1] or values.shape[2] % LANES:
        return (
            f"implementation 'pallas_tpu' takes groups of {GROUP} inputs, and outputs that are a multiple of {LANES}, "
            f"not a weight {values.shape} with scales {scales.shape}"
        )
    if rows > MAX_ROWS or scales.shape[1] > MAX_GROUPS:
        return (
            f"implementation 'pallas_tpu' takes at most {MAX_ROWS} rows and {MAX_GROUPS} groups of inputs, not {rows} "
            f"and {scales.shape[1]}"
        )
    return None


def product(
    x: Float[Array, "M I"], values: Int[Array, "N I O"], scales: Float[Array, "N G O"], *, target: Target, result
) -> Float[Array, "M X"]:
    """Multiply rows by N matrices, whose outputs follow each other, in `result`."""
    rows, inputs = x.shape
    count, _, outputs = values.shape
    groups = scales.shape[1]
    cores = target.cores if count * outputs % (target.cores * LANES) == 0 else 1
    matrices, columns = _block(count, outputs, inputs, cores, target.blocks.int4_bytes)
    steps = count * outputs // (matrices * columns * cores)
    kept = [(GROUP, x.dtype)] if target.blocks.converts_int4 else [(GROUP, x.dtype), (LANES, jnp.float32)]

    def of_weights(core, step):
        block, across = core * steps + step, outputs // columns
        return lax.div(block, across), 0, lax.rem(block, across)

    return pl.pallas_call(
        partial(_kernel, width=_width(rows, matrices, columns)),
        name="phi4mm_int4",
        grid=(cores, steps),
        in_specs=[
            pl.BlockSpec((rows, inputs), lambda core, step: (0, 0)),
            pl.BlockSpec((matrices, inputs, columns), of_weights),
            pl.BlockSpec((matrices, groups, columns), of_weights),
        ],
        out_specs=pl.BlockSpec((rows, matrices * columns), lambda core, step: (0, core * steps + step)),
        out_shape=jax.ShapeDtypeStruct((rows, count * outputs), result),
        scratch_shapes=[
            pltpu.VMEM((matrices, groups, columns), jnp.float32),
            [pltpu.VMEM((groups, rows, n), dtype) for n, dtype in kept],
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            allow_input_fusion=(True, False, False),  # XLA then brings the weights ahead, too: docs/kernels.md
            vmem_limit_bytes=target.blocks.vmem,
        ),
        interpret=target.interpret,
    )(x, values, scales)


def _block(count: int, outputs: int, inputs: int, cores: int, size: int) -> tuple[int, int]:
    """Return how many matrices are a block of about `size` bytes, and how many columns of each.

    A block is columns of one matrix, or narrow ones as a whole; there are as many for each core. The first one is
    waited for, so it is no more than a part of the whole.
    """
    columns = max(min(2 * size // inputs, count * outputs // (_STEPS * cores)), LANES)
    if outputs == LANES:
        return max(n for n in range(1, columns // LANES + 1) if count % (n * cores) == 0 or n == 1), LANES
    fitting = (n for n in range(LANES, columns + 1, LANES) if outputs % n == 0 and count * outputs % (n * cores) == 0)
    return 1, max(fitting)


def _width(rows: int, matrices: int, columns: int) -> int:
    """Return how many outputs of a block are computed at a time: of whole matrices, or of a part of one."""
    max_lanes = max(min(_ACCUMULATED // rows, _WIDEST), LANES)
    fitting = (n for n in range(LANES, max_lanes + 1, LANES) if matrices * columns % n == 0)
    return max(n for n in fitting if n % columns == 0 or columns % n == 0)


def _kernel(x_ref, w_ref, scales_ref, out_ref, wide_scales_ref, kept_refs, *, width: int):
    """Compute a block of outputs; `kept_refs` hold the rows by groups, or ordered ones and their groups' sums.

    `x_ref` is read in the first step alone: XLA may compute the rows where they are read.
    """
    matrices, inputs, columns = w_ref.shape
    groups = inputs // GROUP

    has_sums = len(kept_refs) > 1

    @pl.when(pl.program_id(1) == 0)
    def _():
        factors = _order().astype(x_ref.dtype), jnp.full((GROUP, LANES), _OFFSET, x_ref.dtype)
        for g in range(groups):
            x = x_ref[:, g * GROUP : (g + 1) * GROUP]
            if not has_sums:
                kept_refs[0][g] = x
                continue
            for ref, factor in zip(kept_refs, factors, strict=True):
                ref[g] = jnp.dot(x, factor, preferred_element_type=jnp.float32).astype(ref.dtype)

    wide_scales_ref[...] = scales_ref[...].astype(jnp.float32)
    per_matrix, at_once = max(columns // width, 1), max(width // columns, 1)
    size = width // at_once  # columns of a matrix

    def one_width(n, _):
        matrix = lax.div(n, per_matrix) * at_once
        column = pl.multiple_of(lax.rem(n, per_matrix) * size, LANES)

        def beside(ref, at, widen=lambda x: x):
            return jnp.concatenate([widen(ref[matrix + m, at, pl.ds(column, size)]) for m in range(at_once)], 1)

        def one_group(g, total):
            at = pl.ds(g * GROUP, GROUP)
            rows, *sums = (ref[g] for ref in kept_refs)
            if has_sums:
                part = jnp.dot(rows, beside(w_ref, at, _with_offset), preferred_element_type=jnp.float32)
                part -= jnp.tile(sums[0], (1, width // LANES))
            else:
                weights = beside(w_ref, at, lambda w: w.astype(x_ref.dtype))
                part = jnp.dot(rows, weights, preferred_element_type=jnp.float32)
            return total + part * beside(wide_scales_ref, pl.ds(g, 1))

        total = jnp.zeros((x_ref.shape[0], width), jnp.float32)
        for g in range(groups):
            total = one_group(g, total)
        out_ref[:, pl.ds(pl.multiple_of(n * width, LANES), width)] = total.astype(out_ref.dtype)

    lax.fori_loop(0, matrices * columns // width, one_width, None)


def _order() -> Float[Array, "I P"]:
    """Permutation of a group's inputs to the order of `_with_offset`."""
    source, place = (lax.broadcasted_iota(jnp.int32, (GROUP, GROUP), axis) for axis in (0, 1))
    block, within = lax.div(place, _WORDS), lax.rem(place, _WORDS)
    pair, at = lax.div(within, _WORDS // 2), lax.rem(within, _WORDS // 2)
    word, half = lax.div(at, 2), lax.rem(at, 2)
    return (source == block * _WORDS + 4 * word + 2 * half + pair).astype(jnp.float32)


def _with_offset(weights: Int[Array, "I O"]) -> Float[Array, "I O"]:
    """Return 24 + weights, the inputs in an order of their own."""
    found = []
    for start in range(0, GROUP, _WORDS):
        words = pltpu.bitcast(weights[start : start + _WORDS].astype(jnp.int8), jnp.int32)  # 4 inputs each
        for shift in _SHIFTS:
            move = lax.shift_left if shift > 0 else lax.shift_right_logical
            bits = move(words, jnp.int32(abs(shift))) & jnp.int32(_BITS)
            found.append(pltpu.bitcast(bits ^ jnp.int32(_EXPONENT), jnp.bfloat16))
    return jnp.concatenate(found, 0)
