"""Ceilings of the GPU, and the attention kernels beside XLA and cuDNN."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.gpu.common import HEADS, KV_HEADS, SIZE, Measurement, attention_rows, of_jax


def ceilings(small: bool) -> Iterator[Measurement]:
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    yield "platform", "ours", "", lambda: f"{device.device_kind}, jax {jax.__version__}"
    size, side = (1 << 16, 128) if small else (1 << 31, 8192)

    def read() -> float:
        x, largest = jnp.ones(size, jnp.bfloat16), jax.jit(jnp.max)
        return 2 * size / of_jax(lambda: largest(x)) / 1e12

    def copy() -> float:
        x, add = jnp.ones(size, jnp.bfloat16), jax.jit(lambda x: x + jnp.bfloat16(1))
        return 4 * size / of_jax(lambda: add(x)) / 1e12

    def product() -> float:  # of random numbers: of equal ones it is faster
        x, y = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
        multiply = jax.jit(lambda a, b: a @ b)
        return 2 * side**3 / of_jax(lambda: multiply(x, y)) / 1e12

    yield "ceiling: read", "ours", "TB/s", read
    yield "ceiling: copy", "ours", "TB/s", copy
    yield "ceiling: bfloat16 product", "ours", "TFLOP/s", product


def kernels(small: bool) -> Iterator[Measurement]:
    import jax
    import jax.numpy as jnp

    from phi4mm_jax.kernels import flash_attention

    def draw(seed: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    def bare(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    sides = {
        "ours": lambda q, k, v: flash_attention(q, k, v, causal=True),
        "XLA": lambda q, k, v: flash_attention(q, k, v, causal=True, implementation="xla"),
        "cuDNN bare": bare,
    }
    for backward, length, name, operations in attention_rows(small):
        for side, attention in sides.items():
            if side == "XLA" and length > 16384:
                continue

            def measure(attention=attention, length=length, operations=operations, backward=backward) -> float:
                def both(q, k, v):
                    out, pull = jax.vjp(attention, q, k, v)
                    return pull(out)

                call = jax.jit(both if backward else attention)
                q, k, v = draw(0, 1, length, HEADS, SIZE), *(draw(i, 1, length, KV_HEADS, SIZE) for i in (1, 2))
                return operations / of_jax(lambda: call(q, k, v)) / 1e12

            yield name, side, "TFLOP/s", measure
    yield from decoding_kernels(small, draw)


def decoding_kernels(small: bool, draw: Callable[..., Any]) -> Iterator[Measurement]:
    """Yield one step's attention of four layers, in bytes of keys, values and scales that it has to read."""
    import jax
    import jax.numpy as jnp

    from benchmarks.gpu.errors import decoders
    from phi4mm_jax.kernels import decode_attention

    layers, page = 4, 64
    for batch, length in ((1, 256), (2, 128)) if small else ((1, 131072), (8, 8192), (64, 2048)):
        for int8 in (False, True):
            for side, (context, name) in decoders().items():

                def measure(batch=batch, length=length, int8=int8, context=context, name=name) -> float:
                    pages = batch * length // page
                    shape = layers, pages, KV_HEADS, page, SIZE
                    tables = np.random.default_rng(0).permutation(pages).astype(np.int32).reshape(batch, -1)
                    if int8:
                        k = jax.random.randint(jax.random.key(1), shape, -127, 128, jnp.int8)
                        scales = jax.random.uniform(jax.random.key(2), shape[:4]) * 0.02
                    else:
                        k, scales = draw(1, *shape), None

                    @jax.jit
                    def step(q, k, v, k_scales, v_scales):
                        for layer in range(layers):
                            q = decode_attention(
                                q, k, v, layer=layer, lengths=jnp.full(batch, length), tables=jnp.asarray(tables),
                                k_scales=k_scales, v_scales=v_scales, implementation=name,
                            )  # fmt: skip
                        return q

                    q, v = draw(3, batch, HEADS, SIZE), k + k.dtype.type(0)  # pages of its own
                    bytes_read = layers * batch * length * KV_HEADS * 2 * (SIZE + 4 if int8 else 2 * SIZE)
                    with context():
                        return bytes_read / of_jax(lambda: step(q, k, v, scales, scales)) / 1e12

                kind = "int8" if int8 else "bfloat16"
                yield f"attention of a decoding step, {batch} x {length}, {kind}", side, "TB/s", measure
