"""Attention: one class of tests for every implementation, against float64, forwards and backwards."""

import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention import pages_of, quantized, random, reference, unpaged
from jax._src.pallas.mosaic import tpu_info
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from phi4mm_jax.errors import InputError
from phi4mm_jax.kernels import (
    append_tokens,
    cached,
    cached_attention,
    decode_attention,
    flash_attention,
    gpu,
    merge_partials,
    pallas_gpu_decode,
    tpu,
    xla,
)
from phi4mm_jax.kernels.pages import BITS, as_cached
from phi4mm_jax.kernels.registry import IMPLEMENTATIONS, Implementation
from phi4mm_jax.training.step import compiler_options

SMALL = tpu.Blocks(
    rows=384, keys=256, chunk=128, backward_rows=384, backward_keys=256, backward_chunk=128, decode_bytes=1 << 18
)  # several tiles even of short sequences
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile, not to run
CONTEXTS = {
    "xla": nullcontext,
    "xla, a head at a time": lambda: patch.object(xla, "_TILE_ELEMENTS_PER_CORE", 0),
    "pallas_tpu": lambda: tpu.interpreted(True, SMALL),
}
DECODERS = {
    "xla": nullcontext,
    "pallas_tpu": CONTEXTS["pallas_tpu"],
    "pallas_gpu": lambda: gpu.assumed(gpu.Target(gpu.AMPERE, cores=3, interpret=True)),  # 2 parts of a row
    "pallas_gpu, Hopper": lambda: for_hopper_alone(gpu.Target(gpu.HOPPER, cores=9, interpret=True)),  # likewise
}
HALF = {"pallas_gpu, Hopper"}  # take bfloat16 alone


@contextmanager
def for_hopper_alone(target):
    """Without Triton, which takes int8 pages from the kernel for Hopper."""
    with gpu.assumed(target), patch.object(pallas_gpu_decode, "triton", None):
        yield


def random_qkv(seed, batch, length, keys, heads, kv_heads, size, dtype=np.float32):
    return random(seed, (batch, length, heads, size), *[(batch, keys, kv_heads, size)] * 2, dtype=dtype)


def random_case(seed):
    """Lengths from 1 to 2K, many of them odd; any mixture of the options, with empty rows and queries without keys."""
    rng = np.random.default_rng(seed)
    batch, kv_heads, group = int(rng.integers(1, 3)), int(rng.integers(1, 3)), int(rng.choice([1, 3]))
    length, keys = (int(2 ** rng.uniform(0, 11)) for _ in range(2))
    options = {"causal": bool(rng.integers(2))}
    if rng.integers(2):
        options["q_offset"] = rng.integers(-5, keys + 1, batch)
    if rng.integers(2):
        options["kv_lengths"] = rng.integers(0, keys + 1, batch)
    if rng.integers(2):
        options["q_segments"] = np.sort(rng.integers(0, 4, (batch, length)))
        options["kv_segments"] = np.sort(rng.integers(0, 4, (batch, keys)))
    return (batch, length, keys, kv_heads * group, kv_heads, 16), options


PACKED = np.repeat([[0, 1, 2, 3]], [300, 20, 600, 104], axis=1)  # of 1024 tokens
CASES = {
    "one tile": ((2, 17, 17, 6, 2, 128), {"causal": True}),
    "many tiles": ((1, 1300, 1300, 3, 1, 16), {"causal": True}),
    "bidirectional, as the vision tower": ((2, 700, 901, 4, 4, 72), {"causal": False}),
    "lengths": ((3, 600, 600, 6, 2, 8), {"causal": True, "kv_lengths": np.array([600, 1, 333]), "scale": 0.7}),
    "empty row": ((2, 40, 700, 2, 1, 8), {"causal": False, "kv_lengths": np.array([0, 650])}),
    "offset": ((2, 100, 1200, 3, 1, 16), {"causal": True, "q_offset": np.array([0, 1100])}),
    "mask, in one row of nothing": (
        (2, 530, 530, 2, 2, 8),
        {"causal": False, "kv_mask": np.arange(530) % [[3], [1]] > 0},
    ),
    "packed": ((1, 1024, 1024, 3, 1, 16), {"causal": True, "q_segments": PACKED, "kv_segments": PACKED}),
    "one long document": (
        (1, 1024, 1024, 3, 1, 16),
        {"causal": True, "q_segments": PACKED * 0, "kv_segments": PACKED * 0},
    ),
    **{f"random {seed}": random_case(seed) for seed in range(4)},
}


