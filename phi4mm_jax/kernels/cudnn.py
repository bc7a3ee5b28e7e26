"""Attention by cuDNN, forward and backward, through the primitives under jax's own API.

They are called directly because that API gives no gradient where it gives the log-sum-exp, asks for the machine's own
GPU when it is traced, and (in jax 0.10) finds packed keys at the queries' stride. Keys are limited by lengths and by
offsets of segments: cuDNN takes masks as biases, which cost it most of its speed.
"""

import inspect
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from phi4mm_jax.kernels import gpu, xla
from phi4mm_jax.kernels.limits import Limits
from phi4mm_jax.kernels.partials import Output
from phi4mm_jax.mesh import Axes, over_mesh

try:
    from jax._src.cudnn import fused_attention_stablehlo
    from jax._src.lib import cuda_versions
except ImportError:  # a later jax
    fused_attention_stablehlo = cuda_versions = None

primitives: Any = fused_attention_stablehlo

MAX_SEGMENTS = 32  # of a packed row, on average over the batch
_LAYOUT = 0  # (B, T, N, H)


class Keys(NamedTuple):
    """Limits of the keys as cuDNN takes them.

    Attributes:
        lengths: valid keys of each row; None for all.
        segments: ids of a packed row's queries, which are its keys' too.
    """

    lengths: Int[Array, " B"] | None = None
    segments: Int[Array, "B T"] | None = None


class _Call(NamedTuple):
    """Static arguments of one call."""

    causal: bool
    scale: float


def supports(operation: str, *arguments: Any) -> str | None:
    """Return why an operation cannot run on these arguments, if so; see `registry.Implementation`."""
    if operation != "prefill":
        return f"implementation 'cudnn' has no {operation}"
    q, _, _, limits, causal = arguments
    target = gpu.target()
    if target is None:
        return "implementation 'cudnn' needs an NVIDIA GPU, and this is none; use 'xla'"
    if target.interpret:
        return "implementation 'cudnn' cannot be interpreted"
    if target.capability < gpu.AMPERE:
        return "implementation 'cudnn' needs a GPU of compute capability 8.0 or later"
    if not all(hasattr(primitives, f"_dot_product_attention_{name}_p") for name in ("fwd", "bwd")):
        return f"implementation 'cudnn' does not know the primitives of jax {jax.__version__}"
    if cuda_versions is None and not gpu.is_assumed():
        return "implementation 'cudnn' needs cuDNN, which is not installed: install jax[cuda13]"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q has dtype {q.dtype}; implementation 'cudnn' takes bfloat16 and float16"
    max_size = 256 if target.capability >= gpu.HOPPER else 128
    if q.shape[3] % 8 or q.shape[3] > max_size:
        return f"q {q.shape}: implementation 'cudnn' takes head sizes that are multiples of 8 up to {max_size}"
    if causal and not limits.starts_at_zero:
        return "q_offset is given; implementation 'cudnn' has the first query at the first key"
    if limits.segments is None:
        return None
    if limits.key_mask is not None:
        return "kv_mask is given; implementation 'cudnn' does not take it with causality" if causal else None
    if limits.segments[0] is not limits.segments[1]:
        return "q_segments and kv_segments differ; implementation 'cudnn' takes one array for both"
    if target.capability < gpu.HOPPER:
        return "q_segments is given; implementation 'cudnn' takes packed rows from compute capability 9.0 on"
    if q.size >= 2**31:
        return f"q {q.shape}: implementation 'cudnn' takes packed rows of less than 2**31 elements"
    return None


def prefill(q, k, v, limits: Limits, *, causal: bool, scale: float, out_dtype) -> tuple[Array, Array]:
    """Compute the output and the log-sum-exp (B, T, N), rows and heads split over the mesh.

    cuDNN's output is of q's dtype: with another `out_dtype` it has been rounded to q's. Packed rows with more than
    `MAX_SEGMENTS` segments a row, or with segments that are not in one piece, are left to XLA when the program runs:
    only then are they known.
    """
    heads, per_row, per_token = Axes("rows", None, "heads", None), Axes("rows"), Axes("rows", None)
    mask = limits.key_mask
    lengths = None if limits.takes_all(k.shape[1]) else limits.kv_lengths
    segments = limits.segments[0] if limits.segments is not None and mask is None else None
    keys = Keys(lengths, segments)
    axes: Any = [None if x is None else a for x, a in zip(keys, (per_row, per_token), strict=True)]
    out, log_sum = over_mesh(
        partial(flash_attention, causal=causal, scale=scale),
        (q, k, v, keys, mask),
        (heads, heads, heads, Keys(*axes), None if mask is None else per_token),
        (heads, Axes("rows", None, "heads")),
        rows=q.shape[0],
        heads=k.shape[2],
    )
    return out.astype(out_dtype), log_sum


