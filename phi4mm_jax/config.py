"""The model's configuration: frozen dataclasses, read from either published `config.json`.

Nothing is built from defaults: each architecture choice that this implementation makes is checked against the file,
and a file that asks for another one is an error that names the key.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi4mm_jax.adapters import ADAPTERS, Adapter
from phi4mm_jax.errors import CheckpointError, ConfigError
from phi4mm_jax.peft_settings import common_lora, module_loras
from phi4mm_jax.utils.checks import is_number, is_whole

Layout = str  # "original" (model_type phi4mm) or "native" (model_type phi4_multimodal)


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
    rank: int
    alpha: float
    dropout: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class DecoderConfig:
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
        return self.crop_size // self.patch_size

    @property
    def head_size(self) -> int:
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
        return self.embed_dim // self.num_heads

    @property
    def subsampled_bands(self) -> int:
        """What is left of the bands after the three convolutions of stride 2."""
        bands = self.num_bands
        for _ in range(int(math.log2(self.time_reduction))):
            bands = (bands - 1) // 2 + 1
        return bands


@dataclass(frozen=True)
class Phi4MMConfig:
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
    def from_dict(
        cls, config: Mapping[str, Any], *, adapters: Mapping[str, Mapping[str, Any]] | None = None
    ) -> "Phi4MMConfig":
        """Read a published `config.json`, of the original or the native layout.

        Args:
            config: the parsed file.
            adapters: for the native layout, whose `config.json` says nothing of them: the parsed
                `adapter_config.json` of each adapter by name. An adapter that is not given is absent.

        Raises:
            ConfigError: a key is missing, malformed, or asks for what is not supported; it names the key.
        """
        model_type = config.get("model_type")
        reader = _READERS.get(model_type) if isinstance(model_type, str) else None
        if reader is None:
            raise ConfigError(
                f"config.json: model_type is {model_type!r}; supported are {sorted(_READERS)}. "
                "Is this a Phi-4-multimodal checkpoint?"
            )
        keys = _Keys(config, "config.json")
        for key in ("quantization_config", "compression_config"):
            if keys.has(key):
                method = config[key].get("quant_method") if isinstance(config[key], Mapping) else None
                raise keys.error(
                    key,
                    f"is set{f' ({method})' if method else ''}: the weights are quantised, which is not supported; "
                    "give the checkpoint in bfloat16 that they were made from, or one that transformers has "
                    "dequantised (model.dequantize(), then save_pretrained)",
                )
        return _check(reader(keys, adapters or {}))

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
            files = _adapter_files(folder / adapter.folder)
            path = folder / adapter.folder / "adapter_config.json"
            if "adapter_model.bin" in files and "adapter_model.safetensors" not in files:
                raise CheckpointError(
                    f"{path.with_name('adapter_model.bin')}: pickle files are not read, since they can run code; "
                    "save the adapter as safetensors (PEFT: save_pretrained(FOLDER, safe_serialization=True))"
                )
            if native and files:
                adapters[name] = read_json(path)
                check_adapter_settings(path, adapters[name])
        config_with_stops = dict(config)
        if (folder / "generation_config.json").exists() and "eos_token_ids" not in config:
            config_with_stops["eos_token_ids"] = read_json(folder / "generation_config.json").get("eos_token_id")
        return cls.from_dict(config_with_stops, adapters=adapters)

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


# Of an adapter_config.json: what is read, what the tensors themselves show, and what changes no number.
_ADAPTER_KEYS = frozenset({
    "r", "lora_alpha", "lora_dropout", "dp", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type", "auto_mapping",
    "peft_version", "base_model_name_or_path", "revision", "inference_mode", "runtime_config", "megatron_core",
    "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
})  # fmt: skip
_PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica")  # they leave the base's weights alone
_MERGEABLE = ("use_dora", "modules_to_save", "trainable_token_indices", "bias")
_CONVERTIBLE_INITS = ("pissa", "corda", "olora")


def check_adapter_settings(name: str | Path, settings: Mapping[str, Any]) -> None:
    """Check the settings with which PEFT saved an adapter: each is honoured, known to be harmless, or refused by name.

    Args:
        name: of the settings, for errors.

    Raises:
        ConfigError: a setting by which PEFT would compute something else than base weights plus A B.
    """
    init = settings.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _PLAIN_INITS)):
        remedy = "train it with init_lora_weights=True"
        if isinstance(init, str) and init.lower().startswith(_CONVERTIBLE_INITS):
            remedy = (
                "let PEFT save it as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion), or "
                f"{remedy}"
            )
        raise ConfigError(f"{name}: init_lora_weights is {init!r:.60}, which changes the base's weights; {remedy}")
    for key, value in settings.items():
        plain = value in (None, False, [], {}) or (key, value) in (("bias", "none"), ("peft_type", "LORA"))
        if not plain and key not in _ADAPTER_KEYS:
            remedy = "or remove it where it has no effect"
            if key in _MERGEABLE:
                remedy = "or merge it (PEFT: merge_and_unload(), then save_pretrained(FOLDER)) and give FOLDER"
            raise ConfigError(
                f"{name}: {key} is {value!r:.60}, which is not supported; train the adapter without it, {remedy}"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file; a missing or broken one is a CheckpointError that names it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. Give the folder of a Phi-4-multimodal checkpoint.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). See who may read it.") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}). Download the file again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, expected an object. Download the file again.")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which a key that is there twice is an error."""
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"{twice!r} is in one object twice")
    return values


