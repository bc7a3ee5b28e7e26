"""The TPU kernels compiled ahead of time, without a TPU, by the TPU's own compiler.

It rejects what interpretation accepts: bad block shapes, too much vector or scalar memory.
"""

import json
import os
import re

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # there is no TPU to ask about

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FIXTURES
from flax import linen as nn
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding

from phi4mm_jax.config import Phi4MMConfig, with_layers
from phi4mm_jax.kernels import decode_attention, flash_attention, tpu
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.phi4mm import abstract_variables, empty_cache

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.fixture(params=CHIPS)
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
    return jax.jit(function, **options).lower(*arguments).compile().as_text()


def with_gradients(q, k, v, **options):
    out, gradients = jax.vjp(lambda *x: flash_attention(*x, **options), q, k, v)
    return out, gradients(out)


def test_blocks_fit_the_chip(mesh):
    chosen = tpu.target()
    assert chosen is not None
    assert chosen.blocks.vmem < pltpu.get_tpu_info().vmem_capacity_bytes


def test_at_2k_with_segments(mesh):
    def program(q, k, v, segments):
        return with_gradients(q, k, v, causal=True, q_segments=segments, kv_segments=segments)

    arguments = *(shape(2, 2048, n, 128) for n in (24, 8, 8)), shape(2, 2048, dtype=jnp.int32)
    text = compiled(mesh, program, *arguments)
    assert set(re.findall(r"%(phi4mm_\w+)", text)) == {"phi4mm_flash_fwd", "phi4mm_flash_bwd_dq", "phi4mm_flash_bwd_dkv"}


def test_at_128k(mesh):
    def program(q, k, v, offset, lengths):
        return flash_attention(q, k, v, causal=True, q_offset=offset, kv_lengths=lengths)

    per_row = shape(1, dtype=jnp.int32)
    text = compiled(mesh, program, *(shape(1, 131_072, n, 128) for n in (24, 8, 8)), per_row, per_row)
    assert "%phi4mm_flash_fwd" in text


@only_v6e
def test_backward_at_128k(mesh):
    text = compiled(mesh, lambda *x: with_gradients(*x, causal=True), *(shape(1, 131_072, n, 128) for n in (3, 1, 1)))
    assert "%phi4mm_flash_bwd_dkv" in text


@only_v6e
def test_vision_tower(mesh):
    def program(q, k, v, mask):
        return with_gradients(q, k, v, causal=False, kv_mask=mask)

    arguments = *(shape(7, 1024, 16, 72) for _ in "qkv"), shape(7, 1024, dtype=jnp.bool_)
    assert "%phi4mm_flash_fwd" in compiled(mesh, program, *arguments)


@pytest.mark.parametrize("int8", [False, True])
def test_decode_at_128k(mesh, int8):
    def program(q, k, v, lengths, tables, scales):
        k_scales, v_scales = scales or (None, None)
        return decode_attention(
            q, k, v, layer=1, lengths=lengths, tables=tables, k_scales=k_scales, v_scales=v_scales
        )

    pages = shape(2, 4096, 8, 128, 128, dtype=jnp.int8 if int8 else jnp.bfloat16)
    scales = (shape(2, 4096, 8, 128, dtype=jnp.float32),) * 2 if int8 else None
    lengths, tables = shape(4, dtype=jnp.int32), shape(4, 1024, dtype=jnp.int32)
    text = compiled(mesh, program, shape(4, 24, 128), pages, pages, lengths, tables, scales)
    assert "%phi4mm_decode" in text
    assert copies(text, 4096 * 8 * 128 * 128) == []


def copies(text: str, least: int) -> list[str]:
    """Copies and transposes of at least so many elements in a compiled module."""
    found = re.findall(r"= (\w+\[([\d,]+)\]\S*) (?:copy|transpose|copy-start)\((.*)", text)
    return [f"{kind} {rest}" for kind, sizes, rest in found if np.prod([int(n) for n in sizes.split(",")]) >= least]


class TestDecoderLayer:
    """The published layer around the kernels: no copy or transpose of Q, K, V, their gradients or the cache."""

    BATCH, LENGTH = 2, 2048

    @pytest.fixture(scope="class")
    def model(self):
        config = json.loads((FIXTURES / "ms_release_config.json").read_text())
        model = Phi4MM(with_layers(Phi4MMConfig.from_dict(config), 2, 1, 1))
        variables = jax.tree.map(lambda x: shape(*x.shape), nn.unbox(abstract_variables(model)))
        return model, {"params": variables["params"], "lora_speech": variables["lora_speech"]}

    def heads(self, text):
        """Of arrays (B, heads, T, H) in any order; the weights are of another shape."""
        ours = {str(n) for n in (self.BATCH, self.LENGTH, 128)}
        return [c for c in copies(text, self.BATCH * self.LENGTH * 8 * 128) if ours <= set(re.findall(r"\d+", c[: c.index("]")]))]

    @only_v6e
    def test_prefill(self, mesh, model):
        model, variables = model
        cache = jax.eval_shape(lambda: empty_cache(model.config, self.BATCH, self.LENGTH, jnp.bfloat16))

        def program(variables, x, lengths, cache):
            return model.apply(variables, x, lengths, lengths, cache, method="decode")

        arguments = variables, shape(self.BATCH, self.LENGTH, 3072), shape(self.BATCH, dtype=jnp.int32), cache
        text = compiled(mesh, program, *arguments, donate_argnums=3)
        assert "%phi4mm_flash_fwd" in text
        assert self.heads(text) == []

    @only_v6e
    def test_training(self, mesh, model):
        model, variables = model

        def program(variables, x, lengths):
            def loss(variables, x):
                return model.apply(variables, x, lengths, lengths, method="decode")[0].astype(jnp.float32).sum()

            return jax.grad(loss, argnums=(0, 1))(variables, x)

        arguments = variables, shape(self.BATCH, self.LENGTH, 3072), shape(self.BATCH, dtype=jnp.int32)
        text = compiled(mesh, program, *arguments)
        assert "%phi4mm_flash_bwd_dkv" in text
        assert self.heads(text) == []
