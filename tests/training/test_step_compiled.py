"""The training step, compiled by the TPU's compiler without a TPU: what a device sends."""

import re
from collections import Counter
from typing import Any

import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from helpers.paths import FIXTURES

from phi4mm_jax.config import Phi4MMConfig, read_json
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.phi4mm import abstract_variables
from phi4mm_jax.testing.compiled import COLLECTIVES, num_bytes, parse_module
from phi4mm_jax.testing.recipe_steps import compile_recipe
from phi4mm_jax.testing.training_steps import Case, chips_of, compile_step
from phi4mm_jax.training.recipe import load_recipe
from train.dpo import DPO

pytestmark = [pytest.mark.slow, pytest.mark.tpu_compile]

ROWS, LENGTH, WIDTH, MLP = 4, 1280, 768, 1024
MESHES = ["fsdp=2,context=2"]  # fsdp alone is in test_step.py


@pytest.fixture(scope="module", params=MESHES)
def sent(request):
    """Collectives of a step of a decoder of two layers, narrower than the release's, but for those of the loss."""
    sizes = {
        "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }  # fmt: skip
    config = Phi4MMConfig.from_dict(read_json(FIXTURES / "ms_release_config.json") | sizes)
    case = Case("v5e:2x2", ["params/decoder"], "attention", ROWS, LENGTH, mesh=request.param)
    computations, _ = parse_module(str(compile_step(case, config).as_text()))
    every = [x for instructions in computations.values() for x in instructions]
    found = [x for x in every if x.op.removesuffix("-start") in COLLECTIVES and "(loss)" not in x.origin]
    assert any("all-gather" in x.op for x in found), "the weights are gathered where they are used"
    return found


def test_no_keys_or_values_are_gathered(sent):
    """Nor their gradients: the tokens of a row, or of its half, by a head's 128 values, stay or go around in a ring."""
    of_heads = [x for x in sent if re.search(rf"\[[\d,]*\b({LENGTH}|{LENGTH // 2})\b[\d,]*,128\]", x.type)]
    assert [x.text for x in of_heads if "collective-permute" not in x.op] == []


def test_no_more_than_one_weight_is_gathered_at_a_time(sent):
    """In the layers nothing else is gathered; around them, activations are for the embedding and its gradient."""
    gathered = [x for x in sent if "all-gather" in x.op and "/layers/" in x.origin]
    assert [x.text for x in gathered if "sharding_constraint" not in x.origin] == []
    assert max(num_bytes(x.type) / (2 if x.op.endswith("-start") else 1) for x in gathered) <= 2 * WIDTH * MLP


def test_no_activations_of_the_whole_batch_are_summed_in_float32(sent):
    sums = [x for x in sent if "reduce" in x.op and "f32" in x.type]
    assert [x.text for x in sums if num_bytes(x.type) >= 4 * ROWS * LENGTH * WIDTH] == []


def test_a_recipe_is_compiled_with_all_that_its_step_holds():
    """Preferences: the adapter's float32 masters and moments, its reference and the decoder in bfloat16, a batch."""
    sizes = {
        "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }  # fmt: skip
    config = Phi4MMConfig.from_dict(read_json(FIXTURES / "ms_release_config.json") | sizes)
    recipe = load_recipe("dpo", ["data.packing={rows: 8, lengths: [512], pack: false}", "accumulate=2"])
    compiled = compile_recipe(recipe, DPO.objective, DPO.add_reference_params, config, chips_of("v5e:2x2"))
    variables: Any = flatten_dict(nn.unbox(abstract_variables(Phi4MM(config))))
    counts = Counter()
    for path, x in variables.items():
        counts[path[0] if path[0] != "params" else path[1]] += x.size
    batch = 2 * 4 * 4 * 8 * 512  # of each token itself, its media, target and weight
    expected = ((12 + 2) * counts["lora_vision"] + 2 * counts["decoder"] + batch) / 4
    memory: Any = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(expected, rel=0.01)
