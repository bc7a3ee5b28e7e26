"""What travels with the weights: the same bytes within a layout; between them, transformers and PEFT load the result.

transformers' image processor, and so its whole processor, needs torchvision, which is no dependency of the tests. Here
each of its other parts is loaded, and the chat template that it would use is rendered by the tokenizer.
"""

import json
import lzma
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cases import golden_cases, media_of
from helpers.marks import fast_are
from helpers.paths import FIXTURES, TINY
from safetensors.numpy import load_file, save_file
from soundfile import read as read_audio

from phi4mm_jax import CheckpointError, ConfigError
from phi4mm_jax.checkpoint.sidecar_files import read_sidecar_files
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.processing.processor_files import read_dynamic_hd
from phi4mm_jax.processing.tokenizer import Tokenizer

RELEASE = json.loads((FIXTURES / "ms_release_config.json").read_text())
CASES = {case["name"]: case for case in golden_cases()}
KINDS = ("vision", "speech")
CODE = ("configuration_phi4mm.py", "modeling_phi4mm.py", "processing_phi4mm.py")
TEXTS = (
    "How to explain   Internet for a medieval knight?",
    "<|user|>  hi there<|end|>\n\n<|assistant|> don't I'LL 12345  \t\n x",
    "日本語 élève 한국어 <|endoftext10|><|endoftext11|> y",
)


@pytest.fixture(scope="module")
def transformers() -> Any:
    import transformers

    return transformers


