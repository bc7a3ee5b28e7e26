"""The training step: PyTorch's gradients and updates, however the same samples are laid out."""

import dataclasses
import json
import re
from collections.abc import Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from helpers.cases import golden_gradient_cases, media_of
from helpers.checkpoints import original_tensor
from helpers.gradients import assert_gradients_are_golden
from helpers.marks import fast_are
from helpers.norms import distance
from helpers.paths import FIXTURES, TINY
from helpers.quantized import dequantized
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import phi4mm_jax
from phi4mm_jax import InputError
from phi4mm_jax.adapters import index_of
from phi4mm_jax.batch import AudioStack, Batch, ImageStack, TrainingBatch
from phi4mm_jax.checkpoint.layouts.original import original_table
from phi4mm_jax.checkpoint.tensor_types import UNUSED
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.mesh import jit_on_mesh, make_mesh
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.lora import dropout
from phi4mm_jax.quantization import QuantizedWeight, quantize
from phi4mm_jax.testing.compiled import CHIPS, cost, num_bytes
from phi4mm_jax.testing.training_steps import CASES as COMPILED
from phi4mm_jax.testing.training_steps import case_flops, compile_step, hbm_gib
from phi4mm_jax.training import dpo
from phi4mm_jax.training.dpo import REFERENCE, DPOConfig, answer_log_probability, preference
from phi4mm_jax.training.flops import peak_flops, step_flops
from phi4mm_jax.training.losses import LossConfig, token_losses
from phi4mm_jax.training.metrics_log import MetricsLog, read_log
from phi4mm_jax.training.optimizer import OptimizerConfig, decayed_paths, make_lr_schedule, make_optimizer
from phi4mm_jax.training.param_filter import join, matching, split
from phi4mm_jax.training.step import (
    LossStats,
    compiler_options,
    dropout_key,
    gradients,
    initial_state,
    supervised,
    train_step,
)

CASES = {c["name"]: c for c in golden_gradient_cases()}
ADAPTERS = ["lora_vision", "lora_speech"]
TRAINED = ["lora_speech", "params/audio_projector"]


def sample(model, prompt: str, answer: str, **media) -> TrainingBatch:
    """One row whose answer carries loss."""
    batch = model.process([prompt + answer], **media)
    length, answered = batch.lengths[0], len(model.processor.tokenizer.encode(answer, special=True))
    targets = np.roll(batch.tokens, -1, 1)
    position = np.arange(targets.shape[1])
    weights = (position >= length - answered - 1) & (position < length - 1)
    return TrainingBatch(batch, targets, weights[None].astype(np.float32))


def case_sample(model, name: str) -> TrainingBatch:
    case = CASES[name]
    return sample(model, case["prompt"], case["answer"], **media_of(case))


def micro_batches(*batches: TrainingBatch):
    return jax.tree.map(lambda *x: np.stack(x), *batches)


def relative(ours, theirs) -> float:
    """The largest difference of a leaf, relative to its norm."""

    def of_leaf(mine, its) -> float:
        return float(np.linalg.norm(np.asarray(mine - its)) / (np.linalg.norm(np.asarray(its)) + 1e-9))

    return max(jax.tree.leaves(jax.tree.map(of_leaf, ours, theirs)))


# Patterns.


def test_patterns_select_parameters():
    paths = [("params", "speech", "stem", "kernel"), ("params", "speech", "bias"), ("lora_speech", "down", "a")]
    assert matching(paths, ["params/speech"], "trainable") == set(paths[:2])
    assert matching(paths, ["**/a", "params/*/bias"], "trainable") == {paths[2], paths[1]}
    assert matching(paths, ["**", "!params/**/kernel"], "trainable") == set(paths[1:])
    for wrong in ("params/spe", "speech", "lora_*/up", "params/*/kernel"):
        with pytest.raises(InputError, match=r"trainable: the pattern .* matches no parameter"):
            matching(paths, [wrong], "trainable")
    with pytest.raises(InputError, match="excludes nothing"):
        matching(paths, ["lora_speech", "!params"], "trainable")
    with pytest.raises(InputError, match="expected a list of patterns"):
        matching(paths, "lora_speech", "trainable")


def test_join_undoes_split(scanned):
    trainable, frozen = split(scanned.variables, ["lora_speech"], "trainable")
    assert set(trainable) == {"lora_speech"}
    assert set(frozen) == {"params", "lora_vision"}
    jax.tree.map(np.testing.assert_array_equal, join(trainable, frozen), dict(scanned.variables))


# The loss.


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(0)
    hidden, embedding = rng.standard_normal((3, 37, 16), np.float32), rng.standard_normal((50, 16), np.float32)
    weights = (rng.random((3, 37)) < 0.3).astype(np.float32)
    weights[1] = 0
    return hidden, embedding, rng.integers(0, 50, (3, 37)), weights


@pytest.mark.torch
@pytest.mark.parametrize("chunk", [1, 5, 37, 1000])
@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 1e-3)])
def test_chunked_loss_is_pytorchs(head, monkeypatch, chunk, smoothing, z):
    """Value and gradients are those of the whole logits, by PyTorch."""
    import torch

    hidden, embedding, targets, weights = head
    monkeypatch.setattr("phi4mm_jax.training.losses._CHUNK_LOGITS", chunk * 3 * 50)

    def ours(hidden, embedding):
        losses = token_losses(hidden, embedding, targets, weights, LossConfig(smoothing, z))
        return (losses.loss * weights).sum(), losses

    (total, losses), found = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, embedding)
    theirs = [torch.tensor(x, requires_grad=True) for x in (hidden, embedding)]
    logits = theirs[0] @ theirs[1].T
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(targets).flatten(), reduction="none", label_smoothing=smoothing
    ).reshape(3, 37)
    expected = ((each + z * logits.logsumexp(-1) ** 2) * torch.tensor(weights)).sum()
    expected.backward()
    np.testing.assert_allclose(total, expected.item(), rtol=1e-5)
    for mine, parameter in zip(found, theirs, strict=True):
        np.testing.assert_allclose(mine, np.asarray(parameter.grad), atol=2e-5)
    with_frozen_head = jax.jit(jax.grad(lambda hidden: ours(hidden, embedding)[0]))(hidden)
    np.testing.assert_allclose(with_frozen_head, np.asarray(theirs[0].grad), atol=2e-5)
    likeliest = (logits.argmax(-1).numpy() == targets) * (weights > 0)
    np.testing.assert_array_equal(losses.correct, likeliest)
    log_probability = torch.log_softmax(logits, -1).detach().numpy()
    chosen = np.take_along_axis(log_probability, targets[..., None], -1)[..., 0] * (weights > 0)
    np.testing.assert_allclose(losses.log_probability, chosen, atol=1e-5)