def flash_attention(q, k, v, keys: Keys, mask: Bool[Array, "B S"] | None, *, causal: bool, scale: float) -> Output:
    """Compute the output and the log-sum-exp on one device; `mask` without causality only."""
    if mask is not None:  # without causality the order of keys does not matter: the valid ones go first
        if keys.lengths is not None:
            mask &= jnp.arange(k.shape[1]) < keys.lengths[:, None]
        order = jnp.argsort(~mask, axis=1, stable=True)[..., None, None]
        k, v = (jnp.take_along_axis(x, order, 1) for x in (k, v))
        keys = Keys(mask.sum(1, dtype=jnp.int32))
    result: Any = _attend(q, k, v, keys, _Call(causal, scale))
    return result


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, keys: Keys, call: _Call):
    return _attended(q, k, v, keys, call)


def _attended(q, k, v, keys: Keys, call: _Call) -> Output:
    if keys.segments is None:
        return _forward(q, k, v, keys, call)
    return lax.cond(
        _fits(keys.segments), partial(_forward_packed, call=call), partial(_forward_xla, call=call), q, k, v, keys
    )


def _attend_forward(q, k, v, keys: Keys, call: _Call):
    q, k, v, keys = jax.tree.map(lambda x: x.value, (q, k, v, keys), is_leaf=lambda x: hasattr(x, "perturbed"))
    out, log_sum = _attended(q, k, v, keys, call)
    return (out, log_sum), (q, k, v, keys, out, log_sum)


def _attend_backward(call: _Call, residuals, cotangents):
    q, k, v, keys, out, log_sum = residuals
    d_out, d_log_sum = cotangents
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), keys)
    zeros = jax.custom_derivatives.SymbolicZero
    if not isinstance(d_log_sum, zeros):  # cuDNN has no gradient of it
        pairs = (out, d_out), (log_sum, d_log_sum)
        d_out, d_log_sum = (jnp.zeros_like(x) if isinstance(d, zeros) else d for x, d in pairs)
        _, pull = jax.vjp(partial(_forward_xla, keys=keys, call=call), q, k, v)
        return *pull((d_out, d_log_sum)), nothing
    arguments = q, k, v, keys, out, log_sum, d_out
    if keys.segments is None:
        return *_backward(*arguments, call), nothing
    gradients = lax.cond(
        _fits(keys.segments), partial(_backward_packed, call=call), partial(_backward_xla, call=call), *arguments
    )
    return *gradients, nothing


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _forward_xla(q, k, v, keys: Keys, call: _Call) -> Output:
    batch, length = k.shape[:2]
    segments = None if keys.segments is None else (keys.segments, keys.segments)
    lengths = jnp.full(batch, length, jnp.int32) if keys.lengths is None else keys.lengths
    limits = Limits(jnp.zeros(batch, jnp.int32), lengths, segments)
    return xla.flash_attention(q, k, v, limits, causal=call.causal, scale=call.scale, out_dtype=q.dtype)


def _backward_xla(q, k, v, keys: Keys, out, log_sum, d_out, call: _Call):
    _, pull = jax.vjp(lambda q, k, v: _forward_xla(q, k, v, keys, call)[0], q, k, v)
    return pull(d_out)


def _forward(q, k, v, keys: Keys, call: _Call) -> Output:
    out, log_sum = _bind_forward(q, k, v, *_lengths(q, keys.lengths), None, call)
    return _without_keys(out, log_sum.swapaxes(1, 2), None if keys.lengths is None else keys.lengths[:, None] > 0)


def _backward(q, k, v, keys: Keys, out, log_sum, d_out, call: _Call):
    log_sum = jnp.where(jnp.isfinite(log_sum), log_sum, 0.0).swapaxes(1, 2)
    dq, dk, dv = _bind_backward(q, k, v, *_lengths(q, keys.lengths), None, log_sum, out, d_out, call)
    if keys.lengths is None:
        return dq, dk, dv
    valid = (jnp.arange(k.shape[1]) < keys.lengths[:, None])[..., None, None]
    return _where(keys.lengths[:, None, None, None] > 0, dq), _where(valid, dk), _where(valid, dv)


def _lengths(q, lengths):
    """Return the queries' and keys' lengths for cuDNN, which is not asked about rows without keys."""
    if lengths is None:
        return None, None
    return jnp.full(len(q), q.shape[1], jnp.int32), jnp.maximum(lengths, 1)


class _Runs(NamedTuple):
    """Segments of all rows, in the order of their tokens: R of them at most."""

    lengths: Int[Array, " R"]  # 0 for those there are not
    kv_lengths: Int[Array, " R"]  # of those, tokens that may be attended to
    starts: Int[Array, " R"]  # the first token's index among those of all rows
    of_token: Int[Array, "B T"]


def _fits(segments: Int[Array, "B T"]) -> Bool[Array, ""]:
    """Return whether each row's segments are in one piece each, and few enough."""
    step = jnp.diff(segments, axis=1)
    descents, wraps = (step < 0).sum(1), segments[:, -1] < segments[:, 0]  # padding behind all others may be id 0
    few = (step != 0).sum() + len(segments) <= MAX_SEGMENTS * len(segments)
    return few & ((descents == 0) | ((descents == 1) & wraps)).all()


