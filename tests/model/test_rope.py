"""The rotation of queries and keys."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from phi4mm_jax.model.rope import rotate, widen


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("half", [48, 64, 3])
def test_rotation_is_that_of_complex_numbers(dtype, half):
    """By complex numbers in float64: (a + bi) (cos + i sin) of each pair; the other dimensions pass untouched."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, 5, 3, 128)).astype(dtype)
    angles = generator.uniform(0, 100, (2, 5, half)).astype(np.float32)
    cos, sin = np.cos(angles) * np.float32(1.19), np.sin(angles) * np.float32(1.19)
    found = np.asarray(rotate(jnp.asarray(x), *widen(jnp.asarray(cos), jnp.asarray(sin), 128), half))
    assert found.dtype == dtype
    wide = x.astype(np.float64)
    turned = (wide[..., :half] + 1j * wide[..., half : 2 * half]) * (cos + 1j * sin.astype(np.float64))[:, :, None]
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(
        found[..., : 2 * half].astype(np.float64), expected, rtol=2e-2 if dtype != np.float32 else 1e-5, atol=1e-6
        if dtype == np.float32 else 2e-2,
    )  # fmt: skip
    np.testing.assert_array_equal(found[..., 2 * half :], x[..., 2 * half :])
