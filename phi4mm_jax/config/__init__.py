"""The model's configuration: frozen dataclasses, read from either published `config.json`.

Nothing is built from defaults: each architecture choice that this implementation makes is checked against the file,
and a file that asks for another one is an error that names the key.
"""

from phi4mm_jax.config.keys import read_json, read_optional_json
from phi4mm_jax.config.peft_settings import check_adapter_settings, read_adapter
from phi4mm_jax.config.phi4mm import Phi4MMConfig, with_layers
from phi4mm_jax.config.readers import RELEASE_AUDIO_TOKEN, RELEASE_IMAGE_TOKEN, RELEASE_TOWER
from phi4mm_jax.config.sizes import DecoderConfig, LoraConfig, RopeConfig, SpeechConfig, VisionConfig

__all__ = [
    "RELEASE_AUDIO_TOKEN", "RELEASE_IMAGE_TOKEN", "RELEASE_TOWER", "DecoderConfig", "LoraConfig", "Phi4MMConfig",
    "RopeConfig", "SpeechConfig", "VisionConfig", "check_adapter_settings", "read_adapter", "read_json",
    "read_optional_json", "with_layers",
]  # fmt: skip
