"""Names that a profile shows the phases of a program by."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.engine.sampling import Sampling, SamplingRows, sample
from phi4mm_jax.model import KVCache, Phi4MM
from phi4mm_jax.model.phi4mm import abstract_batch
from phi4mm_jax.training.step import initial_state, supervised, train_step

PAGE = 16


def names(function, *arguments) -> set[str]:
    """Parts of the names that a function's operations carry into a profile."""
    text = jax.jit(function).lower(*arguments).as_text(debug_info=True)
    return {part for name in re.findall(r'"(jit\(.*?)"', text) for part in name.split("/")}


@pytest.mark.parametrize("tokens", [1, PAGE])
def test_phases_of_inference_are_named(tiny, tokens):
    """Over one page of cache: a chunk of prefill, and a step of decoding."""
    module: Phi4MM = tiny.module

    def step(variables, cache):
        rows = jnp.ones(1, jnp.int32)
        hidden = module.apply(
            variables, jnp.zeros((1, tokens), jnp.int32), jnp.full((1, tokens), -1), None, method="embed"
        )
        hidden, cache = module.apply(
            variables, hidden, rows * tokens, rows, None, cache, rows * 0, jnp.zeros((1, 1), jnp.int32), method="decode"
        )
        logits = module.apply(variables, hidden[:, 0], method="logits")
        return sample(logits, rows, SamplingRows.of([Sampling()])), cache

    cache = jax.eval_shape(lambda: KVCache.allocate(tiny.config.decoder, 1, PAGE, jnp.float32))
    found = names(step, tiny.variables, cache)
    kernel = {"decode_attention"} if tokens == 1 else {"cached_attention", "cache_gather", "flash_attention"}
    assert {"attention", "mlp", "rope", "cache_write", "sampling", "Phi4MM.logits", *kernel} <= found


def test_phases_of_training_are_named(tiny):
    module = Phi4MM(tiny.config, jnp.float32)
    batch = abstract_batch(tiny.config)
    batch = TrainingBatch(batch, batch.tokens, jax.ShapeDtypeStruct(batch.tokens.shape, np.float32))
    batches = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), batch)
    variables = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), abstract_batch(tiny.config)))
    trainable, frozen = {"lora_speech": variables.pop("lora_speech")}, variables
    optimizer = optax.adamw(1e-3)
    state = jax.eval_shape(lambda x: initial_state(x, optimizer), trainable)

    def step(state, frozen, batches):
        return train_step(supervised(module), optimizer, state, frozen, batches, None)

    found = names(step, state, frozen, batches)
    assert {"attention", "flash_attention", "mlp", "vision", "speech", "jvp(loss)", "optimizer"} <= found
