"""The speech encoder: log-mel frames through a convolutional stem and conformer blocks (arXiv:2005.08100).

Works on chunks of clips (see `phi4mm_jax.batch.AudioStack`). Padding never reaches a valid token: it is zeroed between
the stem's convolutions, masked in attention, and the blocks' own convolution looks only back.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from phi4mm_jax.config import SpeechConfig
from phi4mm_jax.mesh import LENGTH, ROWS, activation_axes, automatic_axes, constrain
from phi4mm_jax.model.layers import LayerNorm, Linear, Remat, Sizes, declare, run_layers
from phi4mm_jax.precision import einsum, gated, row_sum

HALO_FRAMES = 8  # frames before a chunk: more than the stem's three convolutions look back, and one whole token
_MAP_BYTES = 1 << 28  # larger intermediates are computed a few chunks at a time


def sizes_of(config: SpeechConfig) -> Sizes:
    """Return the sizes of axes, by letter."""
    return {
        "D": config.embed_dim, "N": config.num_heads, "H": config.head_size, "F": config.mlp_dim,
        "C": config.conv_channels, "P": config.num_bands, "W": config.kernel_size, "S": 2 * config.bias_distance,
    }  # fmt: skip


class SpeechEncoder(nn.Module):
    """Conformer encoder over chunks of clips: one feature for each 8 frames."""

    config: SpeechConfig
    scan: bool
    remat: Remat

    @nn.compact
    def __call__(
        self,
        frames: Float[Array, "A F P"],
        first: Int[Array, " A"],
        last: Int[Array, " A"],
        attended: Int[Array, " A"],
        dtype: Any,
    ) -> Float[Array, "A T D"]:
        """Return one feature per token, in `dtype`; the arguments are those of `AudioStack`. T = F / 8 - 1."""
        config, sizes = self.config, sizes_of(self.config)
        mean = declare(self, "mean", "P", sizes, nn.initializers.zeros)
        inverse_deviation = declare(self, "inverse_deviation", "P", sizes, nn.initializers.ones)
        # Normalised in float32: log-mel values reach 20, where bfloat16 has steps of 0.125.
        normal = (frames - mean) * inverse_deviation
        x = Stem(config, name="stem")(normal.astype(dtype), first, last)
        table = declare(self, "bias", "SN", sizes)
        bias = relative_bias(table, x.shape[1], config.bias_distance)
        mask = jnp.arange(x.shape[1]) < attended[:, None]
        return run_layers(Block, config, x, bias, mask, scan=self.scan, remat=self.remat)


class Stem(nn.Module):
    """Three convolutions of stride 2, then a linear map: 8 frames become one token."""

    config: SpeechConfig

    @nn.compact
    def __call__(self, frames: Float[Array, "A F P"], first: Int[Array, " A"], last: Int[Array, " A"]):
        sizes = sizes_of(self.config)
        channels = {"C": sizes["C"], "W": 3}
        kernels = [declare(self, f"conv_{i}", "WWC", channels) for i in range(3)]
        biases = [declare(self, f"conv_{i}_bias", "C", channels, nn.initializers.zeros) for i in range(3)]
        mixes = [Linear("C", "E", {"C": sizes["C"], "E": sizes["C"]}, name=f"mix_{i}") for i in (1, 2)]
        out = Linear("WC", "D", {"W": self.config.subsampled_bands, "C": sizes["C"], "D": sizes["D"]}, name="out")

        def convolve(frames, first, last):
            x = frames[..., None]  # (A, F, P, 1)
            for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
                x = strided_convolution(zero_outside(x, first, last), kernel, bias)  # (A, F/2, P/2, C), ...
                x = jax.nn.relu(mixes[i - 1](x) if i else x)
                first, last = first // 2, (last + 1) // 2
            return zero_outside(out(x), first, last)[:, HALO_FRAMES // self.config.time_reduction :]

        if self.is_initializing():
            return convolve(frames, first, last)  # submodules must be made outside of a map
        widest = frames.shape[1] * frames.shape[2] * sizes["C"]  # elements after the first convolution, times 4
        return _map_rows(convolve, widest * frames.dtype.itemsize // 4, frames, first, last)


class Block(nn.Module):
    """Conformer block: attention and a convolution between two halves of an MLP, then a norm."""

    config: SpeechConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "A T D"], layer: Int[Array, ""], bias: Float[Array, "N T T"], mask: Bool[Array, "A T"]
    ) -> tuple[Float[Array, "A T D"], None]:
        x = constrain(x, "media")
        sizes, eps = sizes_of(self.config), self.config.norm_eps
        x = x + 0.5 * FeedForward(self.config, name="mlp_in")(x)
        normal = LayerNorm(sizes, eps, name="attention_norm")(x)
        q, k, v = (
            checkpoint_name(Linear("D", "NH", sizes, name=name)(normal), "attention") for name in ("q", "k", "v")
        )
        x = x + Linear("NH", "D", sizes, name="out")(biased_attention(q, k, v, bias, mask))
        x = checkpoint_name(x + Convolution(self.config, name="conv")(x), "residual")
        x = x + 0.5 * FeedForward(self.config, name="mlp_out")(x)
        return LayerNorm(sizes, eps, name="norm")(x), None


class FeedForward(nn.Module):
    """Gated MLP behind a norm."""

    config: SpeechConfig

    @nn.compact
    def __call__(self, x: Float[Array, "A T D"]) -> Float[Array, "A T D"]:
        sizes = sizes_of(self.config)
        x = LayerNorm(sizes, self.config.norm_eps, name="norm")(x)
        value, gate = (checkpoint_name(Linear("D", "F", sizes, name=name)(x), "mlp") for name in ("value", "gate"))
        return Linear("F", "D", sizes, name="down")(gated(value, gate))


class Convolution(nn.Module):
    """The conformer's convolution module: gated pointwise, causal depthwise, pointwise, pointwise."""

    config: SpeechConfig

    @nn.compact
    def __call__(self, x: Float[Array, "A T D"]) -> Float[Array, "A T D"]:
        sizes = {**sizes_of(self.config), "E": self.config.embed_dim}
        x = LayerNorm(sizes, self.config.norm_eps, name="norm")(x)
        value, gate = (Linear("D", "E", sizes, name=name)(x) for name in ("value", "gate"))
        b1, b2 = (declare(self, name, "D", sizes, nn.initializers.zeros).astype(jnp.float32) for name in ("b1", "b2"))
        x = gated(value + b1, gate + b2).astype(x.dtype)
        kernel = declare(self, "depthwise", "WD", sizes)
        bias = declare(self, "depthwise_bias", "D", sizes, nn.initializers.zeros)
        x = causal_convolution(x, kernel, bias)
        x = jax.nn.silu(Linear("D", "E", sizes, name="mix")(x))
        return Linear("D", "E", sizes, name="out")(x)


