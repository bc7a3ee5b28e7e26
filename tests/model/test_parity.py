"""The same weights and inputs in PyTorch, live: transformers' native model in eager mode."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from helpers.cases import golden_cases, media_of, rows_of
from helpers.paths import FIXTURES, TINY

pytest.importorskip("torch")
import torch
from helpers import torch_native
from helpers.marks import fast_are
from helpers.native_cases import native_inputs

import phi4mm_jax
from phi4mm_jax.checkpoint.layouts.original import original_table
from phi4mm_jax.config import Phi4MMConfig, with_layers
from phi4mm_jax.model import decoder, lora, rope, speech, vision

pytestmark = pytest.mark.torch

CASES = {c["name"]: c for c in golden_cases()}
ADAPTERS = [None, "vision", "speech", "vision"]  # by input mode
RELEASE = json.loads((FIXTURES / "ms_release_config.json").read_text())


@pytest.fixture(scope="module")
def native():
    return torch_native.load_native(TINY)


@pytest.mark.parametrize(
    "name",
    fast_are(
        ["text_long", "vision", "speech"],
        ["text_tools", "text_long", "vision", "speech", "speech_multi", "vision_speech"],
    ),
)
def test_logits_in_float32(scanned, native, name):
    tokens, *rest = native_inputs(scanned, CASES[name])
    theirs = native.logits(tokens, *rest)
    batch = scanned.process([CASES[name]["prompt"]], **media_of(CASES[name]))
    ours = np.asarray(scanned.logits(batch))[0, : len(tokens)]
    np.testing.assert_allclose(ours, theirs, atol=3e-4, rtol=0)


@pytest.mark.slow
def test_bfloat16_errs_no_more_than_pytorch(goldens):
    """Against the float32 goldens, all twelve cases: the norm of the logits' error, ours over PyTorch's.

    Cases with the same media are rows of one batch, and layers are in stacks: four programs of a layer each.
    """
    ours, theirs = phi4mm_jax.load(TINY, scan=True), torch_native.load_native(TINY, torch.bfloat16)
    ratios = {}
    for media in {media_kinds(case) for case in CASES.values()}:
        cases = {name: case for name, case in CASES.items() if media_kinds(case) == media}
        rows = np.asarray(ours.logits(ours.process(*rows_of(list(cases.values())))))
        for (name, case), row in zip(cases.items(), rows, strict=True):
            golden = np.concatenate([goldens[f"{name}.logits_first"], goldens[f"{name}.logits"]])
            tokens, *rest = native_inputs(ours, case)
            last = len(golden) - 4
            errors = [
                np.linalg.norm(np.concatenate([logits[:4], logits[-last:]]) - golden)
                for logits in (row[: len(tokens)], theirs.logits(tokens, *rest))
            ]
            ratios[name] = errors[0] / errors[1]
            print(f"{name}: error's norm, ours over PyTorch's: {ratios[name]:.2f}")
    assert ratios.keys() == CASES.keys()
    assert max(ratios.values()) <= 1.25, ratios
    assert np.mean(list(ratios.values())) <= 1.0, ratios


def media_kinds(case: dict) -> tuple[bool, bool]:
    return bool(case["images"]), bool(case["audios"])


# A single layer at the release's width.


@pytest.fixture(scope="module")
def release() -> Phi4MMConfig:
    return with_layers(Phi4MMConfig.from_dict(RELEASE), decoder=1, vision=1, speech=1)


def layer_variables(config, state, prefix: str) -> dict:
    """The parameters of one layer, from its tensors named without `prefix`."""
    flat, used = {}, set()
    for tensor in original_table(config):
        name = tensor.name.removeprefix(prefix)
        if tensor.layer is None or name not in state or not tensor.name.startswith(prefix):
            continue
        used.add(name)
        assert state[name].shape == tensor.shape
        for part, start, stop in tensor.spans():
            path = part.path[:1] + part.path[part.path.index("layers") + 1 :]
            flat[path] = part.to_parameter(state[name][start:stop])
    assert used == {name for name in state if "relative_attention_bias" not in name}
    return unflatten_dict(flat)


def close(ours, theirs, relative: float) -> None:
    scale = np.abs(theirs).max()
    assert np.abs(np.asarray(ours) - theirs).max() <= relative * scale


@pytest.fixture(scope="module")
def full_width_layer(release):
    """A decoder layer with both adapters, ours compiled for 96 tokens once, and PyTorch's."""
    state, run = torch_native.decoder_layer(RELEASE, seed=0)
    variables = layer_variables(release, state, "model.layers.0.")
    config = decoder.BlockConfig(release.decoder, tuple(lora.lora_configs(release).items()))
    return jax.jit(decoder.Block(config).apply), variables, run


@pytest.mark.parametrize("adapter", fast_are(["vision"], [None, "vision", "speech"]))
@pytest.mark.parametrize("factors", fast_are(["long"], ["short", "long"]))
def test_decoder_layer_at_full_width(release, full_width_layer, factors, adapter):
    apply, variables, run = full_width_layer
    length = 96
    x = np.random.default_rng(0).standard_normal((1, length, 3072)).astype(np.float32)
    long = jnp.asarray([factors == "long"])
    cos, sin = rope.rotations(release.decoder.rope, jnp.arange(length)[None], long)
    cos, sin = rope.widen(cos, sin, release.decoder.head_size)
    index = {None: 0, "vision": 1, "speech": 2}[adapter]
    rows = decoder.AttentionInputs(jnp.asarray([length]), cos, sin, lora.row_scales(release, jnp.asarray([index])))
    (ours, _), _ = apply(variables, (x, None), jnp.int32(0), rows)
    close(ours, run(x, factors, adapter), 2e-5)


def test_vision_layer_at_full_width(release):
    state, run = torch_native.vision_layer(RELEASE, seed=0)
    variables = layer_variables(release, state, "model.embed_tokens_extend.image_embed.img_processor.encoder.layers.0.")
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 1024, 1152)).astype(np.float32)
    mask = rng.random(1024) < 0.8
    ours, _ = jax.jit(vision.Block(release.vision).apply)(variables, x, jnp.int32(0), mask[None])
    close(ours, run(x, mask), 2e-5)


def test_conformer_block_at_full_width(release):
    state, run = torch_native.conformer_block(RELEASE, seed=0)
    variables = layer_variables(release, state, "model.embed_tokens_extend.audio_embed.encoder.encoders.0.")
    x = np.random.default_rng(2).standard_normal((1, 500, 1024)).astype(np.float32)
    table = state["relative_attention_bias_layer.bias_values.weight"]
    bias = speech.relative_bias(jnp.asarray(table), 500, release.speech.bias_distance)
    ours, _ = jax.jit(speech.Block(release.speech).apply)(variables, x, jnp.int32(0), bias, np.ones((1, 500), bool))
    close(ours, run(x), 2e-5)


def test_rotary_frequencies_are_pytorchs(release):
    """Each within one place of PyTorch's float32, whose `pow` is not always correctly rounded."""
    settings = release.decoder.rope
    exponents = torch.arange(0, settings.rotary_size, 2, dtype=torch.int64).float() / settings.rotary_size
    ours = rope.inverse_frequencies(settings)
    for mine, factors in zip(ours, (settings.short_factor, settings.long_factor), strict=True):
        theirs = (1.0 / (torch.tensor(factors, dtype=torch.float32) * settings.theta**exponents)).numpy()
        assert np.abs(mine.view(np.int32) - theirs.view(np.int32)).max() <= 1
        assert (mine == theirs).mean() > 0.9
