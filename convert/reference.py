"""transformers' native model as the reference of goldens.

The reference is right only where it is used as here: attention is eager (with SDPA its vision tower is causal); one
example, one image and one clip at a time (its batches let padding leak, and clips over 40 s crash with others); each
token from the whole sequence (with a cache it goes wrong where LongRoPE switches); the adapter chosen by the prompt's
media, its tensors checked one by one. Pixel values and log-mel features are this project's, which are tested against
the original's: transformers' image processor needs torchvision, its features keep stray frames in batches, and it takes
16 kHz alone. Token ids are those of the tokenizers library.

torch, transformers and peft are imported where they are used: nothing else in the project needs them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.checkpoint import orbax_io
from phi4mm_jax.config import Phi4MMConfig, read_json
from phi4mm_jax.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import Phi4MultimodalForCausalLM

_PLACEHOLDER = re.compile(r"<\|(image|audio)(?:_[0-9]+)?\|>")
_ADAPTED = r"model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)"


@dataclass(frozen=True)
class Reference:
    """transformers' model with both adapters, of which at most one is on."""

    model: "Phi4MultimodalForCausalLM"
    tokenizer: "Tokenizer"
    config: Phi4MMConfig

    def token_ids(self, prompt: str, image_tokens: Sequence[int], audio_tokens: Sequence[int]) -> list[int]:
        """Return the ids of a prompt, each placeholder repeated as often as its medium has tokens."""
        counts = {"image": iter(image_tokens), "audio": iter(audio_tokens)}
        tokens = {"image": self.config.image_token_id, "audio": self.config.audio_token_id}
        spelled = {kind: str(self.tokenizer.id_to_token(token)) for kind, token in tokens.items()}
        text = _PLACEHOLDER.sub(lambda match: spelled[match[1]] * next(counts[match[1]]), prompt)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def image(self, inputs: Mapping[str, np.ndarray]) -> dict[str, "torch.Tensor"]:
        """Return the pooled features (C, 256, D) and the embeddings (T, D) of an image, from the processor's output."""
        import torch

        embedder = self.model.model.embed_tokens_extend.image_embed
        pixels = torch.tensor(inputs["pixel_values"], dtype=self.model.dtype)
        mask, tokens = torch.tensor(inputs["attention_mask"]).bool().contiguous(), int(inputs["num_tokens"][0])
        embeds = embedder(
            torch.full((1, tokens), self.config.image_token_id),
            torch.zeros(1, tokens, self.model.config.hidden_size, dtype=self.model.dtype),
            image_pixel_values=pixels[None],
            image_sizes=torch.tensor(inputs["size"])[None],
            image_attention_mask=mask[None],
        )
        return {"vision_features": embedder.get_img_features(pixels, mask), "embeds": embeds[0]}

    def audio(self, inputs: Mapping[str, np.ndarray]) -> dict[str, "torch.Tensor"]:
        """Return the encoder's output (T, D) of a clip and its embeddings (T, D) by either projector."""
        import torch

        embedder = self.model.model.embed_tokens_extend.audio_embed
        frames = torch.tensor(inputs["features"], dtype=self.model.dtype)[None]
        tokens = int(inputs["num_tokens"][0])
        embeds = {
            f"embeds_{mode}": embedder(
                torch.full((1, tokens), self.config.audio_token_id),
                torch.zeros(1, tokens, self.model.config.hidden_size, dtype=self.model.dtype),
                audio_input_features=frames,
                audio_embed_sizes=torch.tensor([tokens]),
                audio_attention_mask=None,
                audio_projection_mode=mode,
            )[0]
            for mode in ("speech", "vision")
        }
        return {"encoder": embedder.encoder(frames, None)[0], **embeds}

    def embed_tokens(self, ids: Sequence[int]) -> "torch.Tensor":
        """Return the embeddings of tokens, (1, T, D)."""
        import torch

        return self.model.model.embed_tokens(torch.tensor([ids]))

    def embed(
        self, ids: Sequence[int], images: Sequence["torch.Tensor"], audios: Sequence["torch.Tensor"]
    ) -> "torch.Tensor":
        """Return the decoder's input (1, T, D): the tokens' embeddings, the media's in their places."""
        import torch

        tokens, embeds = torch.tensor([ids]), self.embed_tokens(ids)
        for token, media in ((self.config.image_token_id, images), (self.config.audio_token_id, audios)):
            places = tokens == token
            if int(places.sum()) != sum(len(m) for m in media):
                raise InputError(
                    "the prompt spells out the placeholder's own token; write <|image_1|>, <|audio_1|> ..."
                )
            if media:
                embeds = embeds.index_put((places,), torch.cat(list(media)))
        return embeds

    def logits(self, embeds: "torch.Tensor", adapter: str | None, positions: Sequence[int]) -> "torch.Tensor":
        """Return float32 (positions, V), by the whole sequence, without a cache."""
        import torch
        from peft.tuners.tuners_utils import BaseTunerLayer

        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(adapter is not None)
                if adapter is not None:
                    layer.set_adapter(adapter)
        out = self.model(inputs_embeds=embeds, use_cache=False, logits_to_keep=torch.tensor(positions))
        if not out.logits.isfinite().all():
            raise CheckpointError(
                "the reference's logits are not finite: its weights are broken, or bfloat16 overflows"
            )
        return out.logits[0].float()


