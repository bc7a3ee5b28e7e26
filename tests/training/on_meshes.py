"""The training step on meshes of eight devices: what it computes is what one device computes.

Run by test_meshes.py, in a process with more threads.
"""

import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers.norms import norm
from helpers.paths import TINY

import phi4mm_jax
from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.checkpoint.random import write_random_checkpoint
from phi4mm_jax.mesh import jit_on_mesh, make_mesh, mesh_of_sizes, parse_mesh, shardings, split_batch
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.phi4mm import abstract_variables
from phi4mm_jax.training.optimizer import make_optimizer
from phi4mm_jax.training.param_filter import join, split
from phi4mm_jax.training.recipe import AUTO, load_recipe
from phi4mm_jax.training.sharding import compile_step, init_train_state, shard_batches
from phi4mm_jax.training.step import dropout_key, gradients, supervised
from train.dpo import DPO
from train.sft import SFT

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile, not to run
MESHES = [  # data, fsdp, context, tensor, rows
    *[(8, 1, 1, 1, 8), (1, 8, 1, 1, 8), (1, 1, 8, 1, 8), (1, 1, 1, 8, 8)],  # each axis alone
    *[(2, 2, 2, 1, 8), (2, 2, 1, 2, 8), (2, 1, 2, 2, 8), (1, 2, 2, 2, 8)],  # each three, and so each two
]
FEW_ROWS = [(1, 8, 1, 1, 3), (2, 2, 2, 1, 3)]
TRAINED = ["**", "!params/speech/mean", "!params/speech/inverse_deviation"]
RECIPES = Path(__file__).parents[2] / "train" / "recipes"
DISTINCT = (  # the others train fewer of the same parameters; test_runs.py has all recipes
    "dpo", "speech_adapter", "speech_encoder", "text", "vision_adapter", "vision_speech", "vision_stage_1",
    "vision_stage_4",
)  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A model of two layers in each stack, whose key heads eight devices can share."""
    folder = tmp_path_factory.mktemp("small")
    config = json.loads((TINY / "config.json").read_text())
    config |= {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2}
    config["img_processor"] |= {"image_size": 112, "num_hidden_layers": 3}
    config["embd_layer"]["image_embd_layer"]["crop_size"] = 112
    config["audio_processor"]["config"]["num_blocks"] = 2
    for adapter in ("vision_lora", "speech_lora"):
        config[adapter]["dp"] = 0.05
    (folder / "config.json").write_text(json.dumps(config))
    write_random_checkpoint(folder / "config.json", folder / "checkpoint", TINY)
    return phi4mm_jax.load(folder / "checkpoint", dtype="float32", scan=True)


@pytest.fixture(scope="module")
def samples(alone):
    """Return eight rows of different lengths, of the media asked for: text, images, clips, and both in one."""

    @cache
    def of_media(with_images: bool, with_clips: bool) -> TrainingBatch:
        draw = np.random.default_rng(0)
        image = draw.integers(0, 255, (112, 112, 3), np.uint8)
        clip = draw.standard_normal(12000).astype(np.float32) / 10, 16000
        prompts, images, clips = [], [], []
        for row in range(8):
            image_here, clip_here = with_images and row % 2 == 1, with_clips and row % 4 in (2, 3)
            media = "<|image_1|>" * image_here + "<|audio_1|>" * clip_here
            prompts.append(f"<|user|>{media}{'Name it. ' * (row % 3)}<|end|><|assistant|>{'Ssh' * (8 - row)}<|end|>")
            images.append([image] * image_here)
            clips.append([clip] * clip_here)
        batch = alone.process(prompts, images, clips)
        weights = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None] - 1
        return TrainingBatch(batch, np.roll(batch.tokens, -1, 1), weights.astype(np.float32))

    return of_media


def rows_of(samples, rows):
    """Some of the samples, with the media of all."""
    inner = samples.batch
    some = {name: getattr(inner, name)[rows] for name in ("tokens", "lengths", "adapters", "media")}
    return TrainingBatch(inner._replace(**some), samples.targets[rows], samples.weights[rows])


@pytest.fixture(scope="module")
def on_mesh(alone):
    """Put the model's variables on a mesh, from the host: nothing is compiled to cut them."""
    abstract, flat = abstract_variables(alone.module), flatten_dict(jax.device_get(alone.variables))

    def spread(mesh):
        places = shardings(abstract, mesh)
        return unflatten_dict({path: jax.device_put(x, places[path]) for path, x in flat.items()})

    return spread


def program_of(module, variables):
    """Return what computes gradients, sums of the loss, and the logits at the tokens that there are, of samples."""
    trainable, frozen = split(variables, TRAINED, "trainable")

    def objective(trainable, frozen, batch, key):
        seen = []

        class Watched(Phi4MM):
            def apply(self, *arguments, **named):
                seen.append(module.apply(*arguments, **named))
                return seen[-1]

        watched = Watched(module.config, module.dtype, scan=module.scan)
        total, stats = supervised(watched)(trainable, frozen, batch, key)
        with split_batch():
            logits = module.apply(join(trainable, frozen), seen[0], method="logits")
        return total, stats._replace(correct=(stats.correct, logits))

    def program(trainable, frozen, batch):
        return gradients(objective, trainable, frozen, jax.tree.map(lambda x: x[None], batch), None)

    compiled = jit_on_mesh(trainable, program, compiler_options=QUICK)

    def compute(samples):
        found, sums = compiled(trainable, frozen, samples)
        alike = jax.tree.map(lambda g, p: g.sharding.is_equivalent_to(p.sharding, p.ndim), found, trainable)
        assert all(jax.tree.leaves(alike)), "a gradient does not lie as its parameter does"
        found, sums = jax.device_get((found, sums))
        correct, logits = sums.correct
        return found, sums._replace(correct=correct), logits[samples.weights > 0]

    return compute