def _runs(keys: Keys) -> _Runs:
    assert keys.segments is not None
    batch, length = keys.segments.shape
    count = batch * MAX_SEGMENTS
    first = jnp.pad(jnp.diff(keys.segments, axis=1) != 0, ((0, 0), (1, 0)), constant_values=True)
    of_token = jnp.cumsum(first.reshape(-1), dtype=jnp.int32) - 1
    valid = jnp.ones((batch, length), jnp.int32)
    if keys.lengths is not None:
        valid = (jnp.arange(length) < keys.lengths[:, None]).astype(jnp.int32)
    lengths, kv_lengths = (jnp.zeros(count, jnp.int32).at[of_token].add(x, mode="drop") for x in (1, valid.reshape(-1)))
    return _Runs(lengths, kv_lengths, jnp.cumsum(lengths) - lengths, of_token.reshape(batch, length))


def _packed_kv_lengths(runs: _Runs) -> Int[Array, " R"]:
    """Return the number of keys of each segment for cuDNN: one at least where there are queries."""
    return jnp.maximum(runs.kv_lengths, jnp.minimum(runs.lengths, 1))


def _forward_packed(q, k, v, keys: Keys, call: _Call) -> Output:
    runs = _runs(keys)
    out, log_sum = _bind_forward(q, k, v, runs.lengths, _packed_kv_lengths(runs), runs.starts, call)
    place = jnp.arange(q.shape[0] * q.shape[1]).reshape(q.shape[:2]) - runs.starts[runs.of_token]
    return _without_keys(out, log_sum[runs.of_token, :, place], runs.kv_lengths[runs.of_token] > 0)


def _backward_packed(q, k, v, keys: Keys, out, log_sum, d_out, call: _Call):
    runs = _runs(keys)
    batch, length, heads, _ = q.shape
    flat = jnp.where(jnp.isfinite(log_sum), log_sum, 0.0).reshape(batch * length, heads)
    token = jnp.minimum(runs.starts[:, None] + jnp.arange(length), batch * length - 1)  # (R, T)
    dq, dk, dv = _bind_backward(
        q, k, v, runs.lengths, _packed_kv_lengths(runs), runs.starts, flat[token].swapaxes(1, 2), out, d_out, call
    )
    dq = _where((runs.kv_lengths[runs.of_token] > 0)[..., None, None], dq)
    if keys.lengths is None:
        return dq, dk, dv
    valid = (jnp.arange(length) < keys.lengths[:, None])[..., None, None]
    return dq, _where(valid, dk), _where(valid, dv)


def _without_keys(out, log_sum, some: Bool[Array, "B #T"] | None) -> Output:
    """Return zeros and -inf for queries without keys; `some`: which have any, None for all."""
    if some is None:
        return out, log_sum
    return _where(some[..., None, None], out), jnp.where(some[..., None], log_sum, -jnp.inf)


def _where(condition, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    return jnp.where(condition, x, jnp.zeros((), x.dtype))


def _bind_forward(q, k, v, q_lengths, kv_lengths, starts, call: _Call):
    """Return the output and the log-sum-exp, (B, N, T) or (R, N, T)."""
    operands, options = _operands(q, k, q_lengths, kv_lengths, starts, call)
    return primitives._dot_product_attention_fwd_p.bind(q, k, v, *operands, is_training=True, **options)


def _bind_backward(q, k, v, q_lengths, kv_lengths, starts, log_sum, out, d_out, call: _Call):
    operands, options = _operands(q, k, q_lengths, kv_lengths, starts, call)
    return primitives._dot_product_attention_bwd_p.bind(q, k, v, *operands, log_sum, out, d_out, **options)


def _operands(q, k, q_lengths, kv_lengths, starts, call: _Call) -> tuple[tuple, dict[str, Any]]:
    """Return what both primitives take beside q, k and v: bias, lengths, offsets and pages, most of them unused."""
    mask = primitives.MaskType
    none = jnp.zeros(0, q.dtype)
    q_offsets = kv_offsets = none
    if starts is not None:  # as cuDNN wants them: elements before each segment, and before what is behind the last
        batch, length, heads, size = q.shape
        after = jnp.full(batch, batch * length, jnp.int32)
        offsets = jnp.concatenate([starts, after]).reshape(batch, MAX_SEGMENTS + 1)
        q_offsets, kv_offsets = offsets * (heads * size), offsets * (k.shape[2] * size)
        q_lengths, kv_lengths = (x.reshape(batch, MAX_SEGMENTS) for x in (q_lengths, kv_lengths))
    if q_lengths is None:
        kind, q_lengths, kv_lengths = (mask.CAUSAL if call.causal else mask.NO_MASK), none, none
    else:
        kind = mask.PADDING_CAUSAL if call.causal else mask.PADDING
    options = {
        "scale": call.scale, "seed": 42, "dropout_rate": 0.0, "variadic_args": (False, False), "mask_type": kind,
        "layout": _LAYOUT, "sliding_window_length": None,
    }  # fmt: skip
    taken = inspect.signature(primitives._dot_product_attention_fwd_cuda_lowering).parameters
    options |= {name: None for name in ("score_mod_name", "score_mod_jaxpr") if name in taken}  # from jax 0.12 on
    return (none, q_lengths, kv_lengths, q_offsets, kv_offsets, none, none), options