def check_layout(folder: Path) -> None:
    """Raise a CheckpointError if transformers does not load the layout of a folder."""
    converted = (folder / orbax_io.FOLDER).is_dir()
    if converted or read_json(folder / "config.json").get("model_type") == "phi4mm":
        raise CheckpointError(
            f"{folder}: is {'converted' if converted else 'in the original layout'}, which transformers does not load. "
            f"Convert it first: python -m convert.to_torch {folder} {folder.name}-native --layout native"
        )


def load_reference(
    folder: Path, config: Phi4MMConfig, dtype: str, adapters: Mapping[str, Path] | None = None
) -> Reference:
    """Load the model of a folder in the native layout, nothing missing and nothing left over.

    Args:
        config: of the model with its adapters.
        adapters: folders of those that take the place of the folder's own.

    Raises:
        CheckpointError: a file or tensor is missing, extra or misshapen, or an adapter's B is all zero.
    """
    import tokenizers
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        raise CheckpointError(f"{tokenizer}: no such file, which the reference reads; copy it from the checkpoint")
    had_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # beside ours
    try:
        loaded: Any = transformers.Phi4MultimodalForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # of many kinds
        raise CheckpointError(f"{folder}: transformers cannot load it ({error}); see that it is whole") from error
    finally:
        if had_bars:
            transformers.utils.logging.enable_progress_bar()
    model, info = loaded
    if wrong := {kind: sorted(map(str, names)) for kind, names in info.items() if names}:
        raise CheckpointError(f"{folder}: transformers finds tensors that do not fit: {wrong!s:.600}")
    for adapter in config.loras:
        _add_adapter(model, (adapters or {}).get(adapter, ADAPTERS[adapter].folder_in(Path(folder))), adapter)
    model.eval().requires_grad_(False)
    return Reference(model, tokenizers.Tokenizer.from_file(str(tokenizer)), config)


def _add_adapter(model: "Phi4MultimodalForCausalLM", folder: Path, name: str) -> None:
    """Load the adapter of a PEFT folder, on the decoder's matrices: the folder's own pattern may match nothing."""
    import warnings

    import peft
    from peft.tuners.tuners_utils import check_target_module_exists
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    try:
        settings: Any = peft.LoraConfig.from_pretrained(str(folder))
        tensors = load_file(file)
    except Exception as error:  # of many kinds
        raise CheckpointError(f"{file}: cannot be loaded ({error}); see that the adapter is whole") from error
    if not any(check_target_module_exists(settings, key) for key, _ in model.named_modules()):
        settings.target_modules = _ADAPTED
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is meant
        peft.inject_adapter_in_model(settings, model, name)
    expected = {n: p.shape for n, p in model.named_parameters() if ".lora_" in n and f".{name}." in n}
    state = {
        re.sub(
            r"(\.lora_[AB])(\.[^.]+)?\.weight$", rf"\1.{name}.weight", key.removeprefix("base_model.model.")
        ): tensor.to(model.dtype)
        for key, tensor in tensors.items()
    }
    if wrong := sorted(
        n for n in expected.keys() | state.keys() if n not in state or expected.get(n) != state[n].shape
    ):
        raise CheckpointError(f"{file}: tensors that are missing, extra or misshapen: {', '.join(wrong)[:600]}")
    if zero := sorted(n for n, tensor in state.items() if ".lora_B." in n and not tensor.any()):
        raise CheckpointError(f"{file}: all zero, so the adapter does nothing there: {', '.join(zero)[:600]}")
    model.load_state_dict(state, strict=False, assign=True)