def write(files: Mapping[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def values(path: Path) -> dict:
    return json.loads(path.read_text())


def change(path: Path, **changes) -> None:
    path.write_text(json.dumps(values(path) | changes))


@pytest.fixture
def original(tmp_path) -> Path:
    """The tiny checkpoint's files, to be edited."""
    return write(read_sidecar_files(TINY, "original"), tmp_path / "original")


@pytest.fixture
def release(tmp_path) -> Path:
    """As the release: its config.json, its tokenizer's size, its code's files."""
    folder = write(read_sidecar_files(TINY, "original"), tmp_path / "release")
    (folder / "config.json").write_text(json.dumps(RELEASE))
    for kind in KINDS:
        settings = RELEASE[f"{kind}_lora"]
        same = {"r": settings["r"], "lora_alpha": settings["lora_alpha"], "lora_dropout": settings["dp"]}
        change(folder / f"{kind}-lora" / "adapter_config.json", **same)
    tokenizer = json.loads(lzma.decompress((FIXTURES / "o200k" / "tokenizer.json.xz").read_bytes()))
    # The tokenizers library numbers added tokens one after the other: the ids hold if there is no gap.
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    dummy = added[199999]
    tokenizer["added_tokens"] = [
        added.get(i, dummy | {"id": i, "content": f"<|dummy_{i}|>"}) for i in range(199998, max(added) + 1)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = values(folder / "tokenizer_config.json")
    del settings["added_tokens_decoder"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    change(folder / "preprocessor_config.json", auto_map={"AutoProcessor": "processing_phi4mm.Phi4MMProcessor"})
    (folder / "processor_config.json").write_text('{"processor_class": "Phi4MMProcessor"}')
    stops = {"bos_token_id": 199999, "eos_token_id": [200020, 199999], "pad_token_id": 199999}
    (folder / "generation_config.json").write_text(json.dumps(stops))
    for name in (*CODE, "sample_finetune_speech.py"):
        (folder / name).write_text(f"raise RuntimeError('{name} was run')")
    return folder


# Within a layout.


@pytest.mark.parametrize("layout", ["original", "native"])
def test_files_are_copied_within_a_layout(original, tmp_path, layout):
    source = original if layout == "original" else write(read_sidecar_files(original, "native"), tmp_path / "native")
    names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    more = "LICENSE README.md vocab.json merges.txt added_tokens.json special_tokens_map.json modeling_phi4mm.py"
    texts = {*more.split(), "additional_chat_templates/tool_use.jinja", "vision-lora/README.md"}
    write({name: f"{name}\r\n é \0".encode() for name in texts}, source)
    weights = (
        "model.safetensors model.safetensors.index.json pytorch_model.bin optimizer.pt rng_state.pth m.gguf m.onnx"
    )
    elsewhere = ".gitattributes .cache/x.json figures/x.png examples/x.json parameters/_METADATA speech-lora/a.bin"
    write(dict.fromkeys([*weights.split(), *elsewhere.split()], b"{}"), source)
    with (source / "video.mp4").open("wb") as large:
        large.truncate((64 << 20) + 1)
    assert names | texts == read_sidecar_files(source, layout).keys()
    assert read_sidecar_files(source, layout) == {name: (source / name).read_bytes() for name in names | texts}


def test_adapter_settings_are_made_where_they_are_missing(original):
    expected = {kind: values(original / f"{kind}-lora" / "adapter_config.json") for kind in KINDS}
    for kind in KINDS:
        shutil.rmtree(original / f"{kind}-lora")
    files = read_sidecar_files(original, "original")
    for kind in KINDS:
        made = json.loads(files[f"{kind}-lora/adapter_config.json"])
        assert made.pop("base_model_name_or_path") is None
        assert made == {k: v for k, v in expected[kind].items() if k != "base_model_name_or_path"}


@pytest.mark.parametrize("layout", ["original", "native"])
def test_adapters_only(original, layout):
    files = read_sidecar_files(original, layout, adapters_only=True)
    assert set(files) == {f"{kind}-lora/adapter_config.json" for kind in KINDS}
    assert files.items() <= read_sidecar_files(original, layout).items()


# Between the layouts: our own reading.


@pytest.mark.parametrize("source", fast_are(["original"], ["original", "release"]))
def test_sidecar_files_survive_a_round_trip(source, tmp_path, request):
    source = request.getfixturevalue(source)
    native = write(read_sidecar_files(source, "native"), tmp_path / "native")
    back = write(read_sidecar_files(native, "original"), tmp_path / "back")
    config = Phi4MMConfig.from_folder(source)
    for folder in (native, back):
        assert Phi4MMConfig.from_folder(folder) == config
        processor = Processor.from_folder(folder, config)
        assert (processor.context, processor.dynamic_hd) == (131072, 36)
    training = {"activation_checkpointing", "enable_gradient_checkpointing"}
    other = {"_name_or_path", "transformers_version", "eos_token_ids", "auto_map"}  # no key of the model's
    assert flat(values(back / "config.json"), training | other) == flat(
        values(source / "config.json"), training | other
    )
    for name in ("tokenizer_config.json", "vision-lora/adapter_config.json", "speech-lora/adapter_config.json"):
        assert values(back / name) == values(source / name)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (back / name).read_bytes() == (native / name).read_bytes() == (source / name).read_bytes()


def flat(config: dict, without: set[str]) -> dict:
    return {
        key: flat(value, without) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in without
    }


def test_the_release_comes_back_with_its_code(release, tmp_path):
    native = write(read_sidecar_files(release, "native"), tmp_path / "native")
    assert all("auto_map" not in path.read_text() for path in native.glob("*config.json"))
    back = write(read_sidecar_files(native, "original"), tmp_path / "back")
    assert values(back / "config.json").keys() == RELEASE.keys()
    classes = {key: name for key, name in RELEASE["auto_map"].items() if key != "AutoTokenizer"}  # another repository's
    assert values(back / "config.json")["auto_map"] == classes
    assert values(back / "preprocessor_config.json")["auto_map"]["AutoProcessor"] == "processing_phi4mm.Phi4MMProcessor"
    for name in (*CODE, "sample_finetune_speech.py"):
        assert (back / name).read_bytes() == (release / name).read_bytes()
        (native / name).unlink()
    without = read_sidecar_files(native, "original")
    assert b"auto_map" not in without["config.json"] + without["preprocessor_config.json"]


@pytest.mark.torch
def test_from_a_folder_that_transformers_wrote(original, tmp_path, transformers):
    """Rotary settings in rope_parameters, dtype for torch_dtype, no generation_config.json, a nested processor."""
    native = write(read_sidecar_files(original, "native"), tmp_path / "native")
    transformers.AutoConfig.from_pretrained(native).save_pretrained(native)
    transformers.AutoTokenizer.from_pretrained(native).save_pretrained(native)
    crops = values(native / "preprocessor_config.json") | {"dynamic_hd": 7}
    (native / "processor_config.json").write_text(json.dumps({"image_processor": crops, "audio_processor": {}}))
    for name in ("generation_config.json", "preprocessor_config.json"):
        (native / name).unlink()
    assert {"rope_parameters", "dtype"} <= values(native / "config.json").keys()
    assert Phi4MMConfig.from_folder(native) == Phi4MMConfig.from_folder(original)
    assert Processor.from_folder(native, Phi4MMConfig.from_folder(native)).dynamic_hd == 7

    back = write(read_sidecar_files(native, "original"), tmp_path / "back")
    again = write(
        read_sidecar_files(write(read_sidecar_files(original, "native"), tmp_path / "n"), "original"), tmp_path / "o"
    )
    assert Phi4MMConfig.from_folder(back) == Phi4MMConfig.from_folder(original)
    assert values(back / "config.json") == values(again / "config.json")
    assert read_dynamic_hd(back) == 7
    tokens = "added_tokens_decoder"  # in tokenizer.json alone
    expected = {key: value for key, value in values(original / "tokenizer_config.json").items() if key != tokens}
    assert values(back / "tokenizer_config.json") == expected


@pytest.mark.torch
@pytest.mark.parametrize("stated", [{}, {"eos_token_id": 633, "temperature": 0.5}])
def test_stop_tokens_travel(original, tmp_path, stated, transformers):
    """config.json of the original outranks generation_config.json, which is all that the native layout goes by."""
    change(original / "config.json", eos_token_ids=[639, 647])
    (original / "generation_config.json").write_text(json.dumps(stated))
    native = write(read_sidecar_files(original, "native"), tmp_path / "native")
    back = write(read_sidecar_files(native, "original"), tmp_path / "back")
    for folder in (native, back):
        assert Phi4MMConfig.from_folder(folder).stop_token_ids == (639, 647)
        generation = transformers.GenerationConfig.from_pretrained(folder)
        assert generation.eos_token_id == [639, 647]
        assert (generation.pad_token_id, generation.temperature) == (633, stated.get("temperature"))


def test_adapters_that_are_not_there(original, tmp_path):
    native = write(read_sidecar_files(original, "native"), tmp_path / "native")
    shutil.rmtree(native / "speech-lora")
    files = read_sidecar_files(native, "original")
    assert "speech_lora" not in json.loads(files["config.json"])
    assert "vision_lora" in json.loads(files["config.json"])
    assert not any(name.startswith("speech-lora") for name in files)


# Between the layouts: transformers' and PEFT's reading.


@pytest.mark.torch
@pytest.mark.parametrize("source", ["original", "release"])
def test_autoconfig(source, tmp_path, request, transformers):
    from helpers import torch_native

    source = request.getfixturevalue(source)
    native = write(read_sidecar_files(source, "native"), tmp_path / "native")
    ours = transformers.AutoConfig.from_pretrained(native).to_dict()
    del ours["_name_or_path"]
    theirs = torch_native.native_config(values(source / "config.json")).to_dict()
    assert ours.pop("architectures") == ["Phi4MultimodalForCausalLM"]
    assert ours.pop("dtype") == values(source / "config.json")["torch_dtype"]
    assert set(ours.pop("eos_token_id")) == set(Phi4MMConfig.from_folder(source).stop_token_ids)
    rope, factor = theirs["rope_parameters"], theirs["rope_parameters"].pop("factor")
    # Where it is not stated, as version 4 demands, transformers takes the ratio of the lengths.
    assert factor == theirs["max_position_embeddings"] / rope["original_max_position_embeddings"]
    assert ours["rope_parameters"].pop("type") == "longrope"
    assert ours.pop("partial_rotary_factor") == rope["partial_rotary_factor"]
    dropped = {"architectures", "dtype", "eos_token_id", "_name_or_path"}
    assert ours == {key: value for key, value in theirs.items() if key not in dropped}


@pytest.mark.torch
def test_every_key_of_transformers_is_stated(original, transformers):
    """None is left to a default, which are not the release's."""
    stated = json.loads(read_sidecar_files(original, "native")["config.json"])
    stated["rope_parameters"] = stated["rope_scaling"]  # the name that all versions read
    for section, known in (
        (stated, transformers.Phi4MultimodalConfig),
        (stated["vision_config"], transformers.Phi4MultimodalVisionConfig),
        (stated["audio_config"], transformers.Phi4MultimodalAudioConfig),
    ):
        settings = {field for field in known.__annotations__ if not hasattr(transformers.PreTrainedConfig, field)}
        assert len(settings) > 10
        assert settings <= section.keys()


@pytest.mark.torch
@pytest.mark.parametrize("source", fast_are(["original"], ["original", "release"]))
def test_autotokenizer(source, tmp_path, request, transformers):
    source = request.getfixturevalue(source)
    native = write(read_sidecar_files(source, "native"), tmp_path / "native")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(native), Tokenizer.from_folder(source)
    config = values(native / "config.json")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text, special=True)
    assert theirs.image_token_id == config["vision_config"]["image_token_id"]
    assert theirs.audio_token_id == config["audio_config"]["audio_token_id"]
    assert (theirs.pad_token_id, theirs.model_max_length) == (config["pad_token_id"], 131072)


@pytest.mark.torch
def test_chat_template(tiny, original, tmp_path, transformers):
    """Texts as in the release's template, and the parts of a content as in our own chat."""
    native = write(read_sidecar_files(original, "native"), tmp_path / "native")
    tokenizer = transformers.AutoTokenizer.from_pretrained(native)
    release = transformers.AutoTokenizer.from_pretrained(
        original, config=transformers.AutoConfig.from_pretrained(native)
    )
    image, audio = TINY / "inputs" / "image_0.png", TINY / "inputs" / "audio_0.flac"
    texts = [
        {"role": "system", "content": "Be kind.", "tools": '[{"name": "f"}]'},
        {"role": "user", "content": "a 'quoted' {{text}}\n"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "b"},
    ]
    how = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(texts, **how) == release.apply_chat_template(texts, **how)
    parts = [{"type": "image"}, {"type": "text", "text": "and "}, {"type": "audio"}, {"type": "text", "text": "?"}]
    media = [{"type": "image", "image": image}, parts[1], {"type": "audio", "audio": audio}, parts[3]]
    rendered = tokenizer.apply_chat_template([*texts[:3], {"role": "user", "content": parts}], **how)
    ours = tiny.processor.row([*texts[:3], {"role": "user", "content": media}]).tokens.tolist()
    once = [t for i, t in enumerate(ours) if t not in (635, 636) or t != ours[i - 1]]
    assert tokenizer(rendered)["input_ids"] == once


@pytest.mark.torch
def test_feature_extractor_and_processor_settings(tiny, original, tmp_path, transformers):
    native = write(read_sidecar_files(original, "native"), tmp_path / "native")
    extractor = transformers.AutoFeatureExtractor.from_pretrained(native)
    usual = transformers.Phi4MultimodalFeatureExtractor()
    assert type(extractor) is transformers.Phi4MultimodalFeatureExtractor
    assert usual.to_dict().items() <= extractor.to_dict().items()
    clip, rate = read_audio(TINY / "inputs" / "audio_0.flac", dtype="float32")
    ours = tiny.processor.row("<|audio_1|>", (), [(clip, rate)]).clips[0]
    theirs = extractor(clip, sampling_rate=rate, return_tensors="np")
    assert theirs["audio_embed_sizes"].tolist() == [-(-len(ours) // 8)]
    assert np.abs(theirs["audio_input_features"][0] - ours).max() < 0.01  # its STFT differs a little
    settings = values(native / "preprocessor_config.json")
    known = transformers.models.auto.auto_mappings.IMAGE_PROCESSOR_MAPPING_NAMES["phi4_multimodal"]["torchvision"]
    assert settings["image_processor_type"] == f"{known}Fast"  # version 4's name, which 5 takes for its own
    assert settings["processor_class"] == "Phi4MultimodalProcessor"
    assert not (native / "processor_config.json").exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The native layout: our files, and the weights under transformers' names."""
    from helpers import torch_native

    folder = write(read_sidecar_files(TINY, "native"), tmp_path_factory.mktemp("exported"))
    tensors = {}
    for path in TINY.glob("model-*.safetensors"):
        tensors |= load_file(path)
    base = {torch_native.original_to_native(name): value for name, value in tensors.items() if ".lora_" not in name}
    save_file(base, folder / "model.safetensors", metadata={"format": "pt"})
    for kind in KINDS:
        shutil.copy(TINY / f"{kind}-lora" / "adapter_model.safetensors", folder / f"{kind}-lora")
    return folder


@pytest.mark.torch
@pytest.mark.parametrize("loader", fast_are(["transformers"], ["peft", "transformers"]))
def test_adapters_land_and_logits_are_ours(scanned, exported, loader, transformers):
    from helpers import torch_native
    from helpers.native_cases import native_inputs
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        exported, attn_implementation="eager", output_loading_info=True
    )
    model, info = loaded
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if loader == "peft":
        wrapped = PeftModel.from_pretrained(model, str(exported / "vision-lora"), adapter_name="vision")
        wrapped.load_adapter(str(exported / "speech-lora"), adapter_name="speech")
    else:
        for kind in KINDS:
            # It reports as missing whatever parameter has the adapter's name in its own, so that only names that are
            # not in the folder are looked at; what landed is compared below.
            loaded = model.load_adapter(str(exported / f"{kind}-lora"), adapter_name=kind)
            assert not loaded.unexpected_keys

    parameters = {name: value for name, value in model.named_parameters() if ".lora_" in name}
    for kind in KINDS:
        stored = load_file(exported / f"{kind}-lora" / "adapter_model.safetensors")
        placed = {
            f"base_model.model.{n}".replace(f".{kind}.", "."): p for n, p in parameters.items() if f".{kind}." in n
        }
        assert placed.keys() == stored.keys()
        assert all(np.array_equal(placed[name].detach().numpy(), value) for name, value in stored.items())
        settings = values(TINY / "config.json")[f"{kind}_lora"]
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        assert len(layers) == len(stored) / 2
        assert {layer.scaling[kind] for layer in layers} == {settings["lora_alpha"] / settings["r"]}

    native = torch_native.NativeModel(model.eval())
    for name in ("text_tools", "vision", "speech", "vision_speech"):
        tokens, *rest = native_inputs(scanned, CASES[name])
        batch = scanned.process([CASES[name]["prompt"]], **media_of(CASES[name]))
        ours = np.asarray(scanned.logits(batch))[0, : len(tokens)]
        np.testing.assert_allclose(native.logits(tokens, *rest), ours, atol=3e-4, rtol=0)


# What cannot be translated is an error.


def test_no_tokenizer_json(original):
    (original / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        read_sidecar_files(original, "native")


def test_media_tokens_that_the_tokenizer_lacks(original):
    change(original / "config.json", image_token_id=3)
    with pytest.raises(CheckpointError, match="no special token 3"):
        read_sidecar_files(original, "native")


def test_no_number_of_crops(original):
    change(original / "preprocessor_config.json", dynamic_hd=True)
    with pytest.raises(CheckpointError, match="dynamic_hd is True"):
        read_sidecar_files(original, "native")
    (original / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: no such file"):
        read_sidecar_files(original, "native")


def test_a_chat_template_that_is_not_text(original, tmp_path):
    native = write(read_sidecar_files(original, "native"), tmp_path / "native")
    (native / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        read_sidecar_files(native, "original")


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"lora_bias": True}])
def test_adapters_with_other_mathematics(original, tmp_path, setting):
    native = write(read_sidecar_files(original, "native"), tmp_path / "native")
    change(native / "vision-lora" / "adapter_config.json", **setting)
    with pytest.raises(ConfigError, match=next(iter(setting))):
        read_sidecar_files(native, "original")