@pytest.mark.parametrize("is_quantised", [False, True])
def test_the_heads_products_are_in_the_models_dtype(monkeypatch, is_quantised):
    """Look at what accelerators compile: in float32 a GPU writes the head out, and multiplies in TF32."""
    monkeypatch.setattr("phi4mm_jax.training.losses.on_one_cpu", lambda: False)
    rng = np.random.default_rng(0)
    hidden, matrix = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((2, 8, 16), (50, 16)))
    integers, scales = quantize(("params", "decoder", "embedding"), matrix, "int8")
    head = QuantizedWeight(integers, scales) if is_quantised else matrix
    targets = rng.integers(0, 50, (2, 8))

    def loss(hidden):
        return token_losses(hidden, head, targets, jnp.ones((2, 8))).loss.sum()

    products = re.findall(r"dot_general .*: \((.*)\) ->", jax.jit(jax.grad(loss)).lower(hidden).as_text())
    assert len(products) == 2  # the logits and their gradient
    assert all(re.fullmatch(r"tensor<[\dx]+xbf16>, tensor<[\dx]+xbf16>", operands) for operands in products)
    wide = integers * scales if is_quantised else jnp.asarray(matrix, jnp.float32)
    expected = (jax.nn.softmax(hidden.astype(jnp.float32) @ wide.T) - jax.nn.one_hot(targets, 50)) @ wide
    np.testing.assert_allclose(jax.grad(loss)(hidden).astype(jnp.float32), expected, atol=0.05, rtol=0.02)


def test_the_logits_of_all_positions_are_never_held(scanned):
    """Nothing in the compiled step has as many elements as the whole logits."""
    vocabulary, length = 4096, 512
    hidden, embedding = jnp.zeros((2, length, 8)), jnp.zeros((vocabulary, 8))
    targets, weights = jnp.zeros((2, length), jnp.int32), jnp.ones((2, length))

    def loss(hidden, embedding):
        return token_losses(hidden, embedding, targets, weights).loss.sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phi4mm_jax.training.losses._CHUNK_LOGITS", 16 * vocabulary)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, embedding).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2 * length * vocabulary / 4


@pytest.mark.parametrize("trained", [False, True])
def test_one_cpu_takes_positions_of_all_rows_with_the_vocabulary_first(trained):
    """Logits are (V, positions), 128 at a time of a large vocabulary, and neither they nor the head are transposed."""
    vocabulary, size = 8192, 64
    hidden, embedding = jnp.zeros((2, 256, size)), jnp.zeros((vocabulary, size))
    targets, weights = jnp.zeros((2, 256), jnp.int32), jnp.ones((2, 256))

    def loss(hidden, embedding):
        return token_losses(hidden, embedding, targets, weights).loss.sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phi4mm_jax.training.losses._CHUNK_LOGITS", 256 * vocabulary)
        compiled = jax.jit(jax.grad(loss, (0, 1) if trained else 0)).lower(hidden, embedding).compile()
    text: Any = compiled.as_text()
    assert re.search(rf"f32\[{vocabulary},128\]\S* (dot|fusion)\(", text)
    assert not re.search(rf"f32\[({vocabulary},\d+|\d+,{vocabulary})\]\S* (transpose|copy)\(", text)


@pytest.mark.parametrize(("name", "value"), [("label_smoothing", 1.0), ("label_smoothing", -0.1), ("z_loss", -1.0)])
def test_wrong_loss_settings(name, value):
    with pytest.raises(InputError, match=name):
        LossConfig(**{name: value})


# Gradients.


def with_short_queries(variables):
    """Variables whose queries are a quarter as long.

    Where random attention is as sharp as the checkpoint's, rounding alone moves the gradients by 1e-5, more on some
    processors.
    """

    def shorter(path, x):
        is_query = {"q", "q_scales"} & {step.key for step in path}
        return x / 4 if is_query and jnp.issubdtype(x.dtype, jnp.floating) else x  # of integers their scales

    return jax.tree_util.tree_map_with_path(shorter, variables)


@pytest.fixture(scope="module")
def calm(scanned):
    return with_short_queries(scanned.variables)


@pytest.fixture(scope="module")
def compute(scanned):
    """The gradients of all parameters, and the sums."""
    objective = supervised(scanned.module)
    return jax.jit(lambda t, b: gradients(objective, t, {}, b, None))


@pytest.fixture(scope="module")
def case_gradients(scanned, compute):
    """Compute those of a golden case alone."""
    return cache(lambda name: compute(scanned.variables, micro_batches(case_sample(scanned, name))))


@pytest.mark.parametrize("name", fast_are(["grad_speech"], CASES))
def test_gradients_are_golden(scanned, goldens, case_gradients, name):
    found, sums = case_gradients(name)
    assert sums.weight == len(goldens[f"{name}.answer_ids"])
    np.testing.assert_allclose(sums.loss / sums.weight, goldens[f"{name}.loss"][0], rtol=1e-5)
    named = {tensor.name: original_tensor(tensor, found) for tensor in original_table(scanned.config)}
    assert_gradients_are_golden(named, goldens, name)


