"""The tiny checkpoint gives what the original implementation gives: logits, tokens, intermediates, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import golden_cases, golden_gradient_cases, media_of
from helpers.checkpoints import original_tensor
from helpers.gradients import assert_gradients_are_golden
from helpers.marks import fast_are
from helpers.paths import TINY

import phi4mm_jax
from phi4mm_jax.checkpoint.layouts.original import original_table
from phi4mm_jax.kernels import gpu
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.testing.compare import audio_tensors, image_tensors

CASES = {c["name"]: c for c in golden_cases()}
GRADIENT_CASES = {c["name"]: c for c in golden_gradient_cases()}
LOGITS = 3e-4  # their scale is 6


FAST = ["text_cross", "vision", "speech", "vision_speech"]


@pytest.fixture
def model(tiny, scanned, name):
    """Layer by layer for the fast cases, and in stacks, which compile sooner, for the others."""
    return tiny if name in FAST else scanned


@pytest.mark.parametrize("name", fast_are(FAST, CASES))
def test_logits_are_golden(model, goldens, name):
    case = CASES[name]
    batch = model.process([case["prompt"]], **media_of(case))
    ids = goldens[f"{name}.input_ids"]
    assert batch.lengths.tolist() == [len(ids)] == [case["tokens"]]
    np.testing.assert_array_equal(batch.tokens[0, : len(ids)], ids)
    logits = np.asarray(model.logits(batch))[0, : len(ids)]
    last, first = goldens[f"{name}.logits"], goldens[f"{name}.logits_first"]
    error = max(np.abs(logits[-len(last) :] - last).max(), np.abs(logits[:4] - first).max())
    print(f"{name}: {len(ids)} tokens, largest error {error:.1e}")
    assert error <= LOGITS


@pytest.mark.parametrize("name", fast_are(FAST, CASES))
def test_greedy_tokens_are_golden(model, goldens, name):
    case, expected = CASES[name], goldens[f"{name}.generated"].tolist()
    (completion,) = model.generate([case["prompt"]], **media_of(case), max_new_tokens=len(expected))
    assert completion.tokens == expected
    assert completion.finish_reason == "length"
    assert completion.prompt_tokens == case["tokens"]
    assert completion.text == model.processor.tokenizer.decode(expected)


def test_greedy_tokens_on_gpus_are_golden(tiny, goldens):
    """As computed for GPUs: a row alone is padded, pages are scattered and gathered, the kernel is interpreted."""
    name = next(iter(CASES))
    expected = goldens[f"{name}.generated"].tolist()
    with gpu.assumed(gpu.Target(cores=3, interpret=True)):
        alone = phi4mm_jax.Model(tiny.module, tiny.variables, tiny.processor)  # with programs of its own
        (completion,) = alone.generate([CASES[name]["prompt"]], **media_of(CASES[name]), max_new_tokens=len(expected))
    assert completion.tokens == expected


def check_medium(tensors, goldens, name):
    assert {f"{name}.{tensor}" for tensor in tensors} == {n for n in goldens if n.startswith(f"{name}.")}
    for tensor, value in tensors.items():
        np.testing.assert_allclose(value, goldens[f"{name}.{tensor}"], atol=1e-4, rtol=1e-4, err_msg=tensor)


@pytest.mark.parametrize("i", range(4))
def test_image_features_are_golden(tiny, goldens, i):
    check_medium(image_tensors(tiny, TINY / "inputs" / f"image_{i}.png"), goldens, f"image_{i}")


@pytest.mark.parametrize("i", range(5))
def test_audio_features_are_golden(tiny, goldens, i):
    check_medium(audio_tensors(tiny, TINY / "inputs" / f"audio_{i}.flac"), goldens, f"audio_{i}")


def answer_loss(model, variables, batch, prompt_tokens):
    """The mean cross-entropy of the tokens after the prompt."""
    logits = model.module.apply(variables, jax.tree.map(jnp.asarray, batch))[0]
    positions = np.arange(prompt_tokens, batch.lengths[0])
    log_probabilities = jax.nn.log_softmax(logits[positions - 1])
    return -log_probabilities[np.arange(len(positions)), batch.tokens[0, positions]].mean()


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "attention", "dots"])
def test_gradients_with_remat_are_golden(scanned, goldens, remat):
    """Without it, and of the other cases, they are in tests/training/test_step.py."""
    name = "grad_vision_speech"
    case = GRADIENT_CASES[name]
    batch = scanned.process([case["prompt"] + case["answer"]], **media_of(case))
    answer = goldens[f"{name}.answer_ids"]
    prompt_tokens = batch.lengths[0] - len(answer)
    np.testing.assert_array_equal(batch.tokens[0, prompt_tokens : batch.lengths[0]], answer)

    module = Phi4MM(scanned.config, scanned.module.dtype, remat=remat)
    model = type(scanned)(module, scanned.variables, scanned.processor)
    step = jax.jit(jax.value_and_grad(lambda v: answer_loss(model, v, batch, prompt_tokens)))
    loss, gradients = step(scanned.variables)
    np.testing.assert_allclose(loss, goldens[f"{name}.loss"][0], rtol=1e-5)

    found = {tensor.name: original_tensor(tensor, gradients) for tensor in original_table(scanned.config)}
    assert_gradients_are_golden(found, goldens, name)
