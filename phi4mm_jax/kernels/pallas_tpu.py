"""Attention and linear maps by Pallas kernels for TPUs, on the mesh in context.

The kernels are imported when they are asked for: other devices need none of Pallas, which takes a while to import.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from phi4mm_jax.kernels import tpu
from phi4mm_jax.kernels.limits import Limits
from phi4mm_jax.kernels.pages import BITS
from phi4mm_jax.kernels.partials import Partials, decode_over_mesh
from phi4mm_jax.mesh import Axes, activation_axes, automatic_axes, over_mesh, param_split


def supports(operation: str, *arguments: Any) -> str | None:
    """Return why an operation cannot run on these arguments, if so; see `registry.Implementation`."""
    if tpu.target() is None:
        return "implementation 'pallas_tpu' needs a TPU, and this is none; use 'xla'"
    from phi4mm_jax.kernels import (
        pallas_tpu_append,
        pallas_tpu_cached,
        pallas_tpu_decode,
        pallas_tpu_flash,
    )

    match operation, arguments:
        case "prefill", (_, _, _, limits, *_) if limits.q_offset.ndim == 2:
            return "implementation 'pallas_tpu' takes one q_offset a row"
        case "prefill", (q, *_):
            return pallas_tpu_flash.unsupported(q)
        case ("decode" | "cached", (_, k, *_)) | ("append", ((k, *_), *_)) if k.dtype == BITS:
            return "implementation 'pallas_tpu' takes no pages of bits"
        case "decode", (q, k, _, _, _, tables, _):
            return pallas_tpu_decode.unsupported(q, k, tables)
        case "cached", (q, k, *_):
            return pallas_tpu_cached.unsupported(q, k)
        case "append", (caches, *_):
            return pallas_tpu_append.unsupported(caches[0])
        case "product", (x, values, scales, letters, sums):
            return _unsupported_product(x, values, scales, letters, sums)
    return f"implementation 'pallas_tpu' has no {operation}"


def prefill(q, k, v, limits: Limits, *, causal: bool, scale: float, out_dtype) -> tuple[Array, Array]:
    """Compute the output and the log-sum-exp (B, T, N), rows and heads split over the mesh."""
    from phi4mm_jax.kernels import pallas_tpu_flash

    heads, per_row = Axes("rows", None, "heads", None), Axes("rows")
    ids = None if limits.segments is None else (Axes("rows", None),) * 2
    return over_mesh(
        partial(pallas_tpu_flash.flash_attention, causal=causal, scale=scale, out_dtype=out_dtype, target=_target()),
        (q, k, v, limits),
        (heads, heads, heads, Limits(per_row, per_row, ids)),  # type: ignore
        (heads, Axes("rows", None, "heads")),
        rows=q.shape[0],
        heads=k.shape[2],
    )


def decode(q, k, v, layer, lengths, tables, scales, *, scale: float) -> Partials:
    """Compute (o, m, l), heads split over the mesh."""
    from phi4mm_jax.kernels import pallas_tpu_decode

    kernel = partial(pallas_tpu_decode.decode_attention, scale=scale, target=_target())
    return decode_over_mesh(kernel, q, k, v, layer, lengths, tables, scales)


def cached(
    q, k, v, layer, starts, lengths, tables, scales, part, *, parts: int, scale: float, out_dtype: Any
) -> tuple[Array, Array]:
    """Compute the output and the log-sum-exp (B, T, N), on this device."""
    from phi4mm_jax.kernels import pallas_tpu_cached

    return pallas_tpu_cached.cached_attention(
        q, k, v, layer, starts, lengths, tables, scales, part, parts=parts, scale=scale, out_dtype=out_dtype,
        target=_target(),
    )  # fmt: skip


def append(
    caches: Sequence[Array],
    new: Sequence[Array],
    layer: Int[Array, ""],
    pages: Int[Array, " B"],
    slots: Int[Array, " B"],
) -> tuple[Array, ...]:
    """Write one token per row in place, on this device."""
    from phi4mm_jax.kernels import pallas_tpu_append

    return pallas_tpu_append.append(caches, new, layer, pages, slots, target=_target())


def product(
    x: Float[Array, "..."], values: Int[Array, "..."], scales: Float[Array, "..."], letters: str, sums: int, *, result
) -> Float[Array, "..."]:
    """Multiply by a quantised weight, each device by its part of it; sums over parts of the inputs are joined."""
    from phi4mm_jax.kernels import pallas_tpu_int4

    split = param_split(letters, values.shape)
    summed = tuple(name for names in split[:sums] for name in names)

    def on_device(x, values, scales):
        rows = x.shape[: x.ndim - sums]
        x, matrices = x.reshape(math.prod(rows), -1), (_as_matrices(w, sums) for w in (values, scales))
        out = pallas_tpu_int4.product(x, *matrices, target=_target(), result=jnp.float32 if summed else result)
        out = jax.lax.psum(out, summed).astype(result) if summed else out
        return out.reshape(*rows, *values.shape[sums:])

    if math.prod(automatic_axes().values()) == 1:
        return on_device(x, values, scales)
    rows, of_weight = [()] * (x.ndim - sums), jax.P(*split)
    return jax.shard_map(
        on_device, in_specs=(jax.P(*rows, *split[:sums]), of_weight, of_weight), out_specs=jax.P(*rows, *split[sums:]),
        axis_names=set(automatic_axes()), check_vma=False,
    )(x, values, scales)  # fmt: skip


def _unsupported_product(x: Array, values: Array, scales: Array, letters: str, sums: int) -> str | None:
    from phi4mm_jax.kernels import pallas_tpu_int4

    sizes = automatic_axes()
    if math.prod(sizes.get(name, 1) for name in activation_axes()) > 1:
        return "implementation 'pallas_tpu' multiplies by int4 weights where the mesh splits no rows"
    split = param_split(letters, values.shape)
    if split != param_split(letters, scales.shape):
        return f"implementation 'pallas_tpu': the mesh splits a weight {values.shape} within groups of inputs"

    def on_device(w: Array) -> Any:
        parts = (math.prod(sizes[name] for name in names) for names in split)
        shape = tuple(size // part for size, part in zip(w.shape, parts, strict=True))
        return jax.eval_shape(partial(_as_matrices, sums=sums), jax.ShapeDtypeStruct(shape, w.dtype))

    rows = math.prod(x.shape[: x.ndim - sums])
    return pallas_tpu_int4.unsupported(rows, x.dtype, on_device(values), on_device(scales))


def _as_matrices(weight: Array, sums: int) -> Array:
    """Return a weight (*inputs, *outputs), or its scales, as matrices (N, I, O) whose outputs follow each other."""
    if sums == 1 and weight.ndim == 3:  # heads are matrices, as they lie in memory
        return weight.swapaxes(0, 1)
    return weight.reshape(1, math.prod(weight.shape[:sums]), -1)


def _target() -> tpu.Target:
    target = tpu.target()
    assert target is not None  # `supports` was asked
    return target
