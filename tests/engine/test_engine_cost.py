"""What a round costs depends on the tokens that are there: not on the cache's size, nor on how long rows may get."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from helpers.marks import fast_are
from helpers.paths import TINY

import phi4mm_jax
from phi4mm_jax.batch import ImageStack
from phi4mm_jax.engine import Engine, EngineConfig
from phi4mm_jax.engine.encoder_cache import warm_up_stacks
from phi4mm_jax.engine.inputs import decode_inputs, prefill_inputs
from phi4mm_jax.engine.scheduler import DecodeBatch, PrefillBatch

SMALL = EngineConfig(slots=4, cache_tokens=2048, chunk=256, feature_blocks=32)
LARGE = dataclasses.replace(SMALL, cache_tokens=32768, feature_blocks=512)  # and tables of 256 pages a row, not 16
CHANGED = {
    "decode": (1, 2),
    "prefill": (1,),
    "encode": (1,),
    "set_penalty_mask": (0,),
}  # arguments: cache, seen, features


class Compiling:
    """In place of an engine's programs: compiles for the arguments, and runs nothing."""

    def __init__(self, programs):
        self._programs, self.model, self.place = programs, programs.model, programs.place
        self.context, self.devices, self.place_media = programs.context, programs.devices, programs.place_media
        self.compiled: Any = None
        self.changed: list[Any] = []

    def __getattr__(self, name):
        def program(*arguments, **named):
            self.compiled = getattr(self._programs, name).lower(*arguments, **named).compile()
            self.changed = [arguments[i] for i in CHANGED[name]]
            raise StopIteration

        return program


def compiled(tiny, config, program):
    """The compiled program, and the bytes of what it is given to change."""
    programs: Any = Compiling(tiny.programs)
    engine = Engine(programs, tiny.variables, tiny.processor, config)
    runner = engine.runner
    stacks = {isinstance(s, ImageStack): (s, n) for s, n in reversed(list(warm_up_stacks(tiny.config, [4, 1])))}
    resting = decode_inputs(DecodeBatch.idle(config.slots), runner.table_size, with_top=False)
    chunk = prefill_inputs(PrefillBatch([], [], 256, True), [], 1, runner.table_size)
    calls = {
        "decode": lambda: runner.run_decode({0, 1, 2}, resting),
        "prefill": lambda: runner.run_prefill({1}, chunk),
        "image": lambda: runner.encoder_cache.warm_up(*stacks[True]),
        "audio": lambda: runner.encoder_cache.warm_up(*stacks[False]),
        "set_penalty_mask": lambda: runner.run_set_penalty_mask(0, np.zeros(runner.token_seen.shape[1], bool)),
    }
    with pytest.raises(StopIteration):
        calls[program]()
    return programs.compiled, sum(x.nbytes for x in jax.tree.leaves(programs.changed))


@pytest.mark.parametrize(
    ("program", "dtype", "cache_dtype"),
    fast_are(
        [("decode", "float32", "int8"), ("decode", "bfloat16", None), ("image", "bfloat16", None),
         ("audio", "float32", None), ("set_penalty_mask", "float32", None)],
        [*itertools.product(("decode", "prefill"), ("float32", "bfloat16"), (None, "int8")),
         *itertools.product(("image", "audio"), ("float32", "bfloat16"), (None,)),
         ("set_penalty_mask", "float32", None)],
    ),
)  # fmt: skip
def test_memory_is_donated_and_needed_besides_no_more(tiny, program, dtype, cache_dtype):
    """What is changed is changed in place, and with 16 times the cache the rest takes no page more."""
    model = tiny if dtype == "float32" else phi4mm_jax.load(TINY, dtype=dtype, scan=True)
    found = [compiled(model, dataclasses.replace(c, cache_dtype=cache_dtype), program) for c in (SMALL, LARGE)]
    for one, changed in found:
        assert one.memory_analysis().alias_size_in_bytes >= changed
    (small, few), (large, many) = found
    if program != "set_penalty_mask":
        assert many > 12 * few
    pages = (SMALL.cache_tokens or 0) / SMALL.page_tokens
    page = few / (SMALL.feature_blocks if program in ("image", "audio") else pages)
    assert large.memory_analysis().temp_size_in_bytes <= small.memory_analysis().temp_size_in_bytes + page
    assert large.cost_analysis()["flops"] == pytest.approx(small.cost_analysis()["flops"], rel=1e-3)
