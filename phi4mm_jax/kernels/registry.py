"""Registry of the implementations of attention and linear maps: one entry and one file each.

docs/kernels.md, "Add a kernel", says what a new one needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from phi4mm_jax.errors import InputError
from phi4mm_jax.kernels import cudnn, pallas_gpu, pallas_tpu, xla

Operation = Literal["prefill", "decode", "append", "cached", "product"]


def _missing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("`supports` is asked first")


@dataclass(frozen=True)
class Implementation:
    """Operations of one implementation.

    Arguments are checked before, shapes as in `phi4mm_jax.kernels`. A function runs on the mesh in context.

    Attributes:
        supports: supports(operation, *arguments), with the positional arguments of the operation and, in prefill,
            whether it is causal, returns None, or the reason why it does not run on these arguments or on this
            platform, as a clause for an error.
        prefill: prefill(q, k, v, limits, *, causal, scale, out_dtype) returns the output and the log-sum-exp (B, T, N).
        decode: decode(q, k, v, layer, lengths, tables, scales, *, scale) returns (o, m, l); scales is a pair or None.
            Lengths are (B, T): q is (B, N, H), of which the N / K queries of a key head are T groups, each with its
            own number of keys, the last one's the largest.
        append: append(caches, new, layer, pages, slots) returns the caches.
        cached: cached(q, k, v, layer, starts, lengths, tables, scales, part, *, parts, scale, out_dtype) returns the
            output and the log-sum-exp (B, T, N).
        product: product(x, values, scales, letters, sums, *, result) returns the product of x (..., *inputs) with
            quantised weights (*inputs, *outputs), in `result`; `letters` name their axes, of which the first `sums` are
            summed over.
        masks_values: whether `prefill` takes any values behind `limits.kv_lengths`; otherwise they are zeroed before.
    """

    supports: Callable[..., str | None]
    prefill: Callable[..., Any] = _missing
    decode: Callable[..., Any] = _missing
    append: Callable[..., Any] | None = None
    cached: Callable[..., Any] | None = None
    product: Callable[..., Any] | None = None
    masks_values: bool = False


# By name, in order of preference; the last one has everything but what may be None.
IMPLEMENTATIONS = {
    "pallas_tpu": Implementation(
        pallas_tpu.supports,
        pallas_tpu.prefill,
        pallas_tpu.decode,
        pallas_tpu.append,
        pallas_tpu.cached,
        pallas_tpu.product,
        masks_values=True,
    ),
    "cudnn": Implementation(cudnn.supports, prefill=cudnn.prefill),
    "pallas_gpu": Implementation(pallas_gpu.supports, decode=pallas_gpu.decode, append=pallas_gpu.append),
    "xla": Implementation(xla.supports, xla.flash_attention, xla.decode_attention),
}


def find_operation(operation: Operation, *arguments: Any) -> Callable[..., Any] | None:
    """Return an operation that may be None, of the first implementation that has it and supports these arguments."""
    for implementation in IMPLEMENTATIONS.values():
        function = getattr(implementation, operation)
        if function is not None and implementation.supports(operation, *arguments) is None:
            return function
    return None


def choose(function: str, name: str | None, operation: Operation, *arguments: Any) -> Implementation:
    """Return the implementation of a name, or the first one that supports an operation on these arguments.

    Args:
        function: the name of the public function, for errors.
        name: None picks.

    Raises:
        InputError: there is no such implementation, or it does not support the arguments.
    """
    if name is not None and name not in IMPLEMENTATIONS:
        raise InputError(f"{function}: implementation {name!r} is not available; choose from {tuple(IMPLEMENTATIONS)}")
    reason = None
    for implementation in [IMPLEMENTATIONS[name]] if name else IMPLEMENTATIONS.values():
        reason = implementation.supports(operation, *arguments)
        if reason is None:
            return implementation
    raise InputError(f"{function}: {reason}")
