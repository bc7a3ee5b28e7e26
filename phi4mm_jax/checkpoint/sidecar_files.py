"""Sidecar files of a checkpoint folder, besides its weights: settings, tokenizer, licence, code; copied, or translated.

Within a layout all files stay as they are, to the byte. For the other layout those are translated in which the two
differ: the settings of the model, of generation, of the tokenizer, of the processor and of the adapters.
"""

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from phi4mm_jax.adapters import ADAPTERS, Adapter
from phi4mm_jax.checkpoint.config_json import CODE, NATIVE_TARGETS, native_config, original_config, whole
from phi4mm_jax.checkpoint.contents import read_config
from phi4mm_jax.checkpoint.pytorch import Layout, layout_of
from phi4mm_jax.config import LoraConfig, Phi4MMConfig, read_json, read_optional_json
from phi4mm_jax.config.peft_settings import common_lora, is_uniform, module_loras
from phi4mm_jax.errors import CheckpointError, ConfigError
from phi4mm_jax.processing.audio_features import AUDIO_RATES
from phi4mm_jax.processing.processor_files import read_dynamic_hd
from phi4mm_jax.processing.tokenizer import Tokenizer

Json = dict[str, Any]

_TEMPLATES = "additional_chat_templates"  # a folder
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".onnx_data", ".data", ".h5", ".msgpack")
_INDEX = (".safetensors.index.json", ".bin.index.json")
_LARGEST = 64 << 20  # bytes; the release's largest is the tokenizer, of 15 MB

# What transformers 5 adds to tokenizer_config.json; the versions that run the release's code stumble over some of it.
_NEW_TOKENIZER_KEYS = (
    *("audio_token", "backend", "extra_special_tokens", "image_token", "is_local", "local_files_only"),
    *("model_specific_special_tokens", "processor_class"),
)
# Of an adapter_config.json, where all modules have one rank and alpha.
_ON_ALL_MODULES: Json = {
    "alpha_pattern": {},
    "exclude_modules": None,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "use_rslora": False,
}


def read_sidecar_files(
    source: Path, target: Layout, *, config: Phi4MMConfig | None = None, adapters_only: bool = False
) -> dict[str, bytes]:
    """The files that go with the weights of a checkpoint when it is written in a layout.

    Weights, hidden files, files over 64 MiB and folders other than the adapters' and the chat templates' (figures,
    examples, the Orbax folder) are not copied. The release's code is copied, but never run.

    Args:
        source: a checkpoint folder of any layout, converted ones included.
        target: the layout whose files are wanted. Where the source has the same, its files stay as they are; only an
            `adapter_config.json` that it lacks is made, from its config.json.
        config: of what is written, if its adapters are not those of the source's config.json.
        adapters_only: only what PEFT needs beside the adapters' weights.

    Returns:
        Contents by file name, relative to the folder.

    Raises:
        CheckpointError: a file cannot be read, or transformers could not do without one that the source lacks.
        ConfigError: config.json asks for something unsupported.
    """
    config = config or read_config(source)
    translate = layout_of(source) != target
    adapters = {
        f"{ADAPTERS[name].folder}/adapter_config.json": _adapter_config(
            source, ADAPTERS[name], lora, config.decoder.num_layers, target, translate
        )
        for name, lora in config.loras.items()
    }
    if adapters_only:
        return adapters
    files = _read_copied_files(source)
    if translate:
        (_to_native if target == "native" else _to_original)(source, config, files)
    elif target == "original" and (stated := _stating_adapters(read_json(source / "config.json"), config)) is not None:
        files["config.json"] = _json(stated)
    return files | adapters


def skipped_files(source: Path, weights: Set[Path]) -> list[str]:
    """Return the files that `read_sidecar_files` does not take, without those that the weights were read from.

    A folder is one of them, its name ending in "/".

    Raises:
        CheckpointError: a folder cannot be read.
    """
    read = {path.absolute() for path in weights}  # Orbax has its folder so
    read |= {adapter.folder_in(source).absolute() for adapter in ADAPTERS.values()}
    others = [path for path in _entries(source) if path.absolute() not in read and not _is_copied(path)]
    return [f"{path.relative_to(source)}{'/' if path.is_dir() else ''}" for path in others]