def zero_outside(
    x: Float[Array, "A F ..."], first: Int[Array, " A"], last: Int[Array, " A"]
) -> Float[Array, "A F ..."]:
    """Zero the frames outside of the clip, as if the clip were alone and padded with zeros."""
    index = jnp.arange(x.shape[1])
    inside = (index >= first[:, None]) & (index < last[:, None])
    return jnp.where(inside.reshape(*inside.shape, *(1,) * (x.ndim - 2)), x, 0)


def strided_convolution(
    x: Float[Array, "A F P #C"], kernel: Float[Array, "3 3 C"], bias: Float[Array, " C"]
) -> Float[Array, "A (F+1)//2 (P+1)//2 C"]:
    """Convolve depthwise: 3x3, stride 2, padding 1. One input channel serves all output channels.

    A sum over the window's nine places, in float32: compilers turn it into one pass; grouped convolutions are slow on
    CPUs.
    """
    kernel, bias = kernel.astype(jnp.float32), bias.astype(jnp.float32)
    rows, columns = (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = sum(
        padded[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2].astype(jnp.float32) * kernel[i, j]
        for i in range(3)
        for j in range(3)
    )
    return (total + bias).astype(x.dtype)


def causal_convolution(
    x: Float[Array, "A T D"], kernel: Float[Array, "W D"], bias: Float[Array, " D"]
) -> Float[Array, "A T D"]:
    """Convolve depthwise over time: a token sees itself and the W - 1 before it."""
    width, length = kernel.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
    kernel = kernel.astype(jnp.float32)
    total = sum(padded[:, i : i + length].astype(jnp.float32) * kernel[i] for i in range(width))
    return (total + bias.astype(jnp.float32)).astype(x.dtype)


def relative_bias(table: Float[Array, "S N"], length: int, distance: int) -> Float[Array, "N T T"]:
    """Return the learned bias of each head for key - query, clipped to [-distance, distance)."""
    index = jnp.arange(length)
    offsets = jnp.clip(index[None, :] - index[:, None], -distance, distance - 1) + distance
    return table[offsets].transpose(2, 0, 1)


def biased_attention(
    q: Float[Array, "A T N H"],
    k: Float[Array, "A T N H"],
    v: Float[Array, "A T N H"],
    bias: Float[Array, "N T T"],
    mask: Bool[Array, "A T"],
) -> Float[Array, "A T N H"]:
    """Softmax attention in float32 with a bias on the scores; masked keys are not attended to."""

    def attend(q, k, v, mask):
        scores = einsum("ATNH,ASNH->ANTS", q, k, result=jnp.float32)
        scores = scores * q.shape[-1] ** -0.5 + bias.astype(jnp.float32)
        scores = jnp.where(mask[:, None, None], scores, -1e30)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        weights = (weights / row_sum(weights)[..., None]).astype(q.dtype)
        return einsum("ANTS,ASNH->ATNH", weights, v)

    return _map_rows(attend, 4 * bias.size, q, k, v, mask)


def _map_rows(function, bytes_per_row: int, *rows):
    """Compute `function(*rows)`, a few rows at a time if all at once would hold more than `_MAP_BYTES`.

    Of a mesh's devices, each takes as many of its own rows at a time. The backward pass recomputes what would be as
    large.
    """
    count, axes = rows[0].shape[0], automatic_axes()
    devices = math.prod(axes[name] for name in activation_axes() or (*ROWS, *LENGTH) if name in axes)
    devices = 1 if count % devices else devices
    at_once = max(1, _MAP_BYTES // bytes_per_row)
    if count <= at_once * devices:
        return function(*rows)

    def split(x):  # (rows of a device, devices, ...)
        return x.reshape(devices, -1, *x.shape[1:]).swapaxes(0, 1)

    of_some = jax.checkpoint(lambda some: function(*some))
    found = jax.lax.map(of_some, tuple(map(split, rows)), batch_size=at_once)
    return found.swapaxes(0, 1).reshape(count, *found.shape[2:])