@pytest.mark.parametrize("weights", fast_are(["int4"], ["int8", "int4"]))
def test_gradients_beside_quantised_weights_are_those_of_what_they_stand_for(scanned, weights):
    """Of an encoder, its projector and an adapter; what is trained is the checkpoint's own, in float32."""
    patterns = ["params/vision", "params/image_embedder", "lora_vision"]
    model = phi4mm_jax.load(TINY, "float32", weights=weights, trainable=patterns, scan=True)
    trainable, frozen = split(model.variables, patterns, "trainable")
    jax.tree.map(np.testing.assert_array_equal, trainable, split(scanned.variables, patterns, "trainable")[0])
    kinds = {x.dtype.name for x in jax.tree.leaves(frozen["params"]["decoder"])}
    assert kinds == {"int8", weights, "float32"} | ({"bfloat16"} if weights == "int4" else set())
    trainable, frozen = with_short_queries(trainable), with_short_queries(frozen)
    compute = jax.jit(partial(gradients, supervised(model.module)))
    batches = micro_batches(case_sample(model, "grad_vision"))
    (found, sums), (expected, of_floats) = (
        compute(trainable, of_base, batches, None) for of_base in (frozen, dequantized(frozen))
    )
    np.testing.assert_allclose(sums.loss, of_floats.loss, rtol=1e-5)
    for name in ("vision", "image_embedder"):
        assert distance(found["params"][name], expected["params"][name]) < 1e-5
    assert distance(found["lora_vision"], expected["lora_vision"]) < 1e-5


def pack(model, names: Sequence[str]) -> TrainingBatch:
    """The cases one after the other in one row."""
    rows = [model.processor.row(CASES[n]["prompt"] + CASES[n]["answer"], **{
        kind: of_row[0] for kind, of_row in media_of(CASES[n]).items()}) for n in names]  # fmt: skip
    several: Batch = model.processor.batch(rows)
    parts = [slice(0, n) for n in several.lengths]

    def one_row(x, fill):
        joined = np.concatenate([x[b, part] for b, part in enumerate(parts)])
        return np.pad(joined, (0, 11), constant_values=fill)[None]

    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(several.lengths)])
    alone = [case_sample(model, n) for n in names]
    batch = several._replace(
        tokens=one_row(several.tokens, 0), media=one_row(several.media, -1), lengths=several.lengths.sum(keepdims=True),
        adapters=several.adapters[:1], segments=np.pad(segments, (0, 11))[None],
    )  # fmt: skip
    targets, weights = (
        np.pad(np.concatenate([getattr(a, field)[0, part] for a, part in zip(alone, parts, strict=True)]), (0, 11))[
            None
        ]
        for field in ("targets", "weights")
    )
    return TrainingBatch(batch, targets, weights)


@pytest.mark.parametrize(
    ("names", "adapter"),
    fast_are(
        [(("grad_speech", "grad_speech"), "lora_speech")],
        [(("grad_vision", "grad_vision_speech"), "lora_vision"), (("grad_speech", "grad_speech"), "lora_speech")],
    ),
    ids=["images", "clips"],
)
def test_packed_rows_have_the_gradients_of_their_samples(scanned, calm, compute, names, adapter):
    """Two samples in one row, each with a medium, are as each alone: attention, positions, frequencies, media."""
    found, sums = jax.device_get(compute(calm, micro_batches(pack(scanned, names))))
    alone = [jax.device_get(compute(calm, micro_batches(case_sample(scanned, n)))) for n in names]
    weights = [of_sample.weight for _, of_sample in alone]
    assert sums.weight == sum(weights)
    expected = jax.tree.map(
        lambda *g: sum(x * w for x, w in zip(g, weights, strict=True)) / sum(weights), *(g for g, _ in alone)
    )
    of_adapter = {k: v for k, v in found.items() if k == adapter}
    assert relative(of_adapter, {k: expected[k] for k in of_adapter}) <= 1e-5


ANSWERS = [
    "The quick brown fox.",
    "Yes.",
    "No, it is not.",
    "Seven",
    "A red fox and a dog.",
    "Ja.",
    "Stop now",
    "One two",
]


@pytest.fixture(scope="module")
def eight(scanned) -> list[TrainingBatch]:
    case = CASES["grad_speech"]
    return [sample(scanned, case["prompt"], f"{a}<|end|><|endoftext|>", **media_of(case)) for a in ANSWERS]


def together(samples: list[TrainingBatch], model) -> TrainingBatch:
    case = CASES["grad_speech"]
    media = {kind: of_row * len(samples) for kind, of_row in media_of(case).items()}
    batch = model.process([case["prompt"] + f"{a}<|end|><|endoftext|>" for a in ANSWERS], **media)
    return TrainingBatch(batch, *(np.concatenate([getattr(s, f) for s in samples]) for f in ("targets", "weights")))


@pytest.mark.slow
def test_accumulation_changes_nothing(scanned, calm, eight):
    """Eight samples at once, and one after the other: the same gradients, though their answers differ in length."""
    trainable, frozen = split(calm, ["lora_speech", "params/audio_projector"], "trainable")
    compute = jax.jit(lambda t, f, b: gradients(supervised(scanned.module), t, f, b, None))
    (one, sums), (other, other_sums) = (
        compute(trainable, frozen, batches)
        for batches in (micro_batches(together(eight, scanned)), micro_batches(*eight))
    )
    np.testing.assert_allclose(sums, other_sums, rtol=1e-6)
    assert relative(one, other) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, make_mesh(4, 2)], ids=["one device", "eight"])
