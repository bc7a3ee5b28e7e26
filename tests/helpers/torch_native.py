"""The same weights in PyTorch: transformers' own `phi4_multimodal`, run live as the oracle of the tests.

Arrays go in and numpy arrays come out; no other test module knows transformers. Everything runs on the CPU with eager
attention, one example at a time and every image and clip on its own, because that is where the native model is right:
its SDPA path makes the vision tower causal, and its batches let padding leak. Weights are read from a folder in the
original layout, and tensors are named as that layout names them.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import (
    Phi4MultimodalAudioConfig,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalVisionConfig,
)
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import (
    Phi4MultimodalAudioConformerEncoderLayer,
    Phi4MultimodalAudioRelativeAttentionBias,
    Phi4MultimodalDecoderLayer,
    Phi4MultimodalRotaryEmbedding,
    Phi4MultimodalVisionEncoderLayer,
)

Adapter = Literal["vision", "speech"]
ADAPTERS: tuple[Adapter, ...] = ("vision", "speech")
IGNORED = -100  # a label outside the loss mask


class NativeImage(NamedTuple):
    """One preprocessed image. `grid` is needed: neither shapes nor masks tell 1 x 4 crops from 2 x 2."""

    pixels: np.ndarray  # (C, 3, 448, 448) float32, global view first, then the crops row by row
    patch_mask: np.ndarray  # (C, 32, 32), true where a patch holds image
    grid: tuple[int, int]  # rows and columns of crops; rows * columns == C - 1


# ---------------------------------------------------------------------------------------------- configuration

# What the release's config.json leaves out, because its code fixes it: SigLIP-400M and two token ids.
_RELEASE_VISION = {
    "hidden_size": 1152,
    "image_size": 448,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "layer_idx": -2,
}
_RELEASE_IMAGE_TOKEN = 200010
_RELEASE_AUDIO_TOKEN = 200011


def native_config(original: dict[str, Any]) -> Phi4MultimodalConfig:
    """The native configuration of a published (original layout) `config.json`, with eager attention.

    Every key that changes the mathematics is set: the native defaults (32 heads, rotary factor 1.0, an untied head, a
    bias distance of 1000) are not the release's. A key that is missing from `original` raises `KeyError`.
    """
    speech = original["audio_processor"]["config"]
    embedders = original["embd_layer"]
    vision = original.get("img_processor", _RELEASE_VISION)
    rope = original["rope_scaling"]
    config = Phi4MultimodalConfig(
        vocab_size=original["vocab_size"],
        hidden_size=original["hidden_size"],
        intermediate_size=original["intermediate_size"],
        num_hidden_layers=original["num_hidden_layers"],
        num_attention_heads=original["num_attention_heads"],
        num_key_value_heads=original["num_key_value_heads"],
        resid_pdrop=original["resid_pdrop"],
        embd_pdrop=original["embd_pdrop"],
        attention_dropout=original["attention_dropout"],
        hidden_act=original["hidden_act"],
        max_position_embeddings=original["max_position_embeddings"],
        original_max_position_embeddings=original["original_max_position_embeddings"],
        rms_norm_eps=original["rms_norm_eps"],
        tie_word_embeddings=original["tie_word_embeddings"],
        rope_parameters={
            "rope_type": rope["type"],
            "rope_theta": original["rope_theta"],
            "partial_rotary_factor": original["partial_rotary_factor"],
            "short_factor": rope["short_factor"],
            "long_factor": rope["long_factor"],
            "original_max_position_embeddings": original["original_max_position_embeddings"],
            "factor": original["max_position_embeddings"] / original["original_max_position_embeddings"],
        },
        bos_token_id=original["bos_token_id"],
        eos_token_id=original["eos_token_id"],
        pad_token_id=original["pad_token_id"],
        sliding_window=original["sliding_window"],
        vision_config={
            "hidden_size": vision["hidden_size"],
            "intermediate_size": vision["intermediate_size"],
            "num_hidden_layers": vision["num_hidden_layers"],
            "num_attention_heads": vision["num_attention_heads"],
            "num_channels": 3,
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "attention_dropout": 0.0,
            "crop_size": embedders["image_embd_layer"]["crop_size"],
            "image_token_id": original.get("image_token_id", _RELEASE_IMAGE_TOKEN),
            "feature_layer": vision["layer_idx"],
        },
        audio_config={
            "hidden_size": speech["attention_dim"],
            "intermediate_size": speech["linear_units"],
            "num_blocks": speech["num_blocks"],
            "num_attention_heads": speech["attention_heads"],
            "activation": speech["activation"],
            "chunk_size": speech["chunk_size"],
            "left_chunk": speech["left_chunk"],
            "dropout_rate": speech["dropout_rate"],
            "ext_pw_out_channel": speech["ext_pw_out_channel"],
            "depthwise_separable_out_channel": speech["depthwise_seperable_out_channel"],
            "depthwise_multiplier": speech["depthwise_multiplier"],
            "kernel_size": speech["kernel_size"],
            "conv_activation": speech["conv_activation"],
            "input_size": speech["input_size"],
            "conv_glu_type": speech["conv_glu_type"],
            "time_reduction": speech["time_reduction"],
            "bias_max_distance": speech["relative_attention_bias_args"]["t5_bias_max_distance"],
            "bias_symmetric": False,
            "nemo_activation": "relu",
            "nemo_conv_channels": speech["nemo_conv_settings"]["conv_channels"],
            "downsample_rate": embedders["audio_embd_layer"]["downsample_rate"],
            "audio_token_id": original.get("audio_token_id", _RELEASE_AUDIO_TOKEN),
        },
    )
    config._attn_implementation = "eager"  # and that of both towers
    return config


def vision_config(config: Phi4MultimodalConfig) -> Phi4MultimodalVisionConfig:
    """The vision tower's part, typed: the field itself may be a dict or None as far as its declaration goes."""
    assert isinstance(config.vision_config, Phi4MultimodalVisionConfig)
    return config.vision_config