def _read_copied_files(source: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for path in filter(_is_copied, _entries(source)):
        try:
            files[path.relative_to(source).as_posix()] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return files


def _entries(source: Path) -> list[Path]:
    """Return the files in the folder and in those whose files are copied."""
    try:
        names = [*(adapter.folder for adapter in ADAPTERS.values()), _TEMPLATES]
        inner = [source / name for name in names if (source / name).is_dir()]
        return [p for folder in (source, *inner) for p in sorted(folder.iterdir()) if p not in inner]
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _is_copied(path: Path) -> bool:
    weights = path.suffix in _WEIGHTS or path.name.endswith(_INDEX)
    return path.is_file() and not weights and path.name[0] != "." and path.stat().st_size <= _LARGEST


# ---------------------------------------------------------------------------------------------- to the native layout


def _to_native(source: Path, config: Phi4MMConfig, files: dict[str, bytes]) -> None:
    """Put what transformers reads, without running code, in the place of the release's files."""
    if "tokenizer.json" not in files:  # with vocab.json alone, transformers would split text as GPT-2 does
        raise CheckpointError(
            f"{source}: has no tokenizer.json, which the native layout needs; copy the published checkpoint's here"
        )
    spelled = {token: content for content, token in Tokenizer.from_folder(source).special_tokens.items()}
    for token in (config.image_token_id, config.audio_token_id):
        if token not in spelled:
            raise CheckpointError(
                f"{source / 'tokenizer.json'}: has no special token {token}, which config.json has for a medium; "
                "copy the tokenizer that belongs to this model here"
            )
    image, audio = spelled[config.image_token_id], spelled[config.audio_token_id]
    template = chat_template_of(source)
    model = read_json(source / "config.json")
    files["config.json"] = _json(native_config(config, model))
    files["generation_config.json"] = _generation_config(config, model, files, source)
    files["preprocessor_config.json"] = _json(
        AUDIO_RATES
        | {
            "dynamic_hd": read_dynamic_hd(source),
            "feature_extractor_type": "Phi4MultimodalFeatureExtractor",
            "feature_size": config.speech.num_bands,
            "image_processor_type": "Phi4MultimodalImageProcessorFast",
            "patch_size": config.vision.patch_size,
            "processor_class": "Phi4MultimodalProcessor",
            "size": {"height": config.vision.crop_size, "width": config.vision.crop_size},
        }
    )
    tokenizer = read_optional_json(source / "tokenizer_config.json")
    tokenizer |= {
        "extra_special_tokens": {"image_token": image, "audio_token": audio},
        "processor_class": "Phi4MultimodalProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",  # GPT2Tokenizer of version 5 splits text as GPT-2 does
    }
    tokenizer.pop("auto_map", None)
    for name in ("processor_config.json", "chat_template.json"):
        files.pop(name, None)
    if template is not None:
        tokenizer.pop("chat_template", None)
        files["chat_template.jinja"] = (flattening(image, audio) + template).encode()
    files["tokenizer_config.json"] = _json(tokenizer)


def flattening(image: str, audio: str) -> str:
    """Return what goes before the release's chat template, which takes texts only: it joins a content's parts."""
    return (
        "{% set flat = namespace(messages=[], text='') %}"
        "{% for message in messages %}"
        "{% set flat.text = message['content'] %}"
        "{% if message['content'] is not string %}"
        "{% set flat.text = '' %}"
        "{% for part in message['content'] %}"
        f"{{% if 'image' in part['type'] %}}{{% set flat.text = flat.text + '{image}' %}}"
        f"{{% elif 'audio' in part['type'] %}}{{% set flat.text = flat.text + '{audio}' %}}"
        "{% else %}{% set flat.text = flat.text + part['text'] %}{% endif %}"
        "{% endfor %}"
        "{% endif %}"
        "{% set flat.messages = flat.messages + [dict(message, content=flat.text)] %}"
        "{% endfor %}"
        "{% set messages = flat.messages %}"
    )


def media_tokens(config: Phi4MMConfig, tokenizer: Tokenizer) -> tuple[str, str]:
    """Return the tokens that stand for images and for clips; "" for one that the tokenizer lacks."""
    spelled = {token: content for content, token in tokenizer.special_tokens.items()}
    return spelled.get(config.image_token_id, ""), spelled.get(config.audio_token_id, "")


# -------------------------------------------------------------------------------------------- to the original layout


def _to_original(source: Path, config: Phi4MMConfig, files: dict[str, bytes]) -> None:
    """Put the release's files in the place of transformers'; they name its code only where that is copied, too."""

    def has_code(classes: Mapping[str, str]) -> bool:
        return all(f"{name.partition('.')[0]}.py" in files for name in classes.values())

    processing = {
        "AutoProcessor": "processing_phi4mm.Phi4MMProcessor",
        "AutoImageProcessor": "processing_phi4mm.Phi4MMImageProcessor",
        "AutoFeatureExtractor": "processing_phi4mm.Phi4MMAudioFeatureExtractor",
    }
    model = read_json(source / "config.json")
    files["config.json"] = _json(original_config(config, model, code=has_code(CODE)))
    files["generation_config.json"] = _generation_config(config, model, files, source)
    files["preprocessor_config.json"] = _json(
        ({"auto_map": processing} if has_code(processing) else {})
        | AUDIO_RATES
        | {
            "dynamic_hd": read_dynamic_hd(source),
            "feature_extractor_type": "Phi4MMAudioFeatureExtractor",
            "image_processor_type": "Phi4MMImageProcessor",
            "processor_class": "Phi4MMProcessor",
        }
    )
    tokenizer = read_optional_json(source / "tokenizer_config.json") | {"tokenizer_class": "GPT2TokenizerFast"}
    for key in _NEW_TOKENIZER_KEYS:
        tokenizer.pop(key, None)
    template = chat_template_of(source)
    if template is not None:
        own = flattening(*media_tokens(config, Tokenizer.from_folder(source)))
        tokenizer["chat_template"] = template.removeprefix(own)
    files["tokenizer_config.json"] = _json(tokenizer)
    for name in ("processor_config.json", "chat_template.json", "chat_template.jinja"):
        files.pop(name, None)


# --------------------------------------------------------------------------------------------------- both directions


def _generation_config(config: Phi4MMConfig, model: Json, files: Mapping[str, bytes], source: Path) -> bytes:
    """The source's file, made to name the stop tokens that were read from wherever the source has them."""
    values = read_optional_json(source / "generation_config.json")
    stops = values.get("eos_token_id")
    if (stops if isinstance(stops, list) else [stops]) == list(config.stop_token_ids):
        return files["generation_config.json"]
    others = {"bos_token_id": model.get("bos_token_id"), "pad_token_id": config.pad_token_id}
    return _json(others | values | {"eos_token_id": list(config.stop_token_ids)})


def chat_template_of(source: Path) -> str | None:
    """The template in use; None where there is none, or several by name, which stay in their file."""
    path = source / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); copy it anew") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_optional_json(source / name).get("chat_template")
        if isinstance(template, str):
            return template
    return None