def test_clips_in_groups_change_no_gradient(scanned, calm, eight, monkeypatch, mesh):
    """What would be too much to hold for all clips is computed for some, forward and backward; on devices, for their
    own."""
    trainable, frozen = split(calm, ["params/speech/stem", "params/speech/layers"], "trainable")
    batches = micro_batches(together(eight, scanned))
    compute = partial(gradients, supervised(scanned.module), batches=batches, key=None)
    whole, sums = jax.jit(compute)(trainable, frozen)
    monkeypatch.setattr("phi4mm_jax.model.speech._MAP_BYTES", 1)
    if mesh is not None:
        spread = phi4mm_jax.load(TINY, dtype="float32", mesh=mesh, scan=True)
        variables = with_short_queries(spread.variables)
        trainable, frozen = split(variables, ["params/speech/stem", "params/speech/layers"], "trainable")
    found, found_sums = jit_on_mesh(trainable, lambda t, f: compute(t, f))(trainable, frozen)
    np.testing.assert_allclose(found_sums, sums, rtol=1e-5)
    bound = 1e-5 if mesh is None else 1e-4  # sums over devices round otherwise
    assert distance(found, whole) <= bound  # of all leaves: of keys' biases the gradients are 0
    if mesh is not None:  # a stack's gradients lie as its parameters do
        alike = jax.tree.map(lambda g, p: g.sharding.is_equivalent_to(p.sharding, p.ndim), found, trainable)
        assert all(jax.tree.leaves(alike))


# data, fsdp, context, tensor
MESHES = fast_are([(2, 1, 2, 2)], [(1, 4, 2, 1), (2, 1, 2, 2), (1, 8, 1, 1), (1, 2, 2, 2)])


@pytest.fixture(scope="module")
def of_one_device(scanned, eight):
    """Compute the gradients, with dropout, of two kinds of parameters on one device."""
    batches = micro_batches(together(eight, scanned))

    def compute(trainable, frozen):
        return gradients(supervised(scanned.module), trainable, frozen, batches, dropout_key(7))

    return compute, jax.jit(compute)(*split(scanned.variables, TRAINED, "trainable"))


@pytest.mark.parametrize(("data", "fsdp", "context", "tensor"), MESHES)
def test_gradients_on_a_mesh_are_those_of_one_device(of_one_device, data, fsdp, context, tensor):
    """With dropout: what drops out depends on no device, weights are gathered where used, rows and tokens stay where
    they are."""
    compute, (expected, expected_sums) = of_one_device
    mesh = make_mesh(fsdp, tensor, data=data, context=context)
    spread = phi4mm_jax.load(TINY, dtype="float32", mesh=mesh, scan=True)
    trainable, frozen = split(spread.variables, TRAINED, "trainable")
    found, sums = jit_on_mesh(trainable, lambda t, f: compute(t, f))(trainable, frozen)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-5)
    assert relative(jax.device_get(found), jax.device_get(expected)) <= 1e-4
    alike = jax.tree.map(lambda g, p: g.sharding.is_equivalent_to(p.sharding, p.ndim), found, trainable)
    assert all(jax.tree.leaves(alike))


@pytest.mark.slow
def test_frozen_parameters_are_not_differentiated(scanned, eight):
    """Their gradients take no time: a step of the adapter costs less than one of everything."""
    trainable, frozen = split(scanned.variables, ["lora_speech"], "trainable")
    step = micro_batches(eight[0])

    def flops(trainable, frozen):
        def compute(t, f):
            return gradients(supervised(scanned.module), t, f, step, None)

        return jax.jit(compute).lower(trainable, frozen).compile().cost_analysis()["flops"]

    assert flops(trainable, frozen) < 0.8 * flops(scanned.variables, {})


# Updates.

STEPS = 10