class _Keys:
    """Typed access to the keys of a parsed file, with errors that name the key's whole path."""

    def __init__(self, values: Mapping[str, Any], name: str):
        self.values, self.name = values, name

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.name}: {key} {problem}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing; the file is incomplete or of another model")
        if kind is float and is_whole(value):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(key, f"is {value!r}; expected {kind.__name__}")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.get(key, int, default)
        if value <= 0:
            raise self.error(key, f"is {value}; expected a positive whole number")
        return value

    def expect(self, key: str, *supported: Any, required: bool = False) -> None:
        """Reject any other value; an absent key is accepted unless required."""
        value = self.values.get(key)
        if value is None and None not in supported and required:
            raise self.error(key, f"is missing; supported: {_one_of(supported)}")
        if value is not None and value not in supported:
            raise self.error(
                key, f"is {value!r}, which this implementation does not support; supported: {_one_of(supported)}"
            )

    def section(self, key: str) -> "_Keys":
        return _Keys(self.get(key, Mapping), f"{self.name}: {key}")

    def factors(self, key: str) -> tuple[float, ...]:
        values = self.get(key, list)
        numbers = [v for v in values if is_number(v) and v > 0]
        if len(numbers) != len(values):
            raise self.error(key, "must hold positive numbers")
        return tuple(float(v) for v in values)

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        ids = [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
        if not ids or len(ids) != (len(value) if isinstance(value, list) else 1):
            raise self.error(key, f"is {value!r}; expected a token id or a list of them")
        return tuple(ids)


def _one_of(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(v) for v in values)


def _read_decoder(keys: _Keys, rope: _Keys, tied_required: bool) -> DecoderConfig:
    """What both layouts spell alike; `rope` holds the factors and the rotary settings."""
    keys.expect("hidden_act", "silu", required=True)
    if keys.values.get("tie_word_embeddings") is False:
        raise keys.error(
            "tie_word_embeddings",
            "is False, but only a head that is tied to the embedding is supported; where lm_head.weight equals the "
            "embedding, set it to true",
        )
    keys.expect("tie_word_embeddings", True, required=tied_required)
    for absent in ("attention_bias", "mlp_bias", "lm_head_bias"):
        keys.expect(absent, False)
    for dropout in ("attention_dropout", "embd_pdrop", "resid_pdrop"):
        keys.expect(dropout, 0, 0.0)
    keys.expect("full_attn_mod", 1)
    keys.expect("interpolate_factor", 1)
    rope.expect("type", "longrope", required="rope_type" not in rope.values)
    rope.expect("rope_type", "longrope")

    embed_dim, num_heads = keys.positive("hidden_size"), keys.positive("num_attention_heads")
    head_size = keys.positive("head_dim", embed_dim // num_heads)
    max_length = keys.positive("max_position_embeddings")
    if keys.has("sliding_window") and keys.positive("sliding_window") < max_length:
        raise keys.error(
            "sliding_window", f"is shorter than the context of {max_length}; only full attention is supported"
        )
    fraction = rope.get("partial_rotary_factor", float, keys.values.get("partial_rotary_factor"))
    original = rope.get("original_max_position_embeddings", int, keys.values.get("original_max_position_embeddings"))
    rotary = RopeConfig(
        theta=rope.get("rope_theta", float, keys.values.get("rope_theta")),
        rotary_size=int(head_size * fraction),
        short_factor=rope.factors("short_factor"),
        long_factor=rope.factors("long_factor"),
        original_length=original,
        max_length=max_length,
    )
    # transformers takes these where they are given, and else computes them as `RopeConfig.magnitude` does.
    for key, own in (("factor", max_length / original), ("attention_factor", rotary.magnitude)):
        if rope.has(key) and not math.isclose(value := rope.get(key, float), own, rel_tol=1e-6):
            raise rope.error(key, f"is {value}; only {own:.6g}, which the lengths give, is supported: take it out")
    for scale in ("short_mscale", "long_mscale", "mscale", "mscale_all_dim"):
        rope.expect(scale, None)
    return DecoderConfig(
        vocab_size=keys.positive("vocab_size"),
        embed_dim=embed_dim,
        num_layers=keys.positive("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=keys.positive("num_key_value_heads"),
        head_size=head_size,
        mlp_dim=keys.positive("intermediate_size"),
        norm_eps=keys.get("rms_norm_eps", float),
        rope=rotary,
    )


def _read_lora(keys: _Keys) -> LoraConfig:
    for unsupported in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        keys.expect(unsupported, False)
    for by_module in ("rank_pattern", "alpha_pattern"):
        keys.expect(by_module, {})
    keys.expect("bias", "none")
    keys.expect("peft_type", "LORA")
    alpha = keys.get("lora_alpha", float)
    if not 0.0 < alpha < math.inf:
        raise keys.error("lora_alpha", f"is {alpha}; expected a positive number, or the adapter would do nothing")
    return LoraConfig(
        rank=keys.positive("r"),
        alpha=alpha,
        dropout=keys.get("dp" if keys.has("dp") else "lora_dropout", float, 0.0),
    )


def read_adapter(name: str, settings: Mapping[str, Any], decoder: DecoderConfig) -> LoraConfig:
    """An adapter by its adapter_config.json: its modules' ranks and scales as one rank and scale (see `common_lora`).

    Args:
        name: of the settings, for errors.

    Raises:
        ConfigError: a setting is missing, malformed or not supported; it names the key.
    """
    check_adapter_settings(name, settings)
    lora = common_lora(module_loras(name, settings, decoder.num_layers))
    keys = _Keys(settings, name)
    return LoraConfig(lora.rank, lora.alpha, keys.get("dp" if keys.has("dp") else "lora_dropout", float, 0.0))


def _read_original(keys: _Keys, adapters: Mapping[str, Mapping[str, Any]]) -> Phi4MMConfig:
    """`model_type: phi4mm`. The release's file lacks the vision tower's sizes and the media token ids."""
    del adapters  # this layout's config.json has the adapters' settings itself
    embed = keys.section("embd_layer")
    embed.expect("embedding_cls", "image_audio", required=True)
    image = embed.section("image_embd_layer")
    for key, supported in {
        "embedding_cls": "tune_image",
        "hd_transform_order": "sub_glb",
        "image_token_compression_cls": "avg_pool_2d",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    }.items():
        image.expect(key, supported, required=True)
    audio_embed = embed.section("audio_embd_layer")
    for key, supported in {
        "embedding_cls": "audio",
        "projection_cls": "mlp",
        "compression_rate": 8,
        "downsample_rate": 1,
        "use_conv_downsample": False,
        "use_qformer": False,
    }.items():
        audio_embed.expect(key, supported, required=True)

    audio_processor = keys.section("audio_processor")
    audio_processor.expect("name", "cascades", required=True)
    audio = audio_processor.section("config")
    for key, supported in {
        "activation": "swish",
        "conv_activation": "swish",
        "conv_glu_type": "swish",
        "bias_in_glu": True,
        "causal": True,
        "batch_norm": False,
        "cnn_layer_norm": True,
        "chunk_size": -1,
        "depthwise_multiplier": 1,
        "ext_pw_kernel_size": 1,
        "input_layer": "nemo_conv",
        "time_reduction": 8,
    }.items():
        audio.expect(key, supported, required=True)
    audio.expect("dropout_rate", 0, 0.0)
    speech_dim = audio.positive("attention_dim")
    for width in ("ext_pw_out_channel", "depthwise_seperable_out_channel"):
        audio.expect(width, speech_dim, required=True)
    bias = audio.section("relative_attention_bias_args")
    bias.expect("type", "t5", required=True)
    bias.expect("t5_bias_symmetric", False)

    tower = keys.section("img_processor") if keys.has("img_processor") else _Keys(RELEASE_TOWER, "img_processor")
    tower.expect("layer_idx", -2, required=True)
    tower.expect("type_feature", "patch", required=True)
    crop_size = image.positive("crop_size")
    tower.expect("image_size", crop_size, required=True)
    return Phi4MMConfig(
        decoder=_read_decoder(keys, keys.section("rope_scaling"), tied_required=True),
        vision=_read_tower(tower, crop_size),
        speech=SpeechConfig(
            num_bands=audio.positive("input_size"),
            conv_channels=audio.section("nemo_conv_settings").positive("conv_channels"),
            embed_dim=speech_dim,
            num_layers=audio.positive("num_blocks"),
            num_heads=audio.positive("attention_heads"),
            mlp_dim=audio.positive("linear_units"),
            kernel_size=audio.positive("kernel_size"),
            bias_distance=bias.positive("t5_bias_max_distance"),
        ),
        loras={
            name: _read_lora(keys.section(adapter.config_key))
            for name, adapter in ADAPTERS.items()
            if keys.has(adapter.config_key)
        },
        image_token_id=keys.get("image_token_id", int, RELEASE_IMAGE_TOKEN),
        audio_token_id=keys.get("audio_token_id", int, RELEASE_AUDIO_TOKEN),
        pad_token_id=keys.get("pad_token_id", int),
        stop_token_ids=keys.token_ids("eos_token_ids") if keys.has("eos_token_ids") else (199999, 200020),
    )


def _read_native(keys: _Keys, adapters: Mapping[str, Mapping[str, Any]]) -> Phi4MMConfig:
    """`model_type: phi4_multimodal`, as transformers saves it."""
    audio, vision = keys.section("audio_config"), keys.section("vision_config")
    for key, supported in {
        "activation": "swish",
        "conv_activation": "swish",
        "conv_glu_type": "swish",
        "nemo_activation": "relu",
        "bias_symmetric": False,
        "chunk_size": -1,
        "depthwise_multiplier": 1,
        "downsample_rate": 1,
        "time_reduction": 8,
    }.items():
        audio.expect(key, supported)
    audio.expect("dropout_rate", 0, 0.0)
    audio.expect("feature_layer", -2)
    speech_dim = audio.positive("hidden_size")
    for width in ("ext_pw_out_channel", "depthwise_separable_out_channel"):
        audio.expect(width, speech_dim)
    vision.expect("hidden_act", "gelu_pytorch_tanh")
    vision.expect("feature_layer", -2)
    vision.expect("num_channels", 3)
    vision.expect("attention_dropout", 0, 0.0)
    # Newer files keep all rotary settings in rope_parameters, older ones split them.
    rope = keys.section("rope_parameters" if keys.has("rope_parameters") else "rope_scaling")
    decoder = _read_decoder(keys, rope, tied_required=True)
    return Phi4MMConfig(
        decoder=decoder,
        vision=_read_tower(vision, vision.positive("crop_size")),
        speech=SpeechConfig(
            num_bands=audio.positive("input_size"),
            conv_channels=audio.positive("nemo_conv_channels"),
            embed_dim=speech_dim,
            num_layers=audio.positive("num_blocks"),
            num_heads=audio.positive("num_attention_heads"),
            mlp_dim=audio.positive("intermediate_size"),
            kernel_size=audio.positive("kernel_size"),
            bias_distance=audio.positive("bias_max_distance"),
        ),
        loras={
            name: read_adapter(f"{adapter.folder}/adapter_config.json", adapters[name], decoder)
            for name, adapter in ADAPTERS.items()
            if name in adapters
        },
        image_token_id=vision.get("image_token_id", int),
        audio_token_id=audio.get("audio_token_id", int),
        pad_token_id=keys.get("pad_token_id", int),
        stop_token_ids=keys.token_ids("eos_token_ids" if keys.has("eos_token_ids") else "eos_token_id"),
    )


# What the release's config.json does not spell out: SigLIP-400M at 448 pixels, and the media's tokens.
RELEASE_TOWER: Mapping[str, Any] = {
    "hidden_size": 1152,
    "image_size": 448,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "layer_idx": -2,
    "type_feature": "patch",
}
RELEASE_IMAGE_TOKEN, RELEASE_AUDIO_TOKEN = 200010, 200011


def _read_tower(keys: _Keys, crop_size: int) -> VisionConfig:
    num_layers = keys.positive("num_hidden_layers")
    if num_layers < 2:
        raise keys.error("num_hidden_layers", f"is {num_layers}; the features come from the last but one of at least 2")
    return VisionConfig(
        embed_dim=keys.positive("hidden_size"),
        num_layers=num_layers - 1,
        num_heads=keys.positive("num_attention_heads"),
        mlp_dim=keys.positive("intermediate_size"),
        crop_size=crop_size,
        patch_size=keys.positive("patch_size"),
    )


_READERS = {"phi4mm": _read_original, "phi4_multimodal": _read_native}


def _check(config: Phi4MMConfig) -> Phi4MMConfig:
    """What must hold between sizes, whichever file they came from."""
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
            all(0 <= i < decoder.vocab_size for i in ids),
            f"token ids {ids} are not all within vocab_size {decoder.vocab_size}",
        ),
    ):
        if not ok:
            raise ConfigError(f"config.json: {problem}")
    return config


def with_layers(config: Phi4MMConfig, decoder: int, vision: int, speech: int) -> Phi4MMConfig:
    """The same widths with fewer layers, for tests and benchmarks at full width."""
    return dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, num_layers=decoder),
        vision=dataclasses.replace(config.vision, num_layers=vision),
        speech=dataclasses.replace(config.speech, num_layers=speech),
    )
