"""The TPU kernels compiled ahead of time, without a TPU, by the TPU's own compiler.

It rejects what interpretation accepts: bad block shapes, too much vector or scalar memory.
"""

import json
import os
import re
from dataclasses import replace
from typing import Any

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # there is no TPU to ask about

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.marks import fast_are
from helpers.paths import FIXTURES
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding

from phi4mm_jax.config import LoraConfig, Phi4MMConfig
from phi4mm_jax.kernels import cached_attention, decode_attention, flash_attention, tpu
from phi4mm_jax.model.decoder import AttentionInputs, BlockConfig, Decoder
from phi4mm_jax.model.kv_cache import CachedInputs, KVCache, copy_pages
from phi4mm_jax.testing.compiled import copies

pytestmark = pytest.mark.tpu_compile

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.fixture(params=fast_are(["v6e"], CHIPS))
def mesh(request):
    """One device of a chip, set as the mesh that kernels are traced for."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[request.param])
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    with jax.set_mesh(mesh):
        yield mesh


only_v6e = pytest.mark.parametrize("mesh", ["v6e"], indirect=True)


def compiled(mesh, function, *arguments, **options):
    place = NamedSharding(mesh, jax.P())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    text = jax.jit(function, **options).lower(*arguments).compile().as_text()
    assert text is not None
    return text


def with_gradients(q, k, v, **options):
    out, gradients = jax.vjp(lambda *x: flash_attention(*x, **options), q, k, v)
    return out, gradients(out)


def test_blocks_fit_the_chip(mesh):
    chosen = tpu.target()
    assert chosen is not None
    assert chosen.blocks.vmem < pltpu.get_tpu_info().vmem_capacity_bytes


def test_training_at_2k_with_segments_compiles(mesh):
    def program(q, k, v, segments):
        return with_gradients(q, k, v, causal=True, q_segments=segments, kv_segments=segments)

    arguments = *(shape(2, 2048, n, 128) for n in (24, 8, 8)), shape(2, 2048, dtype=jnp.int32)
    text = compiled(mesh, program, *arguments)
    for name in ("phi4mm_flash_fwd", "phi4mm_flash_bwd_dq", "phi4mm_flash_bwd_dkv"):
        assert name in text


@pytest.mark.slow
def test_attention_at_128k_compiles(mesh):
    def program(q, k, v, offset, lengths):
        return flash_attention(q, k, v, causal=True, q_offset=offset, kv_lengths=lengths)

    per_row = shape(1, dtype=jnp.int32)
    text = compiled(mesh, program, *(shape(1, 131_072, n, 128) for n in (24, 8, 8)), per_row, per_row)
    assert "phi4mm_flash_fwd" in text


@pytest.mark.slow
@only_v6e
def test_backward_at_128k_compiles(mesh):
    text = compiled(mesh, lambda *x: with_gradients(*x, causal=True), *(shape(1, 131_072, n, 128) for n in (3, 1, 1)))
    assert "phi4mm_flash_bwd_dkv" in text


@pytest.mark.slow
@only_v6e
def test_vision_tower_compiles(mesh):
    def program(q, k, v, mask):
        return with_gradients(q, k, v, causal=False, kv_mask=mask)

    arguments = *(shape(7, 1024, 16, 72) for _ in "qkv"), shape(7, 1024, dtype=jnp.bool_)
    assert "phi4mm_flash_fwd" in compiled(mesh, program, *arguments)


@pytest.mark.parametrize("int8", fast_are([True], [False, True]))
def test_decoding_at_128k_compiles(mesh, int8):
    def program(q, k, v, lengths, tables, scales):
        k_scales, v_scales = scales or (None, None)
        return decode_attention(q, k, v, layer=1, lengths=lengths, tables=tables, k_scales=k_scales, v_scales=v_scales)

    pages = shape(2, 4096, 8, 128, 128, dtype=jnp.int8 if int8 else jnp.bfloat16)
    scales = (shape(2, 4096, 8, 128, dtype=jnp.float32),) * 2 if int8 else None
    lengths, tables = shape(4, dtype=jnp.int32), shape(4, 1024, dtype=jnp.int32)
    text = compiled(mesh, program, shape(4, 24, 128), pages, pages, lengths, tables, scales)
    assert "phi4mm_decode" in text
    assert copies(text, 4096 * 8 * 128 * 128) == []


def prefill(q, k, v, starts, lengths, tables, scales):
    k_scales, v_scales = scales or (None, None)
    rows: Any = {"starts": starts, "lengths": lengths, "tables": tables, "k_scales": k_scales, "v_scales": v_scales}
    return cached_attention(q, k, v, layer=1, **rows)


@pytest.mark.parametrize("int8", fast_are([True], [False, True]))
def test_prefill_over_pages_at_128k_compiles(mesh, int8):
    """A chunk of 2048 tokens; pages are read where they lie."""
    pages = shape(2, 4096, 8, 128, 128, dtype=jnp.int8 if int8 else jnp.bfloat16)
    scales = (shape(2, 4096, 8, 128, dtype=jnp.float32),) * 2 if int8 else None
    numbers, tables = shape(4, dtype=jnp.int32), shape(4, 1024, dtype=jnp.int32)
    text = compiled(mesh, prefill, shape(4, 2048, 24, 128), pages, pages, numbers, numbers, tables, scales)
    assert "phi4mm_cached" in text
    assert copies(text, 2048 * 8 * 128 * 128) == []


PAGES = [("v5e", 640), ("v5e", 768), ("v5e", 896), *(("v6e", page) for page in (256, 384, 512, 1280))]


@pytest.mark.parametrize(("mesh", "page"), fast_are([("v6e", 384)], PAGES), indirect=["mesh"])
def test_prefill_over_pages_that_share_a_block_of_int8_keys_compiles(mesh, page):
    pages, scales = shape(2, 64, 8, page, 128, dtype=jnp.int8), shape(2, 64, 8, page, dtype=jnp.float32)
    numbers, tables = shape(4, dtype=jnp.int32), shape(4, 5, dtype=jnp.int32)
    text = compiled(mesh, prefill, shape(4, page, 24, 128), pages, pages, numbers, numbers, tables, (scales, scales))
    assert "phi4mm_cached" in text


def test_on_a_mesh_each_device_has_its_rows_and_heads():
    """Without communication: what a device attends to is its own."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = Mesh(np.array(topology.devices).reshape(2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def place(*sizes, spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    def program(q, k, v, lengths, pages, tables):
        out, gradients = jax.vjp(lambda *x: flash_attention(*x, causal=True, kv_lengths=lengths), q, k, v)
        step = decode_attention(q[:, 0], pages, pages, layer=0, lengths=lengths, tables=tables)
        return out, gradients(out), step

    arguments = (
        *(place(2, 512, n, 128, spec=jax.P("fsdp", None, "tensor")) for n in (6, 2, 2)),
        place(2, spec=jax.P("fsdp"), dtype=jnp.int32),
        place(1, 8, 2, 128, 128, spec=jax.P(None, None, "tensor")),
        place(2, 4, spec=jax.P(), dtype=jnp.int32),
    )
    with jax.set_mesh(mesh):
        text = jax.jit(program).lower(*arguments).compile().as_text() or ""
    assert "bf16[1,1,3,512,128]" in text  # of 2 rows and 2 key heads, 1 each
    assert "bf16[1,8,1,128,128]" in text
    assert [x for x in text.splitlines() if "512" in x and re.search(r"all-(gather|reduce|to-all)\(", x)] == []