@pytest.mark.torch
@pytest.mark.parametrize("adapter", fast_are(["speech"], ["vision", "speech"]))
def test_ten_steps_are_pytorchs(scanned, goldens, adapter):
    """Losses of transformers, PEFT and torch.optim within 1e-4; the total update of each tensor within 1 %.

    At twice this learning rate PyTorch itself, begun with weights that differ by 1e-7, comes to losses 3e-4 apart.
    """
    import torch
    from helpers import torch_native

    name = f"grad_{adapter}"
    batches = micro_batches(case_sample(scanned, name))
    config = OptimizerConfig(learning_rate=1e-4, warmup_steps=2, weight_decay=0.01, clip=1.0)
    trainable, frozen = split(scanned.variables, [f"lora_{adapter}"], "trainable")
    optimizer = make_optimizer(config, STEPS, trainable)
    state = initial_state(trainable, optimizer)
    step = jax.jit(lambda s, f, b: train_step(supervised(scanned.module), optimizer, s, f, b, None))
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batches)
        losses.append(float(metrics.loss))

    native = torch_native.load_native(TINY)
    parameters = {n: p for n, p in native.parameters().items() if f".{adapter}." in n and ".lora_" in n}
    before = {n: p.detach().clone().numpy() for n, p in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    adamw = torch.optim.AdamW(parameters.values(), lr=1.0, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.01)
    rates = make_lr_schedule(config, STEPS)
    inputs = native_inputs(scanned, name, goldens)
    for i in range(STEPS):
        adamw.param_groups[0]["lr"] = float(rates(i))
        adamw.zero_grad()
        loss = native.loss(*inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        adamw.step()
        np.testing.assert_allclose(losses[i], loss.item(), rtol=1e-4, err_msg=f"step {i}")
    assert losses[-1] < 0.98 * losses[0]
    compared = 0
    for tensor in original_table(scanned.config):
        if tensor.name not in parameters:
            continue
        ours = original_tensor(tensor, state.trainable) - before[tensor.name]
        theirs = parameters[tensor.name].detach().numpy() - before[tensor.name]
        assert np.linalg.norm(ours - theirs) <= 0.01 * np.linalg.norm(theirs), tensor.name
        compared += 1
    assert compared == len(parameters) > 0


def native_inputs(model, name: str, goldens):
    """The arguments of `NativeModel.loss` for a case."""
    from helpers import torch_native
    from helpers.native_cases import native_media

    batch = case_sample(model, name).batch
    ids, answer = batch.tokens[0, : batch.lengths[0]], len(goldens[f"{name}.answer_ids"])
    labels = np.where(np.arange(len(ids)) < len(ids) - answer, torch_native.IGNORED, ids)
    images, audios, adapter = native_media(CASES[name])
    return ids, labels, images, audios, adapter


@pytest.mark.slow
def test_dropout_is_of_the_adapters_alone(scanned, dropping, eight):
    """Drawn by the key: the same again with it, another with another; none where no row has an adapter."""
    trainable, frozen = split(scanned.variables, ADAPTERS, "trainable")

    @jax.jit
    def compute(trainable, frozen, batch, key):
        return gradients(supervised(dropping), trainable, frozen, batch, key)[1].loss

    loss = partial(compute, trainable, frozen)
    batch, keys = micro_batches(eight[0]), [dropout_key(i) for i in range(2)]
    one, again, other = loss(batch, keys[0]), loss(batch, keys[0]), loss(batch, keys[1])
    assert one == again != other
    assert abs(one / supervised_loss(scanned, eight[0]) - 1) > 1e-3
    text = micro_batches(sample(scanned, "<|user|>Hello<|end|><|assistant|>", "Hi.<|end|><|endoftext|>"))
    assert loss(text, keys[0]) == loss(text, keys[1])


@pytest.fixture(scope="module")
def dropping(scanned) -> Phi4MM:
    """The model with a dropout of a half."""
    config = scanned.config
    loras = {name: dataclasses.replace(lora, dropout=0.5) for name, lora in config.loras.items()}
    return Phi4MM(config.with_loras(loras), scanned.module.dtype)


@pytest.fixture(scope="module")
def spoken(scanned) -> TrainingBatch:
    """Two rows of text with the speech adapter."""
    one = sample(scanned, "<|user|>Which colour has it?<|end|><|assistant|>", "It is red.<|end|><|endoftext|>")
    other = sample(scanned, "<|user|>Which colour has it?<|end|><|assistant|>", "No.<|end|><|endoftext|>")
    both: Any = jax.tree.map(lambda a, b: np.concatenate([a, b]), one, other)
    return both._replace(batch=both.batch._replace(adapters=np.asarray([index_of("speech")] * 2, np.int32)))


@pytest.mark.slow
def test_each_step_and_micro_batch_drops_out_otherwise(scanned, dropping, spoken):
    """At learning rate 0 the losses of steps differ by their draws alone; without a key they are equal."""
    trainable, frozen = split(scanned.variables, ["lora_speech"], "trainable")
    optimizer = optax.sgd(0.0)

    @jax.jit
    def step(state, frozen, batches, key):
        return train_step(supervised(dropping), optimizer, state, frozen, batches, key)

    def losses(batches, key):
        state, first = step(initial_state(trainable, optimizer), frozen, batches, key)
        return float(first.loss), float(step(state, frozen, batches, key)[1].loss)

    nothing = spoken._replace(weights=np.zeros_like(spoken.weights))
    before, after = micro_batches(spoken, nothing), micro_batches(nothing, spoken)
    first, second = losses(before, dropout_key(0))
    assert abs(first - second) > 1e-3
    assert losses(before, dropout_key(0)) == (first, second)
    assert abs(losses(after, dropout_key(0))[0] - first) > 1e-3
    plain = losses(before, None)
    assert plain[0] == plain[1]
    assert abs(plain[0] - first) > 1e-3


def supervised_loss(model, batch: TrainingBatch) -> float:
    return float(jax.jit(supervised(model.module))(model.variables, {}, batch, None)[0])


def test_dropout_keeps_the_mean():
    x = jnp.ones((400, 1000))
    dropped = dropout(x, jax.random.key(0), 0.1)
    np.testing.assert_allclose(dropped.mean(), 1.0, atol=3e-3)
    np.testing.assert_allclose((dropped == 0).mean(), 0.1, atol=3e-3)


@pytest.mark.slow
def test_small_updates_of_a_bfloat16_model_are_not_lost(eight):
    """A learning rate below bfloat16's resolution moves the float32 masters."""
    model = phi4mm_jax.load(TINY, dtype="bfloat16", scan=True)
    trainable, frozen = split(model.variables, ["lora_speech"], "trainable")
    config = OptimizerConfig(learning_rate=1e-6, warmup_steps=0, weight_decay=0.0)
    optimizer = make_optimizer(config, STEPS, trainable)
    state = initial_state(trainable, optimizer)
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    batches = micro_batches(eight[0])
    step = jax.jit(lambda s, f, b: train_step(supervised(model.module), optimizer, s, f, b, None))
    after, metrics = step(state, frozen, batches)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), after.trainable, state.trainable)
    assert 0 < max(jax.tree.leaves(moved)) <= 1.05e-6  # float32 rounds the difference
    assert metrics.gradient_norm > 0


def test_learning_rate_schedules():
    rates: Any = make_lr_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_share=0.1), 100)
    np.testing.assert_allclose([rates(i) for i in (0, 5, 10, 55, 100)], [0, 0.5, 1.0, 0.55, 0.1], rtol=1e-6)
    for schedule, expected in (
        ("cosine", [0, 0.5, 1.0, 0.1 + 0.9 * 0.75, 0.55, 0.1]),
        ("constant", [0, 0.5, 1, 1, 1, 1]),
    ):
        config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_share=0.1, schedule=schedule)
        rates = make_lr_schedule(config, 100)
        np.testing.assert_allclose([rates(i) for i in (0, 5, 10, 40, 55, 100)], expected, rtol=1e-6)
    with pytest.raises(InputError, match=r"warmup_steps is 50, and the run has 20 steps"):
        make_lr_schedule(OptimizerConfig(warmup_steps=50), 20)


@pytest.mark.parametrize(
    ("steps", "rates"), [(1, [1.0]), (3, [0.0, 1.0, 0.5]), (20, [0.0, 0.25, 0.5, 0.75, 1.0, 0.9375])]
)
def test_a_share_of_the_steps_warms_up(steps, rates):
    """0.2 of them, rounded up as by transformers, but not all."""
    schedule: Any = make_lr_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=0.2), steps)
    np.testing.assert_allclose([schedule(i) for i in range(len(rates))], rates, rtol=1e-6)
    with pytest.raises(InputError, match=r"optimizer.warmup_steps is 1.0; .* a fraction below 1"):
        OptimizerConfig(warmup_steps=1.0)