def audio_config(config: Phi4MultimodalConfig) -> Phi4MultimodalAudioConfig:
    """The speech encoder's part, typed likewise."""
    assert isinstance(config.audio_config, Phi4MultimodalAudioConfig)
    return config.audio_config


# ------------------------------------------------------------------------------------------------------ names

# Per part of the model: what the original and the native layout call the same thing. Shapes are equal throughout.
_LAYOUTS: dict[str, tuple[tuple[str, str], ...]] = {
    "image_embed.": (
        ("img_projection.0.", "img_projection_up."),
        ("img_projection.2.", "img_projection_down."),
        ("glb_GN", "global_img_feature_extensor"),
        ("sub_GN", "sub_img_feature_extensor"),
    ),
    "audio_embed.": (
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
    "model.layers.": (
        ("qkv_proj.base_layer.", "qkv_proj."),
        ("o_proj.base_layer.", "o_proj."),
        ("gate_up_proj.base_layer.", "gate_up_proj."),
        ("down_proj.base_layer.", "down_proj."),
    ),
}


def _renames(name: str) -> tuple[tuple[str, str], ...]:
    return next((table for part, table in _LAYOUTS.items() if part in name), ())


def original_to_native(name: str) -> str:
    """The native name of a base tensor of the original layout. Adapters have none: `ValueError`."""
    if ".lora_" in name:
        raise ValueError(f"{name}: the native layout keeps adapters apart from the base tensors")
    for original, native in _renames(name):
        if original in name:
            return name.replace(original, native, 1)
    return name


def native_to_original(name: str) -> str:
    """The inverse of `original_to_native`. The tied `lm_head.weight` has no counterpart: `ValueError`."""
    if name == "lm_head.weight":
        raise ValueError("lm_head.weight: tied to the embedding, absent from the original layout")
    for original, native in _renames(name):
        if native in name:
            return name.replace(native, original, 1)
    return name


def _injected_name(original: str) -> str:
    """The name inside the native model once peft has wrapped the decoder's matrices, which brings the original's
    `base_layer` and `lora_A.vision` names back."""
    return original if ".base_layer." in original or ".lora_" in original else original_to_native(original)


def _original_name(injected: str) -> str:
    return injected if ".base_layer." in injected or ".lora_" in injected else native_to_original(injected)


# --------------------------------------------------------------------------------------------------- adapters

# The adapter folders' own target patterns do not match the native module names; these do, and only the decoder's.
_DECODER_TARGETS = r"model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)"
_LAYER_TARGETS = r"self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj"


def _add_adapters(module: nn.Module, original: dict[str, Any], targets: str) -> None:
    for name in ADAPTERS:
        settings = original[f"{name}_lora"]
        lora = LoraConfig(
            r=settings["r"],
            lora_alpha=settings["lora_alpha"],
            lora_dropout=settings["dp"],
            target_modules=targets,
            bias="none",
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is meant
            inject_adapter_in_model(lora, module, name)


def _use_adapter(module: nn.Module, adapter: Adapter | list[str] | None) -> None:
    """Do to each wrapped matrix what `set_adapter` and `disable_adapters` of transformers do, but for
    `requires_grad`: who trains what is the caller's choice."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter(adapter)
    for parameter, value in before:
        parameter.requires_grad_(value)


def add_user_adapter(module: nn.Module, name: str, folder: Path) -> None:
    """Inject a PEFT folder of the decoder, whose names are those of the original layout."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    lora = LoraConfig(
        r=settings["r"], lora_alpha=settings["lora_alpha"], target_modules=_DECODER_TARGETS, lora_dropout=0.0
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # one more adapter is meant
        inject_adapter_in_model(lora, module, name)
    matrices = load_file(folder / "adapter_model.safetensors")
    names = {n: n.removeprefix("base_model.model.").replace(".weight", f".{name}.weight") for n in matrices}
    unknown = module.load_state_dict({names[n]: matrix for n, matrix in matrices.items()}, strict=False)
    assert not unknown.unexpected_keys
    module.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------ model


def build_native(original: dict[str, Any], dtype: torch.dtype = torch.float32) -> Phi4MultimodalForCausalLM:
    """The native model of a published configuration, both adapters injected, with weights yet to be set.

    `dtype` is that of every parameter; rotary frequencies stay float32, as `from_pretrained` leaves them.
    """
    model = Phi4MultimodalForCausalLM._from_config(native_config(original), dtype=dtype)
    _add_adapters(model, original, _DECODER_TARGETS)
    return model.eval().requires_grad_(False)


def load_native(folder: str | Path, dtype: torch.dtype = torch.float32) -> "NativeModel":
    """The checkpoint in `folder` (original layout, adapters in the main shards) in the native model.

    Strict: `RuntimeError` names every tensor that is missing, unexpected, or of another shape.
    """
    folder = Path(folder)
    original = json.loads((folder / "config.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    model = build_native(original, dtype)
    state: dict[str, torch.Tensor] = {}
    for shard in sorted(set(index["weight_map"].values())):
        for name, tensor in load_file(folder / shard).items():
            state[_injected_name(name)] = tensor.to(dtype)
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        raise RuntimeError("the native model did not tie lm_head to the embedding")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return NativeModel(model)


def image_tokens(image: NativeImage) -> int:
    """Rows of the embedding of an image: 16 x 16 + 16 for the global view, 1 between, and the useful part of the
    sub-crops with one separator a row."""
    rows, columns = image.grid
    if image.patch_mask.shape[0] != rows * columns + 1:
        raise ValueError(f"an image of {rows} x {columns} crops needs {rows * columns + 1} masks, global view included")
    useful = np.asarray(image.patch_mask[1:, ::2, ::2], bool).reshape(rows, columns, 16, 16)
    return 256 + 16 + 1 + int(useful.sum()) + int(useful[:, 0, :, 0].sum())


def _tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(np.asarray(array), dtype=dtype)  # a copy: arrays that JAX made are read-only


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float32).numpy()


@dataclass(frozen=True)
class NativeModel:
    """The native model behind an interface of arrays; results are float32 whatever the model's dtype.

    `images` are `NativeImage`s and `audios` log-mel features (frames, 80), in the order of their placeholders, which
    stand expanded in `input_ids` (T,). `adapter` is "vision", "speech", None (the base model alone) or names whose
    products are all added.
    """

    model: Phi4MultimodalForCausalLM

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter, adapters included, by its name in the original layout: live tensors, to train or to edit."""
        return {_original_name(name): value for name, value in self.model.named_parameters()}

    # Media. Each goes through the native embedder alone, on a prompt that is nothing but its own placeholders.

    def vision_features(self, pixels: np.ndarray, patch_mask: np.ndarray) -> np.ndarray:
        """Return the tower's pooled features (C, 256, D) of pixels (C, 3, 448, 448) and masks (C, 32, 32)."""
        with torch.no_grad():
            embedder = self.model.model.embed_tokens_extend.image_embed
            return _numpy(embedder.get_img_features(_tensor(pixels, self.dtype), _tensor(patch_mask, torch.bool)))

    def image_embeds(self, image: NativeImage) -> np.ndarray:
        """The rows (tokens, D) that replace the image's placeholders: features, separators, projector."""
        with torch.no_grad():
            return _numpy(self._image_embeds(image))

    def audio_encoder(self, features: np.ndarray) -> np.ndarray:
        """Return the speech encoder's output (tokens, D), before the projector, of log-mel (frames, 80)."""
        with torch.no_grad():
            encoder = self.model.model.embed_tokens_extend.audio_embed.encoder
            return _numpy(encoder(_tensor(features, self.dtype)[None], None)[0])

    def audio_embeds(self, features: np.ndarray, mode: Adapter) -> np.ndarray:
        """The rows (tokens, D) that replace the clip's placeholders, through the projector `mode`."""
        with torch.no_grad():
            return _numpy(self._audio_embeds(features, mode))

    def _image_embeds(self, image: NativeImage) -> torch.Tensor:
        config = vision_config(self.model.config)
        tokens = image_tokens(image)
        rows, columns = image.grid
        embeds = self.model.model.embed_tokens_extend.image_embed(
            torch.full((1, tokens), config.image_token_id),
            torch.zeros(1, tokens, self.model.config.hidden_size, dtype=self.dtype),
            image_pixel_values=_tensor(image.pixels, self.dtype)[None],
            image_sizes=torch.tensor([[rows * config.crop_size, columns * config.crop_size]]),
            image_attention_mask=_tensor(image.patch_mask, torch.bool)[None],
        )
        return embeds[0]

    def _audio_embeds(self, features: np.ndarray, mode: Adapter) -> torch.Tensor:
        config = audio_config(self.model.config)
        tokens = math.ceil(features.shape[0] / config.time_reduction)
        embeds = self.model.model.embed_tokens_extend.audio_embed(
            torch.full((1, tokens), config.audio_token_id),
            torch.zeros(1, tokens, self.model.config.hidden_size, dtype=self.dtype),
            audio_input_features=_tensor(features, self.dtype)[None],
            audio_embed_sizes=torch.tensor([tokens]),
            audio_attention_mask=None,
            audio_projection_mode=mode,
        )
        return embeds[0]

    # The whole model.

    def inputs_embeds(
        self, input_ids: np.ndarray, images: Sequence[NativeImage] = (), audios: Sequence[np.ndarray] = ()
    ) -> np.ndarray:
        """Return the decoder's input (T, D)."""
        with torch.no_grad():
            return _numpy(self._inputs_embeds(input_ids, images, audios)[0])

    def logits(
        self,
        input_ids: np.ndarray,
        images: Sequence[NativeImage] = (),
        audios: Sequence[np.ndarray] = (),
        adapter: Adapter | list[str] | None = None,
    ) -> np.ndarray:
        """Logits (T, V) of one example. Clips go through the vision projector if there are images."""
        with torch.no_grad():
            return _numpy(self._decode(self._inputs_embeds(input_ids, images, audios), adapter)[0])

    def greedy(
        self,
        input_ids: np.ndarray,
        images: Sequence[NativeImage] = (),
        audios: Sequence[np.ndarray] = (),
        adapter: Adapter | None = None,
        *,
        new_tokens: int,
    ) -> np.ndarray:
        """Exactly `new_tokens` greedy tokens, int32; stop tokens do not stop it.

        Without a cache: each token is computed from the whole sequence, so that its length alone selects the short or
        the long rotary factors, for every position.
        """
        generated: list[int] = []
        with torch.no_grad():
            embeds = self._inputs_embeds(input_ids, images, audios)
            for _ in range(new_tokens):
                generated.append(int(self._decode(embeds, adapter, last=1)[0, -1].argmax()))
                embeds = torch.cat([embeds, self.model.model.embed_tokens(torch.tensor([generated[-1:]]))], dim=1)
        return np.array(generated, np.int32)

    def beam_search(
        self,
        input_ids: np.ndarray,
        *,
        beams: int,
        new_tokens: int,
        penalty: float,
        stops: Iterable[int],
        adapter: Adapter | list[str] | None = None,
        allowed: Callable[[list[int]], list[int]] | None = None,
        **media: torch.Tensor,
    ) -> tuple[list[list[int]], list[float]]:
        """The best continuations and their scores. Without a cache, so that the length alone selects the rotary set.

        `allowed` gives the tokens that may come after some generated ones; `media` are the arguments of
        the native model's forward.
        """
        _use_adapter(self.model, adapter)
        prompt, stops, model = _tensor(input_ids, torch.int64)[None], sorted(stops), cast(Any, self.model)
        with torch.no_grad():
            found = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), **media, num_beams=beams, num_return_sequences=beams,
                do_sample=False, max_new_tokens=new_tokens, length_penalty=penalty, eos_token_id=stops,
                pad_token_id=stops[0], use_cache=False, return_dict_in_generate=True, output_scores=True,
                prefix_allowed_tokens_fn=allowed and (lambda _, ids: allowed(ids[prompt.shape[1] :].tolist())),
            )  # fmt: skip
        answers = []
        for row, places in zip(
            found.sequences[:, prompt.shape[1] :].tolist(), found.beam_indices.tolist(), strict=True
        ):
            answers.append(row[: sum(place >= 0 for place in places)])
        return answers, found.sequences_scores.tolist()

    def loss(
        self,
        input_ids: np.ndarray,
        labels: np.ndarray,
        images: Sequence[NativeImage] = (),
        audios: Sequence[np.ndarray] = (),
        adapter: Adapter | None = None,
    ) -> torch.Tensor:
        """Mean cross-entropy over the labels that are not -100; differentiable in whichever `parameters()` require it.

        `labels` (T,) is aligned with `input_ids`: the logits at t - 1 are scored against `labels[t]`.
        """
        logits = self._decode(self._inputs_embeds(input_ids, images, audios), adapter)[0]
        targets = _tensor(labels, torch.int64)
        return nn.functional.cross_entropy(logits[:-1].float(), targets[1:], ignore_index=IGNORED)

    def loss_and_grads(
        self,
        input_ids: np.ndarray,
        labels: np.ndarray,
        images: Sequence[NativeImage] = (),
        audios: Sequence[np.ndarray] = (),
        adapter: Adapter | None = None,
        names: Iterable[str] | None = None,
    ) -> tuple[float, dict[str, np.ndarray]]:
        """The loss and its gradients by original name: of `names`, or of every parameter that the loss depends on.

        `RuntimeError` if the loss does not depend on one of `names`. The embedding's padding row gets no gradient from
        the input side (PyTorch's `padding_idx`), only from the tied output side.
        """
        parameters = self.parameters()
        wanted = {name: parameters[name] for name in (parameters if names is None else names)}
        with _requiring_grad(wanted.values()):
            loss = self.loss(input_ids, labels, images, audios, adapter)
            grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=names is None)
        return loss.item(), {name: _numpy(g) for name, g in zip(wanted, grads, strict=True) if g is not None}

    def _inputs_embeds(
        self, input_ids: np.ndarray, images: Sequence[NativeImage], audios: Sequence[np.ndarray]
    ) -> torch.Tensor:
        ids = _tensor(input_ids, torch.int64)[None]
        embeds = self.model.model.embed_tokens(ids)
        mode: Adapter = "vision" if images else "speech"
        for token, media in (
            (vision_config(self.model.config).image_token_id, [self._image_embeds(image) for image in images]),
            (audio_config(self.model.config).audio_token_id, [self._audio_embeds(clip, mode) for clip in audios]),
        ):
            places = ids == token
            rows = sum(len(medium) for medium in media)
            if int(places.sum()) != rows:
                raise ValueError(f"the prompt has {int(places.sum())} placeholders {token} for {rows} media tokens")
            if media:
                embeds = embeds.index_put((places,), torch.cat(media))
        return embeds

    def _decode(self, embeds: torch.Tensor, adapter: Adapter | list[str] | None, last: int = 0) -> torch.Tensor:
        _use_adapter(self.model, adapter)
        return self.model(inputs_embeds=embeds, use_cache=False, logits_to_keep=last).logits


