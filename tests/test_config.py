"""Both published config.json layouts; what is not supported is an error that names the key."""

import copy
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import FIXTURES, TINY

import phi4mm_jax
from phi4mm_jax import CheckpointError, ConfigError
from phi4mm_jax.config import Phi4MMConfig, read_adapter

RELEASE = json.loads((FIXTURES / "ms_release_config.json").read_text())


def native_of(original: dict) -> tuple[dict, dict]:
    """The same model's config.json and adapter_config.json files as transformers and PEFT save them."""
    audio = original["audio_processor"]["config"]
    tower = original.get("img_processor", {})
    same = (
        "hidden_act hidden_size intermediate_size max_position_embeddings num_attention_heads num_hidden_layers "
        "num_key_value_heads original_max_position_embeddings pad_token_id partial_rotary_factor rms_norm_eps "
        "rope_scaling rope_theta sliding_window tie_word_embeddings vocab_size attention_dropout embd_pdrop resid_pdrop"
    )
    native = {key: original[key] for key in same.split()} | {
        "model_type": "phi4_multimodal",
        "eos_token_id": original.get("eos_token_ids", [199999, 200020]),
        "vision_config": {
            "hidden_size": tower.get("hidden_size", 1152),
            "intermediate_size": tower.get("intermediate_size", 4304),
            "num_hidden_layers": tower.get("num_hidden_layers", 27),
            "num_attention_heads": tower.get("num_attention_heads", 16),
            "crop_size": 448,
            "patch_size": 14,
            "feature_layer": -2,
            "image_token_id": original.get("image_token_id", 200010),
        },
        "audio_config": {
            "hidden_size": audio["attention_dim"],
            "intermediate_size": audio["linear_units"],
            "num_blocks": audio["num_blocks"],
            "num_attention_heads": audio["attention_heads"],
            "kernel_size": audio["kernel_size"],
            "input_size": audio["input_size"],
            "nemo_conv_channels": audio["nemo_conv_settings"]["conv_channels"],
            "bias_max_distance": audio["relative_attention_bias_args"]["t5_bias_max_distance"],
            "ext_pw_out_channel": audio["ext_pw_out_channel"],
            "audio_token_id": original.get("audio_token_id", 200011),
        },
    }
    adapters = {
        kind: {"r": lora["r"], "lora_alpha": lora["lora_alpha"], "lora_dropout": lora["dp"], "bias": "none"}
        for kind, lora in (("vision", original["vision_lora"]), ("speech", original["speech_lora"]))
    }
    return native, adapters


def read_native(folder: Path, config: dict, adapters: dict) -> Phi4MMConfig:
    """Read the files of a model that transformers and PEFT have saved in a folder."""
    files = {"config.json": config} | {f"{name}-lora/adapter_config.json": x for name, x in adapters.items()}
    for path, values in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(values))
    return Phi4MMConfig.from_folder(folder)


def test_release():
    config = Phi4MMConfig.from_dict(RELEASE)
    d, v, s = config.decoder, config.vision, config.speech
    assert (d.num_layers, d.embed_dim, d.num_heads, d.num_kv_heads, d.head_size) == (32, 3072, 24, 8, 128)
    assert (d.mlp_dim, d.vocab_size, d.norm_eps) == (8192, 200064, 1e-5)
    assert (d.rope.rotary_size, d.rope.original_length, d.rope.max_length) == (96, 4096, 131072)
    assert d.rope.magnitude == pytest.approx(1.190238, abs=1e-6)
    assert (v.num_layers, v.embed_dim, v.mlp_dim, v.num_heads, v.head_size, v.norm_eps) == (
        26,
        1152,
        4304,
        16,
        72,
        1e-6,
    )
    assert v.features_per_crop == 256
    assert (s.num_layers, s.embed_dim, s.mlp_dim, s.num_heads, s.conv_channels) == (24, 1024, 1536, 16, 1024)
    assert (s.bias_distance, s.chunk_tokens, s.subsampled_bands) == (500, 500, 10)
    assert (config.loras["vision"].rank, config.loras["vision"].scale) == (256, 2.0)
    speech = config.loras["speech"]
    assert (speech.rank, speech.scale, speech.dropout) == (320, 2.0, 0.01)
    assert (config.image_token_id, config.audio_token_id, config.pad_token_id) == (200010, 200011, 199999)
    assert config.stop_token_ids == (199999, 200020)