@pytest.mark.torch
def test_gradients_are_clipped_before_the_moments_as_in_pytorch():
    """All of four steps but the second are clipped, which the moments of the later ones show."""
    import torch

    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.1, clip=1.0)
    start = np.asarray([1.0, -2.0, 3.0], np.float32)
    ours: Any = {"a": jnp.asarray(start)}
    optimizer = make_optimizer(config, 10, ours)
    state = optimizer.init(ours)
    theirs = torch.nn.Parameter(torch.tensor(start))
    adamw = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1)
    for scale in (10.0, 0.1, 3.0, 20.0):
        gradient = scale * np.asarray([1.0, -0.5, 0.2], np.float32)
        updates, state = optimizer.update({"a": jnp.asarray(gradient)}, state, ours)
        ours = optax.apply_updates(ours, updates)
        theirs.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        adamw.step()
    np.testing.assert_allclose(ours["a"], theirs.detach().numpy(), rtol=1e-5)


def test_metrics_of_a_step_by_hand():
    """Micro-batches of one and of three targets: means of all four; the norm is that before clipping."""

    def objective(trainable, frozen, batch, key):
        loss = jnp.sum(trainable["a"] * batch["x"])
        return loss, LossStats(loss, batch["weight"], -2.0 * batch["weight"], batch["correct"])

    batches = {"x": jnp.asarray([[8.0, 0.0], [4.0, 16.0]]), "weight": jnp.asarray([1.0, 3.0]),
               "correct": jnp.asarray([1.0, 0.0])}  # fmt: skip
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    state = initial_state({"a": jnp.asarray([1.0, 2.0])}, optimizer)
    after, metrics = train_step(objective, optimizer, state, {}, batches, None)
    np.testing.assert_allclose(metrics, [(8 + 4 + 32) / 4, 2.0, 1 / 4, 4.0, 5.0])  # gradients of 12 / 4 and 16 / 4
    np.testing.assert_allclose(after.trainable["a"], [1 - 3 / 5, 2 - 4 / 5], rtol=1e-6)
    assert after.step == 1


def test_weight_decay_by_patterns(scanned):
    trainable, _ = split(scanned.variables, ["params/audio_projector"], "trainable")
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=1.0, decay=["**", "!**/bias"])
    optimizer = make_optimizer(config, STEPS, trainable)
    nothing = jax.tree.map(jnp.zeros_like, trainable)
    updates, _ = optimizer.update(nothing, optimizer.init(trainable), trainable)
    flat: dict[Any, Any] = flatten_dict(trainable)
    for path, update in dict[Any, Any](flatten_dict(updates)).items():
        expected = 0.0 if path[-1] == "bias" else -0.1 * flat[path]
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-8)
    with pytest.raises(InputError, match=r"optimizer\.decay: the pattern 'lora_speech' matches no"):
        make_optimizer(OptimizerConfig(decay=["lora_speech"]), 100, trainable)


def test_biases_and_norms_are_not_decayed(scanned):
    """By the names of the original checkpoint, as transformers' Trainer tells them."""
    table = [tensor for tensor in original_table(scanned.config) if tensor.collection != UNUSED]
    paths = {part.path for tensor in table for part in tensor.parts}
    spared = {part.path for t in table if re.search(r"bias|norm[^.]*\.weight$", t.name) for part in t.parts}
    assert len(spared) > 50
    assert decayed_paths(OptimizerConfig(), paths) == paths - spared


@pytest.mark.parametrize("name", ["learning_rate", "warmup_steps", "schedule", "beta1", "eps", "weight_decay", "clip"])
def test_wrong_optimizer_settings(name):
    with pytest.raises(InputError, match=rf"optimizer\.{name} is"):
        OptimizerConfig(**{name: "steep" if name == "schedule" else -1})


# Operations.


def trained(name: str, size: int = 70):
    """Parameters of this name, so many in all."""
    collection, _, rest = name.partition("/")
    return {collection: {rest or "x": {"kernel": np.zeros(size)}}}


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v6e", 918e12), ("NVIDIA H100 80GB HBM3", 989e12),
     ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("TPU v50", None), ("cpu", None)],
)  # fmt: skip
def test_peaks_by_the_makers_data_sheets(monkeypatch, kind, peak):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    assert peak_flops() == peak


def text_batch(segments, targets: int) -> TrainingBatch:
    """A packed row; its first positions carry loss."""
    row = np.asarray([segments], np.int32)
    batch = Batch(row, (row > 0).sum(1), np.zeros(1, np.int32), np.full_like(row, -1), None, None, row)
    return TrainingBatch(batch, row, (np.arange(row.size) < targets).astype(np.float32)[None])


@pytest.mark.parametrize(
    ("name", "products"),  # of a weight and token, of a target and the head's weight, of an adapter's
    [("lora_speech", (2, 2, 3)), ("params/speech", (2, 2, 0)), ("params/decoder", (3, 3, 0))],
)
def test_operations_of_the_decoder_by_hand(tiny, name, products):
    """Samples of 4 and 6 tokens in a row of 12, of which 5 carry loss."""
    batch = text_batch([1] * 4 + [2] * 6 + [0] * 2, targets=5)
    layer = 96 * 16 * (6 + 2 + 2 + 6) + 3 * 96 * 160  # q, k, v, out; gate, up, down
    pairs = (4 * 4 + 6 * 6) / 2  # of a query and a key that it sees
    forward = 2 * 2 * 6 * 16 * 3 * pairs  # a score and a weighted value, by heads of 16, in 3 layers
    of_weight, of_head, of_adapter = products
    expected = 2 * (3 * layer * of_weight + 70 * of_adapter) * 10 + 3 * forward + 2 * 768 * 96 * 5 * of_head
    assert step_flops(tiny.config, trained(name), [batch]) == expected
    assert step_flops(tiny.config, trained(name), [batch, batch]) == 2 * expected
    reference = 2 * (3 * layer + 70 * (of_adapter > 0)) * 10 + forward + 2 * 768 * 96 * 5
    assert step_flops(tiny.config, trained(name), [batch], reference=True) == expected + reference


