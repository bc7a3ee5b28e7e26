"""The vision tower: SigLIP-400M (arXiv:2303.15343) on crops, with the positions of NaViT (arXiv:2307.06304)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from phi4mm_jax.config import VisionConfig
from phi4mm_jax.kernels import flash_attention
from phi4mm_jax.mesh import constrain, on_one_cpu
from phi4mm_jax.model.layers import LayerNorm, Linear, Projector, Remat, Sizes, declare, gelu_tanh, run_layers
from phi4mm_jax.precision import precision_of


def sizes_of(config: VisionConfig) -> Sizes:
    """Return the sizes of axes, by letter."""
    return {
        "D": config.embed_dim, "N": config.num_heads, "H": config.head_size, "F": config.mlp_dim,
        "X": config.patch_size, "W": 3, "S": config.patches_per_side**2,
    }  # fmt: skip


class VisionTower(nn.Module):
    """SigLIP tower over crops: one feature for each 2x2 patches."""

    config: VisionConfig
    scan: bool
    remat: Remat

    @nn.compact
    def __call__(self, crops: Float[Array, "C X X 3"], patch_mask: Bool[Array, "C Y Y"]) -> Float[Array, "C M D"]:
        """Features of each crop, averaged over 2x2 patches, row by row."""
        config, sizes = self.config, sizes_of(self.config)
        kernel = declare(self, "patch_kernel", "XXWD", sizes)
        x = embed_patches(crops, kernel, declare(self, "patch_bias", "D", sizes, nn.initializers.zeros))  # (C, S, D)
        table = declare(self, "position", "SD", sizes)
        x = x + table.astype(x.dtype)[position_ids(patch_mask)]
        mask = patch_mask.reshape(len(patch_mask), -1)
        x = run_layers(Block, config, x, mask, scan=self.scan, remat=self.remat)
        return average_pool(x, config.patches_per_side)


class Block(nn.Module):
    """One layer: attention among the patches of a crop, then an MLP, each behind a norm."""

    config: VisionConfig

    def __call__(
        self, x: Float[Array, "C S D"], layer: Int[Array, ""], mask: Bool[Array, "C S"]
    ) -> tuple[Float[Array, "C S D"], None]:
        return self._encode_each(x, mask) if len(x) > 1 and on_one_cpu() else self._encode(x, mask), None

    def _encode_each(self, x: Float[Array, "C S D"], mask: Bool[Array, "C S"]) -> Float[Array, "C S D"]:
        """Encode one crop after the other, so that the activations of each stay in a CPU's caches."""

        def one(block, _, x, mask):
            return None, block._encode(x[None], mask[None])[0]

        each = nn.scan(
            one, variable_broadcast="params", variable_axes={"intermediates": 0}, split_rngs={"params": False},
            in_axes=0,
        )  # fmt: skip
        return each(self, None, x, mask)[1]

    @nn.compact
    def _encode(self, x: Float[Array, "C S D"], mask: Bool[Array, "C S"]) -> Float[Array, "C S D"]:
        x = constrain(x, "media")
        sizes, eps = sizes_of(self.config), self.config.norm_eps
        normal = LayerNorm(sizes, eps, name="attention_norm")(x)
        q, k, v = (Linear("D", "NH", sizes, name=name)(normal) for name in ("q", "k", "v"))
        x = x + Linear("NH", "D", sizes, name="out")(flash_attention(q, k, v, causal=False, kv_mask=mask))
        x = checkpoint_name(x, "residual")
        hidden = Linear("D", "F", sizes, name="up")(LayerNorm(sizes, eps, name="mlp_norm")(x))
        hidden = checkpoint_name(hidden, "mlp")
        return x + Linear("F", "D", sizes, name="down")(gelu_tanh(hidden))


class ImageEmbedder(nn.Module):
    """The features and the two learned separators, projected into the decoder's embedding."""

    sizes: Sizes  # D of the tower, E of the decoder

    @nn.compact
    def __call__(self, features: Float[Array, "M D"]) -> Float[Array, "M+2 E"]:
        """Return the features' embeddings, then those of the row separator and of the global view."""
        separators = [declare(self, name, "D", self.sizes) for name in ("row_separator", "global_separator")]
        x = jnp.concatenate([features, jnp.stack(separators).astype(features.dtype)])
        return Projector(self.sizes, name="projector")(x)


def embed_patches(
    crops: Float[Array, "C X X 3"], kernel: Float[Array, "P P 3 D"], bias: Float[Array, " D"]
) -> Float[Array, "C S D"]:
    """Embed each patch, row by row, by a convolution without overlap."""
    size = kernel.shape[0]
    x = jax.lax.conv_general_dilated(
        crops, kernel.astype(crops.dtype), (size, size), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision_of(crops.dtype),
    )  # fmt: skip
    return x.reshape(len(x), -1, x.shape[-1]) + bias.astype(x.dtype)


def position_ids(mask: Bool[Array, "C Y Y"]) -> Int[Array, "C S"]:
    """Return the place of each patch in the table of positions: by its fraction of the valid region, 0 where masked."""
    side = mask.shape[1]
    buckets = jnp.asarray(_buckets(side))
    rows, columns = buckets[mask[:, :, 0].sum(1)], buckets[mask[:, 0, :].sum(1)]  # (C, Y) each
    ids = rows[:, :, None] * side + columns[:, None, :]
    return jnp.where(mask, ids, 0).reshape(len(mask), -1)


def _buckets(side: int) -> Int[np.ndarray, "{side}+1 {side}"]:
    """Return a table whose [n, i] is the number of the one of `side` equal intervals of [0, 1) that holds i/n.

    A table, because the rounding decides at the boundaries: i times the float32 reciprocal of n, on every platform.
    """
    counts = np.arange(side + 1, dtype=np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        fractions = np.arange(side, dtype=np.float32) * (np.float32(1) / counts)[:, None]
    fractions = np.minimum(np.nan_to_num(fractions), np.float32(1 - 1e-6))
    boundaries = np.arange(1 / side, 1.0, 1 / side, dtype=np.float32)
    return np.searchsorted(boundaries, fractions, side="right").astype(np.int32)


def average_pool(x: Float[Array, "C S D"], side: int) -> Float[Array, "C M D"]:
    """Average 2x2 patches, in PyTorch's order."""
    count, half = x.shape[0], side // 2
    # Not by a reduction: XLA's CPU backend would fuse it with the last MLP, which is slower.
    each = x.reshape(count, half, 2, half, 2, -1).astype(jnp.float32)
    pooled = (each[:, :, 0, :, 0] + each[:, :, 0, :, 1] + each[:, :, 1, :, 0] + each[:, :, 1, :, 1]) / 4
    return pooled.astype(x.dtype).reshape(count, half * half, -1)