def with_gradients(attention, q, k, v, d_out, d_lse):
    """The output, the log-sum-exp and the gradients of q, k and v, compiled as one program."""

    def program(q, k, v, d_out, d_lse):
        results, gradients = jax.vjp(attention, q, k, v)
        return *results, *gradients((d_out, d_lse))

    return jax.jit(program, compiler_options=QUICK)(q, k, v, d_out, d_lse)


def check(implementation, shape, options, seed=0, garbage=None):
    """`garbage`: a value, and where it stands among the keys (B, S)."""
    arrays = random_qkv(seed, *shape)
    arrays += random(seed + 1, arrays[0].shape, arrays[0].shape[:3])
    with jax.enable_x64(True):
        expected = with_gradients(lambda *x: reference(*x, **options), *(x.astype(np.float64) for x in arrays))
    if garbage is not None:
        value, at = garbage
        arrays[1][at], arrays[2][at] = value, -value
    results = with_gradients(
        lambda *x: flash_attention(*x, return_lse=True, implementation=implementation, **options), *arrays
    )
    for ours, theirs, tolerance in zip(results, expected, (3e-6, 3e-6, 2e-5, 2e-5, 2e-5), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=1e-5)


@pytest.fixture(params=CONTEXTS)
def implementation(request):
    with CONTEXTS[request.param]():
        yield request.param.split(",")[0]


@pytest.fixture(params=DECODERS)
def decoder(request):
    """The name of an implementation, the dtype of its queries, keys and values, and its tolerance."""
    with DECODERS[request.param]():
        half = request.param in HALF
        yield request.param.split(",")[0], *((jnp.bfloat16, 5e-3) if half else (jnp.float32, 3e-6))


