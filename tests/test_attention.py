"""Attention against a float64 reference, forwards and backwards, and its bounded memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi4mm_jax.kernels import decode_attention, flash_attention, xla


def reference(q, k, v, *, causal, q_offset=None, kv_lengths=None, kv_mask=None, scale=None):
    """Attention written out in float64; (B, T, N, H)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, size = q.shape
    k, v = (np.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) * (size**-0.5 if scale is None else scale)
    keys, queries = np.arange(k.shape[1]), np.arange(length)
    allowed = np.ones((batch, length, k.shape[1]), bool)
    if causal:
        offset = np.zeros(batch, int) if q_offset is None else np.asarray(q_offset)
        allowed &= keys <= (queries[None, :] + offset[:, None])[..., None]
    if kv_lengths is not None:
        allowed &= keys < np.asarray(kv_lengths)[:, None, None]
    if kv_mask is not None:
        allowed &= np.asarray(kv_mask)[:, None, :]
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * allowed[:, None]
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", weights / np.where(total == 0, 1, total), v)


def random_qkv(seed, batch, length, keys, heads, kv_heads, size, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = (batch, length, heads, size), (batch, keys, kv_heads, size), (batch, keys, kv_heads, size)
    return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)


CASES = {
    "one tile": ((2, 17, 17, 6, 2, 16), {"causal": True}),
    "many tiles": ((1, 1300, 1300, 3, 1, 8), {"causal": True}),
    "odd sizes, bidirectional": ((2, 700, 901, 4, 4, 72), {"causal": False}),
    "lengths": ((3, 600, 600, 6, 2, 8), {"causal": True, "kv_lengths": np.array([600, 1, 333])}),
    "empty row": ((2, 40, 700, 2, 1, 8), {"causal": False, "kv_lengths": np.array([0, 650])}),
    "offset": ((2, 100, 1200, 3, 1, 16), {"causal": True, "q_offset": np.array([0, 1100])}),
    "mask": ((2, 530, 530, 2, 2, 8), {"causal": False, "kv_mask": np.arange(530) % np.array([[3], [7]]) > 0}),
    "nothing allowed": ((1, 9, 600, 2, 1, 8), {"causal": False, "kv_mask": np.zeros((1, 600), bool)}),
    "scale": ((1, 33, 33, 2, 1, 8), {"causal": True, "scale": 0.7}),
}


@pytest.mark.parametrize(("shape", "options"), CASES.values(), ids=CASES)
def test_forward(shape, options):
    q, k, v = random_qkv(0, *shape)
    out = flash_attention(q, k, v, **options)
    np.testing.assert_allclose(out, reference(q, k, v, **options), atol=3e-6)


@pytest.mark.parametrize(("shape", "options"), CASES.values(), ids=CASES)
def test_gradients(shape, options):
    """Against autodiff of plain attention, in float32."""
    q, k, v = random_qkv(1, *shape)
    target = jnp.asarray(np.random.default_rng(2).standard_normal(q.shape), jnp.float32)

    def plain(q, k, v):
        batch, length, heads, size = q.shape
        k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * options.get("scale", size**-0.5)
        allowed = jnp.ones((batch, length, k.shape[1]), bool)
        if options["causal"]:
            offset = jnp.asarray(options.get("q_offset", np.zeros(batch, int)))
            allowed &= jnp.arange(k.shape[1]) <= (jnp.arange(length) + offset[:, None])[..., None]
        if "kv_lengths" in options:
            allowed &= jnp.arange(k.shape[1]) < jnp.asarray(options["kv_lengths"])[:, None, None]
        if "kv_mask" in options:
            allowed &= jnp.asarray(options["kv_mask"])[:, None, :]
        weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -1e30), -1) * allowed.any(-1)[:, None, :, None]
        return jnp.vdot(jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest"), target)

    ours = jax.grad(lambda *x: jnp.vdot(flash_attention(*x, **options), target), argnums=(0, 1, 2))(q, k, v)
    theirs = jax.grad(plain, argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


def test_bfloat16_is_as_good_as_its_inputs():
    q, k, v = random_qkv(3, 2, 640, 640, 6, 2, 16, jnp.bfloat16)
    out = flash_attention(q, k, v, causal=True)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), reference(q, k, v, causal=True), atol=2e-2)


def test_decode_reads_each_rows_own_length():
    rng = np.random.default_rng(4)
    capacity, lengths = 1024, np.array([1, 700, 1024, 129])
    k, v = (rng.standard_normal((2, 4, 2, capacity, 16)).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((4, 6, 16)).astype(np.float32)
    for layer in (0, 1):
        out = decode_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), layer=jnp.int32(layer), lengths=lengths)
        expected = reference(
            q[:, None], k[layer].swapaxes(1, 2), v[layer].swapaxes(1, 2), causal=False, kv_lengths=lengths
        )
        np.testing.assert_allclose(out, expected[:, 0], atol=3e-6)


def test_memory_is_bounded():
    """Neither direction ever holds the scores, which would take 4 GiB here."""
    length, heads = 16384, 4
    shape = jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32)

    def loss(q, k, v):
        return flash_attention(q, k, v, causal=True).sum()

    for function in (loss, jax.grad(loss, argnums=(0, 1, 2))):
        memory = jax.jit(function).trace(shape, shape, shape).lower().compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4 * xla._TILE_ELEMENTS * 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"k": jnp.zeros((1, 4, 2, 8))}, "k"),
        ({"q": jnp.zeros((1, 4, 3, 8))}, "q's 3 heads"),
        ({"q": jnp.zeros((1, 4, 8))}, "q"),
        ({"v": jnp.zeros((1, 5, 2, 8), jnp.bfloat16)}, "dtype"),
        ({"kv_lengths": jnp.zeros(3, jnp.int32)}, "kv_lengths"),
        ({"kv_mask": jnp.zeros((1, 3), bool)}, "kv_mask"),
        ({"q_offset": jnp.zeros(2, jnp.int32)}, "q_offset"),
        ({"implementation": "cudnn"}, "cudnn"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    good = {"q": jnp.zeros((1, 4, 4, 8)), "k": jnp.zeros((1, 5, 2, 8)), "v": jnp.zeros((1, 5, 2, 8)), "causal": True}
    if named == "k":
        arguments = {"k": jnp.zeros((2, 5, 2, 8)), "v": jnp.zeros((2, 5, 2, 8))}
    with pytest.raises(ValueError, match=named):
        flash_attention(**(good | arguments))
