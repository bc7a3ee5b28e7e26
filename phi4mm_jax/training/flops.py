"""Operations of a training step, by the model's sizes, and the peak of the chips."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.config import Phi4MMConfig

# Operations a second in bfloat16 without sparsity, of one device, by their makers' data sheets.
PEAK_FLOPS: Mapping[str, float] = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU7x": 1154e12,
    "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
}  # fmt: skip


def peak_flops() -> float | None:
    """Return the peak of one device, in operations a second; None where it is not known."""
    kind = jax.devices()[0].device_kind
    known = [name for name in PEAK_FLOPS if kind == name or kind.startswith(f"{name} ")]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def step_flops(config: Phi4MMConfig, trainable: Mapping[str, Any], batches: Sequence[TrainingBatch]) -> float:
    """Return the operations of micro-batches, forward and backward, without recomputation.

    A product of matrices costs 2 operations a weight and token forward, as many for the gradient of its input, and as
    many again for that of its weights where they are trained. Causal attention is counted in full squares' halves,
    that of the encoders in full squares, depthwise convolutions and padding not at all.
    """
    decoder = config.decoder
    flat: dict[Any, Any] = flatten_dict(dict(trainable))
    trained = {"/".join(path[:2]) for path in flat}
    heads = decoder.embed_dim * (2 * decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_size
    block = heads + 3 * decoder.embed_dim * decoder.mlp_dim
    of_lora = sum(x.size for path, x in flat.items() if path[0].startswith("lora_"))
    base = block * decoder.num_layers
    passes = 3 if "params/decoder" in trained else 2  # forward, to the input, to the weights
    total = 0.0
    for batch in batches:
        lengths = _sample_lengths(batch)
        tokens, squares = lengths.sum(), (lengths.astype(np.float64) ** 2).sum()
        attention = 2 * decoder.num_heads * decoder.head_size * decoder.num_layers * squares / 2
        targets = float(np.count_nonzero(batch.weights))
        total += 2 * (base * passes + of_lora * 3) * tokens + 2 * attention * 3
        total += 2 * decoder.vocab_size * decoder.embed_dim * targets * passes
        images, audio = batch.batch.images, batch.batch.audio
        if images is not None:
            crops = int(images.patch_mask.any((1, 2)).sum())
            encoder, projector = _vision_weights(config)
            total += 2 * crops * _passes(encoder, projector, trained, "params/vision", {"params/image_embedder"})
        if audio is not None:
            attended = audio.attended.astype(np.float64)
            encoder, projector = _speech_weights(config, attended)
            projectors = {"params/audio_projector", "params/audio_projector_with_images"}
            total += 2 * _passes(encoder, projector, trained, "params/speech", projectors)
    return total


def _passes(
    encoder: float, projector: float, trained: AbstractSet[str], name: str, projectors: AbstractSet[str]
) -> float:
    """Products of an encoder and the projector behind it, forward and backward: of what is trained, or leads there."""
    own = 3 if name in trained else 1
    return encoder * own + projector * (3 if projectors & trained else 2 if own == 3 else 1)


def _vision_weights(config: Phi4MMConfig) -> tuple[float, float]:
    """Multiplications of a crop: in the tower, and in the projector of its features."""
    vision, embed_dim = config.vision, config.decoder.embed_dim
    patches = vision.patches_per_side**2
    block = 4 * vision.embed_dim**2 + 2 * vision.embed_dim * vision.mlp_dim + 2 * vision.embed_dim * patches
    embedding = 3 * vision.patch_size**2 * vision.embed_dim
    projector = (vision.embed_dim + embed_dim) * embed_dim
    return (block * vision.num_layers + embedding) * patches, projector * vision.features_per_crop


def _speech_weights(config: Phi4MMConfig, attended: np.ndarray) -> tuple[float, float]:
    """Multiplications of chunks of so many tokens: in the encoder, and in the projector of its features."""
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
    """Return the tokens of each sample."""
    segments = batch.batch.segments
    if segments is None:
        return np.asarray(batch.batch.lengths)
    counts = [np.bincount(row)[1:] for row in segments]
    return np.concatenate(counts)
