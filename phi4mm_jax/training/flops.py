"""The arithmetic of a training step, by the model's sizes, and what the chips could do at most."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.training.batch import TrainingBatch

# Operations a second in bfloat16 without sparsity, of one device, by their makers' data sheets.
PEAK_FLOPS: Mapping[str, float] = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU7x": 1154e12,
    "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
}  # fmt: skip


def peak_flops() -> float | None:
    """Of one device; None where it is not known."""
    kind = jax.devices()[0].device_kind
    known = [name for name in PEAK_FLOPS if kind == name or kind.startswith(f"{name} ")]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def step_flops(config: Phi4MMConfig, trainable: Mapping[str, Any], batches: Sequence[TrainingBatch]) -> float:
    """Of these micro-batches forward and backward, without what is computed again.

    A product of matrices costs 2 operations a weight and token forward, as many for the gradient of its input, and as
    many again for that of its weights where they are trained. Attention is counted in full squares' halves, padding not
    at all.
    """
    decoder, vision, speech = config.decoder, config.vision, config.speech
    flat: dict[Any, Any] = flatten_dict(dict(trainable))
    trained = {"/".join(path[:2]) for path in flat}
    head = decoder.embed_dim * (2 * decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.head_size
    block = head + 3 * decoder.embed_dim * decoder.mlp_dim
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
        if batch.batch.images is not None:
            crops = int(batch.batch.images.patch_mask.any((1, 2)).sum())
            patches = vision.patches_per_side**2
            weights = (4 * vision.embed_dim**2 + 2 * vision.embed_dim * vision.mlp_dim) * vision.num_layers
            attention = 2 * vision.embed_dim * patches * vision.num_layers
            total += 2 * (weights + attention) * patches * crops * (3 if "params/vision" in trained else 1)
        if batch.batch.audio is not None:
            frames = float(batch.batch.audio.attended.sum())
            width = speech.embed_dim
            weights = (4 * width**2 + 6 * width * speech.mlp_dim + 4 * width**2) * speech.num_layers
            total += 2 * weights * frames * (3 if "params/speech" in trained else 1)
    return total


def _sample_lengths(batch: TrainingBatch) -> np.ndarray:
    """Tokens of each sample."""
    segments = batch.batch.segments
    if segments is None:
        return np.asarray(batch.batch.lengths)
    counts = [np.bincount(row)[1:] for row in segments]
    return np.concatenate(counts)
