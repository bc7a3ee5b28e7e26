"""Token losses, without ever materialising all logits. Sum and mean are in step.py, the DPO loss in dpo.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from phi4mm_jax.errors import InputError
from phi4mm_jax.kernels import linear
from phi4mm_jax.mesh import automatic_axes, constrain_param, on_one_cpu
from phi4mm_jax.precision import einsum
from phi4mm_jax.quantization import QuantizedWeight

_CHUNK_LOGITS = 1 << 26  # held at once by one device: 256 MiB in float32
_CPU_POSITIONS = 128  # at once on CPUs, or an eighth of `_CHUNK_LOGITS`


@dataclass(frozen=True)
class LossConfig:
    """Terms that are added to the cross-entropy.

    Attributes:
        label_smoothing: the share of the target's probability that is spread over the vocabulary (arXiv:1512.00567).
        z_loss: the weight of the squared log-partition (arXiv:2204.02311), which keeps the logits near zero.

    Raises:
        InputError: a value out of range.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.label_smoothing < 1.0:
            raise InputError(f"label_smoothing is {self.label_smoothing!r}; expected a number from 0 (off) to below 1")
        if not self.z_loss >= 0.0:
            raise InputError(f"z_loss is {self.z_loss!r}; expected 0 (off) or a positive number")


class TokenLosses(NamedTuple):
    """Losses of each position; zeros where its weight is 0. The loss alone has gradients."""

    loss: Float[Array, "B T"]  # the objective
    log_probability: Float[Array, "B T"]  # of the target
    correct: Float[Array, "B T"]  # 1 where the target is the likeliest


