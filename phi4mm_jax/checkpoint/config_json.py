"""Writer of config.json in either layout from a configuration: the inverse of `Phi4MMConfig.from_dict`.

Every key is written out: transformers' defaults for `phi4_multimodal` are not the release's. What the model does not
depend on (its name, how it was trained) is the release's, or the source's where both layouts have it.
"""

from collections.abc import Mapping
from typing import Any

from phi4mm_jax.adapters import ADAPTERS, Adapter
from phi4mm_jax.config import RELEASE_AUDIO_TOKEN, RELEASE_IMAGE_TOKEN, RELEASE_TOWER, LoraConfig, Phi4MMConfig

Json = dict[str, Any]

# The modules that an adapter is for, which PEFT looks for within what it wraps: the decoder in the release's code (see
# `Adapter.targets`), the model with its head in transformers. The release's pattern would match nothing there.
NATIVE_TARGETS = r"(.*\.)?layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)"

# The release's code, which its config.json names.
CODE = {"AutoConfig": "configuration_phi4mm.Phi4MMConfig", "AutoModelForCausalLM": "modeling_phi4mm.Phi4MMForCausalLM"}


def native_config(config: Phi4MMConfig, source: Mapping[str, Any]) -> Json:
    """Return config.json as transformers' `Phi4MultimodalConfig` reads it, in versions 4 and 5.

    Args:
        source: the parsed config.json, of either layout, that `config` was read from.
    """
    v, s = config.vision, config.speech
    own = source.get("eos_token_id")
    return {
        "architectures": ["Phi4MultimodalForCausalLM"],
        "model_type": "phi4_multimodal",
        **_shared(config, source),
        "eos_token_id": sorted(config.stop_token_ids, key=lambda token: token != own),  # its own first
        "vision_config": {
            "model_type": "phi4_multimodal_vision",
            "attention_dropout": 0.0,
            "crop_size": v.crop_size,
            "feature_layer": -2,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": v.embed_dim,
            "image_size": v.crop_size,
            "image_token_id": config.image_token_id,
            "intermediate_size": v.mlp_dim,
            "layer_norm_eps": v.norm_eps,
            "num_attention_heads": v.num_heads,
            "num_channels": 3,
            "num_hidden_layers": v.num_layers + 1,
            "patch_size": v.patch_size,
        },
        "audio_config": {
            "model_type": "phi4_multimodal_audio",
            "activation": "swish",
            "audio_token_id": config.audio_token_id,
            "bias_max_distance": s.bias_distance,
            "bias_symmetric": False,
            "chunk_size": -1,
            "conv_activation": "swish",
            "conv_glu_type": "swish",
            "depthwise_multiplier": 1,
            "depthwise_separable_out_channel": s.embed_dim,
            "downsample_rate": 1,
            "dropout_rate": 0.0,
            "ext_pw_out_channel": s.embed_dim,
            "feature_layer": -2,
            "hidden_size": s.embed_dim,
            "initializer_range": source.get("initializer_range", 0.02),
            "input_size": s.num_bands,
            "intermediate_size": s.mlp_dim,
            "kernel_size": s.kernel_size,
            "left_chunk": 18,  # without effect where chunk_size is -1
            "nemo_activation": "relu",
            "nemo_conv_channels": s.conv_channels,
            "num_attention_heads": s.num_heads,
            "num_blocks": s.num_layers,
            "time_reduction": s.time_reduction,
        },
    }


def original_config(config: Phi4MMConfig, source: Mapping[str, Any], *, code: bool) -> Json:
    """Return config.json as the release has it.

    Args:
        source: as in `native_config`.
        code: name the release's code, which then has to be in the folder.
    """
    own = source.get("eos_token_id")
    return {
        "architectures": ["Phi4MMForCausalLM"],
        "model_type": "phi4mm",
        "transformers_version": "4.46.1",  # of the release; its code does not run with 5
        **({"auto_map": CODE} if code else {}),
        **_shared(config, source),
        "eos_token_id": own[0] if isinstance(own, list) else own,  # generation_config.json has all of them
        "attention_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "audio_processor": {"config": _original_speech(config), "name": "cascades"},
        "embd_layer": {
            "audio_embd_layer": {
                "compression_rate": config.speech.time_reduction,
                "downsample_rate": 1,
                "embedding_cls": "audio",
                "enable_gradient_checkpointing": True,
                "projection_cls": "mlp",
                "use_conv_downsample": False,
                "use_qformer": False,
            },
            "embedding_cls": "image_audio",
            "image_embd_layer": {
                "crop_size": config.vision.crop_size,
                "embedding_cls": "tune_image",
                "enable_gradient_checkpointing": True,
                "hd_transform_order": "sub_glb",
                "image_token_compression_cls": "avg_pool_2d",
                "projection_cls": "mlp",
                "use_hd_transform": True,
                "with_learnable_separator": True,
            },
        },
        **{ADAPTERS[name].config_key: _original_lora(ADAPTERS[name], lora) for name, lora in config.loras.items()},
        **_unlike_the_release(config),
    }


