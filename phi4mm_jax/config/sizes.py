"""Sizes of the model's parts."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RopeConfig:
    """LongRoPE (arXiv:2402.13753): two sets of factors, one for short and one for long sequences."""

    theta: float
    rotary_size: int  # how many of a head's dimensions are rotated
    short_factor: tuple[float, ...]  # rotary_size / 2 of each
    long_factor: tuple[float, ...]
    original_length: int  # a sequence longer than this uses the long factors throughout
    max_length: int  # the context

    @property
    def magnitude(self) -> float:
        """The factor on cos and sin, for short and long sequences alike."""
        scale = self.max_length / self.original_length
        return 1.0 if scale <= 1.0 else math.sqrt(1.0 + math.log(scale) / math.log(self.original_length))


@dataclass(frozen=True)
class LoraConfig:
    """Adapter on all of the decoder's projections: rank, alpha, and the rate of dropout in training."""

    rank: int
    alpha: float
    dropout: float

    @property
    def scale(self) -> float:
        """Factor of A B."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class DecoderConfig:
    """The decoder: layers of grouped-query attention and gated MLPs."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp_dim: int
    norm_eps: float
    rope: RopeConfig


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP. `num_layers` counts the layers that run; the files hold one more, whose output is never used."""

    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    crop_size: int  # pixels
    patch_size: int  # pixels
    norm_eps: float = 1e-6

    @property
    def patches_per_side(self) -> int:
        """Number of patches along a side of a crop."""
        return self.crop_size // self.patch_size

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.embed_dim // self.num_heads

    @property
    def features_per_crop(self) -> int:
        """After the 2x2 average pooling."""
        return (self.patches_per_side // 2) ** 2


@dataclass(frozen=True)
class SpeechConfig:
    """The conformer encoder over log-mel frames."""

    num_bands: int
    conv_channels: int
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    kernel_size: int
    bias_distance: int  # the relative bias table has 2 * bias_distance rows
    chunk_tokens: int = 500  # longer clips are cut into independent chunks of this many tokens
    time_reduction: int = 8
    norm_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.embed_dim // self.num_heads

    @property
    def subsampled_bands(self) -> int:
        """Bands that are left after the three convolutions of stride 2."""
        bands = self.num_bands
        for _ in range(int(math.log2(self.time_reduction))):
            bands = (bands - 1) // 2 + 1
        return bands
