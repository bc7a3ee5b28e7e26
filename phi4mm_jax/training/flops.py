"""FLOP of a training step, by the model's sizes, and peak FLOP/s of the chips, for MFU."""

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.kernels.tpu import chip_name

# FLOP/s in bfloat16 without sparsity, of one device, by the makers' data sheets.
PEAK_FLOPS: Mapping[str, float] = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU7x": 1154e12,
    "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
}  # fmt: skip


def peak_flops() -> float | None:
    """Return the peak FLOP/s of one device; None if unknown."""
    kind = chip_name(jax.devices()[0].device_kind)
    known = [name for name in PEAK_FLOPS if re.match(rf"{re.escape(name)}\b", kind)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def step_flops(
    config: Phi4MMConfig, trainable: Mapping[str, Any], batches: Sequence[TrainingBatch], reference: bool = False
) -> float:
    """Return the FLOP of micro-batches, forward and backward, without recomputation.

    A matmul costs 2 FLOP per weight and token forward, as many for the gradient of its input, and as many again for
    that of its weights if they are trainable. Causal attention counts as half of the square, the encoders' as the whole
    square; depthwise convolutions and padding do not count.

    Args:
        reference: whether a reference model goes forward, too (DPO); it takes the features of a frozen encoder and
            projector from the model.
    """
    decoder = config.decoder
    flat: dict[Any, Any] = flatten_dict(dict(trainable))
    trained = {"/".join(path[:2]) for path in flat}
    heads = decoder.embed_dim * (2 * decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_size
    block = heads + 3 * decoder.embed_dim * decoder.mlp_dim
    lora_size = sum(x.size for path, x in flat.items() if path[0].startswith("lora_"))
    base = block * decoder.num_layers
    forward = 2 if reference else 1  # passes
    passes = forward + (2 if "params/decoder" in trained else 1)  # backward: to the input, and to the weights
    total = 0.0
    for batch in batches:
        lengths = _sample_lengths(batch)
        tokens, squares = lengths.sum(), (lengths.astype(np.float64) ** 2).sum()
        attention = 2 * decoder.num_heads * decoder.head_size * decoder.num_layers * squares / 2
        targets = float(np.count_nonzero(batch.weights))
        total += 2 * (base * passes + lora_size * (forward + 2)) * tokens + 2 * attention * (forward + 2)
        total += 2 * decoder.vocab_size * decoder.embed_dim * targets * passes
        images, audio = batch.batch.images, batch.batch.audio
        if images is not None:
            crops = int(images.patch_mask.any((1, 2)).sum())
            encoder, projector = _vision_weights(config)
            projectors = {"params/image_embedder"}
            total += 2 * crops * _multiplications(encoder, projector, trained, "params/vision", projectors, forward)
        if audio is not None:
            attended = audio.attended.astype(np.float64)
            encoder, projector = _speech_weights(config, attended)
            projectors = {"params/audio_projector", "params/audio_projector_with_images"}
            total += 2 * _multiplications(encoder, projector, trained, "params/speech", projectors, forward)
    return total


def _multiplications(
    encoder: float, projector: float, trained: AbstractSet[str], name: str, projectors: AbstractSet[str], forward: int
) -> float:
    """Return the multiplications of an encoder and its projector, forward and, as far as needed, backward.

    Args:
        encoder, projector: multiplications of one pass.
        name, projectors: the parameters of both, by their first two names.
        forward: passes; what is frozen throughout goes forward once.
    """
    own = forward + 2 if name in trained else 1
    backward = 2 if projectors & trained else 1 if name in trained else 0
    return encoder * own + projector * (forward + backward if backward else 1)


def _vision_weights(config: Phi4MMConfig) -> tuple[float, float]:
    """Return the multiplications per crop: of the tower, and of the projector."""
    vision, embed_dim = config.vision, config.decoder.embed_dim
    patches = vision.patches_per_side**2
    block = 4 * vision.embed_dim**2 + 2 * vision.embed_dim * vision.mlp_dim + 2 * vision.embed_dim * patches
    embedding = 3 * vision.patch_size**2 * vision.embed_dim
    projector = (vision.embed_dim + embed_dim) * embed_dim
    return (block * vision.num_layers + embedding) * patches, projector * vision.features_per_crop


def _speech_weights(config: Phi4MMConfig, attended: np.ndarray) -> tuple[float, float]:
    """Return the multiplications of chunks with these token counts: of the encoder, and of the projector."""
    speech, embed_dim = config.speech, config.decoder.embed_dim
    width, channels, bands = speech.embed_dim, speech.conv_channels, speech.subsampled_bands
    tokens = attended.sum()
    # The stem mixes channels at a quarter and at an eighth of the frames and bands, then joins bands and channels.
    quarter_bands = (speech.num_bands + 3) // 4
    stem = channels**2 * (2 * quarter_bands + bands) + bands * channels * width
    block = 4 * width**2 + 6 * width * speech.mlp_dim + 4 * width**2
    encoder = (stem + block * speech.num_layers) * tokens
    encoder += 2 * width * speech.num_layers * (attended**2).sum()
    return encoder, (width + embed_dim) * embed_dim * tokens


def _sample_lengths(batch: TrainingBatch) -> np.ndarray:
    """Return the number of tokens per sample."""
    segments = batch.batch.segments
    if segments is None:
        return np.asarray(batch.batch.lengths)
    counts = [np.bincount(row)[1:] for row in segments]
    return np.concatenate(counts)
