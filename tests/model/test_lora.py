"""Adapters' dropout: a hash of the key and of a value's place."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi4mm_jax.config import LoraConfig
from phi4mm_jax.mesh import make_mesh
from phi4mm_jax.model.lora import Projection, dropout

RATE = 0.1


def mask(seed: int, *shape: int) -> np.ndarray:
    """Which values are zeroed."""
    dropped = np.asarray(dropout(jnp.ones(shape), jax.random.key(seed), RATE))
    np.testing.assert_allclose(dropped[dropped != 0], 1 / (1 - RATE), rtol=1e-6)
    return dropped == 0


def test_dropout_meets_its_rate_in_every_row_and_column():
    """Within five standard deviations of independent draws."""
    dropped = mask(0, 4, 500, 2000).reshape(-1, 2000)
    for axis, count in ((0, 2000), (1, 2000)):
        deviation = np.sqrt(RATE * (1 - RATE) / count)
        assert np.abs(dropped.mean(axis) - RATE).max() < 5 * deviation
    assert abs(dropped.mean() - RATE) < 5 * np.sqrt(RATE * (1 - RATE) / dropped.size)


def test_dropout_is_independent_of_rows_columns_and_keys():
    """Two rows, two columns, neighbours and two keys' draws have no correlation beyond chance."""
    one, other = mask(0, 1000, 1000), mask(1, 1000, 1000)

    def correlation(a, b):
        return abs(np.corrcoef(a.ravel(), b.ravel())[0, 1])

    chance = 5 / np.sqrt(one.size)
    assert correlation(one, other) < chance
    for rows, columns in ((1, 0), (0, 1), (1, 1), (64, 0), (0, 128)):
        assert correlation(one[rows:, columns:], one[: 1000 - rows, : 1000 - columns]) < chance
    between_rows = np.corrcoef(one[:300])[np.triu_indices(300, 1)]
    between_columns = np.corrcoef(one[:, :300].T)[np.triu_indices(300, 1)]
    for found in (between_rows, between_columns):
        assert np.abs(found).max() < 6 / np.sqrt(1000)
        assert found.std() == pytest.approx(1 / np.sqrt(1000), rel=0.05)


@pytest.mark.parametrize("spec", [("fsdp",), (None, "fsdp"), (None, None, ("fsdp", "tensor"))], ids=str)
def test_dropout_is_the_same_however_the_array_lies_on_a_mesh(spec):
    x = jax.random.normal(jax.random.key(2), (8, 16, 64))
    mesh = make_mesh(4, 2)
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(*spec)))
    expected = dropout(x, jax.random.key(0), RATE)
    found = jax.jit(dropout, static_argnums=2)(spread, jax.random.key(0), RATE)
    np.testing.assert_array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("alpha", [8.0, 12 * 3**0.5])  # of rank 3; the second as rsLoRA's 12 / sqrt(3)
def test_a_scale_that_bfloat16_lacks_is_not_rounded_to_it(alpha):
    """Output and gradient of x in bfloat16 are off by roundings of their values alone, whose mean is zero."""
    rng = np.random.default_rng(1)
    lora = LoraConfig(rank=3, alpha=alpha, dropout=0.0)
    x, a, b, d_out = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 512, 12), (12, 3), (3, 40), (2, 512, 40))
    )
    variables = {"params": {"up": jnp.zeros((12, 40), x.dtype)}, "lora_speech": {"a": a, "up": b}}
    projection = Projection("D", {"up": "F"}, {"D": 12, "F": 40}, {"lora_speech": lora})

    def apply(x) -> Any:
        return projection.apply(variables, x, {"lora_speech": jnp.full(2, lora.scale)})

    (out,), pull = jax.vjp(apply, x)
    wide = [np.asarray(values, np.float64) for values in (x, a, b, d_out)]
    expected = wide[0] @ wide[1] @ wide[2], wide[3] @ wide[2].T @ wide[1].T
    for found, product in zip((out, *pull((d_out,))), expected, strict=True):
        scale = (np.asarray(found, np.float64) * product).sum() / np.square(product).sum()  # the least squares'
        assert scale == pytest.approx(alpha / 3, rel=4e-4)


@pytest.mark.torch
def test_dropout_comes_before_the_down_projection_as_in_peft():
    """With the same draws, which powers of two in A make visible: y = x W + (alpha / r) drop(x) A B."""
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    class Mask(torch.nn.Module):
        """Dropout whose draws are given."""

        def __init__(self, kept: np.ndarray, rate: float):
            super().__init__()
            self.factor = torch.tensor(kept / (1 - rate), dtype=torch.float32)

        def forward(self, x):
            return x * self.factor

    rate, inputs, outputs, rank = 0.5, 12, 7, 3
    lora = LoraConfig(rank=rank, alpha=6.0, dropout=rate)
    sizes = {"D": inputs, "F": outputs}
    projection = Projection("D", {"up": "F"}, sizes, {"lora_speech": lora})
    rng = np.random.default_rng(0)
    w, a, b = (
        rng.normal(size=shape).astype(np.float32) for shape in ((inputs, outputs), (inputs, rank), (rank, outputs))
    )

    def apply(x, w, a, b):
        variables = jax.tree.map(jnp.asarray, {"params": {"up": w}, "lora_speech": {"a": a, "up": b}})
        scales = {"lora_speech": jnp.full(2, lora.scale)}
        found: Any = projection.apply(variables, jnp.asarray(x), scales, rngs={"dropout": jax.random.key(3)})
        return np.asarray(found[0])

    powers, one = np.zeros((inputs, rank), np.float32), np.zeros((rank, outputs), np.float32)
    powers[:, 0], one[0, 0] = 2.0 ** np.arange(inputs), 1.0
    seen = apply(np.ones((2, 5, inputs), np.float32), np.zeros_like(w), powers, one)[..., 0]
    digits = (seen * (1 - rate) / lora.scale).astype(int)
    kept = digits[..., None] >> np.arange(inputs) & 1
    assert 0.3 < kept.mean() < 0.7
    assert len({tuple(row) for row in kept.reshape(10, -1)}) == 10

    module = torch.nn.ModuleDict({"up": torch.nn.Linear(inputs, outputs, bias=False)})
    config = PeftConfig(r=rank, lora_alpha=lora.alpha, lora_dropout=rate, target_modules=["up"])
    layer: Any = inject_adapter_in_model(config, module).get_submodule("up")
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor(w.T))
        layer.lora_A["default"].weight.copy_(torch.tensor(a.T))
        layer.lora_B["default"].weight.copy_(torch.tensor(b.T))
    layer.lora_dropout["default"] = Mask(kept, rate)
    x = rng.normal(size=(2, 5, inputs)).astype(np.float32)
    np.testing.assert_allclose(apply(x, w, a, b), layer.train()(torch.tensor(x)).detach().numpy(), atol=1e-5)