def _adapter_config(
    source: Path, adapter: Adapter, lora: LoraConfig, num_layers: int, target: Layout, translate: bool
) -> bytes:
    """Return what PEFT reads. In the original layout the settings are those of config.json, as its code has them.

    A file stays as it is where all modules have one rank and alpha; others are written with what `common_lora` gives.
    """
    path = adapter.folder_in(source) / "adapter_config.json"
    own = read_optional_json(path)
    if own and not translate:
        loras = module_loras(str(path), own, num_layers)
        common = common_lora(loras)
        if is_uniform(loras, num_layers) and (common.rank, common.scale) == (lora.rank, lora.scale):
            return path.read_bytes()
    usual = {
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    settings = {
        "lora_alpha": whole(lora.alpha),
        "lora_dropout": lora.dropout,
        "r": lora.rank,
        "target_modules": adapter.targets if target == "original" else NATIVE_TARGETS,
    }
    return _json(usual | own | settings | {key: value for key, value in _ON_ALL_MODULES.items() if key in own})


def _stating_adapters(model: Json, config: Phi4MMConfig) -> Json | None:
    """Return config.json of the original layout with the adapters' settings; None where it has them already."""
    stated = dict(model)
    for name, lora in config.loras.items():
        adapter = ADAPTERS[name]
        own = model.get(adapter.config_key)
        settings = {"lora_alpha": whole(lora.alpha), "r": lora.rank}
        if not isinstance(own, Mapping) or {**own, **settings} != own:
            stated[adapter.config_key] = {**(own or {"dp": lora.dropout, "layer": adapter.targets}), **settings}
    return stated if stated != model else None


def _json(values: Json) -> bytes:
    try:
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except ValueError as error:
        raise ConfigError(f"a setting is NaN or infinite, which JSON cannot say ({error}); repair the files") from error
