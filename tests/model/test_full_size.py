"""The published model's configuration: parameter counts and shapes, without taking memory."""

import json
import math

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from helpers.paths import FIXTURES

from phi4mm_jax.checkpoint.layouts.original import original_table
from phi4mm_jax.checkpoint.tensor_types import UNUSED
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.mesh import LOGICAL_AXES
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.phi4mm import abstract_batch, abstract_variables

RELEASE = json.loads((FIXTURES / "ms_release_config.json").read_text())


@pytest.fixture(scope="module")
def model() -> Phi4MM:
    return Phi4MM(Phi4MMConfig.from_dict(RELEASE))


@pytest.fixture(scope="module")
def variables(model):
    return abstract_variables(model)


def count(tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def test_parameter_counts(variables):
    sizes = nn.unbox(variables)
    assert count(sizes["params"]["decoder"]) == 3_836_021_760
    assert count(sizes["lora_vision"]) == 369_098_752
    assert count(sizes["lora_speech"]) == 461_373_440
    assert count(sizes["params"]["vision"]) == 398_085_280  # 26 layers; the files hold 27 and a pooling head
    assert count(sizes["params"]["speech"]) == 441_238_304


def test_the_table_fills_every_parameter(model, variables):
    table = original_table(model.config)
    used = [tensor for tensor in table if tensor.collection != UNUSED]
    assert count(nn.unbox(variables)) == sum(math.prod(part.view) for tensor in used for part in tensor.parts)
    files = sum(math.prod(t.shape) for t in table)
    assert 5.5e9 < files < 5.7e9


def test_output_shapes(model, variables):
    batch = abstract_batch(model.config, batch=2, length=48, crops=3, chunks=2)
    logits = jax.eval_shape(model.apply, nn.unbox(variables), batch)
    assert (logits.shape, logits.dtype) == ((2, 48, 200_064), jnp.float32)
    features = jax.eval_shape(
        lambda v, b: model.apply(v, b.images, b.audio, method="encode"), nn.unbox(variables), batch
    )
    assert (features.shape, features.dtype) == ((3 * 256 + 2 + 2 * 4, 3072), jnp.bfloat16)


def test_every_parameter_has_its_logical_axes(variables):
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
        assert isinstance(leaf, nn.Partitioned), path
        assert len(leaf.names) == leaf.value.ndim, path
        named = [n for n in leaf.names if n is not None]
        assert len(set(named)) == len(named), path  # an axis can be split once
        assert set(named) <= {*LOGICAL_AXES.values(), "layers"}, path
