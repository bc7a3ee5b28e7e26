"""Readers of `config.json`, one for each layout: the fields of `Phi4MMConfig`, by name."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.config.keys import Keys
from phi4mm_jax.config.peft_settings import read_dropout
from phi4mm_jax.config.sizes import DecoderConfig, LoraConfig, RopeConfig, SpeechConfig, VisionConfig

Fields = dict[str, Any]

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
_RELEASE_STOPS = (199999, 200020)  # <|endoftext|>, and <|end|> of a chat's turn
_SWISH = ("silu", "swish")  # transformers has one function by both names; the release's own encoder only by swish
_BANDS = 80  # of the spectrum that clips are made into
_ORIGINAL_LENGTH = 4096  # of original_max_position_embeddings in PyTorch, where config.json itself does not say it


def _read_original(keys: Keys) -> Fields:
    """Read `model_type: phi4mm`. The release's file lacks the vision tower's sizes and the media token ids."""
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
        "input_size": _BANDS,
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

    tower = keys.section("img_processor") if keys.has("img_processor") else Keys(RELEASE_TOWER, "img_processor")
    tower.expect("layer_idx", -2, required=True)
    tower.expect("type_feature", "patch", required=True)
    crop_size = image.positive("crop_size")
    tower.expect("image_size", crop_size, required=True)
    return Fields(
        decoder=_read_decoder(keys, keys.section("rope_scaling")),
        vision=_read_tower(tower, crop_size),
        speech=SpeechConfig(
            num_bands=_BANDS,
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
        stop_token_ids=_original_stops(keys),
    )


def _original_stops(keys: Keys) -> tuple[int, ...]:
    """Return the tokens that end an answer; the release's config.json names one of its two."""
    if keys.has("eos_token_ids"):
        return keys.token_ids("eos_token_ids")
    own = keys.token_ids("eos_token_id") if keys.has("eos_token_id") else ()
    return tuple(dict.fromkeys((*own, *_RELEASE_STOPS)))


def _read_native(keys: Keys) -> Fields:
    """Read `model_type: phi4_multimodal`, as transformers saves it: adapters are in folders of their own."""
    audio, vision = keys.section("audio_config"), keys.section("vision_config")
    for key in ("activation", "conv_activation", "conv_glu_type"):
        audio.expect(key, *_SWISH)
    for key, supported in {
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
    audio.expect("input_size", _BANDS, required=True)
    speech_dim = audio.positive("hidden_size")
    for width in ("ext_pw_out_channel", "depthwise_separable_out_channel"):
        audio.expect(width, speech_dim)
    vision.expect("hidden_act", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new")  # one function
    vision.expect("feature_layer", -2)
    vision.expect("num_channels", 3)
    vision.expect("attention_dropout", 0, 0.0)
    vision.expect("image_size", vision.positive("crop_size"))
    vision.expect("layer_norm_eps", VisionConfig.norm_eps)
    # Newer files keep all rotary settings in rope_parameters, older ones split them; transformers reads one of them.
    rope = keys.section("rope_parameters" if keys.has("rope_parameters") else "rope_scaling")
    if keys.has("rope_scaling") and keys.section("rope_scaling").values != rope.values:
        raise keys.error("rope_scaling", "differs from rope_parameters; remove the one that is not meant")
    return Fields(
        decoder=_read_decoder(keys, rope),
        vision=_read_tower(vision, vision.positive("crop_size")),
        speech=SpeechConfig(
            num_bands=_BANDS,
            conv_channels=audio.positive("nemo_conv_channels"),
            embed_dim=speech_dim,
            num_layers=audio.positive("num_blocks"),
            num_heads=audio.positive("num_attention_heads"),
            mlp_dim=audio.positive("intermediate_size"),
            kernel_size=audio.positive("kernel_size"),
            bias_distance=audio.positive("bias_max_distance"),
        ),
        loras={},
        image_token_id=vision.get("image_token_id", int),
        audio_token_id=audio.get("audio_token_id", int),
        pad_token_id=keys.get("pad_token_id", int),
        stop_token_ids=keys.token_ids("eos_token_ids" if keys.has("eos_token_ids") else "eos_token_id"),
    )


def _read_decoder(keys: Keys, rope: Keys) -> DecoderConfig:
    """Read what both layouts spell alike; `rope` holds the factors and the rotary settings."""
    keys.expect("hidden_act", *_SWISH, required=True)
    if keys.values.get("tie_word_embeddings") is False:
        raise keys.error(
            "tie_word_embeddings",
            "is False, but only a head that is tied to the embedding is supported; where lm_head.weight equals the "
            "embedding, set it to true",
        )
    keys.expect("tie_word_embeddings", True, required=True)
    for absent in ("attention_bias", "mlp_bias", "lm_head_bias"):
        keys.expect(absent, False)
    for dropout in ("attention_dropout", "embd_pdrop", "resid_pdrop"):
        keys.expect(dropout, 0, 0.0)
    keys.expect("is_causal", True)
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
    length = "original_max_position_embeddings"
    original = keys.positive(length, rope.values.get(length))
    if rope.has(length) and rope.values[length] != (own := keys.values.get(length) or _ORIGINAL_LENGTH):
        raise rope.error(
            length,
            f"is {rope.values[length]!r}, but PyTorch goes by that of config.json itself, {own}; make them equal",
        )
    rotary = RopeConfig(
        theta=rope.above_zero("rope_theta", keys.values.get("rope_theta")),
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
        norm_eps=keys.above_zero("rms_norm_eps"),
        rope=rotary,
    )


def _read_tower(keys: Keys, crop_size: int) -> VisionConfig:
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


def _read_lora(keys: Keys) -> LoraConfig:
    for unsupported in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        keys.expect(unsupported, False)
    for by_module in ("rank_pattern", "alpha_pattern"):
        keys.expect(by_module, {})
    keys.expect("bias", "none")
    keys.expect("peft_type", "LORA")
    alpha = keys.get("lora_alpha", float)
    if not 0.0 < alpha < math.inf:
        raise keys.error("lora_alpha", f"is {alpha}; expected a positive number, or the adapter would do nothing")
    return LoraConfig(keys.positive("r"), alpha, read_dropout(keys))


READERS: Mapping[str, Callable[[Keys], Fields]] = {  # by model_type
    "phi4mm": _read_original,
    "phi4_multimodal": _read_native,
}
