"""Adapters' dropout: a hash of the key and of a value's place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi4mm_jax.model.lora import dropout
from phi4mm_jax.sharding import make_mesh

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
