"""The attention API. An implementation is chosen by name; a name succeeds or raises."""

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from phi4mm_jax.kernels import xla

Implementation = Literal["xla"]


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool,
    scale: float | None = None,
    q_offset: Int[Array, " B"] | None = None,
    kv_lengths: Int[Array, " B"] | None = None,
    kv_mask: Bool[Array, "B S"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped query heads; memory is bounded, the (T, S) scores are never held at once.

    Query head n attends with key head n // (N / K). Scores and softmax are in float32. A query that may attend to no
    key gives zeros. Differentiable in q, k and v.

    Args:
        causal: query t of row b attends to keys s <= t + q_offset[b] only.
        scale: of the scores; H**-0.5 by default.
        q_offset: the position of each row's first query among its keys; zeros by default.
        kv_lengths: keys from this index on are not attended to.
        kv_mask: keys where it is False are not attended to.
        implementation: None chooses what is best on this platform; a name succeeds or raises.

    Raises:
        ValueError: a shape, dtype or implementation that is not supported; the message names the argument.
    """
    _check_implementation(implementation)
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"flash_attention: q {q.shape} and k {k.shape} must be (B, T, N, H) and (B, S, K, H)")
    if k.shape != v.shape:
        raise ValueError(f"flash_attention: k {k.shape} and v {v.shape} differ in shape")
    batch, _, heads, size = q.shape
    if k.shape[0] != batch or k.shape[3] != size:
        raise ValueError(f"flash_attention: k {k.shape} must share the batch and head sizes of q {q.shape}")
    if heads % k.shape[2]:
        raise ValueError(f"flash_attention: q's {heads} heads are not a multiple of k's {k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"flash_attention: q, k, v must share one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, argument, shape in (
        ("q_offset", q_offset, (batch,)),
        ("kv_lengths", kv_lengths, (batch,)),
        ("kv_mask", kv_mask, (batch, k.shape[1])),
    ):
        if argument is not None and argument.shape != shape:
            raise ValueError(f"flash_attention: {name} has shape {argument.shape}; expected {shape}")
    return xla.flash_attention(
        q, k, v, causal=causal, scale=size**-0.5 if scale is None else scale,
        q_offset=q_offset, kv_lengths=kv_lengths, kv_mask=kv_mask,
    )  # fmt: skip


def decode_attention(
    q: Float[Array, "B N H"],
    k_cache: Float[Array, "L B K S H"],
    v_cache: Float[Array, "L B K S H"],
    *,
    layer: Int[Array, ""],
    lengths: Int[Array, " B"],
    implementation: Implementation | None = None,
) -> Float[Array, "B N H"]:
    """One query a row against the first `lengths[b]` keys of `layer` in the cache.

    The cache of all layers is taken whole, so that no layer's part of it need be copied out; what is read grows with
    the longest length, not with the capacity S.

    Raises:
        ValueError: a shape or implementation that is not supported; the message names the argument.
    """
    _check_implementation(implementation)
    if k_cache.shape != v_cache.shape or k_cache.ndim != 5:
        raise ValueError(f"decode_attention: k_cache {k_cache.shape} and v_cache {v_cache.shape} must both be "
                         "(L, B, K, S, H)")  # fmt: skip
    if (q.shape[0], q.shape[2]) != (k_cache.shape[1], k_cache.shape[4]) or q.shape[1] % k_cache.shape[2]:
        raise ValueError(f"decode_attention: q {q.shape} does not fit k_cache {k_cache.shape}")
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"decode_attention: lengths has shape {lengths.shape}; expected {q.shape[:1]}")
    return xla.decode_attention(q, k_cache, v_cache, layer=layer, lengths=lengths)


def _check_implementation(implementation: str | None) -> None:
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(f"implementation {implementation!r} is not available; choose from {get_args(Implementation)}")