def matrix_products(function, *arguments) -> float:
    """Operations of the products of matrices and convolutions that are traced: of a loop, times its length."""

    def count(jaxpr) -> float:
        total = 0.0
        for equation in jaxpr.eqns:
            inner = [x for x in jax.tree.leaves(equation.params, is_leaf=is_jaxpr) if is_jaxpr(x)]
            times = equation.params["length"] if equation.primitive.name == "scan" else 1
            total += times * sum(count(getattr(x, "jaxpr", x)) for x in inner)
            if equation.primitive.name == "dot_general":
                (contracted, _), (shared, _) = equation.params["dimension_numbers"]
                one, other = (x.aval for x in equation.invars)
                is_sum = other.ndim == len(contracted) + len(shared)  # over rows: by a vector of ones
                size = np.prod([one.shape[i] for i in contracted])
                total += 0 if is_sum else 2 * equation.outvars[0].aval.size * size
            if equation.primitive.name == "conv_general_dilated":
                kernel = equation.invars[1].aval
                total += 2 * equation.outvars[0].aval.size * kernel.size / kernel.shape[-1]
        return total

    def is_jaxpr(x) -> bool:
        return hasattr(x, "eqns") or hasattr(x, "jaxpr")

    return float(count(jax.make_jaxpr(function)(*arguments).jaxpr))


def test_operations_of_the_encoders_are_those_traced(scanned):
    """Forward, of stacks without padding: two crops, and three chunks of 19 tokens."""
    crops, chunks, tokens = 2, 3, 19
    images = ImageStack(np.zeros((crops, 448, 448, 3), np.float32), np.ones((crops, 32, 32), bool))
    frames = np.zeros((chunks, 8 * (tokens + 1), 80), np.float32)
    whole = np.full(chunks, frames.shape[1])
    audio = AudioStack(frames, 0 * whole, whole, np.full(chunks, tokens), np.zeros(chunks, bool))
    nothing = text_batch([0], targets=0)

    def counted(images, audio):
        batch = nothing._replace(batch=nothing.batch._replace(images=images, audio=audio))
        return step_flops(scanned.config, trained("lora_speech"), [batch])

    def traced(method, *arguments):
        return matrix_products(lambda: scanned.module.apply(scanned.variables, *arguments, method=method))

    assert counted(None, None) == 0
    ours, theirs = counted(images, None), traced("encode_images", images)
    separators = 2 * 2 * (48 + 96) * 96  # which are projected beside the features
    assert ours == theirs - separators
    encoder = 2 * 16 * 16 * (2 * 20 + 10) + 2 * 10 * 16 * 32  # the stem, of a token
    encoder += 2 * 3 * (8 * 32 * 32 + 6 * 32 * 48 + 2 * 32 * tokens)  # three blocks
    projector = 2 * (32 + 96) * 96
    halo = 1  # a token before each chunk, which the stem makes as well
    assert counted(None, audio) == chunks * tokens * (encoder + projector)
    stem = 2 * 16 * 16 * (2 * 20 + 10) + 2 * 10 * 16 * 32
    branches = 4  # of which one is taken: a projector, the other, or both
    assert traced("encode_audio", audio) == chunks * (tokens * (encoder + branches * projector) + halo * stem)


def test_operations_of_what_is_trained_before_the_decoder(scanned):
    """An encoder that is trained costs three products each; its projector then two, or three where it is trained.

    A reference runs them again, unless nothing of them is trained.
    """
    frames = np.zeros((1, 16, 80), np.float32)
    audio = AudioStack(frames, np.zeros(1, int), np.full(1, 16), np.ones(1, int), np.zeros(1, bool))
    nothing = text_batch([0], targets=0)
    batch = nothing._replace(batch=nothing.batch._replace(audio=audio))
    projector = 2 * (32 + 96) * 96
    encoder = step_flops(scanned.config, trained("lora_speech"), [batch]) - projector
    for name, expected, reference in (
        ("params/speech", 3 * encoder + 2 * projector, encoder + projector),
        ("params/audio_projector", encoder + 3 * projector, projector),
        ("params/vision", encoder + projector, 0),
    ):
        assert step_flops(scanned.config, trained(name), [batch]) == expected, name
        assert step_flops(scanned.config, trained(name), [batch], reference=True) == expected + reference, name


# At full size.


@pytest.mark.tpu_compile
@pytest.mark.parametrize(("topology", "option"), [("v5e:2x2", "einsum"), ("v6e:2x2", "vmem")])
def test_options_of_a_chip_are_known_to_its_compiler(topology, option):
    """A wrong name is an error, of libtpu, where the step is compiled for TPUs only."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    options = compiler_options(device)
    assert options is not None
    assert any(option in name for name in options)
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=SingleDeviceSharding(device))
    lowered = jax.jit(lambda x: x @ x).lower(x)
    lowered.compile(compiler_options=options)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options=options | {"xla_tpu_of_no_name": "true"})


@pytest.mark.slow
@pytest.mark.tpu_compile
def test_tuning_the_speech_adapter_fits_eight_chips():
    """Compiled by the TPU's compiler, without one: what a chip holds, gathers and sums, and the estimated time."""
    case = COMPILED["speech adapter"]
    config = Phi4MMConfig.from_dict(json.loads((FIXTURES / "ms_release_config.json").read_text()))
    compiled = compile_step(case, config)
    assert hbm_gib(compiled) < 12.0
    text = compiled.as_text()
    assert text is not None
    assert "phi4mm_flash" in text
    assert not re.search(r"\[200064,3072\]|\[3072,200064\]", text), "a chip holds the whole embedding"
    found = cost(text, CHIPS["v5e"])
    # Each of the decoder's weights is gathered twice (8.0 GB each time) and each of the encoder's once, no activation
    # is summed over the chips but in the loss, and the gradients are summed once.
    assert 14e9 < found.bytes["all-gather"] < 18e9
    assert found.bytes["all-reduce"] < 0.6e9
    assert found.bytes["reduce-scatter"] < 2e9
    weights = [line for line in text.splitlines() if " all-gather(" in line and "sharding_constraint" in line]
    largest = max(num_bytes(line.split(" all-gather(")[0]) for line in weights)
    assert largest <= 2 * 8192 * 3072, "more than one layer's weight is gathered at a time"
    assert case_flops(case, config) / 8 / CHIPS["v5e"].peak / found.seconds > 0.5


