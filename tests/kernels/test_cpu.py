"""Linear maps on one CPU by pieces of a large weight, against plain products in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.norms import distance
from helpers.paths import TINY
from helpers.quantized import dequantized, floats_of

import phi4mm_jax
from phi4mm_jax.kernels import cpu, linear
from phi4mm_jax.mesh import make_mesh
from phi4mm_jax.quantization import QuantizedWeight

Q, OUT, UP, HEAD = "BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DF->BTF", "...D,VD->...V"
CASES = {  # equation, shape of the weight, of the scales; all above `cpu._PIECE`, which no piece may be
    "int8 heads": (Q, (1536, 12, 128), (1, 12, 128)),
    "int8 of heads": (OUT, (12, 128, 1536), (1, 1, 1536)),
    "int8": (UP, (1024, 4160), (1, 4160)),
    "int8 of a prime number of outputs": (UP, (1024, 2053), (1, 2053)),
    "int4 heads": (Q, (1536, 12, 128), (12, 12, 128)),
    "int4 of heads": (OUT, (12, 128, 1536), (12, 1, 1536)),
    "int4": (UP, (2048, 1032), (16, 1032)),
    "int8 head": (HEAD, (5210, 512), (5210, 1)),
    "float head": (HEAD, (5210, 512), None),
    "bfloat16 head": (HEAD, (5210, 512), None),
    "bfloat16": (UP, (1024, 4160), None),
    "bfloat16 of heads": (OUT, (12, 128, 1536), None),
    "floats": (UP, (1024, 2080), None),
    "floats of heads": (OUT, (12, 128, 1536), None),
}


def operands(name: str, rows: int):
    """Rows whose mean is not zero, and the weight; then both in float64."""
    equation, shape, scales = CASES[name]
    random = np.random.default_rng(rows)
    letters, axes = equation.partition("->")[0].split(",")
    sizes = dict(zip(axes, shape, strict=True))
    inputs = [sizes[axis] for axis in letters.removeprefix("...").removeprefix("BT")]
    x = (random.standard_normal((rows, 1, *inputs)) + 0.5).astype(np.float32)
    if scales is None:
        weight = jnp.asarray(random.standard_normal(shape), "bfloat16" if name.startswith("bfloat16") else "float32")
        return equation, x, weight, np.asarray(weight, np.float64)
    most = 8 if name.startswith("int4") else 128
    values, factors = random.integers(1 - most, most, shape), random.uniform(0.01, 0.1, scales)
    dtypes = (jnp.int4, jnp.bfloat16) if most == 8 else (jnp.int8, jnp.float32)
    weight = QuantizedWeight(*(jnp.asarray(y, dtype) for y, dtype in zip((values, factors), dtypes, strict=True)))
    return equation, x, weight, floats_of(weight)


@pytest.mark.parametrize(
    ("name", "rows", "dtype"),
    [
        *[(name, rows, "float32") for name in CASES if name.startswith("int") for rows in (1, 5, 130)],
        *[(name, 5, "bfloat16") for name in ("int8 of heads", "int4 heads", "int8 head")],
        *[(name, rows, "bfloat16") for name in CASES if name.startswith("bfloat16") for rows in (1, 5)],
        *[("float head", 5, "float32"), ("floats", 1, "float32"), ("floats of heads", 1, "float32")],
    ],
)
def test_products_and_gradients_are_those_of_the_weights_as_floats(name, rows, dtype):
    equation, x, weight, floats = operands(name, rows)
    assert cpu.is_faster(equation, jnp.asarray(x, dtype), weight)
    inputs, out = equation.split("->")
    expected = np.einsum(equation, x := np.asarray(jnp.asarray(x, dtype), np.float64), floats, optimize=True)
    towards = np.random.default_rng(0).standard_normal(expected.shape)
    back = f"{out},{inputs.split(',')[1]}->{inputs.split(',')[0]}"
    wanted = np.einsum(back, np.asarray(jnp.asarray(towards, dtype), np.float64), floats, optimize=True)

    @jax.jit
    def program(x, towards, weight):
        found, pull = jax.vjp(lambda x: linear(equation, x, weight), x)
        return found, *pull(towards)

    found, gradient = program(jnp.asarray(x, dtype), jnp.asarray(towards, dtype), weight)
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    bound = 2e-6 if dtype == "float32" else 5e-3
    assert distance(found, expected) < bound
    assert distance(gradient, wanted) < bound


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        (name, rows)
        for name in CASES
        if name.startswith(("int", "bfloat16")) and "prime" not in name
        for rows in ((1, 5, 130) if name.startswith("int") else (1, 5))
    ],
)
def test_no_weight_is_written_as_floats_even_in_a_loop(name, rows):
    """XLA moves out of a loop what each of its rounds computes alike, such as the floats of a whole weight."""
    equation, x, weight, floats = operands(name, rows)

    @jax.jit
    def rounds(x, weight):
        return jax.lax.fori_loop(0, 3, lambda _, x: x + linear(equation, x, weight).mean(), x)

    x = jnp.asarray(x, "bfloat16" if name.startswith("bfloat16") else "float32")
    memory = rounds.lower(x, weight).compile().memory_analysis()
    assert memory is not None
    results = 4 * floats.size * rows**2 // x.size  # bytes of a product
    assert memory.temp_size_in_bytes < 0.8 * 4 * floats.size + 3 * results


@pytest.mark.parametrize("name", ["bfloat16 head", "bfloat16 of heads", "float head", "floats"])
def test_gradients_of_trained_weights(name):
    rows = 1 if name == "floats" else 5
    equation, x, weight, _ = operands(name, rows)
    assert isinstance(weight, jax.Array)
    x = jnp.asarray(x, weight.dtype)
    inputs, out = equation.split("->")
    letters, axes = inputs.split(",")
    found, pull = jax.vjp(jax.jit(lambda weight: linear(equation, x, weight)), weight)
    towards = jnp.asarray(np.random.default_rng(0).standard_normal(found.shape), weight.dtype)
    (gradient,) = jax.jit(pull)(towards)
    assert gradient.dtype == weight.dtype
    wide = (np.asarray(y, np.float64) for y in (x, towards))
    letters, out = (y.replace("...", "BT") for y in (letters, out))
    expected = np.einsum(f"{letters},{out}->{axes}", *wide, optimize=True)
    assert distance(gradient, expected) < (2e-6 if weight.dtype == jnp.float32 else 5e-3)


def test_small_weights_and_meshes_are_left_to_xla():
    equation, x, weight, _ = operands("int8", 2)
    assert cpu.is_faster(equation, jnp.asarray(x), weight)
    small = jax.tree.map(lambda y: y[:, :64], weight)
    assert not cpu.is_faster(equation, jnp.asarray(x), small)
    floats = jnp.zeros(weight.shape)
    assert [rows for rows in (1, 2) if cpu.is_faster(equation, jnp.ones((rows, 1, 1024)), floats)] == [1]
    assert not cpu.is_faster(equation, jnp.ones((1, 1, 1024), jnp.bfloat16), floats)
    assert not cpu.is_faster(equation, jnp.ones((130, 1, 1024), jnp.bfloat16), floats.astype(jnp.bfloat16))
    with jax.set_mesh(make_mesh(fsdp=2)):
        assert not cpu.is_faster(equation, jnp.asarray(x), weight)


def test_large_int4_weights_are_loaded_as_int8(monkeypatch):
    """Those alone that are cut into pieces; they hold the same numbers, and give the logits of these as floats."""
    narrow: dict[Any, Any] = flatten_dict(phi4mm_jax.load(TINY, "float32", weights="int4").variables)
    monkeypatch.setattr(cpu, "_PIECE", 5000)
    model = phi4mm_jax.load(TINY, "float32", weights="int4")
    found: dict[Any, Any] = flatten_dict(model.variables)
    assert found.keys() == narrow.keys()
    for path, x in narrow.items():
        is_wide = x.dtype == jnp.int4 and x.size > 5000
        assert found[path].dtype == (jnp.int8 if is_wide else x.dtype)
        np.testing.assert_array_equal(np.asarray(found[path], np.float32), np.asarray(x, np.float32))
    kinds = {x.dtype.name for x in found.values()}
    assert {"int4", "int8"} < kinds
    batch = model.process(["<|user|>one two three<|end|><|assistant|>"])
    plain = phi4mm_jax.Model(model.module, dequantized(model.variables), model.processor)
    logits, expected = (np.asarray(m.logits(batch))[0, : batch.lengths[0]] for m in (model, plain))
    assert distance(logits, expected) < 1e-4
