"""Decoding on NVIDIA GPUs by one of two Pallas kernels, and writing new tokens, on the mesh in context."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from phi4mm_jax.kernels import gpu
from phi4mm_jax.kernels.pages import BITS, as_cached
from phi4mm_jax.kernels.partials import Partials, decode_over_mesh


def supports(operation: str, *arguments: Any) -> str | None:
    """Return why an operation cannot run on these arguments, if so; see `registry.Implementation`."""
    target = gpu.target()
    if target is None:
        return "implementation 'pallas_gpu' needs an NVIDIA GPU, and this is none; use 'xla'"
    match operation, arguments:
        case "decode", (_, _, _, _, lengths, *_) if lengths.shape[1] > 1:
            return f"lengths has shape {lengths.shape}; implementation 'pallas_gpu' takes one query a row"
        case "decode", (_, k, *_) if k.dtype == BITS:
            return "implementation 'pallas_gpu' takes no pages of bits"
        case "decode", (q, k, *_):
            module, reason = _kernel(q, k, target)
            return None if module is not None else reason
        case "append", _:
            return None
    return f"implementation 'pallas_gpu' has no {operation}"


def decode(q, k, v, layer, lengths, tables, scales, *, scale: float) -> Partials:
    """Compute (o, m, l), heads split over the mesh."""
    target = gpu.target()
    assert target is not None  # `supports` was asked
    module, _ = _kernel(q, k, target)
    kernel = partial(module.decode_attention, scale=scale, target=target)
    return decode_over_mesh(kernel, q, k, v, layer, lengths[:, 0], tables, scales)


def _kernel(q, k, target: gpu.Target) -> tuple[Any, str | None]:
    """Return the module of the kernel, or None and the reason why there is none.

    Hopper has one of its own, which leaves int8 pages to Triton's where that takes them: on an H200 it reads them at
    1.7 TB/s, since it writes them into shared memory again as bfloat16, and Triton's at 2.4.
    """
    from phi4mm_jax.kernels import pallas_gpu_decode, pallas_gpu_hopper  # Pallas takes a while to import

    reason = pallas_gpu_decode.unsupported(q, k, target)
    for_hopper = pallas_gpu_hopper.unsupported(q, k, target) is None
    if for_hopper and (k.dtype != jnp.int8 or reason is not None):
        return pallas_gpu_hopper, None
    return (pallas_gpu_decode if reason is None else None), reason


def append(
    caches: Sequence[Array],
    new: Sequence[Array],
    layer: Int[Array, ""],
    pages: Int[Array, " B"],
    slots: Int[Array, " B"],
) -> tuple[Array, ...]:
    """Write one token a row in place, on this device: one scatter along the axis of all tokens and heads of a cache."""
    return tuple(
        scatter(cache, token[:, None, :, None], layer, pages[:, None], slots[:, None])
        for cache, token in zip(caches, as_cached(new, caches[0].dtype), strict=True)
    )


def scatter(
    cache: Array, pieces: Array, layer: Int[Array, ""], pages: Int[Array, "B n"], slots: Int[Array, "B n"]
) -> Array:
    """Write pieces (B, n, K, T, ...) into pages of a cache (L, P, K, S, ...), each from a slot on.

    Nothing is written into the last page, the scratch page.
    """
    _, per_layer, heads, page_size, *rest = cache.shape
    page = ((layer * per_layer + pages)[..., None] * heads + jnp.arange(heads)) * page_size  # (B, n, K)
    place = (page + slots[..., None])[..., None] + jnp.arange(pieces.shape[3])
    flat = cache.reshape(-1, *rest)
    place = jnp.where((pages == per_layer - 1)[..., None, None], len(flat), place)  # out of bounds: dropped
    return flat.at[place.reshape(-1)].set(pieces.reshape(-1, *rest), mode="drop").reshape(cache.shape)