def whole(number: float) -> int | float:
    """Return an alpha as the files spell it."""
    return int(number) if number == int(number) else number


def _original_speech(config: Phi4MMConfig) -> Json:
    s = config.speech
    return {
        "activation": "swish",
        "activation_checkpointing": {"interval": 1, "module": "transformer", "offload": False},
        "attention_dim": s.embed_dim,
        "attention_heads": s.num_heads,
        "batch_norm": False,
        "bias_in_glu": True,
        "causal": True,
        "chunk_size": -1,
        "cnn_layer_norm": True,
        "conv_activation": "swish",
        "conv_glu_type": "swish",
        "depthwise_multiplier": 1,
        "depthwise_seperable_out_channel": s.embed_dim,
        "dropout_rate": 0.0,
        "encoder_embedding_config": {"input_size": s.num_bands},
        "ext_pw_kernel_size": 1,
        "ext_pw_out_channel": s.embed_dim,
        "input_layer": "nemo_conv",
        "input_size": s.num_bands,
        "kernel_size": s.kernel_size,
        "left_chunk": 18,
        "linear_units": s.mlp_dim,
        "nemo_conv_settings": {"conv_channels": s.conv_channels},
        "num_blocks": s.num_layers,
        "relative_attention_bias_args": {"t5_bias_max_distance": s.bias_distance, "type": "t5"},
        "time_reduction": s.time_reduction,
    }


def _original_lora(adapter: Adapter, lora: LoraConfig) -> Json:
    return {"dp": lora.dropout, "layer": adapter.targets, "lora_alpha": whole(lora.alpha), "r": lora.rank}


def _unlike_the_release(config: Phi4MMConfig) -> Json:
    """Return the keys that the release's file lacks, if this model differs from the release."""
    v = config.vision
    tower = {
        "hidden_size": v.embed_dim,
        "image_size": v.crop_size,
        "intermediate_size": v.mlp_dim,
        "num_attention_heads": v.num_heads,
        "num_hidden_layers": v.num_layers + 1,
        "patch_size": v.patch_size,
        "layer_idx": -2,
        "type_feature": "patch",
    }
    stated = {
        "img_processor": (tower, RELEASE_TOWER),
        "image_token_id": (config.image_token_id, RELEASE_IMAGE_TOKEN),
        "audio_token_id": (config.audio_token_id, RELEASE_AUDIO_TOKEN),
    }
    return {key: value for key, (value, usual) in stated.items() if value != usual}


def _shared(config: Phi4MMConfig, source: Mapping[str, Any]) -> Json:
    """Return the keys that both layouts call the same; rotary settings in the one spelling that all versions read."""
    d, rope = config.decoder, config.decoder.rope
    rotary = {**source, **(source.get("rope_parameters") or source["rope_scaling"])}
    return {
        "attention_dropout": 0.0,
        "bos_token_id": source.get("bos_token_id"),
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "hidden_size": d.embed_dim,
        "initializer_range": source.get("initializer_range", 0.02),
        "intermediate_size": d.mlp_dim,
        "max_position_embeddings": rope.max_length,
        "num_attention_heads": d.num_heads,
        "num_hidden_layers": d.num_layers,
        "num_key_value_heads": d.num_kv_heads,
        "original_max_position_embeddings": rope.original_length,
        "pad_token_id": config.pad_token_id,
        "partial_rotary_factor": rotary["partial_rotary_factor"],
        "resid_pdrop": 0.0,
        "rms_norm_eps": d.norm_eps,
        "rope_scaling": {
            "long_factor": list(rope.long_factor),
            "short_factor": list(rope.short_factor),
            "type": "longrope",
        },
        "rope_theta": rope.theta,
        "sliding_window": source.get("sliding_window"),
        "tie_word_embeddings": True,
        "torch_dtype": source.get("torch_dtype", source.get("dtype")),
        "use_cache": source.get("use_cache", True),
        "vocab_size": d.vocab_size,
    }
