"""The same numbers however the program is laid out: scanned or written out, spread over devices or not."""

from functools import partial

import jax
import numpy as np
import pytest
from helpers.cases import golden_cases, media_of
from helpers.marks import fast_are
from helpers.paths import TINY

import phi4mm_jax
from phi4mm_jax.batch import AudioStack
from phi4mm_jax.mesh import make_mesh
from phi4mm_jax.model.layers import unstack_layers

CASE = next(c for c in golden_cases() if c["name"] == "vision_speech")


@pytest.fixture(scope="module")
def batch(tiny):
    return tiny.process([CASE["prompt"]], **media_of(CASE))


@pytest.mark.slow
def test_scan_equals_loop(tiny, scanned, batch):
    assert "layers" in scanned.variables["lora_vision"]["decoder"]
    assert "layers_2" in tiny.variables["lora_vision"]["decoder"]
    np.testing.assert_allclose(scanned.logits(batch), tiny.logits(batch), atol=3e-4, rtol=0)


def test_layers_are_unstacked(tiny, scanned):
    stacks = jax.tree.map(lambda x: x, scanned.variables["params"]["decoder"])  # whose dicts are emptied
    unstacked = unstack_layers(stacks)
    assert not stacks
    jax.tree.map(np.testing.assert_array_equal, unstacked, tiny.variables["params"]["decoder"])


def test_encoders_are_unrolled_with_the_decoder_on_one_cpu(tiny, scanned):
    for name in ("vision", "speech"):
        stacks = jax.tree.map(lambda x: x, scanned.variables["params"][name])
        jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacks), tiny.variables["params"][name])
    spread = phi4mm_jax.load(TINY, dtype="float32", mesh=make_mesh(2)).variables["params"]
    assert "layers" in spread["vision"]
    assert "layers_0" in spread["decoder"]


@pytest.mark.parametrize("with_images", [[False] * 3, [True] * 3, [False, True, False]])
def test_each_chunk_of_audio_has_its_projector(scanned, with_images):
    """That for clips beside images where it is one, whether a branch computes it alone or all is captured."""
    frames = np.random.default_rng(0).standard_normal((3, 8 * 20, 80)).astype(np.float32)
    whole, chosen = np.full(3, 160), np.array(with_images)
    audio = AudioStack(frames, 0 * whole, whole, np.full(3, 19), chosen)
    run = partial(scanned.module.apply, scanned.variables, audio, method="encode_audio")
    captured, state = run(mutable=["intermediates"], capture_intermediates=lambda module, _: module.name == "speech")
    features = state["intermediates"]["speech"]["__call__"][0]

    def projected(name):
        up, down = (scanned.variables["params"][name][part] for part in ("up", "down"))
        hidden = jax.nn.gelu(features @ up["kernel"] + up["bias"], approximate=False)
        return hidden @ down["kernel"] + down["bias"]

    alone, beside = projected("audio_projector"), projected("audio_projector_with_images")
    expected = np.where(chosen[:, None, None], beside, alone).reshape(-1, alone.shape[-1])
    assert np.abs(np.asarray(alone - beside)).max() > 0.1
    np.testing.assert_allclose(run(), expected, atol=1e-5)
    np.testing.assert_allclose(captured, expected, atol=1e-5)


def test_scanned_layers_generate_the_same(scanned, goldens):
    expected = goldens["vision_speech.generated"].tolist()
    (completion,) = scanned.generate([CASE["prompt"]], **media_of(CASE), max_new_tokens=len(expected))
    assert completion.tokens == expected


@pytest.mark.parametrize(("fsdp", "tensor"), fast_are([(1, 2)], [(8, 1), (1, 2), (4, 2)]))
def test_logits_and_tokens_on_a_mesh(scanned, goldens, batch, fsdp, tensor):
    model = phi4mm_jax.load(TINY, dtype="float32", mesh=make_mesh(fsdp, tensor))
    gate = model.variables["params"]["decoder"]["layers_0"]["mlp"]["gate_up"]["gate"]
    assert gate.addressable_shards[0].data.size * fsdp * tensor == gate.size
    np.testing.assert_allclose(model.logits(batch), scanned.logits(batch), atol=3e-4, rtol=0)
    expected = goldens["vision_speech.generated"].tolist()
    (completion,) = model.generate([CASE["prompt"]], **media_of(CASE), max_new_tokens=len(expected))
    assert completion.tokens == expected


def test_adapters_that_no_row_uses_cost_nothing(tiny, monkeypatch):
    """A batch of text runs without the adapters' parameters, and its program without their products."""
    text = tiny.process(["<|user|>Hello<|end|><|assistant|>"])
    whole, without = (
        jax.jit(tiny.module.apply).lower(variables, text).compile()
        for variables in (tiny.variables, {"params": tiny.variables["params"]})
    )
    assert without.cost_analysis()["flops"] < 0.9 * whole.cost_analysis()["flops"]
    expected, with_adapters = without({"params": tiny.variables["params"]}, text), whole(tiny.variables, text)
    unusable = {name: "an adapter" for name in tiny.variables if name != "params"}
    monkeypatch.setattr(tiny, "variables", tiny.variables | unusable)
    np.testing.assert_array_equal(tiny.logits(text), expected)
    np.testing.assert_allclose(expected, with_adapters, atol=1e-5)
