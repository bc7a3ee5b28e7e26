"""The engine's decoding at full size, compiled by the TPU's compiler for eight chips, without one."""

import json
import os
from functools import partial
from typing import Any

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # there is no TPU to ask about

import jax
import jax.numpy as jnp
import numpy as np
from conftest import FIXTURES
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from test_attention_compiled import copies

from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.generation import Programs, Sampling
from phi4mm_jax.generation.programs import Slots
from phi4mm_jax.generation.sampling import SamplingRows
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.phi4mm import abstract_variables, empty_cache
from phi4mm_jax.sharding import shardings

SLOTS, PAGES, PAGE, PAGES_OF_A_ROW = 16, 2048, 128, 1024  # a cache of 256K tokens; rows of up to 128K


def test_decoding_holds_one_cache_and_moves_none_of_it():
    config = Phi4MMConfig.from_dict(json.loads((FIXTURES / "ms_release_config.json").read_text()))
    module = Phi4MM(config, jnp.bfloat16)
    abstract = abstract_variables(module)
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = Mesh(np.array(chips).reshape(1, 8), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    places = shardings(abstract, mesh)

    def on_chips(shape, dtype, place):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    flat: dict[Any, Any] = flatten_dict(nn.unbox(abstract))
    variables = unflatten_dict({path: on_chips(x.shape, jnp.bfloat16, places[path]) for path, x in flat.items()})
    programs = Programs(module, variables)
    everywhere = partial(on_chips, place=NamedSharding(mesh, jax.P()))
    cache = jax.eval_shape(lambda: empty_cache(config, PAGES, PAGE, jnp.bfloat16))
    cache = jax.tree.map(lambda x: on_chips(x.shape, x.dtype, programs._placement(x)), cache)
    settings = SamplingRows.of([Sampling()] * SLOTS)
    slots = Slots(
        *(everywhere((SLOTS,), jnp.int32) for _ in range(3)),
        tables=everywhere((SLOTS, PAGES_OF_A_ROW), jnp.int32),
        adapters=everywhere((SLOTS,), jnp.int32),
        long=everywhere((SLOTS,), jnp.bool_),
        drawn=everywhere((SLOTS,), jnp.int32),
        settings=jax.tree.map(lambda x: everywhere(x.shape, x.dtype), settings),
    )
    seen = everywhere((SLOTS, config.decoder.vocab_size), jnp.bool_)
    compiled = programs.decode.lower(variables, cache, seen, slots, width=8).compile()
    memory = compiled.memory_analysis()
    of_cache = sum(x.size * x.dtype.itemsize for x in cache if x is not None) / 8
    assert memory.alias_size_in_bytes >= of_cache
    assert memory.temp_size_in_bytes < 0.05 * of_cache  # 0.16 of 4.3 GB
    text = compiled.as_text()
    assert "phi4mm_decode" in text
    layer = PAGES * PAGE * config.decoder.head_size  # keys of the one head that a chip has, in one layer
    assert copies(text, layer) == []