@jax.named_scope("loss")
def token_losses(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"] | QuantizedWeight,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    config: LossConfig = LossConfig(),
) -> TokenLosses:
    """Return the losses of the positions that have a weight.

    Each row's such positions are gathered to its front, and the rows then go through the head some positions at a
    time; where none has a weight any more, nothing is computed. While their logits are there, the gradients of the
    positions' own losses are taken, which the backward pass only scales; where the embedding is trained too, it
    computes the logits again.
    """
    shape, held = targets.shape, _CHUNK_LOGITS
    if on_one_cpu():  # rows need not stay apart, and fewer positions at a time are less padding
        hidden, targets, weights = (x.reshape(1, math.prod(shape), *x.shape[2:]) for x in (hidden, targets, weights))
        held = min(held, max(_CPU_POSITIONS * embedding.shape[0], held // 8))
    batch, length, _ = hidden.shape
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    hidden, targets, counted = (
        jnp.take_along_axis(x, order.reshape(batch, length, *[1] * (x.ndim - 2)), 1)
        for x in (hidden, targets, weights != 0)
    )
    # A mesh holds more, but not ever more: a chunk in which a single position counts costs as much as a full one.
    held *= min(math.prod(automatic_axes().values()), 8)
    size = max(min(length, held // (batch * embedding.shape[0])), 1)
    missing = -length % size

    def chunks(x):  # (chunks, B, size, ...)
        x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(batch, -1, size, *x.shape[2:]).swapaxes(0, 1)

    found = _chunked_losses(config)(chunks(hidden), embedding, chunks(targets), chunks(counted))
    back = jnp.argsort(order, axis=1)
    found = (jnp.take_along_axis(x.swapaxes(0, 1).reshape(batch, -1)[:, :length], back, 1) for x in found)
    return TokenLosses(*(x.reshape(shape) for x in found))


def _chunked_losses(config: LossConfig) -> Callable[..., TokenLosses]:
    """Return a function of chunks of positions (C, B, T) to their losses; a chunk in which none counts is skipped."""

    def losses(hidden, embedding, targets, counted) -> TokenLosses:
        head, zeros = _cast(embedding, hidden.dtype), jnp.zeros(targets.shape[1:], jnp.float32)

        def of_chunk(chunk) -> TokenLosses:
            hidden, targets, counted = chunk
            return jax.lax.cond(
                counted.any(),
                lambda: _losses(_logits(hidden, head), targets, counted, config, _axis(head)),
                lambda: TokenLosses(zeros, zeros, zeros),
            )

        return jax.lax.map(of_chunk, (hidden, targets, counted))

    def forward(hidden, embedding, targets, counted):
        given: Any = jax.tree.map(lambda x: x.value, (hidden, embedding, targets, counted))
        if any(x.perturbed for x in jax.tree.leaves(embedding)):
            return losses(*given), (given, None)
        hidden, embedding, targets, counted = given
        head, zeros = _cast(embedding, hidden.dtype), jnp.zeros(targets.shape[1:], jnp.float32)

        def of_chunk(chunk):
            hidden, targets, counted = chunk

            def with_gradient():
                logits = _logits(hidden, head)
                found, logits_grad = _losses_and_grad(logits, targets, counted, 1.0, config, _axis(head))
                return found, _hidden_grad(logits_grad, hidden, head)  # no loss depends on another position

            nothing = TokenLosses(zeros, zeros, zeros), jnp.zeros_like(hidden)
            return jax.lax.cond(counted.any(), with_gradient, lambda: nothing)

        found, gradient = jax.lax.map(of_chunk, (hidden, targets, counted))
        return found, (None, gradient)

    def backward(kept, cotangents: Any):
        given, gradient = kept
        scale = cotangents.loss
        if given is None:
            return gradient * scale[..., None].astype(gradient.dtype), None, None, None
        hidden, embedding, targets, counted = given
        head = embedding.astype(hidden.dtype)

        def of_chunk(total, chunk):
            hidden, targets, counted, scale = chunk

            def added():  # to the sum where it lies: another one would be as large as the embedding
                logits = _logits(hidden, head)
                _, logits_grad = _losses_and_grad(logits, targets, counted, scale, config, _axis(head))
                equation = "VBT,BTD->VD" if _axis(head) == 0 else "BTV,BTD->VD"
                product = einsum(equation, logits_grad.astype(hidden.dtype), hidden, result=jnp.float32)
                return total + product, _hidden_grad(logits_grad, hidden, head)

            return jax.lax.cond(counted.any(), added, lambda: (total, jnp.zeros_like(hidden)))

        zeros = constrain_param(jnp.zeros(embedding.shape, jnp.float32), ("vocab", "embed"))
        total, hidden_grad = jax.lax.scan(of_chunk, zeros, (hidden, targets, counted, scale))
        return hidden_grad, total.astype(embedding.dtype), None, None

    chunked = jax.custom_vjp(losses)
    chunked.defvjp(forward, backward, symbolic_zeros=True)
    return chunked


def _cast(embedding: Float[Array, "V D"] | QuantizedWeight, dtype) -> Float[Array, "V D"] | QuantizedWeight:
    """Return the head as its products take it: cast once, not for each chunk."""
    return embedding if isinstance(embedding, QuantizedWeight) else embedding.astype(dtype)


def _axis(head: Float[Array, "V D"] | QuantizedWeight) -> int:
    """Return the logits' axis of the vocabulary: on one CPU the first, or else each product copies the head."""
    return 0 if on_one_cpu() and not isinstance(head, QuantizedWeight) else -1


def _logits(hidden: Float[Array, "B T D"], head: Float[Array, "V D"] | QuantizedWeight) -> Float[Array, "..."]:
    """Return the logits in float32: (B, T, V), or (V, B, T) where `_axis` is 0."""
    if isinstance(head, QuantizedWeight) or _axis(head) != 0:
        return linear("BTD,VD->BTV", hidden, head, result=jnp.float32)
    flat = einsum("VD,MD->VM", head, hidden.reshape(-1, hidden.shape[-1]), result=jnp.float32)
    return flat.reshape(-1, *hidden.shape[:2])


def _hidden_grad(
    logits_grad: Float[Array, "..."], hidden: Float[Array, "B T D"], head: Float[Array, "V D"] | QuantizedWeight
) -> Float[Array, "B T D"]:
    """Return the gradient of the hidden states, from that of the logits: a product in their dtype, as PyTorch's is.

    Left in float32, the logits' gradient would have GPUs write the head out in float32 and multiply in TF32.
    """
    matrix: Any = head
    if isinstance(head, QuantizedWeight):
        logits_grad, matrix = logits_grad * head.scales[:, 0], head.values
    elif _axis(head) == 0:
        return einsum("VM,VD->MD", logits_grad.reshape(len(head), -1).astype(hidden.dtype), head).reshape(hidden.shape)
    found = einsum("BTV,VD->BTD", logits_grad.astype(hidden.dtype), matrix, result=jnp.float32)
    return found.astype(hidden.dtype)


def _losses_and_grad(logits, targets, counted, scale, config: LossConfig, axis: int) -> tuple[TokenLosses, Array]:
    """Return the losses, and the gradient of their sum, each times its scale, with respect to the logits."""

    def own(logits):
        found = _losses(logits, targets, counted, config, axis)
        return found.loss, found

    loss, pull, found = jax.vjp(own, logits, has_aux=True)
    return found, pull(jnp.broadcast_to(jnp.float32(scale), loss.shape))[0]


def _losses(logits: Float[Array, "..."], targets, counted, config: LossConfig, axis: int) -> TokenLosses:
    """Return the losses (B, T) of logits whose `axis` is the vocabulary; zeros where a position does not count."""
    log_sum = jax.nn.logsumexp(logits, axis)
    target = jnp.take_along_axis(logits, jnp.expand_dims(targets, axis), axis).squeeze(axis)
    loss = log_sum - target
    if config.label_smoothing:
        share = config.label_smoothing
        loss = (1.0 - share) * loss + share * (log_sum - logits.mean(axis))
    if config.z_loss:
        loss = loss + config.z_loss * jnp.square(log_sum)
    correct = (target >= logits.max(axis)).astype(jnp.float32)
    return TokenLosses(*(jnp.where(counted, x, 0.0) for x in (loss, target - log_sum, correct)))
