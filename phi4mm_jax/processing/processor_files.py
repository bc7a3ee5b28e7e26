"""Processor files of a checkpoint folder: settings of media, the crops of an image, the context."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi4mm_jax.config import Phi4MMConfig, read_json, read_optional_json
from phi4mm_jax.errors import CheckpointError
from phi4mm_jax.processing.audio_features import AUDIO_RATES, FEATURE_SETTINGS
from phi4mm_jax.utils.checks import is_number, is_whole

# Settings that the files may state, with the only values that are supported.
_PROCESSING: Mapping[str, Any] = {
    "image_mean": 0.5, "image_std": 0.5, "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_resize": True, "resample": 3, "mel_min_frequency": 0, "mel_max_frequency": 7690, **FEATURE_SETTINGS,
    **AUDIO_RATES,
}  # fmt: skip
# Parts of processor_config.json, by the names that transformers has given them.
_SECTIONS = ("image_processor", "feature_extractor", "audio_processor")


def check_processing(folder: Path, config: Phi4MMConfig) -> None:
    """Check that the checkpoint's media are processed as they are here.

    Raises:
        CheckpointError: a setting that would change the numbers; it names the file and the key.
    """
    supported = {**_PROCESSING, "size": config.vision.crop_size, "patch_size": config.vision.patch_size}
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        values = read_optional_json(path)
        sections = [values, *(values.get(key) for key in _SECTIONS)]
        for section in sections:
            for key in supported.keys() & (section.keys() if isinstance(section, Mapping) else set()):
                found = section[key]
                numbers = list(found.values()) if isinstance(found, Mapping) else found
                numbers = numbers if isinstance(numbers, list) else [numbers]
                if found is not None and not all(_is_close(number, supported[key]) for number in numbers):
                    whose = "config.json's" if key in ("size", "patch_size") else "the release's"
                    raise CheckpointError(
                        f"{path}: {key} is {found!r:.60}; only {supported[key]!r:.20}, {whose}, is supported: "
                        "media are processed as in its training"
                    )


def _is_close(found: Any, usual: float) -> bool:
    return isinstance(found, int | float) and math.isclose(found, usual, rel_tol=1e-6)


def read_dynamic_hd(folder: Path) -> int:
    """Return the largest number of crops of an image.

    It is in preprocessor_config.json or, as transformers 5 saves a processor, in a section of processor_config.json,
    which transformers reads first.

    Raises:
        CheckpointError: neither file says it, or one is unusable.
    """
    path = folder / "processor_config.json"
    settings = read_optional_json(path).get("image_processor")
    if not isinstance(settings, Mapping):  # older ones only name the processor's class
        path = folder / "preprocessor_config.json"
        if not path.exists():  # Trainer.save_model writes it only where it is given the processor
            raise CheckpointError(f"{path}: no such file; copy it from the model that this one was tuned from")
        settings = read_json(path)
    dynamic_hd = settings.get("dynamic_hd")
    if not is_whole(dynamic_hd, 1):
        raise CheckpointError(f"{path}: dynamic_hd is {dynamic_hd!r}; expected the largest number of crops")
    return dynamic_hd


def read_context(folder: Path, config: Phi4MMConfig) -> int:
    """Return the number of tokens of the longest sequence, of the tokenizer's file, else of the network.

    The file may state more than max_position_embeddings, beyond which PyTorch computes as well.

    Raises:
        CheckpointError: the file states no number of tokens.
    """
    path = folder / "tokenizer_config.json"
    length = read_optional_json(path).get("model_max_length")
    if length is None or (is_number(length) and length >= 10**9):  # some tools write 10**30 for "unknown"
        return config.decoder.rope.max_length
    if not is_number(length) or not length >= 1 or length != int(length):
        raise CheckpointError(f"{path}: model_max_length is {length!r:.80}; expected the context's number of tokens")
    return int(length)