BATCH, LENGTH, HEADS, KV_HEADS = 2, 1024, 6, 2  # of the layers below: the published one, but narrower
PAGE = 128


@pytest.fixture(scope="module")
def decoders():
    """By its number of layers: a decoder with an adapter, the shapes of its variables, and its configuration."""
    return {layers: decoder_of(layers) for layers in (1, 4)}


def decoder_of(layers):
    config = Phi4MMConfig.from_dict(json.loads((FIXTURES / "ms_release_config.json").read_text())).decoder
    narrow = replace(
        config, num_layers=layers, embed_dim=256, num_heads=HEADS, num_kv_heads=KV_HEADS, mlp_dim=512, vocab_size=128
    )
    decoder = Decoder(BlockConfig(narrow, (("lora_speech", LoraConfig(320, 640, 0.01)),)), scan=True, remat="none")
    x, rows = inputs(narrow, BATCH, LENGTH)
    variables = jax.eval_shape(lambda key, *x: decoder.init(key, *x, None), jax.random.key(0), x, rows)
    return decoder, jax.tree.map(lambda v: shape(*v.shape), nn.unbox(variables)), narrow


def inputs(config, batch, length, pages_of_a_row=None):
    """What the decoder is called with, for new tokens that come after cached ones where there are pages."""
    angles = shape(batch, length, config.head_size, dtype=jnp.float32)
    numbers = shape(batch, dtype=jnp.int32)
    cached = pages_of_a_row and CachedInputs(
        numbers,
        numbers,
        shape(batch, pages_of_a_row, dtype=jnp.int32),
        *[shape(batch, max(length // PAGE, 1), dtype=jnp.int32)] * 2,
    )
    rows = AttentionInputs(numbers, angles, angles, {"lora_speech": shape(batch, dtype=jnp.float32)}, cached)
    return shape(batch, length, config.embed_dim), rows


def cache_of(config, pages, dtype=jnp.bfloat16):
    sizes = config.num_layers, pages, config.num_kv_heads, PAGE, config.head_size
    scales = [shape(*sizes[:-1], dtype=jnp.float32)] * 2 if dtype == jnp.int8 else []
    return KVCache(*[shape(*sizes, dtype=dtype)] * 2, *scales)


@only_v6e
@pytest.mark.parametrize("dtype", fast_are([jnp.int8], [jnp.bfloat16, jnp.int8]))
def test_prefill_copies_neither_queries_nor_keys_nor_the_cache(mesh, decoders, dtype):
    decoder, variables, config = decoders[4]
    x, rows = inputs(config, BATCH, LENGTH, 64)
    cache = cache_of(config, 512, dtype)
    text = compiled(mesh, decoder.apply, variables, x, rows, cache, donate_argnums=3)
    assert "phi4mm_cached" in text
    assert [c for c in copies(text, BATCH * KV_HEADS * LENGTH * 128) if "128]" in c] == []


@only_v6e
def test_training_copies_neither_queries_nor_keys_nor_their_gradients(mesh, decoders):
    decoder, variables, config = decoders[1]
    x, rows = inputs(config, BATCH, LENGTH)

    def program(variables, x, rows):
        def loss(variables, x):
            return decoder.apply(variables, x, rows, None)[0].astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1))(variables, x)

    text = compiled(mesh, program, variables, x, rows)
    assert "phi4mm_flash_bwd_dkv" in text
    assert [c for c in copies(text, BATCH * KV_HEADS * LENGTH * 128) if "128]" in c] == []


@pytest.mark.slow
@only_v6e
@pytest.mark.parametrize("dtype", fast_are([jnp.int8], [jnp.bfloat16, jnp.int8]))
def test_decoding_copies_no_pages(mesh, decoders, dtype):
    """Layers in a loop, each of which puts a token into its pages and attends to them."""
    decoder, variables, config = decoders[4]
    x, rows = inputs(config, 8, 1, 64)
    text = compiled(mesh, decoder.apply, variables, x, rows, cache_of(config, 512, dtype), donate_argnums=3)
    assert "phi4mm_decode" in text
    assert copies(text, 8 * KV_HEADS * PAGE * 128) == []


@pytest.mark.slow
@only_v6e
@pytest.mark.parametrize("dtype", fast_are([jnp.int8], [jnp.bfloat16, jnp.int8]))
def test_beams_copy_no_more_pages_than_they_part_with(mesh, decoders, dtype):
    decoder, variables, config = decoders[4]
    x, rows = inputs(config, 5, 1, 64)

    def program(variables, x, rows, cache, sources, targets, count):
        return decoder.apply(variables, x, rows, copy_pages(cache, sources, targets, count))

    numbers, count = shape(5, dtype=jnp.int32), shape(dtype=jnp.int32)
    cache = cache_of(config, 512, dtype)
    text = compiled(mesh, program, variables, x, rows, cache, numbers, numbers, count, donate_argnums=3)
    assert copies(text, 2 * config.num_layers * KV_HEADS * PAGE * 128) == []  # two pages of all layers
