"""Write the checkpoint that the small model begins as: its sizes, its tokenizer of single bytes, and random weights.

python -m train.tiny.start DESTINATION
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.checkpoint.config_json import original_config
from phi4mm_jax.checkpoint.convert import to_torch
from phi4mm_jax.checkpoint.pytorch import tensors_of
from phi4mm_jax.checkpoint.random import write_random_checkpoint
from phi4mm_jax.checkpoint.tensor_types import UNUSED, parameter_shapes
from phi4mm_jax.config import (
    DecoderConfig,
    LoraConfig,
    Phi4MMConfig,
    RopeConfig,
    SpeechConfig,
    VisionConfig,
)
from phi4mm_jax.processing.tokenizer_files import O200K_PATTERN
from phi4mm_jax.utils.cli import cli_entrypoint, make_parser
from phi4mm_jax.utils.paths import path_argument

_SPECIAL = str.split(
    "endoftext dummy_0 endoftext10 endoftext11 endofprompt assistant end user system tool /tool tool_call /tool_call "
    "tool_response tag"
)
_SWALLOWS = ("assistant", "end", "user", "system")  # white space after them, as in the release
_IDS = {name: 256 + i for i, name in enumerate(_SPECIAL)}
_CONTEXT = 4096
Weights = dict[tuple[str, ...], np.ndarray]  # by path
_LORA = LoraConfig(rank=16, alpha=32.0, dropout=0.0)

CONFIG = Phi4MMConfig(
    decoder=DecoderConfig(
        vocab_size=256 + 16, embed_dim=128, num_layers=5, num_heads=4, num_kv_heads=2, head_size=32, mlp_dim=384,
        norm_eps=1e-5,
        rope=RopeConfig(
            theta=10000.0, rotary_size=24, short_factor=(1.0,) * 12, long_factor=(1.0,) * 12,
            original_length=_CONTEXT, max_length=_CONTEXT,
        ),
    ),
    vision=VisionConfig(embed_dim=160, num_layers=2, num_heads=4, mlp_dim=320, crop_size=112, patch_size=14),
    speech=SpeechConfig(
        num_bands=80, conv_channels=48, embed_dim=144, num_layers=4, num_heads=4, mlp_dim=288, kernel_size=3,
        bias_distance=500,
    ),
    loras=dict.fromkeys(ADAPTERS, _LORA),
    image_token_id=_IDS["endoftext10"],
    audio_token_id=_IDS["endoftext11"],
    pad_token_id=_IDS["endoftext"],
    stop_token_ids=(_IDS["endoftext"], _IDS["end"]),
)  # fmt: skip
# What config.json has besides.
_SOURCE = {
    "torch_dtype": "bfloat16", "bos_token_id": _IDS["endoftext"], "eos_token_id": _IDS["endoftext"],
    "partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope"}, "sliding_window": 262144,
}  # fmt: skip
PREPROCESSOR = {
    "audio_compression_rate": 8,
    "audio_downsample_rate": 1,
    "audio_feat_stride": 1,
    "dynamic_hd": 16,
    "feature_extractor_type": "Phi4MMAudioFeatureExtractor",
    "image_processor_type": "Phi4MMImageProcessor",
    "processor_class": "Phi4MMProcessor",
}
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


def tokenizer() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return tokenizer.json and tokenizer_config.json: a token a byte, whose id is its value."""
    added = [
        {
            "id": _IDS[name], "content": f"<|{name}|>", "single_word": False, "lstrip": False,
            "rstrip": name in _SWALLOWS, "normalized": False, "special": True,
        }
        for name in _SPECIAL
    ]  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": O200K_PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    of_text = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {_character(byte): byte for byte in range(256)}, "merges": []},
    }  # fmt: skip
    settings = {
        "added_tokens_decoder": {str(a["id"]): {k: v for k, v in a.items() if k != "id"} for a in added},
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
        "chat_template": _TEMPLATE, "tokenizer_class": "GPT2TokenizerFast", "model_max_length": _CONTEXT,
        "add_prefix_space": False,
    }  # fmt: skip
    return of_text, settings


def _character(byte: int) -> str:
    """Return how byte-level BPE spells a byte (GPT-2): itself where it is printable, else from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + [b for b in range(256) if b not in printable].index(byte))


def weights(config: Phi4MMConfig, seed: int = 0) -> Weights:
    """Return random parameters by path. Maps keep the size of what goes through them; B of adapters is zero."""
    rng = np.random.default_rng(seed)
    tensors = tensors_of("original", config)
    inputs = {part.path: math.prod(t.shape[1:]) for t in tensors for part in t.parts}
    found: Weights = {}
    for path, shape in parameter_shapes(tensors).items():
        name = path[-1]
        if path[0] == UNUSED or (path[0].startswith("lora_") and name != "a"):
            value = np.zeros(shape, np.float32)
        elif name in ("scale", "inverse_deviation"):
            value = np.ones(shape, np.float32)
        elif inputs[path] == 1:  # biases, and the mean of the bands
            value = np.zeros(shape, np.float32)
        else:
            deviation = 0.05 if name == "embedding" else inputs[path] ** -0.5
            if ("out" in path or "down" in path) and "decoder" in path:
                deviation /= math.sqrt(2 * config.decoder.num_layers)  # what is added up over the layers
            if path[-2] == "down" and "projector" in path[-3]:
                deviation /= 10  # the outputs are classes, of which most are 0
            value = deviation * rng.standard_normal(shape, np.float32)
        found[path] = value
    return found | _own_cell_attention(config.vision, found, rng)


def _own_cell_attention(vision: VisionConfig, found: Weights, rng: np.random.Generator) -> Weights:
    """Return a tower's parameters whose heads attend to the four patches of a patch's own cell, one each.

    From random attention it learns nothing for thousands of steps. A patch's position is told by an embedding in
    dimensions of its own, and the queries of head h ask for the h-th patch of the cell.
    """
    D, side = vision.embed_dim, vision.patches_per_side
    count = side**2
    tower = ("params", "vision")
    kernel = found[*tower, "patch_kernel"].copy()
    kernel[..., -count:] = 0
    position = np.zeros((count, D), np.float32)
    position[:, -count:] = 3 * np.eye(count)
    codes = rng.standard_normal((count, vision.head_size), np.float32)
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    rows, columns = np.divmod(np.arange(count), side)
    made: Weights = {(*tower, "patch_kernel"): kernel, (*tower, "position"): position}
    for name in ("q", "k"):
        path = (*tower, "layers", name, "kernel")
        value = 0.1 * found[path]  # (layers, D, N, H)
        for head in range(vision.num_heads):
            dy, dx = divmod(head, 2)
            wanted = (rows - rows % 2 + dy) * side + columns - columns % 2 + dx
            value[:, -count:, head] = 5 * codes[wanted] if name == "q" else codes
        made[path] = value
    return made


@cli_entrypoint
def main() -> int:
    parser = make_parser("train.tiny.start", __doc__)
    parser.add_argument("destination", metavar="DESTINATION", type=path_argument)
    destination = parser.parse_args().destination
    of_text, settings = tokenizer()
    files = {
        "config": {**original_config(CONFIG, _SOURCE, code=False), "eos_token_ids": CONFIG.stop_token_ids},
        "preprocessor_config": PREPROCESSOR,
        "tokenizer": of_text,
        "tokenizer_config": settings,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, f"{name}.json").write_text(json.dumps(content, indent=1))
        random = Path(folder, "random")
        write_random_checkpoint(Path(folder, "config.json"), random, folder)
        to_torch(random, destination, "original", trained=weights(CONFIG))
    print(f"{destination}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
