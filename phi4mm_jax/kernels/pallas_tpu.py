"""Attention by Pallas kernels for TPUs, on the mesh in context.

The kernels are imported when they are asked for: other devices need none of Pallas, which takes a while to import.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxtyping import Array, Int

from phi4mm_jax.kernels import tpu
from phi4mm_jax.kernels.limits import Limits
from phi4mm_jax.kernels.partials import Partials, decode_over_mesh
from phi4mm_jax.mesh import Axes, over_mesh


def supports(operation: str, *arguments: Any) -> str | None:
    """Return why an operation cannot run on these arguments, if so; see `registry.Implementation`."""
    if tpu.target() is None:
        return "implementation 'pallas_tpu' needs a TPU, and this is none; use 'xla'"
    from phi4mm_jax.kernels import pallas_tpu_append, pallas_tpu_cached, pallas_tpu_decode, pallas_tpu_flash

    match operation, arguments:
        case "prefill", (_, _, _, limits, *_) if limits.q_offset.ndim == 2:
            return "implementation 'pallas_tpu' takes one q_offset a row"
        case "prefill", (q, *_):
            return pallas_tpu_flash.unsupported(q)
        case "decode", (q, k, _, _, _, tables, _):
            return pallas_tpu_decode.unsupported(q, k, tables)
        case "cached", (q, k, *_):
            return pallas_tpu_cached.unsupported(q, k)
        case "append", (caches, *_):
            return pallas_tpu_append.unsupported(caches[0])
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
) -> tuple[Array, Array]:  # fmt: skip
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


def _target() -> tpu.Target:
    target = tpu.target()
    assert target is not None  # `supports` was asked
    return target