# Preferences.


@pytest.mark.slow
def test_dpo_is_its_formula(scanned, eight):
    """The loss and its gradients are those of its formula, by whole logits; nothing of it moves the reference."""
    rows = together(eight, scanned)
    trainable, frozen = split(scanned.variables, ["lora_speech"], "trainable")
    reference = jax.tree.map(lambda x: x * 0.9, trainable)
    config = DPOConfig(beta=0.5, label_smoothing=0.1)
    found, sums = jax.jit(lambda t, f, b: gradients(preference(scanned.module, config), t, f, b, None))(
        trainable, frozen | {REFERENCE: reference}, micro_batches(rows)
    )

    def by_formula(trainable, reference, frozen):
        def log_probabilities(own):
            logits = jax.nn.log_softmax(scanned.module.apply(join(own, frozen), rows.batch))
            each = jnp.take_along_axis(logits, rows.targets[..., None], -1)[..., 0] * rows.weights
            return each.sum(1)

        gains = log_probabilities(trainable) - log_probabilities(reference)
        margins = 0.5 * (gains[0::2] - gains[1::2])
        losses = 0.9 * jnp.log1p(jnp.exp(-margins)) + 0.1 * jnp.log1p(jnp.exp(margins))
        return losses.mean(), margins

    compute = jax.jit(jax.value_and_grad(by_formula, has_aux=True))
    (loss, margins), expected = compute(trainable, reference, frozen)
    assert sums.weight == 4
    np.testing.assert_allclose(sums.loss / 4, loss, rtol=1e-5)
    np.testing.assert_allclose(sums.correct, (margins > 0).sum())
    assert relative(found, expected) <= 1e-4


def test_pairs_without_targets_do_not_count(scanned, monkeypatch):
    """By hand: the first pair gains 1 and 0, and the second one is a bad sample's place."""
    monkeypatch.setattr(dpo, "answer_log_probability", lambda model, trainable, *_: trainable["log_probability"])
    policy, reference = jnp.asarray([-1.0, -2.0, -3.0, -9.0]), jnp.asarray([-2.0, -2.0, -3.0, -3.0])
    weights = np.float32([[0, 1], [1, 1], [0, 0], [0, 0]])
    total, sums = preference(scanned.module, DPOConfig(beta=0.5))(
        {"log_probability": policy}, {REFERENCE: {"log_probability": reference}},
        TrainingBatch(None, None, weights), None,
    )  # fmt: skip
    np.testing.assert_allclose((total, sums.loss), np.log1p(np.exp(-0.5)), rtol=1e-6)
    assert (sums.weight, sums.correct, sums.log_probability) == (1.0, 1.0, 0.5)


def test_dpo_reference_does_not_drop_out(scanned, dropping, spoken):
    """Begun as the reference, the policy that drops out is another: the margin is that of the undropped reference."""
    trainable, frozen = split(scanned.variables, ["lora_speech"], "trainable")
    known, key = frozen | {REFERENCE: trainable}, dropout_key(0)
    objective = preference(dropping, DPOConfig(beta=0.5))
    (loss, sums), policy = jax.jit(
        lambda: (
            objective(trainable, known, spoken, key),
            answer_log_probability(dropping, trainable, frozen, spoken, key),
        )
    )()
    logits = scanned.logits(spoken.batch)  # of a model without dropout
    each = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), spoken.targets[..., None], -1)[..., 0]
    reference = (each * spoken.weights).sum(1)
    assert np.abs(policy - reference).min() > 1e-2
    gains = np.asarray(policy) - reference
    margin = 0.5 * (gains[0] - gains[1])
    np.testing.assert_allclose(sums.log_probability, margin, atol=1e-4)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-margin)), atol=1e-4)
    assert abs(float(loss) - np.log(2)) > 1e-3


@pytest.mark.slow
def test_dpo_raises_what_is_chosen(scanned, eight):
    rows = together(eight, scanned)
    trainable, frozen = split(scanned.variables, ["lora_speech"], "trainable")
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0), STEPS, trainable)
    objective = preference(scanned.module, DPOConfig())
    state = initial_state(trainable, optimizer)
    known = frozen | {REFERENCE: trainable}
    compute = jax.jit(lambda s, k, b: train_step(objective, optimizer, s, k, b, None))
    step = partial(compute, k=known, b=micro_batches(rows))
    state, first = step(state)
    np.testing.assert_allclose(first.loss, np.log(2), rtol=0.05)
    last = first
    for _ in range(STEPS - 1):
        state, last = step(state)
    assert last.loss < 0.5 * first.loss
    assert last.accuracy == 1.0
    compute = jax.jit(lambda t, f, b: answer_log_probability(scanned.module, t, f, b, None))
    before, after = (compute(t, frozen, rows) for t in (trainable, state.trainable))
    gains = np.asarray(after - before)
    assert (gains[0::2] > gains[1::2]).all()


def test_metrics_are_strict_json(tmp_path):
    """A loss that is NaN is null there, and NaN again where it is read."""
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": float("nan"), "targets": 3.0})
    log.close()
    (path,) = tmp_path.glob("*.jsonl")
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"step": 1, "loss": None, "targets": 3.0}
    (line,) = read_log(tmp_path)
    assert np.isnan(line["loss"])
