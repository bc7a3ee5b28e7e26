"""The weight table of the native layout (`model_type: phi4_multimodal`), as transformers and PEFT save it.

Its tensors are those of the original layout under other names, the adapters' in folders of their own.
"""

import dataclasses
import re

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.checkpoint.layouts.original import original_table
from phi4mm_jax.checkpoint.tensor_types import Tensor
from phi4mm_jax.config import Phi4MMConfig

# What the two layouts call the same thing, by part of the model.
_RENAMES = {
    "model.embed_tokens_extend.image_embed.": (
        ("img_projection.0.", "img_projection_up."),
        ("img_projection.2.", "img_projection_down."),
        ("glb_GN", "global_img_feature_extensor"),
        ("sub_GN", "sub_img_feature_extensor"),
    ),
    "model.embed_tokens_extend.audio_embed.": (
        ("audio_projection.speech.0.", "up_proj_for_speech."),
        ("audio_projection.speech.2.", "down_proj_for_speech."),
        ("audio_projection.vision.0.", "up_proj_for_vision_speech."),
        ("audio_projection.vision.2.", "down_proj_for_vision_speech."),
        (".net.0.linear.", ".gate_up_proj."),
        (".net.2.", ".down_proj."),
        ("self_attn.linear_q.", "self_attn.q_proj."),
        ("self_attn.linear_k.", "self_attn.k_proj."),
        ("self_attn.linear_v.", "self_attn.v_proj."),
        ("self_attn.linear_out.", "self_attn.o_proj."),
    ),
    "model.layers.": ((".base_layer.", "."),),
}
_ADAPTER = re.compile(r"\.(lora_[AB])\.(\w+)\.")


def native_table(config: Phi4MMConfig) -> list[Tensor]:
    """Every tensor of the main shards and of the adapters' folders."""
    return [_renamed(tensor) for tensor in original_table(config)]


def adapter_table(config: Phi4MMConfig) -> list[Tensor]:
    """The tensors of the adapters' folders, which are alike in both layouts."""
    return [tensor for tensor in native_table(config) if tensor.folder]


def _renamed(tensor: Tensor) -> Tensor:
    name = tensor.name
    if (adapter := _ADAPTER.search(name)) is not None:
        name = "base_model.model." + _ADAPTER.sub(r".\1.", name)
        return dataclasses.replace(tensor, name=name, folder=ADAPTERS[adapter[2]].folder)
    for part, renames in _RENAMES.items():
        if name.startswith(part):
            for theirs, native in renames:
                name = name.replace(theirs, native)
    return dataclasses.replace(tensor, name=name)
