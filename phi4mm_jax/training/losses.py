"""Token losses, without ever materialising all logits. Sum and mean are in step.py, the DPO loss in dpo.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from phi4mm_jax.errors import InputError
from phi4mm_jax.mesh import automatic_axes
from phi4mm_jax.precision import einsum
from phi4mm_jax.quantization import QuantizedWeight

_CHUNK_LOGITS = 1 << 26  # held at once by one device: 256 MiB in float32


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
    batch, length, _ = hidden.shape
    order = jnp.argsort(weights == 0, axis=1, stable=True)
    hidden, targets, counted = (
        jnp.take_along_axis(x, order.reshape(batch, length, *[1] * (x.ndim - 2)), 1)
        for x in (hidden, targets, weights != 0)
    )
    # A mesh holds more, but not ever more: a chunk in which a single position counts costs as much as a full one.
    held = _CHUNK_LOGITS * min(math.prod(automatic_axes().values()), 4)
    size = max(min(length, held // (batch * embedding.shape[0])), 1)
    missing = -length % size

    def chunks(x):  # (chunks, B, size, ...)
        x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(batch, -1, size, *x.shape[2:]).swapaxes(0, 1)

    of_chunk = _of_chunk(config)
    found: TokenLosses = jax.lax.map(
        lambda x: of_chunk(x[0], embedding, *x[1:]), (chunks(hidden), chunks(targets), chunks(counted))
    )
    back = jnp.argsort(order, axis=1)
    return TokenLosses(*(jnp.take_along_axis(x.swapaxes(0, 1).reshape(batch, -1)[:, :length], back, 1) for x in found))


def _of_chunk(config: LossConfig) -> Callable[..., TokenLosses]:
    """Return the losses of some positions; nothing is computed where none counts."""

    def losses(hidden, embedding, targets, counted) -> TokenLosses:
        zeros = jnp.zeros(targets.shape, jnp.float32)
        return jax.lax.cond(
            counted.any(),
            lambda: _losses(hidden, embedding, targets, counted, config),
            lambda: TokenLosses(zeros, zeros, zeros),
        )

    def forward(hidden, embedding, targets, counted):
        given: Any = jax.tree.map(lambda x: x.value, (hidden, embedding, targets, counted))
        if any(x.perturbed for x in jax.tree.leaves(embedding)):
            return losses(*given), (given, None)

        def with_gradient():
            def own(h):
                found = _losses(h, *given[1:], config)
                return found.loss, found

            loss, pull, found = jax.vjp(own, hidden.value, has_aux=True)
            return found, pull(jnp.ones_like(loss))[0]  # no loss depends on another position

        zeros = jnp.zeros(targets.value.shape, jnp.float32)
        nothing = TokenLosses(zeros, zeros, zeros), jnp.zeros_like(hidden.value)
        found, gradient = jax.lax.cond(counted.value.any(), with_gradient, lambda: nothing)
        return found, (None, gradient)

    def backward(kept, cotangents: Any):
        given, gradient = kept
        scale = cotangents.loss
        if given is None:
            return gradient * scale[..., None].astype(gradient.dtype), None, None, None
        _, pull = jax.vjp(lambda h, e: losses(h, e, *given[2:]).loss, *given[:2])
        return *pull(scale), None, None

    of_chunk = jax.custom_vjp(losses)
    of_chunk.defvjp(forward, backward, symbolic_zeros=True)
    return of_chunk


def _losses(hidden, embedding, targets, counted, config: LossConfig) -> TokenLosses:
    logits = einsum("BTD,VD->BTV", hidden, embedding, result=jnp.float32)
    log_sum = jax.nn.logsumexp(logits, -1)
    target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    loss = log_sum - target
    if config.label_smoothing:
        share = config.label_smoothing
        loss = (1.0 - share) * loss + share * (log_sum - logits.mean(-1))
    if config.z_loss:
        loss = loss + config.z_loss * jnp.square(log_sum)
    correct = (target >= logits.max(-1)).astype(jnp.float32)
    return TokenLosses(*(jnp.where(counted, x, 0.0) for x in (loss, target - log_sum, correct)))
