"""Attention of rows whose tokens are spread over devices: as if each row were on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from phi4mm_jax.errors import InputError
from phi4mm_jax.kernels.ring import from_zigzag, ring_attention, to_zigzag, zigzag_order
from phi4mm_jax.mesh import make_mesh, split_batch

BATCH, LENGTH, HEADS, KV_HEADS, SIZE = 2, 64, 4, 2, 16


def plain(q, k, v, segments):
    """Causal attention within segments, all scores at once."""
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, 2) for x in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * SIZE**-0.5
    allowed = (segments[:, :, None] == segments[:, None]) & np.tri(LENGTH, dtype=bool)
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf), -1), v)


def ring(q, k, v, segments):
    with split_batch():
        return ring_attention(q, k, v, segments)


@pytest.mark.parametrize(("fsdp", "context", "tensor"), [(2, 2, 2), (2, 4, 1), (1, 8, 1)])
def test_values_and_gradients_on_a_mesh(fsdp, context, tensor):
    """Of packed samples that begin and end anywhere; no device has another's keys all at once."""
    mesh = make_mesh(fsdp, tensor, context=context)
    draw = np.random.default_rng(context)
    q, k, v, weights = (
        jnp.asarray(draw.standard_normal((BATCH, LENGTH, heads, SIZE)), jnp.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    segments = jnp.asarray(np.sort(draw.integers(0, 4, (BATCH, LENGTH)), 1), jnp.int32)

    def value_and_gradients(attention):
        def loss(q, k, v, segments, weights):
            out = attention(q, k, v, segments)
            return jnp.sum(out * weights), out

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)

    (_, expected), gradients = value_and_gradients(plain)(q, k, v, segments, weights)
    order = np.arange(LENGTH).reshape(2 * context, -1)
    order = np.concatenate([order[[i, -1 - i]].reshape(-1) for i in range(context)])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        arguments = [
            jax.device_put(x[:, order], NamedSharding(mesh, jax.P("fsdp", "context", *["tensor"][: x.ndim - 2])))
            for x in (q, k, v, segments, weights)
        ]
        compiled = jax.jit(value_and_gradients(ring)).lower(*arguments).compile()
    (_, found), found_gradients = compiled(*arguments)
    np.testing.assert_allclose(found, expected[:, order], atol=1e-5)
    for ours, theirs in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(ours, theirs[:, order], atol=2e-5)
    assert "all-gather" not in str(compiled.as_text())


def test_each_device_has_an_early_and_a_late_chunk():
    """Of four devices and 64 tokens: chunks of eight, the first with the last, the second with the last but one."""
    mesh = make_mesh(fsdp=2, context=4)
    tokens = jax.device_put(np.tile(np.arange(64), (2, 1)), NamedSharding(mesh, jax.P("fsdp", "context")))

    def there_and_back(x):
        with split_batch():
            return to_zigzag(x), from_zigzag(to_zigzag(x)), jnp.asarray(zigzag_order(64))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        zigzag, back, order = jax.jit(there_and_back)(tokens)
    expected = np.concatenate([np.arange(8 * i, 8 * i + 8) for i in (0, 7, 1, 6, 2, 5, 3, 4)])
    np.testing.assert_array_equal(zigzag, np.tile(expected, (2, 1)))
    np.testing.assert_array_equal(order, expected)
    np.testing.assert_array_equal(back, np.tile(np.arange(64), (2, 1)))


@pytest.mark.parametrize("length", [60, 62])
def test_rows_that_do_not_divide_are_refused(length):
    """Into two chunks for each of four devices; the first divides by the devices alone."""
    mesh = make_mesh(fsdp=2, context=4)
    refused = pytest.raises(InputError, match=f"rows have {length} tokens.*context=4.*multiple of 8")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), split_batch(), refused:
        jax.eval_shape(to_zigzag, jax.ShapeDtypeStruct((2, length), np.int32))
