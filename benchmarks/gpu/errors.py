"""Errors of the kernels on one GPU against attention written out in float64.

An error is the norm of the difference over the norm of what is right, of the output or of the gradient that is furthest
off. Inputs are rounded to the kernel's dtype before, so that rounding of its own is left: some 2e-3 in bfloat16.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.common import HEADS, KV_HEADS, SIZE, Measurement
from phi4mm_jax.kernels import append_tokens, cached_attention, decode_attention, flash_attention, gpu
from tests.helpers.attention import pages_of, quantized, random, reference, unpaged

VISION_HEADS, VISION_SIZE = 16, 72
PAGE, LAYERS, LAYER = 64, 3, 1


def numbers(small: bool) -> Iterator[Measurement]:
    for name, (shape, options) in flash_cases(128 if small else 1024).items():
        yield f"attention, {name}", "ours", "error", partial(flash_error, shape, options)
    for kind in ("bfloat16", "int8"):
        yield f"a chunk over pages, {kind}", "ours", "error", partial(chunk_error, kind, 640 if small else 8640)
    longest = 300 if small else 1500
    for batch in (1, 9):
        for kind in ("bfloat16", "float16", "int8"):
            for side, (context, name) in decoders().items():
                measure = partial(decode_error, longest, batch, kind, context, name)
                yield f"a decoding step's attention, {batch} rows, {kind}", side, "error", measure
    if gpu.target() is None:
        return
    for kind in ("bfloat16", "int8"):
        yield f"new tokens written into pages, {kind}", "ours", "error", partial(append_error, kind)


def decoders() -> dict[str, tuple[Callable[[], Any], str | None]]:
    """Return by side the context and the implementation that decoding is traced in."""
    target = gpu.target()
    sides: dict[str, tuple[Callable[[], Any], str | None]] = {"ours": (nullcontext, None), "XLA": (nullcontext, "xla")}
    if target is not None and target.capability[0] == gpu.HOPPER[0]:  # beside the kernel for Hopper, that for every GPU
        sides["Triton"] = partial(gpu.assumed, gpu.Target(gpu.AMPERE, target.cores)), None
    return sides


def flash_cases(length: int) -> dict[str, tuple[tuple[int, ...], dict[str, Any]]]:
    """Return by name (B, T, S, N, K, H) and the options of `flash_attention`."""
    text, vision = (HEADS, KV_HEADS, SIZE), (VISION_HEADS, VISION_HEADS, VISION_SIZE)
    few = np.repeat([[0, 1, 2, 3]], np.array([4, 1, 8, 3]) * length // 16, axis=1)
    many = np.arange(length)[None] * 64 // length  # more than cuDNN's lengths allow: left to XLA
    valid = np.arange(length) % 7 < [[7], [5]]
    return {
        "causal": ((2, length, length, *text), {"causal": True}),
        "padded rows": (
            (3, length, length, *text),
            {"causal": True, "kv_lengths": np.array([length, 1, length // 3], np.int32)},
        ),
        "4 documents in a row": (
            (1, length, length, *text),
            {"causal": True, "q_segments": few, "kv_segments": few},
        ),
        "64 documents in a row": (
            (1, length, length, *text),
            {"causal": True, "q_segments": many, "kv_segments": many},
        ),
        "the end of a prompt": (
            (2, length // 4, length, *text),
            {"causal": True, "q_offset": np.array([3 * length // 4, length // 2], np.int32)},
        ),
        "crops with masked patches": ((2, length, length, *vision), {"causal": False, "kv_mask": valid}),
    }


def draw(seed: int, *shapes: tuple[int, ...], dtype: Any = jnp.bfloat16) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(x, dtype) for x in random(seed, *shapes))


def widened(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def error(found: Any, right: Any) -> float:
    found, right = widened(found), widened(right)
    return float(np.linalg.norm(found - right) / np.linalg.norm(right)) if np.isfinite(found).all() else float("nan")


def flash_error(shape: tuple[int, ...], options: dict[str, Any]) -> float:
    batch, length, keys, heads, kv_heads, size = shape
    of_keys = batch, keys, kv_heads, size
    q, k, v, d_out = draw(0, (batch, length, heads, size), of_keys, of_keys, (batch, length, heads, size))

    def program(attention, q, k, v, d_out):
        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(d_out)

    ours = jax.jit(partial(program, lambda *x: flash_attention(*x, **options)))
    with jax.enable_x64(True):
        plain = jax.jit(partial(program, lambda *x: reference(*x, **options)[0]))
        right = plain(*(jnp.asarray(widened(x)) for x in (q, k, v, d_out)))
    return max(map(error, ours(q, k, v, d_out), right))


def cached(lengths: np.ndarray, kind: str) -> tuple[dict[str, jax.Array], np.ndarray, np.ndarray, np.ndarray]:
    """Return keys and values in pages with their scales, the table, and both (B, S, K, H) of LAYER as floats."""
    per_row = -(-int(lengths.max()) // PAGE)
    *values, tables = pages_of(2, lengths, kv_heads=KV_HEADS, page=PAGE, layers=LAYERS, per_row=per_row)
    arrays, plain = {}, []
    for name, pages in zip("kv", values, strict=True):
        if kind == "int8":
            integers, scales = quantized(pages)
            arrays |= {name: jnp.asarray(integers), f"{name}_scales": jnp.asarray(scales)}
            pages = integers * scales[..., None]
        else:
            pages = arrays[name] = jnp.asarray(pages, kind)
        plain.append(unpaged(widened(pages)[LAYER], tables))
    return arrays, tables, *plain


def plainly(q: Any, k: np.ndarray, v: np.ndarray, **options: Any) -> np.ndarray:
    with jax.enable_x64(True):
        attend = jax.jit(lambda *x: reference(*x, **options)[0])
        return np.asarray(attend(*(jnp.asarray(widened(x)) for x in (q, k, v))))


def decode_error(longest: int, batch: int, kind: str, context: Callable[[], Any], name: str | None) -> float:
    """Return the error of rows whose keys fill whole pages, some or none."""
    some, whole = longest // 2 - 50, (longest // PAGE - 1) * PAGE
    lengths = np.array([longest, 1, 63, 64, 65, some, 0, whole, 3], np.int32)[:batch]
    pages, tables, k, v = cached(lengths, kind)
    dtype = jnp.bfloat16 if kind == "int8" else kind
    (q,) = draw(3, (batch, HEADS, SIZE), dtype=dtype)
    with context():
        found = jax.jit(
            lambda q, pages: decode_attention(
                q, **pages, layer=jnp.int32(LAYER), lengths=jnp.asarray(lengths), tables=jnp.asarray(tables),
                implementation=name,
            )
        )(q, pages)  # fmt: skip
    return error(found, plainly(q[:, None], k, v, causal=False, kv_lengths=lengths)[:, 0])


def chunk_error(kind: str, max_cached: int) -> float:
    """Return the error of 256 tokens of each row, after none, some and `max_cached` cached ones."""
    starts = np.array([0, 384, max_cached], np.int32)
    lengths = starts + np.array([200, 256, 256], np.int32)
    pages, tables, k, v = cached(lengths, kind)
    (q,) = draw(4, (len(starts), 256, HEADS, SIZE))
    found = jax.jit(
        lambda q, pages: cached_attention(
            q, **pages, layer=jnp.int32(LAYER), starts=jnp.asarray(starts), lengths=jnp.asarray(lengths),
            tables=jnp.asarray(tables),
        )
    )(q, pages)  # fmt: skip
    valid = np.arange(256) < (lengths - starts)[:, None]
    right = plainly(q, k, v, causal=True, q_offset=starts, kv_lengths=lengths)
    return error(widened(found)[valid], right[valid])


def append_error(kind: str) -> float:
    """Return the error of the tokens that are read back; infinite where anything else has changed."""
    pages, *_ = cached(np.array([640], np.int32), kind)
    caches = [pages[name] for name in ("k", "v", "k_scales", "v_scales") if name in pages]
    new = draw(5, *[(4, KV_HEADS, SIZE)] * 2)
    at, slots = np.array([3, 0, 7, 1]), np.array([0, PAGE - 1, 5, 33])
    written = jax.jit(
        lambda caches, new: append_tokens(
            caches, new, layer=jnp.int32(LAYER), pages=jnp.asarray(at), slots=jnp.asarray(slots)
        )
    )(caches, new)
    assert written is not None  # on a GPU
    for before, after in zip(caches, written, strict=True):
        others = np.ones(before.shape[:4], bool)
        others[LAYER, at, :, slots] = False
        if not np.array_equal(np.asarray(before)[others], np.asarray(after)[others], equal_nan=before.dtype != np.int8):
            return float("inf")
    tokens = [widened(x)[LAYER, at, :, slots] for x in written]
    if kind == "int8":
        tokens = [values * scales[..., None] for values, scales in zip(tokens[:2], tokens[2:], strict=True)]
    return max(map(error, tokens, new))