def assert_close(found, expected, tolerance):
    """Each leaf relative to its norm, or to a thousandth of that of all, where it is smaller."""
    whole = norm(expected)
    leaves = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, ours), theirs in leaves:
        bound = tolerance * max(float(np.linalg.norm(theirs)), 1e-3 * whole)
        assert np.linalg.norm(ours - theirs) <= bound, jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def of_one_device(alone, samples):
    """Compute some rows by the program of all, the others of which weigh nothing."""
    compute, everything = program_of(alone.module, alone.variables), samples(True, True)

    @cache
    def of_rows(rows):
        return compute(everything._replace(weights=everything.weights * (np.arange(8) < rows)[:, None]))

    return of_rows


@pytest.mark.parametrize(("data", "fsdp", "context", "tensor", "rows"), [*MESHES, *FEW_ROWS])
def test_loss_gradients_and_logits_on_a_mesh(alone, samples, on_mesh, of_one_device, data, fsdp, context, tensor, rows):
    """Of ragged rows of all media; three rows are fewer than the devices that would share them."""
    variables = on_mesh(make_mesh(fsdp, tensor, data=data, context=context))
    found, sums, logits = program_of(alone.module, variables)(rows_of(samples(True, True), slice(rows)))
    expected, expected_sums, expected_logits = of_one_device(rows)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-4)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(logits.argmax(-1), expected_logits.argmax(-1))
    assert_close(found, expected, 1e-4)


@pytest.fixture(scope="module")
def one_device_step(alone):
    """Compute a step by hand on one device; gradients of all parameters are compiled once for each set of media."""

    @cache
    def differentiate(method, loss, dpo):
        config = SimpleNamespace(loss=loss, dpo=dpo)
        return jax.jit(jax.grad(method.objective(alone.module, config), has_aux=True), compiler_options=QUICK)

    def step(method, recipe, batches, trained, optimizer):
        everything, frozen = split(alone.variables, TRAINED, "trainable")
        frozen = method.add_reference_params(frozen, everything)
        key = jax.random.fold_in(dropout_key(recipe.seed), 0)
        differentiated = differentiate(method, recipe.loss, recipe.dpo)
        parts = [
            differentiated(everything, frozen, batch, jax.random.fold_in(key, i)) for i, batch in enumerate(batches)
        ]
        loss, weight = (sum(float(getattr(sums, name)) for _, sums in parts) for name in ("loss", "weight"))
        sums: Any = [flatten_dict(found) for found, _ in parts]
        before = flatten_dict(trained)
        found = unflatten_dict({path: sum(part[path] for part in sums) / weight for path in before})
        update, state = jax.jit(optimizer.update, compiler_options=QUICK)(found, optimizer.init(trained), trained)
        return loss / weight, optax.tree.norm(found), optax.tree.get(state, "mu"), update

    return step


@pytest.mark.parametrize("name", DISTINCT)
def test_a_step_of_a_recipe_is_that_of_one_device(alone, samples, on_mesh, one_device_step, monkeypatch, name):
    """On its own mesh, of which sixteen devices are eight here: the moments, and the update without warm-up."""
    monkeypatch.setattr("phi4mm_jax.training.sharding.compiler_options", lambda *_: QUICK)
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    trained = ("lora_speech",) if recipe.trainable == AUTO else recipe.trainable
    sizes = parse_mesh(recipe.mesh or "fsdp=8")
    sizes["fsdp"] = sizes["fsdp"] * 8 // math.prod(sizes.values())
    method = DPO if recipe.data.kind == "preferences" else SFT
    packing = recipe.data.packing  # None is auto
    asked = [*trained, *(["vision"] if packing and packing.crops else [])]
    asked += ["audio"] if packing and packing.chunks else []
    media = (any(re.search(kind, pattern) for pattern in asked) for kind in ("vision|image", "speech|audio"))
    mixed = samples(*media)
    orders = [np.roll(np.arange(8), turn) for turn in range(recipe.accumulate)]
    batches = [rows_of(mixed, order) for order in orders]
    module = Phi4MM(alone.config, alone.module.dtype, remat=recipe.remat)
    mesh = mesh_of_sizes(sizes)
    trainable, frozen = split(on_mesh(mesh), trained, "trainable")
    before = jax.device_get(trainable)
    optimizer = make_optimizer(replace(recipe.optimizer, warmup_steps=0), 10, trainable)
    expected_loss, expected_norm, expected_moments, expected_update = jax.device_get(
        one_device_step(method, recipe, batches, before, optimizer)
    )

    frozen = method.add_reference_params(frozen, trainable)
    state = init_train_state(trainable, optimizer, mesh)
    run = compile_step(method.objective(module, recipe), optimizer, state)
    state, metrics = run(state, frozen, shard_batches(batches, mesh), dropout_key(recipe.seed))
    after, moments = jax.device_get((state.trainable, optax.tree.get(state.optimizer, "mu")))
    np.testing.assert_allclose([metrics.loss, metrics.gradient_norm], [expected_loss, expected_norm], rtol=1e-4)
    assert_close(moments, expected_moments, 1e-4)
    difference = jax.tree.map(lambda a, b, update: a - b - update, after, before, expected_update)
    assert norm(difference) <= 1e-3 * norm(expected_update)