@pytest.mark.parametrize("original", [RELEASE, json.loads((TINY / "config.json").read_text())])
def test_native_layout_says_the_same(original, tmp_path):
    native, adapters = native_of(original)
    assert read_native(tmp_path, native, adapters) == Phi4MMConfig.from_dict(original)
    modern = copy.deepcopy(native)  # newer files keep the rotary settings together
    length = "original_max_position_embeddings"  # is saved twice
    modern["rope_parameters"] = modern.pop("rope_scaling") | {
        **{key: modern.pop(key) for key in ("rope_theta", "partial_rotary_factor")},
        length: modern[length],
    }
    modern["rope_parameters"]["rope_type"] = modern["rope_parameters"].pop("type")
    assert read_native(tmp_path, modern, adapters) == Phi4MMConfig.from_dict(original)
    modern["hidden_act"], modern["vision_config"]["hidden_act"] = "swish", "gelu_new"  # other names of one function
    modern["audio_config"] |= dict.fromkeys(("activation", "conv_activation", "conv_glu_type"), "silu")
    assert read_native(tmp_path, modern, adapters) == Phi4MMConfig.from_dict(original)
    without = Phi4MMConfig.from_dict(native)
    assert without.loras == {}


UNSUPPORTED = {
    "model_type": "llama",
    "hidden_act": "gelu",
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
    "lm_head_bias": True,
    "attention_dropout": 0.1,
    "resid_pdrop": 0.1,
    "sliding_window": 4096,
    "full_attn_mod": 2,
    "num_key_value_heads": 7,
    "num_attention_heads": 25,
    "hidden_size": "3072",
    "vocab_size": 1000,
    "rms_norm_eps": None,
    "num_hidden_layers": 0,
    "partial_rotary_factor": 0.001,
    "original_max_position_embeddings": 1 << 20,
    "embd_layer.embedding_cls": "image",
    "embd_layer.image_embd_layer.hd_transform_order": "glb_sub",
    "embd_layer.image_embd_layer.use_hd_transform": False,
    "embd_layer.image_embd_layer.image_token_compression_cls": "none",
    "embd_layer.audio_embd_layer.use_qformer": True,
    "embd_layer.audio_embd_layer.compression_rate": 4,
    "audio_processor.name": "whisper",
    "audio_processor.config.chunk_size": 18,
    "audio_processor.config.causal": False,
    "audio_processor.config.batch_norm": True,
    "audio_processor.config.time_reduction": 4,
    "audio_processor.config.conv_glu_type": "sigmoid",
    "audio_processor.config.activation": "silu",
    "audio_processor.config.depthwise_seperable_out_channel": 512,
    "audio_processor.config.relative_attention_bias_args.type": "rotary",
    "rope_scaling.type": "yarn",
    "rope_scaling.long_factor": [1.0, 2.0],
    "rope_scaling.short_factor": ["1"] * 48,
    "vision_lora.r": -1,
    "speech_lora.use_dora": True,
    "speech_lora.alpha_pattern": {"o_proj": 2},
    "speech_lora.lora_alpha": 0,
    "vision_lora.lora_alpha": float("nan"),
    "vision_lora.peft_type": "LOHA",
    "quantization_config": {"bits": 4},
    "vision_lora.rank_pattern": {"o_proj": 2},
    "vision_lora.lora_bias": True,
    "vision_lora.fan_in_fan_out": True,
    "audio_processor.config.input_size": 128,
    "vision_lora.dp": 1.0,
    "speech_lora.dp": -0.5,
    "eos_token_id": [True],
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_unsupported_choices_are_errors(key):
    config = copy.deepcopy(RELEASE)
    *sections, last = key.split(".")
    section = config
    for name in sections:
        section = section[name]
    section[last] = UNSUPPORTED[key]
    with pytest.raises(ConfigError, match=last):
        Phi4MMConfig.from_dict(config)


UNSUPPORTED_NATIVE: dict[str, Any] = {  # in which transformers computes something else, or says something else
    "audio_config.input_size": 128,
    "vision_config.layer_norm_eps": 1e-5,
    "vision_config.image_size": 224,
    "vision_config.image_token_id": 200011,
    "rope_scaling.original_max_position_embeddings": 2048,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "longrope"},
    "rope_theta": 0,
    "rms_norm_eps": -1e-5,
    "is_causal": False,
}