class TestEveryImplementation:
    @pytest.mark.parametrize(("shape", "options"), CASES.values(), ids=CASES)
    def test_values_and_gradients(self, implementation, shape, options):
        check(implementation, shape, options)

    @pytest.mark.parametrize(("option", "causal"), [("kv_lengths", True), ("kv_lengths", False), ("kv_mask", False)])
    def test_masked_keys_may_hold_any_value(self, implementation, option, causal):
        """Forwards and backwards. Of three rows, one ends with a tile and one has no key."""
        valid = np.arange(300) < np.array([[256], [70], [0]])
        valid = valid if option == "kv_lengths" else valid[:, ::-1].copy()
        options = {option: valid.sum(1) if option == "kv_lengths" else valid, "causal": causal}
        garbage = np.resize([np.nan, np.inf, -np.inf], int(np.sum(~valid)))[:, None, None]
        check(implementation, (3, 40, 300, 2, 1, 8), options, garbage=(garbage, ~valid))

    @pytest.mark.parametrize(("out_dtype", "atol"), [(None, 2e-2), (jnp.float32, 5e-3)])
    def test_bfloat16_is_as_good_as_its_inputs(self, implementation, out_dtype, atol):
        q, k, v = random_qkv(3, 2, 640, 640, 6, 2, 16)
        out = flash_attention(
            *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), causal=True, implementation=implementation,
            out_dtype=out_dtype,
        )  # fmt: skip
        assert out.dtype == (out_dtype or jnp.bfloat16)
        assert bool((out == out.astype(jnp.bfloat16)).all()) == (out_dtype is None)  # not rounded on the way
        rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (q, k, v)]
        np.testing.assert_allclose(np.asarray(out, np.float32), reference(*rounded, causal=True)[0], atol=atol)

    @pytest.mark.parametrize("growth", [1.0, 200.0])
    def test_scores_that_grow_towards_the_beginning(self, implementation, growth):
        """The greatest score is met last; at 200 its weight is beyond float32 by the maximum known before."""
        q, k, v = random_qkv(5, 1, 520, 520, 1, 1, 8)
        q[..., 0], k[..., 0] = 1.0, growth * np.linspace(1, 0, 520)[None, :, None]
        out = flash_attention(*map(jnp.asarray, (q, k, v)), causal=True, scale=1.0, implementation=implementation)
        expected, _ = reference(q.astype(float), k.astype(float), v, causal=True, scale=1.0)
        np.testing.assert_allclose(out, expected, atol=1e-4)  # a score of 200 has an ulp of 1.5e-5

    @pytest.mark.parametrize("int8", [False, True])
    @pytest.mark.parametrize("layer", [0, 1])
    def test_decode_reads_pages(self, decoder, layer, int8):
        name, dtype, atol = decoder
        lengths = np.array([1, 0, 300, 640], np.int32)
        k, v, tables = pages_of(4, lengths, kv_heads=2)
        q, k, v = (np.asarray(jnp.asarray(x, dtype), np.float32) for x in (*random(5, (4, 6, 128)), k, v))
        extra = {}
        expected_k, expected_v = k, v
        if int8:
            (k, k_scales), (v, v_scales) = quantized(k), quantized(v)
            expected_k, expected_v = k * k_scales[..., None], v * v_scales[..., None]
            extra = {"k_scales": jnp.asarray(k_scales), "v_scales": jnp.asarray(v_scales)}
        pages = (jnp.asarray(x, jnp.int8 if int8 else dtype) for x in (k, v))
        out = decode_attention(
            jnp.asarray(q, dtype), *pages, layer=jnp.int32(layer), lengths=jnp.asarray(lengths),
            tables=jnp.asarray(tables), implementation=name, **extra,
        )  # fmt: skip
        expected, _ = reference(
            q[:, None], unpaged(expected_k[layer], tables), unpaged(expected_v[layer], tables), causal=False,
            kv_lengths=lengths,
        )  # fmt: skip
        np.testing.assert_allclose(np.asarray(out, np.float32), expected[:, 0], atol=atol, rtol=atol)

    @pytest.mark.parametrize("int8", [False, True])
    def test_decode_with_a_few_queries_a_row(self, implementation, int8):
        """Each has keys of its own number: across a page's border, none new behind the second, none at all."""
        lengths = np.array([[126, 127, 128, 129, 130], [299, 300, 300, 300, 300], [0] * 5, [1, 2, 3, 4, 5]], np.int32)
        k, v, tables = pages_of(24, lengths[:, -1], kv_heads=2)
        (q,) = random(25, (4, 5, 6, 128))
        extra = {}
        expected_k, expected_v = k, v
        if int8:
            (k, k_scales), (v, v_scales) = quantized(k), quantized(v)
            expected_k, expected_v = k * k_scales[..., None], v * v_scales[..., None]
            extra = {"k_scales": jnp.asarray(k_scales), "v_scales": jnp.asarray(v_scales)}
        out, largest, total = decode_attention(
            *map(jnp.asarray, (q, k, v)), layer=jnp.int32(1), lengths=jnp.asarray(lengths), tables=jnp.asarray(tables),
            return_partials=True, implementation=implementation, **extra,
        )  # fmt: skip
        for t in range(5):
            expected, lse = reference(
                q[:, t : t + 1], unpaged(expected_k[1], tables), unpaged(expected_v[1], tables), causal=False,
                kv_lengths=lengths[:, t],
            )  # fmt: skip
            found = out[:, t] / jnp.maximum(total[:, t], 1e-30)[..., None]
            np.testing.assert_allclose(found, expected[:, 0], atol=3e-6)
            np.testing.assert_allclose(largest[:, t] + jnp.log(total[:, t]), lse[:, 0], atol=3e-6)

    @pytest.mark.parametrize("int8", [False, True])
    def test_prefill_reads_pages(self, implementation, int8):
        """A chunk of 256 tokens of each row after none, some and many cached ones; one row has none at all."""
        starts, lengths = np.array([0, 384, 128, 0], np.int32), np.array([200, 640, 384, 0], np.int32)
        k, v, tables = pages_of(14, lengths, kv_heads=2)
        (q,) = random(15, (4, 256, 6, 128))
        extra = {}
        expected_k, expected_v = k, v
        if int8:
            (k, k_scales), (v, v_scales) = quantized(k), quantized(v)
            expected_k, expected_v = k * k_scales[..., None], v * v_scales[..., None]
            extra = {"k_scales": jnp.asarray(k_scales), "v_scales": jnp.asarray(v_scales)}
        out, lse = cached_attention(
            *map(jnp.asarray, (q, k, v)), layer=jnp.int32(1), starts=jnp.asarray(starts), lengths=jnp.asarray(lengths),
            tables=jnp.asarray(tables), implementation=implementation, return_lse=True, **extra,
        )  # fmt: skip
        expected = reference(
            q, unpaged(expected_k[1], tables), unpaged(expected_v[1], tables), causal=True, q_offset=starts,
            kv_lengths=lengths,
        )  # fmt: skip
        valid = np.arange(256) < (lengths - starts)[:, None]
        for ours, theirs in zip((out, lse), expected, strict=True):
            np.testing.assert_allclose(np.asarray(ours)[valid], np.asarray(theirs)[valid], atol=3e-6)

    def test_partial_results_merge(self, decoder):
        """Each of two shards has some of a row's keys, and of one row none."""
        name, dtype, atol = decoder
        lengths = np.array([200, 640], np.int32)
        k, v, tables = pages_of(6, lengths, kv_heads=1)
        q, k, v = (np.asarray(jnp.asarray(x, dtype), np.float32) for x in (*random(7, (2, 3, 128)), k, v))
        halves = ((tables[:, :2], np.minimum(lengths, 256)), (tables[:, 2:], np.maximum(lengths - 256, 0)))
        parts = [
            decode_attention(
                *(jnp.asarray(x, dtype) for x in (q, k, v)), layer=0, lengths=jnp.asarray(part),
                tables=jnp.asarray(table), return_partials=True, implementation=name,
            )
            for table, part in halves
        ]  # fmt: skip
        o, _, l = merge_partials(*map(jnp.stack, zip(*parts, strict=True)))  # noqa: E741
        expected, _ = reference(
            q[:, None], unpaged(k[0], tables), unpaged(v[0], tables), causal=False, kv_lengths=lengths
        )
        np.testing.assert_allclose(o / l[..., None], expected[:, 0], atol=atol, rtol=atol)

    def test_at_128k(self, implementation):
        """The last tile of queries, and a decoding step, over the whole cache."""
        length, tile = 131_072, 32
        (q,), (k, v) = random(8, (1, tile, 3, 128)), random(9, *[(length // 128, 1, 128, 128)] * 2)
        flat = [x.reshape(1, length, 1, 128) for x in (k, v)]
        expected, _ = reference(q, *flat, causal=True, q_offset=length - tile)
        with nullcontext() if implementation == "xla" else tpu.interpreted(True):
            out = flash_attention(
                *map(jnp.asarray, (q, *flat)), causal=True, q_offset=length - tile, implementation=implementation
            )
            last = decode_attention(
                *map(jnp.asarray, (q[:, -1], k[None], v[None])), layer=0, lengths=jnp.asarray([length]),
                tables=jnp.arange(length // 128)[None], implementation=implementation,
            )  # fmt: skip
        np.testing.assert_allclose(out, expected, atol=3e-6)
        np.testing.assert_allclose(last, expected[:, -1], atol=3e-6)


class TestTransfers:
    """With memory that is not a number before it is written, and races between transfers and reads found."""

    @pytest.fixture(params=[1, 2], ids=["one core", "two cores"])
    def cores(self, request):
        blocks = tpu.Blocks(
            rows=128,
            keys=128,
            chunk=128,
            backward_rows=128,
            backward_keys=128,
            backward_chunk=128,
            decode_bytes=1 << 18,
        )
        params = pltpu.InterpretParams(
            detect_races=True, uninitialized_memory="nan", num_cores_or_threads=request.param
        )
        pltpu.reset_tpu_interpret_mode_state()
        with tpu.interpreted(params, blocks, cores=request.param):
            yield
        assert not interpret_pallas_call.races.races_found

    def test_flash(self, cores):
        """Of the four blocks of queries, one step has no tile at all."""
        segments = np.repeat([[0, 1], [2, 2]], [130, 70], axis=1)
        options = {"causal": True, "q_segments": segments, "kv_segments": segments, "kv_lengths": np.array([200, 0])}
        check("pallas_tpu", (2, 200, 200, 1, 1, 8), options)

    def test_decode(self, cores):
        for int8 in (False, True):
            TestEveryImplementation().test_decode_reads_pages(("pallas_tpu", jnp.float32, 3e-6), 1, int8)

    def test_prefill(self, cores):
        for int8 in (False, True):
            TestEveryImplementation().test_prefill_reads_pages("pallas_tpu", int8)


@pytest.mark.parametrize(("page", "blocks"), [
    (256, tpu.Blocks(rows=384, keys=768, chunk=512)),  # blocks of 384 keys
    (512, tpu.Blocks(rows=384, keys=1536, chunk=1024)),  # of 768
    (640, tpu.Blocks(rows=384)),  # of 384
])  # fmt: skip
def test_prefill_where_pages_share_a_block_of_int8_keys(page, blocks):
    """Three tiles, of which none of the first two is masked; against XLA, whose blocks are whole pages."""
    count = 3 * (blocks.keys // page)
    lengths = np.array([count * page, (count - 1) * page - 7], np.int32)
    starts = (lengths - 1) // page * page
    k, v, tables = pages_of(31, lengths, kv_heads=1, page=page, per_row=count)
    (q,) = random(32, (2, page, 3, 128))
    (k, k_scales), (v, v_scales) = quantized(k), quantized(v)
    scales = {"k_scales": np.nan_to_num(k_scales), "v_scales": np.nan_to_num(v_scales)}
    with tpu.interpreted(True, blocks):
        found, expected = (
            cached_attention(
                *map(jnp.asarray, (q, k, v)), layer=jnp.int32(1), starts=jnp.asarray(starts),
                lengths=jnp.asarray(lengths), tables=jnp.asarray(tables), implementation=name,
                **jax.tree.map(jnp.asarray, scales),
            )
            for name in ("pallas_tpu", "xla")
        )  # fmt: skip
    valid = np.arange(page) < (lengths - starts)[:, None]
    np.testing.assert_allclose(np.asarray(found)[valid], np.asarray(expected)[valid], atol=3e-6)


@pytest.mark.parametrize("int8", [False, True])
def test_prefill_reads_pages_on_gpus(monkeypatch, int8):
    """The chunk by itself and what lies before it, two blocks of one row; as cuDNN takes them, computed by XLA."""
    monkeypatch.setattr(cached, "KEYS_PER_BLOCK_ON_GPU", 256)
    with gpu.assumed(gpu.Target(interpret=True)):
        TestEveryImplementation().test_prefill_reads_pages("xla", int8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pages_of_bits(dtype):
    """A decoded token and a chunk of prefill read the numbers that were written, from pages of what CPUs hold."""
    starts, lengths = np.array([128, 0], np.int32), np.array([384, 200], np.int32)
    k, v, tables = pages_of(26, lengths, kv_heads=2)
    (q,) = random(27, (2, 256, 6, 128))
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    pages = as_cached((k, v), BITS)
    assert [x.dtype for x in pages] == [BITS] * 2
    rows = {"layer": jnp.int32(1), "lengths": jnp.asarray(lengths), "tables": jnp.asarray(tables)}
    of_chunk = np.asarray(cached_attention(q, *pages, starts=jnp.asarray(starts), **rows), np.float32)
    of_token = np.asarray(decode_attention(q[:, 0], *pages, **rows), np.float32)
    q, *expected = (np.asarray(x, np.float32) for x in (q, k, v))
    expected = [unpaged(x[1], tables) for x in expected]
    wanted, _ = reference(q, *expected, causal=True, q_offset=starts, kv_lengths=lengths)
    valid = np.arange(256) < (lengths - starts)[:, None]
    np.testing.assert_allclose(of_chunk[valid], np.asarray(wanted)[valid], atol=5e-3, rtol=5e-3)
    wanted, _ = reference(q[:, :1], *expected, causal=False, kv_lengths=lengths)
    np.testing.assert_allclose(of_token, wanted[:, 0], atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_kernels_leave_pages_of_bits_to_xla(name):
    q, pages = jnp.ones((1, 2, 128), jnp.bfloat16), as_cached([jnp.ones((1, 2, 1, 128, 128), jnp.bfloat16)] * 2, BITS)
    rows = {"layer": 0, "lengths": jnp.ones(1, jnp.int32), "tables": jnp.zeros((1, 1), jnp.int32)}
    with DECODERS[name]():
        assert (decode_attention(q, *pages, **rows) == 1).all()
        with pytest.raises(InputError, match=f"'{name}' takes no pages of bits"):
            decode_attention(q, *pages, **rows, implementation=name)


def test_no_kernel_for_tpus_appends_bits():
    pages, token = as_cached([jnp.ones((1, 2, 1, 128, 128), jnp.bfloat16)] * 2, BITS), jnp.ones((1, 1, 128))
    with tpu.interpreted():
        assert append_tokens(pages, [token] * 2, layer=0, pages=jnp.zeros(1, int), slots=jnp.zeros(1, int)) is None


def test_decode_without_tables_reads_each_rows_own_length():
    rng = np.random.default_rng(4)
    capacity, lengths = 1024, np.array([1, 700, 1024, 129])
    k, v = (rng.standard_normal((2, 4, 2, capacity, 16)).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((4, 6, 16)).astype(np.float32)
    behind = np.arange(capacity) >= lengths[:, None, None]
    expected_k, expected_v = k.copy(), v.copy()
    for x in (k, v):
        np.putmask(x, np.broadcast_to(behind[None, ..., None], x.shape), np.nan)
    for layer in (0, 1):
        out = decode_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), layer=jnp.int32(layer), lengths=lengths)
        expected, _ = reference(
            q[:, None],
            expected_k[layer].swapaxes(1, 2),
            expected_v[layer].swapaxes(1, 2),
            causal=False,
            kv_lengths=lengths,
        )
        np.testing.assert_allclose(out, expected[:, 0], atol=3e-6)


def test_scores_are_never_held():
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
        ({"k": jnp.zeros((2, 5, 2, 8)), "v": jnp.zeros((2, 5, 2, 8))}, "k"),
        ({"q": jnp.zeros((1, 4, 3, 8))}, "q's 3 heads"),
        ({"q": jnp.zeros((1, 4, 8))}, "q"),
        ({"v": jnp.zeros((1, 5, 2, 8), jnp.bfloat16)}, "dtype"),
        ({"kv_lengths": jnp.zeros(3, jnp.int32)}, "kv_lengths"),
        ({"kv_lengths": jnp.zeros(1)}, "kv_lengths"),
        ({"kv_mask": jnp.zeros((1, 3), bool)}, "kv_mask"),
        ({"q_offset": jnp.zeros(2, jnp.int32)}, "q_offset"),
        ({"q_segments": jnp.zeros((1, 4), jnp.int32)}, "kv_segments"),
        ({"q_segments": jnp.zeros((1, 4), jnp.int32), "kv_segments": jnp.zeros((1, 4), jnp.int32)}, "kv_segments"),
        ({"implementation": "cudnn"}, "cudnn"),
        ({"implementation": "pallas_tpu"}, "needs a TPU"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    good = {"q": jnp.zeros((1, 4, 4, 8)), "k": jnp.zeros((1, 5, 2, 8)), "v": jnp.zeros((1, 5, 2, 8)), "causal": True}
    with pytest.raises(InputError, match=named):
        flash_attention(**(good | arguments))


def test_an_implementation_is_one_entry(monkeypatch):
    """A stand-in, which returns zeros and takes 8 queries only; the default stays."""
    zeros = Implementation(
        supports=lambda operation, q, *_: None if q.shape[1] == 8 else f"{operation} takes 8 queries only",
        prefill=lambda q, *_, **__: (jnp.zeros_like(q), jnp.zeros(q.shape[:3])),
        decode=lambda q, *_, **__: (jnp.zeros_like(q), jnp.zeros(q.shape[:2]), jnp.zeros(q.shape[:2])),
    )
    monkeypatch.setitem(IMPLEMENTATIONS, "zeros", zeros)
    ones = jnp.ones((1, 8, 1, 8))
    assert (flash_attention(ones, ones, ones, causal=True, implementation="zeros") == 0).all()
    assert (flash_attention(ones, ones, ones, causal=True) == 1).all()
    with pytest.raises(InputError, match="flash_attention: prefill takes 8 queries only"):
        flash_attention(ones[:, :4], ones, ones, causal=True, implementation="zeros")
    cache = jnp.ones((1, 1, 1, 128, 8))
    with pytest.raises(InputError, match="decode_attention: decode takes 8 queries only"):
        decode_attention(ones[:, 0], cache, cache, layer=0, lengths=jnp.ones(1, jnp.int32), implementation="zeros")


@pytest.mark.subprocess
def test_pallas_is_imported_where_a_kernel_is_asked_for():
    """Elsewhere it would be a part of every program's start."""
    code = (
        "import sys, jax.numpy as jnp; from phi4mm_jax.kernels import flash_attention, tpu\n"
        "x = jnp.ones((1, 8, 1, 8)); assert (flash_attention(x, x, x, causal=True) == 1).all()\n"
        "loaded = 'jax.experimental.pallas' in sys.modules\n"
        "with tpu.interpreted(): flash_attention(x, x, x, causal=True, implementation='pallas_tpu')\n"
        "print(loaded, 'jax.experimental.pallas' in sys.modules)"
    )
    environment, root = os.environ | {"JAX_PLATFORMS": "cpu"}, Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert found.stdout == "False True\n", found.stderr


KINDS = [f"TPU {name}" for name in ("v4", "v4 lite", "v5", "v5 lite", "v5e", "v5p", "v6 lite", "v6e")] + ["TPU7x"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_chip_has_one_name(kind):
    """Either of the two that jax has for some leads to the same blocks and options of the training step."""
    version = tpu_info.chip_version_from_device_kind
    same = [other for other in KINDS if version(other) == version(kind)]
    assert {tpu.chip_name(other) for other in same} == {tpu.chip_name(kind)}
    assert len({tpu.chip_name(other) for other in KINDS}) == len(set(map(version, KINDS)))
    found = []
    for other in same:
        device = jax.sharding.AbstractDevice(device_kind=other, num_cores=1, platform="tpu")
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("tensor",), abstract_device=device)):
            found.append((tpu.target(), compiler_options(device)))
    assert found == found[:1] * len(same)


def test_what_the_tpu_kernel_cannot_take_is_named():
    with tpu.interpreted(), pytest.raises(InputError, match="q has dtype float16"):
        flash_attention(*[jnp.zeros((1, 4, 1, 8), jnp.float16)] * 3, causal=True, implementation="pallas_tpu")


INT8 = {name: jnp.zeros((1, 3, 2, 128, 8), jnp.int8) for name in ("k", "v")}
BAD_PAGES = [  # and what is beside them
    ({"v": jnp.zeros((1, 3, 2, 64, 8))}, "v"),
    ({"lengths": jnp.zeros(3, jnp.int32)}, "lengths"),
    ({"lengths": jnp.zeros(2)}, "lengths"),
    ({"tables": jnp.zeros((3, 2), jnp.int32)}, "tables"),
    ({"tables": None}, "without tables"),
    ({"k": INT8["k"]}, "k int8"),
    ({"k": jnp.zeros((1, 3, 2, 128, 8), BITS), "v": jnp.zeros((1, 3, 2, 128, 8), BITS)}, "k uint16"),
    (INT8, "k_scales must be given"),
    (INT8 | {"k_scales": jnp.zeros((1, 3, 2, 128))}, "v_scales must be given"),
    ({"k_scales": jnp.zeros((1, 3, 2, 128))}, "k_scales"),
    ({"implementation": "pallas_tpu"}, "needs a TPU"),
]
GOOD_PAGES = {
    "k": jnp.zeros((1, 3, 2, 128, 8)), "v": jnp.zeros((1, 3, 2, 128, 8)), "layer": 0,
    "lengths": jnp.zeros(2, jnp.int32), "tables": jnp.zeros((2, 2), jnp.int32),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "named"), [*BAD_PAGES, ({"q": jnp.zeros((2, 3, 8))}, "q")])
def test_bad_arguments_of_decoding_are_named(arguments, named):
    good = GOOD_PAGES | {"q": jnp.zeros((2, 4, 8))}
    with pytest.raises(InputError, match=f"decode_attention: .*{named}"):
        decode_attention(**(good | arguments))


@pytest.mark.parametrize("context", [nullcontext, lambda: gpu.assumed(gpu.Target(interpret=True))], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        *BAD_PAGES,
        ({"q": jnp.zeros((2, 128, 3, 8))}, "q"),
        ({"q": jnp.zeros((2, 4, 8))}, "q"),
        ({"q": jnp.zeros((2, 100, 4, 8))}, "100 queries"),
        ({"q": jnp.zeros((2, 384, 4, 8)), "part": (0, 2)}, "384 queries"),
        ({"starts": jnp.zeros(1, jnp.int32)}, "starts"),
    ],
)
def test_bad_arguments_of_a_chunk_are_named(context, arguments, named):
    good = GOOD_PAGES | {"q": jnp.zeros((2, 128, 4, 8)), "starts": jnp.zeros(2, jnp.int32)}
    with context(), pytest.raises(InputError, match=f"cached_attention: .*{named}"):
        cached_attention(**(good | arguments))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_append_writes_each_rows_token_alone(platform, dtype):
    """Six rows, one of which rests, in the first, a middle and the last token of a page; on TPUs four at once."""
    draw = np.random.default_rng(0)
    shape = (2, 9, 2, 128, 128)
    caches = [jnp.asarray(draw.integers(-100, 100, shape), dtype) for _ in range(2)]
    if dtype == "int8":
        caches += [jnp.asarray(draw.standard_normal(shape[:4]), jnp.float32) for _ in range(2)]
    new = [jnp.asarray(draw.standard_normal((6, 2, 128)), jnp.bfloat16).at[2, 1].set(0) for _ in range(2)]
    pages, slots = np.array([3, 8, 0, 5, 7, 1]), np.array([0, 5, 127, 33, 64, 31])  # the last page is for what rests
    blocks = tpu.Blocks(append_bytes=4 * 4 * 2 * 32 * 128 * caches[0].dtype.itemsize + (1 << 14))
    pltpu.reset_tpu_interpret_mode_state()
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with tpu.interpreted(params, blocks) if platform == "tpu" else gpu.assumed(gpu.Target()):
        found = jax.jit(lambda c, n: append_tokens(c, n, layer=1, pages=pages, slots=slots))(caches, new)
    assert found is not None
    wanted, exact = [np.asarray(x, np.float32) for x in new], 0.0
    if dtype == "int8":
        scales = [np.abs(x).max(-1) / np.float32(127) for x in wanted]
        pairs = zip(wanted, scales, strict=True)
        wanted, exact = [*(x / np.where(scale > 0, scale, 1)[..., None] for x, scale in pairs), *scales], 0.5
    bounds = [exact + 1e-5] * 2 + [1e-6] * 2  # integers are the nearest, however the quotient was rounded
    for cache, token, written, bound in zip(caches, wanted, found, bounds, strict=False):
        kept, written = np.array(cache), np.array(written)
        for row in (0, 2, 3, 4, 5):
            place = 1, pages[row], slice(None), slots[row]
            np.testing.assert_allclose(written[place].astype(np.float32), token[row], atol=bound, rtol=0)
            written[place] = kept[place]
        np.testing.assert_array_equal(written, kept)
    assert not getattr(interpret_pallas_call.races, "races_found", False)
