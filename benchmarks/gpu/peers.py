"""The same rows by PyTorch and transformers."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.gpu.common import (
    ANSWER,
    AUDIO_SECONDS,
    CLIPS,
    CROPS,
    DECODE,
    HEADS,
    KV_HEADS,
    PREFILL,
    SIZE,
    SMALL,
    TRANSCRIPTS,
    Measurement,
    Sizes,
    attention_rows,
    noise,
    of_torch,
    torch_device,
)
from benchmarks.paths import RELEASE, TINY


def torch_kernels(small: bool) -> Iterator[Measurement]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    yield "platform", "transformers", "", lambda: f"torch {torch.__version__}"
    device = torch_device()
    backends = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
    for backward, length, name, operations in attention_rows(small):
        for side, backend in backends.items():

            def measure(length=length, operations=operations, backward=backward, backend=backend) -> float:
                options: Any = {"device": device, "dtype": torch.bfloat16, "requires_grad": backward}
                q, k, v = (torch.randn(1, n, length, SIZE, **options) for n in (HEADS, KV_HEADS, KV_HEADS))

                def call() -> torch.Tensor:
                    with sdpa_kernel(backend):
                        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                        if backward:
                            out.backward(out.detach())
                    return out

                return operations / of_torch(call) / 1e12

            yield name, side, "TFLOP/s", measure


def torch_model(small: bool) -> Iterator[Measurement]:
    import torch
    from transformers import DynamicCache

    from benchmarks.vs_transformers import leave_out_unused
    from tests.helpers import torch_native

    torch.set_grad_enabled(False)
    sizes, device = SMALL if small else Sizes(), torch_device()
    file = TINY / "config.json" if small else RELEASE
    config = torch_native.native_config(json.loads(file.read_text()))
    with torch.device(device):
        kind: Any = torch_native.Phi4MultimodalForCausalLM
        theirs = kind._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    leave_out_unused(theirs)

    def ids(rows: int, length: int) -> torch.Tensor:
        return torch.randint(0, 500, (rows, length), device=device)

    for length in sizes.prompts:

        def prefill(length=length) -> float:
            tokens = ids(1, length)
            call = lambda: theirs(input_ids=tokens, use_cache=True, logits_to_keep=1).logits  # noqa: E731
            return length / of_torch(call, rounds=2, seconds=0.0)

        yield PREFILL.format(length), "transformers", "tokens/s", prefill

    def decoding(rows: int, cached: int) -> float:
        cache = DynamicCache(config=theirs.config)
        last = theirs(input_ids=ids(rows, cached), use_cache=True, past_key_values=cache, logits_to_keep=1)
        last = last.logits[:, -1:].argmax(-1)

        def call() -> torch.Tensor:
            if more := cache.get_seq_length() - cached:
                cache.crop(-more)
            drawn = last
            for _ in range(sizes.steps):
                drawn = theirs(input_ids=drawn, use_cache=True, past_key_values=cache).logits[:, -1:].argmax(-1)
            return drawn

        return rows * sizes.steps / of_torch(call, rounds=2, seconds=0.0)

    for batch in sizes.batches:
        row = DECODE.format(batch, sizes.cached)
        yield row, "transformers", "tokens/s", lambda batch=batch: decoding(batch, sizes.cached)
    yield DECODE.format(1, max(sizes.prompts)), "transformers", "tokens/s", lambda: decoding(1, max(sizes.prompts))
    extend = theirs.model.embed_tokens_extend

    def crops() -> float:
        vision: Any = torch_native.vision_config(config)
        side, patches = vision.image_size, vision.image_size // vision.patch_size
        pixels = torch.zeros(sizes.crops, 3, side, side, device=device, dtype=torch.bfloat16)
        mask = torch.ones(sizes.crops, patches, patches, device=device, dtype=torch.bool)
        embed = extend.image_embed

        def call() -> torch.Tensor:
            features = embed.get_img_features(pixels, mask)
            return embed.img_projection_down(torch.nn.functional.gelu(embed.img_projection_up(features)))

        return sizes.crops / of_torch(call)

    def audio(count: int) -> dict[str, Any]:
        from transformers import Phi4MultimodalFeatureExtractor

        random = np.random.default_rng(0)
        made = Phi4MultimodalFeatureExtractor()(
            [noise(random)[0] for _ in range(count)], sampling_rate=16000, return_tensors="pt"
        )
        return {
            "audio_input_features": made["audio_input_features"].to(device, torch.bfloat16),
            "audio_embed_sizes": made["audio_embed_sizes"].to(device),
        }

    def clips() -> float:
        features = audio(sizes.clips)["audio_input_features"]
        mask = torch.ones(features.shape[:2], device=device, dtype=torch.bool)
        call = lambda: extend.audio_embed.encoder(features, mask)  # noqa: E731
        return sizes.clips * AUDIO_SECONDS / of_torch(call)

    def transcripts() -> float:
        special = theirs.config.audio_config.audio_token_id

        def call() -> torch.Tensor:
            media = audio(sizes.transcripts)
            count = int(media["audio_embed_sizes"][0])
            tokens = ids(sizes.transcripts, 12)
            tokens = torch.cat([tokens[:, :1], torch.full_like(tokens[:, :1], special).expand(-1, count), tokens], 1)
            return theirs.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), **media, max_new_tokens=ANSWER,
                min_new_tokens=ANSWER, do_sample=False, pad_token_id=0,
            )  # fmt: skip

        return sizes.transcripts * AUDIO_SECONDS / of_torch(call, rounds=1, seconds=0.0)

    yield TRANSCRIPTS.format(sizes.transcripts), "transformers", "s of audio/s", transcripts
    yield CROPS.format(sizes.crops), "transformers", "crops/s", crops
    yield CLIPS.format(sizes.clips), "transformers", "s of audio/s", clips