@contextmanager
def _requiring_grad(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    chosen = list(parameters)
    before = [parameter.requires_grad for parameter in chosen]
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, value in zip(chosen, before, strict=True):
            parameter.requires_grad_(value)


# ---------------------------------------------------------------------------------- single layers, full width


def _randomise(module: nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Give every parameter storage and a random value; returns them by native name, float32.

    Matrices have variance 1 / fan-in, so that activations stay O(1); norms are near 1, biases near 0. The values are
    representable in bfloat16: the same seed gives the same weights in either dtype, so that two runs differ by
    arithmetic alone.
    """
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias_values.weight"):
            values *= 0.5  # a table of logits, not a matrix
        elif max(parameter.shape) == parameter.numel():  # a vector, however many axes of one it carries
            values = 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
        else:
            values /= math.sqrt(parameter[0].numel())
            if ".lora_B." in name:
                values *= 0.25  # with alpha / r = 2, an adapter adds about half of what the base matrix does
        values = values.to(torch.bfloat16).to(torch.float32)
        parameter.data = values.to(parameter.dtype)
        state[name] = values.numpy()
    return state


@contextmanager
def _shapes_alone(dtype: torch.dtype) -> Iterator[None]:
    """Modules built inside have parameters of `dtype` without storage: an initialisation would only be overwritten."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def decoder_layer(
    original: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, np.ndarray], Callable[..., np.ndarray]]:
    """One native decoder layer of `original`'s width, both adapters included.

    Returns its tensors (`input_layernorm.weight`, `self_attn.qkv_proj.base_layer.weight`,
    `self_attn.qkv_proj.lora_A.vision.weight`, ...) and
    `run(hidden (1, T, D), rope="short" | "long", adapter=None) -> (1, T, D)`, causal, at positions 0..T-1.
    """
    config = native_config(original)
    with _shapes_alone(dtype):
        layer = Phi4MultimodalDecoderLayer(config, layer_idx=0)
        _add_adapters(layer, original, _LAYER_TARGETS)
    layer.eval()  # last: the adapters come with dropout
    rotary = Phi4MultimodalRotaryEmbedding(config)
    state = _randomise(layer, seed)
    original_length = original["original_max_position_embeddings"]

    def run(hidden: np.ndarray, rope: Literal["short", "long"], adapter: Adapter | None = None) -> np.ndarray:
        length = hidden.shape[1]
        if rope == "short" and length > original_length:
            raise ValueError(f"the native model has no short factors past {original_length} positions")
        # The highest position selects the factors, so positions past the end stand in to select the long ones.
        positions = torch.arange(length if rope == "short" else max(length, original_length + 1))[None]
        x = _tensor(hidden, dtype)
        with torch.no_grad():
            _use_adapter(layer, adapter)
            cos, sin = rotary(x, positions)
            future = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)
            embeddings = (cos[:, :length], sin[:, :length])
            return _numpy(layer(x, attention_mask=future[None, None], position_embeddings=embeddings))

    return state, run


