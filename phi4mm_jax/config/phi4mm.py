"""Configuration of the whole model."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi4mm_jax.adapters import ADAPTERS, Adapter
from phi4mm_jax.config.keys import Keys, read_json, read_optional_json
from phi4mm_jax.config.peft_settings import read_adapter
from phi4mm_jax.config.readers import READERS
from phi4mm_jax.config.sizes import DecoderConfig, LoraConfig, SpeechConfig, VisionConfig
from phi4mm_jax.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Phi4MMConfig:
    """Sizes of all parts, the adapters, and the tokens that stand for media or end an answer."""

    decoder: DecoderConfig
    vision: VisionConfig
    speech: SpeechConfig
    loras: Mapping[str, LoraConfig] = field(hash=False)  # by the adapter's name, in the registry's order
    image_token_id: int
    audio_token_id: int
    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    has_vision: bool = True  # whether the checkpoint has the vision tower; its sizes are in `vision` either way
    has_speech: bool = True  # likewise the speech encoder

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Phi4MMConfig":
        """Read a parsed `config.json`, of the original or the native layout; the latter's says nothing of adapters.

        Raises:
            ConfigError: a key is missing, malformed, or asks for what is not supported; it names the key.
        """
        model_type = config.get("model_type")
        reader = READERS.get(model_type) if isinstance(model_type, str) else None
        if reader is None:
            raise ConfigError(
                f"config.json: model_type is {model_type!r:.80}; supported are {sorted(READERS)}. "
                "Is this a Phi-4-multimodal checkpoint?"
            )
        keys = Keys(config, "config.json")
        for key in ("quantization_config", "compression_config"):
            if keys.has(key):
                method = config[key].get("quant_method") if isinstance(config[key], Mapping) else None
                raise keys.error(
                    key,
                    f"is set{f' ({method})' if method else ''}: the weights are quantised, which is not supported; "
                    "give the checkpoint in bfloat16 that they were made from, or one that transformers has "
                    "dequantised (model.dequantize(), then save_pretrained)",
                )
        found = cls(**reader(keys))
        _check(found)
        return found

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Phi4MMConfig":
        """Read `config.json` of a checkpoint folder, and in the native layout the adapters' `adapter_config.json`.

        Raises:
            CheckpointError: no such folder or file, or a file that is not JSON.
            ConfigError: as in `from_dict`.
        """
        folder = Path(folder)
        config = read_json(folder / "config.json")
        native = config.get("model_type") == "phi4_multimodal"
        adapters = {}
        for name, adapter in ADAPTERS.items():
            path = adapter.folder_in(folder) / "adapter_config.json"
            files = _adapter_files(path.parent)
            if "adapter_model.bin" in files and "adapter_model.safetensors" not in files:
                raise CheckpointError(
                    f"{path.with_name('adapter_model.bin')}: pickle files are not read, since they can run code; "
                    "save the adapter as safetensors (PEFT: save_pretrained(FOLDER, safe_serialization=True))"
                )
            if native and files:
                adapters[name] = path, read_json(path)
        if "eos_token_ids" not in config:
            config["eos_token_ids"] = read_optional_json(folder / "generation_config.json").get("eos_token_id")
        try:
            found = cls.from_dict(config)
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}") from error
        return found.with_loras({n: read_adapter(str(path), s, found.decoder) for n, (path, s) in adapters.items()})

    def with_loras(self, loras: Mapping[str, LoraConfig]) -> "Phi4MMConfig":
        """Return the configuration with these adapters added, or in place of its own of the same names."""
        loras = {**self.loras, **loras}
        return dataclasses.replace(self, loras={name: loras[name] for name in ADAPTERS if name in loras})

    def lacks_tower(self, adapter: Adapter) -> bool:
        """Tell whether the checkpoint cannot encode the media that an adapter is for."""
        return not {"images": self.has_vision, "clips": self.has_speech, None: True}[adapter.media]


def _adapter_files(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir() if path.name.startswith("adapter_")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror}); see who may read it") from error


def _check(config: Phi4MMConfig) -> None:
    """Raise ConfigError unless the sizes fit each other, whichever file they came from."""
    decoder, vision, speech, rope = config.decoder, config.vision, config.speech, config.decoder.rope
    ids = (config.image_token_id, config.audio_token_id, config.pad_token_id, *config.stop_token_ids)
    for ok, problem in (
        (
            decoder.num_heads * decoder.head_size == decoder.embed_dim,
            f"hidden_size {decoder.embed_dim} is not num_attention_heads {decoder.num_heads} times a whole head size",
        ),
        (
            decoder.num_heads % decoder.num_kv_heads == 0,
            f"num_attention_heads {decoder.num_heads} is not a multiple of num_key_value_heads {decoder.num_kv_heads}",
        ),
        (
            0 < rope.rotary_size <= decoder.head_size and rope.rotary_size % 2 == 0,
            f"partial_rotary_factor rotates {rope.rotary_size} of a head's {decoder.head_size} dimensions; expected an "
            "even number",
        ),
        (
            len(rope.short_factor) == rope.rotary_size // 2,
            f"rope_scaling short_factor has {len(rope.short_factor)} numbers; {rope.rotary_size // 2} are rotated",
        ),
        (
            len(rope.long_factor) == rope.rotary_size // 2,
            f"rope_scaling long_factor has {len(rope.long_factor)} numbers; {rope.rotary_size // 2} are rotated",
        ),
        (
            1 < rope.original_length <= rope.max_length,
            f"original_max_position_embeddings {rope.original_length} is not between 2 and max_position_embeddings "
            f"{rope.max_length}",
        ),
        (
            vision.crop_size % (2 * vision.patch_size) == 0,
            f"crop_size {vision.crop_size} is not an even number of patches of {vision.patch_size} pixels",
        ),
        (
            vision.embed_dim % vision.num_heads == 0,
            f"the vision tower's hidden_size {vision.embed_dim} is not a multiple of its {vision.num_heads} heads",
        ),
        (
            speech.embed_dim % speech.num_heads == 0,
            f"the speech attention_dim {speech.embed_dim} is not a multiple of its {speech.num_heads} heads",
        ),
        (
            config.image_token_id != config.audio_token_id,
            f"image_token_id and audio_token_id are both {config.image_token_id}",
        ),
        (
            all(0 <= i < decoder.vocab_size for i in ids),
            f"token ids {ids} are not all within vocab_size {decoder.vocab_size}",
        ),
    ):
        if not ok:
            raise ConfigError(f"config.json: {problem}")


def with_layers(config: Phi4MMConfig, decoder: int, vision: int, speech: int) -> Phi4MMConfig:
    """The same widths with fewer layers, for tests and benchmarks at full width."""
    return dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, num_layers=decoder),
        vision=dataclasses.replace(config.vision, num_layers=vision),
        speech=dataclasses.replace(config.speech, num_layers=speech),
    )