@pytest.mark.parametrize("key", UNSUPPORTED_NATIVE)
def test_unsupported_choices_of_the_native_layout_are_errors(key):
    config, _ = native_of(copy.deepcopy(RELEASE))
    section, last = (config[key.split(".")[0]], key.split(".")[1]) if "." in key else (config, key)
    section[last] = UNSUPPORTED_NATIVE[key]
    with pytest.raises(ConfigError, match=last):
        Phi4MMConfig.from_dict(config)


@pytest.mark.parametrize("rate", [1.0, 2, -0.5, float("nan")])
@pytest.mark.parametrize("key", ["lora_dropout", "dp"])
def test_rates_of_dropout_are_shares(key, rate):
    _, adapters = native_of(RELEASE)
    adapters["speech"][key] = rate
    with pytest.raises(ConfigError, match=f"speech-lora/adapter_config.json: {key} is .* below 1"):
        read_adapter("speech-lora/adapter_config.json", adapters["speech"], Phi4MMConfig.from_dict(RELEASE).decoder)


@pytest.mark.parametrize(("own", "stops"), [
    (200018, (200018, 199999, 200020)), ([199999, 200018], (199999, 200018, 200020)), (None, (199999, 200020)),
])  # fmt: skip
def test_stop_tokens_of_the_original_layout(own, stops, tmp_path):
    """Those of config.json and the release's; or of generation_config.json alone, as PyTorch generates."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASE | {"eos_token_id": own}))
    assert Phi4MMConfig.from_folder(tmp_path).stop_token_ids == stops
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [200020, 7]}))
    assert Phi4MMConfig.from_folder(tmp_path).stop_token_ids == (200020, 7)


def test_the_length_before_longrope_is_that_of_transformers():
    from transformers import Phi4MultimodalConfig

    config, _ = native_of(RELEASE)
    del config["original_max_position_embeddings"]
    for own, taken in ((4096, True), (2048, False)):
        config["rope_scaling"] = RELEASE["rope_scaling"] | {"original_max_position_embeddings": own}
        theirs = Phi4MultimodalConfig.from_dict(copy.deepcopy(config)).rope_parameters
        assert isinstance(theirs, dict)
        assert (theirs.get("original_max_position_embeddings") == own) is taken
        with nullcontext() if taken else pytest.raises(ConfigError, match="PyTorch goes by"):
            assert Phi4MMConfig.from_dict(config).decoder.rope.original_length == own


@pytest.mark.parametrize("key", sorted(RELEASE.keys() - {
    "_name_or_path", "architectures", "auto_map", "attention_bias", "attention_dropout", "bos_token_id", "embd_pdrop",
    "eos_token_id", "full_attn_mod", "initializer_range", "interpolate_factor", "lm_head_bias", "mlp_bias",
    "resid_pdrop", "sliding_window", "torch_dtype", "transformers_version", "use_cache", "speech_lora", "vision_lora",
}))  # fmt: skip
def test_missing_keys_are_errors_not_defaults(key):
    config = copy.deepcopy(RELEASE)
    del config[key]
    with pytest.raises(ConfigError, match=key):
        Phi4MMConfig.from_dict(config)


def test_unreadable_files(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        Phi4MMConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        Phi4MMConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="list"):
        Phi4MMConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"^{tmp_path}: config.json: model_type is None; supported are"):
        Phi4MMConfig.from_folder(tmp_path)


def lora_fields() -> dict[str, Any]:
    """The settings that PEFT writes of an adapter of its defaults."""
    from peft import LoraConfig

    return json.loads(json.dumps(LoraConfig(r=8, lora_alpha=16, target_modules=".*").to_dict(), default=str))


def adapter_folder(tmp_path: Path, layout: str, settings: dict[str, Any]) -> Path:
    if layout == "original":
        shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("inputs", "goldens*"))
    else:
        (tmp_path / "model").mkdir()
        from helpers import torch_native

        native = torch_native.native_config(json.loads((TINY / "config.json").read_text())).to_dict()
        (tmp_path / "model" / "config.json").write_text(json.dumps(native, default=str))
        for kind in ("vision", "speech"):
            shutil.copytree(TINY / f"{kind}-lora", tmp_path / "model" / f"{kind}-lora")
    path = tmp_path / "model" / "vision-lora" / "adapter_config.json"
    path.write_text(json.dumps({**lora_fields(), "r": 8, "lora_alpha": 16, "peft_type": "LORA"} | settings))
    return tmp_path / "model"


@pytest.mark.torch
@pytest.mark.parametrize("layout", ["original", "native"])
@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva", "mica"])
def test_adapters_of_plain_lora_are_taken(tmp_path, layout, init):
    """As PEFT writes them, with every setting at its default."""
    folder = adapter_folder(tmp_path, layout, {"init_lora_weights": init})
    config = Phi4MMConfig.from_folder(folder)
    assert (config.loras["vision"].rank, config.loras["vision"].scale) == (8, 2.0)


@pytest.mark.torch
@pytest.mark.parametrize("layout", ["original", "native"])
@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "pissa_niter_16", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "OLoRA", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "corda", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "loftq", "init_lora_weights=True"),
        ("init_lora_weights", "lora_ga", "init_lora_weights=True"),
        ("init_lora_weights", "something new", "init_lora_weights=True"),
        ("use_dora", True, "without it"),
        ("alora_invocation_tokens", [1, 2], "without it"),
        ("modules_to_save", ["embed_tokens"], "without it"),
        ("bias", "all", "without it"),
        ("lora_bias", True, "without it"),
        ("fan_in_fan_out", True, "without it"),
        ("layer_replication", [[0, 2], [1, 3]], "without it"),
        ("trainable_token_indices", [5], "without it"),
        ("target_parameters", ["experts.gate"], "without it"),
        ("use_qalora", True, "without it"),
        ("peft_type", "VERA", "save_as_lora.*merge_and_unload"),
        ("a_setting_of_tomorrow", 3, "without it"),
    ],
)  # fmt: skip
def test_adapter_settings_that_change_the_numbers_are_refused_by_name(tmp_path, layout, setting, value, remedy):
    folder = adapter_folder(tmp_path, layout, {setting: value})
    with pytest.raises(ConfigError, match=rf"vision-lora/adapter_config\.json: {setting} is .*{remedy}"):
        phi4mm_jax.load(folder)


@pytest.mark.torch
@pytest.mark.parametrize("layout", ["original", "native"])
def test_pickled_adapters_are_refused(tmp_path, layout):
    folder = adapter_folder(tmp_path, layout, {}) / "vision-lora"
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: pickle files are not read.*safe_serialization"):
        Phi4MMConfig.from_folder(folder.parent)


@pytest.mark.parametrize(
    ("key", "value"), [("factor", 16.0), ("attention_factor", 1.5), ("short_mscale", 1.1), ("long_mscale", 1.3)]
)
def test_longrope_settings_that_would_change_the_rotation_are_refused(key, value):
    config = copy.deepcopy(RELEASE)
    config["rope_scaling"][key] = value
    with pytest.raises(ConfigError, match=rf"rope_scaling: {key}"):
        Phi4MMConfig.from_dict(config)


def test_longrope_settings_that_say_what_the_lengths_give():
    config = copy.deepcopy(RELEASE)
    config["rope_scaling"] |= {"factor": 32.0, "attention_factor": 1.1902380714238083}
    assert Phi4MMConfig.from_dict(config) == Phi4MMConfig.from_dict(RELEASE)