def vision_layer(
    original: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, np.ndarray], Callable[..., np.ndarray]]:
    """One native vision layer of `original`'s width.

    Returns its tensors (`layer_norm1.weight`, `self_attn.q_proj.weight`, ...) and
    `run(hidden (1, S, D), key_mask (S,) bool) -> (1, S, D)`; keys that are false are not attended to.
    """
    with _shapes_alone(dtype):
        layer = Phi4MultimodalVisionEncoderLayer(vision_config(native_config(original))).eval()
    state = _randomise(layer, seed)

    def run(hidden: np.ndarray, key_mask: np.ndarray) -> np.ndarray:
        bias = torch.zeros(key_mask.shape, dtype=dtype)
        bias[~_tensor(key_mask, torch.bool)] = torch.finfo(dtype).min
        with torch.no_grad():
            return _numpy(layer(_tensor(hidden, dtype), bias[None, None, None]))

    return state, run


def conformer_block(
    original: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, np.ndarray], Callable[..., np.ndarray]]:
    """One native conformer block of `original`'s width, with the table of relative biases that all blocks share.

    Returns the block's tensors (`feed_forward_in.net.0.linear.weight`, `self_attn.linear_q.weight`, ...) and the
    table's (`relative_attention_bias_layer.bias_values.weight`), and `run(hidden (1, T, D)) -> (1, T, D)`.
    """
    config = audio_config(native_config(original))
    with _shapes_alone(dtype):
        block = Phi4MultimodalAudioConformerEncoderLayer(config).eval()
        table = Phi4MultimodalAudioRelativeAttentionBias(config).eval()
    # The table of names goes by the full name, so the block stands where it would in the encoder.
    encoder = "model.embed_tokens_extend.audio_embed.encoder."
    state = {
        native_to_original(f"{encoder}encoders.0.{name}").removeprefix(f"{encoder}encoders.0."): value
        for name, value in _randomise(block, seed).items()
    }
    for name, value in _randomise(table, seed + 1).items():
        state[f"relative_attention_bias_layer.{name}"] = value

    def run(hidden: np.ndarray) -> np.ndarray:
        x = _tensor(hidden, dtype)
        with torch.no_grad():
            return _numpy(block(x, table(x)))

    return state, run
