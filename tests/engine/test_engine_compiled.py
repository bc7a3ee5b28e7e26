"""The engine's programs at full width, compiled by the TPU's compiler for eight chips, without one.

Their vocabulary is small: the compiler takes half a minute for the sorting of 200,064 tokens.
"""

import json
import os
import re
from dataclasses import replace
from functools import cache, partial
from typing import Any

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # there is no TPU to ask about

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from helpers.marks import fast_are
from helpers.paths import FIXTURES
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.engine import Programs, Sampling
from phi4mm_jax.engine.sampling import SamplingRows
from phi4mm_jax.engine.step_io import BeamInputs, Carried, DecodeInputs, PrefillInputs
from phi4mm_jax.model import KVCache, Phi4MM
from phi4mm_jax.quantization import Weights
from phi4mm_jax.testing.abstract_variables import variables_on
from phi4mm_jax.testing.compiled import copies, float_copies

pytestmark = pytest.mark.tpu_compile

SLOTS, PAGES, PAGE, PAGES_OF_A_ROW = 16, 2048, 128, 1024  # a cache of 256K tokens; rows of up to 128K
CHUNK, VOCABULARY, LAYERS = 512, 1024, 2
BYTES = {"pred": 1, "s8": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}


@cache
def compiled(program: str, weights: Weights | None, context: int, chips: int) -> tuple[Any, int]:
    """A program of two layers on chips that share the heads and the tokens of pages, and the cache's bytes on each."""
    config = Phi4MMConfig.from_dict(json.loads((FIXTURES / "ms_release_config.json").read_text()))
    config = replace(config, decoder=replace(config.decoder, vocab_size=VOCABULARY, num_layers=LAYERS))
    module = Phi4MM(config, jnp.bfloat16, scan=False)  # as `load` has it
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices[:chips]
    mesh = Mesh(np.array(devices).reshape(context, -1), ("context", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def on_chips(shape, dtype, place):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    variables = unflatten_dict(variables_on(mesh, module, weights))
    programs = Programs(module, variables)
    everywhere = partial(on_chips, place=NamedSharding(mesh, jax.P()))
    numbers, flags = partial(everywhere, dtype=jnp.int32), partial(everywhere, dtype=jnp.bool_)
    pages = jax.eval_shape(lambda: KVCache.allocate(config.decoder, PAGES // context, PAGE * context, jnp.bfloat16))
    pages = jax.tree.map(lambda x: on_chips(x.shape, x.dtype, programs.sharding_of(x)), pages)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages)) // chips
    rows = 1 if program == "prefill" else SLOTS
    tables = numbers((rows, PAGES_OF_A_ROW // context))
    settings = SamplingRows.of([Sampling()] * rows)
    settings = jax.tree.map(lambda x: everywhere(x.shape, x.dtype), settings)
    seen = flags((SLOTS, VOCABULARY))
    seen = on_chips(seen.shape, seen.dtype, programs.sharding_of(seen))
    row, long = numbers((rows,)), flags((rows,))
    if program == "decode":
        slots = DecodeInputs(row, row, row, tables, row, long, row, settings)
        lowered = programs.decode.lower(variables, pages, seen, slots, width=8)
    elif program == "drafts":
        slots = DecodeInputs(
            row, row, row, tables, row, long, row, settings, carried=Carried(row, row), with_drafts=long, limits=row,
            widths=row, max_steps=numbers(()),
        )  # fmt: skip
        history = numbers((SLOTS, PAGES_OF_A_ROW * PAGE))
        lowered = programs.decode_drafts.lower(variables, pages, seen, history, slots, width=48, max_draft=5)
    elif program == "extend":
        beams = BeamInputs(row, row, tables, row, long, row, row, numbers(()))
        lowered = programs.beam_step.lower(variables, pages, beams, candidates=16)
    else:
        tokens = numbers((rows, CHUNK))
        chunk = PrefillInputs(tokens, tokens, row, row, tables, row, long, row, row, settings)
        features = everywhere((1024, config.decoder.embed_dim), jnp.bfloat16)
        lowered = programs.prefill.lower(variables, pages, features, seen, chunk)
    return lowered.compile(), held


def moved(text: str) -> list[tuple[float, str]]:
    """Collectives in a compiled module, but for sums: the bytes of the result, and where each comes from."""
    found = []
    for line in text.splitlines():
        kinds = "all-gather|all-to-all|collective-permute|reduce-scatter"
        if match := re.search(rf"= (.*?) (?:{kinds})(?:-start)?\(", line):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            size = sum(BYTES[dtype] * np.prod([int(n) for n in shape.split(",") if n]) for dtype, shape in shapes)
            found.append((size, line[line.find("op_name") :]))
    return found


@pytest.mark.parametrize(
    ("program", "context"),
    fast_are(
        [("decode", 1), ("prefill", 2)], [(p, n) for p in ("decode", "drafts", "prefill", "extend") for n in (1, 2)]
    ),
)
def test_programs_gather_no_cache(program, context):
    """A row of the longest has 16 MB of keys in a layer, the smallest weight of a layer is 6 MB: 1.5 on four chips.

    No weights are gathered but where a chunk's tokens are shared: then one layer's at a time.
    """
    text = compiled(program, None, context, 8)[0].as_text()
    assert "phi4mm_cached" in text if program == "prefill" else "phi4mm_decode" in text
    assert "all-reduce" in text  # as the products of split weights need it
    gathered = [size for size, place in moved(text) if size > 2**20]  # activations of drafts: 0.6 MB
    shared = program == "prefill" and context > 1
    assert bool(gathered) == shared
    largest = 2 * 3072 * 8192 // (8 // context)  # bytes of a chip's part of the gate's weight
    assert max(gathered, default=0) <= shared * largest


@pytest.mark.parametrize("program", fast_are(["decode"], ["decode", "drafts", "extend"]))
def test_decoding_holds_one_cache_and_moves_none_of_it(program):
    step, of_cache = compiled(program, None, 1, 8)
    memory = step.memory_analysis()
    assert memory.alias_size_in_bytes >= of_cache
    assert memory.temp_size_in_bytes < 0.05 * of_cache  # 0.16 of 4.3 GB in decoding, with the whole vocabulary
    text = step.as_text()
    assert "phi4mm_append" in text
    layer = PAGES * PAGE * 128  # keys of the one head that a chip has, in one layer
    assert copies(text, layer) == []


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_decoding_reads_quantised_weights_as_integers(weights):
    """No float copy of any weight is made in memory; the smallest of a layer, on one of eight chips, has 393,216."""
    step, _ = compiled("decode", weights, 1, 8)
    text = step.as_text()
    assert ("phi4mm_int4" in text) == (weights == "int4")
    plain = compiled("decode", None, 1, 8)[0]
    saved = {"int8": 0.45, "int4": 0.7}[weights] * 2 * 1e8 * LAYERS / 8  # of the layers' bytes on each chip
    after, before = (x.memory_analysis().argument_size_in_bytes for x in (step, plain))
    assert before - after > saved
    found = float_copies(text, 393_216, VOCABULARY)
    assert [copy for copy in found if ",320]" not in copy] == []  # the speech adapter's rank, whose A is a float
    assert [place for size, place in moved(text) if size > 2**18] == []


@pytest.mark.parametrize("program", fast_are(["decode"], ["decode", "drafts"]))
def test_decoding_on_one_chip_reads_weights_where_they_lie(program):
    """Neither cut out of a stack nor in another layout; the smallest of a layer, that of the keys, has 3,145,728."""
    text = compiled(program, None, 1, 1)[0].as_text()
    assert "phi4mm_decode" in text
    found = float_copies(text, 3072 * 1024, VOCABULARY)
    assert [copy for copy in found if ",320]" not in copy] == []  # the speech adapter's rank
