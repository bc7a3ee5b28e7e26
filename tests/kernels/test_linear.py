"""Linear maps of int4 weights by the TPU kernel, interpreted and compiled, against a plain product in float64."""

import os

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # there is no TPU to ask about

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.marks import fast_are
from helpers.norms import distance
from helpers.quantized import floats_of
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from phi4mm_jax.config import LoraConfig
from phi4mm_jax.kernels import linear, tpu
from phi4mm_jax.mesh import make_mesh
from phi4mm_jax.model.layers import tpu_format
from phi4mm_jax.model.lora import GATE_UP, Projection
from phi4mm_jax.quantization import QuantizedWeight
from phi4mm_jax.testing.compiled import copies, float_copies

Q, OUT, UP = "BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DF->BTF"
RELEASE = {  # equation, shape of the weight, of the scales
    "q": (Q, (3072, 24, 128), (24, 24, 128)), "k": (Q, (3072, 8, 128), (24, 8, 128)),
    "out": (OUT, (24, 128, 3072), (24, 1, 3072)), "up": (UP, (3072, 8192), (24, 8192)),
    "down": (UP, (8192, 3072), (64, 3072)),
}  # fmt: skip
SMALL = {
    "heads": (Q, (256, 4, 128), (2, 4, 128)), "of heads": (OUT, (4, 128, 512), (4, 1, 512)),
    "several blocks": (UP, (1024, 1536), (8, 1536)), "one group, as the small model's gate": (UP, (128, 384), (1, 384)),
}  # fmt: skip


def interpreted(converts: bool = False, cores: int = 1):
    blocks = tpu.Blocks(int4_bytes=128 << 10, converts_int4=converts)
    return tpu.interpreted(True, blocks, cores)


def weight_of(seed: int, shape, scales) -> QuantizedWeight:
    """All sixteen integers, and scales of different sizes."""
    random = np.random.default_rng(seed)
    values = jnp.asarray(random.integers(-8, 8, shape), jnp.int4)
    return QuantizedWeight(values, jnp.asarray(random.uniform(0.01, 0.1, scales), jnp.bfloat16))


def rows_of(seed: int, equation: str, shape, rows: int):
    """Inputs whose mean is not zero: an offset of the weights would show."""
    sizes = dict(zip(equation.split(",")[1], shape, strict=False))
    inputs = [sizes[axis] for axis in equation.split(",")[0][2:]]
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, 1, *inputs)) + 0.5, jnp.bfloat16)


def expected_of(equation: str, x, weight: QuantizedWeight) -> np.ndarray:
    return np.einsum(equation, np.asarray(x, np.float64), floats_of(weight), optimize=True)


def by_kernel(equation: str, x, weight: QuantizedWeight, **options):
    """The product, and whether it is the kernel's."""
    program = jax.jit(partial(linear, equation, **options))
    assert "phi4mm_int4" in str(jax.make_jaxpr(partial(linear, equation, **options))(x, weight))
    return program(x, weight)


UNPACKED = {"by words": False, "by the chip's conversion": True}


@pytest.mark.parametrize("unpacked", UNPACKED)
@pytest.mark.parametrize(("name", "rows"), zip(SMALL, (16, 5, 1, 33), strict=True))
def test_products_are_those_of_the_weights_as_floats(name, rows, unpacked):
    equation, shape, scales = SMALL[name]
    weight, x = weight_of(0, shape, scales), rows_of(1, equation, shape, rows)
    with interpreted(UNPACKED[unpacked]):
        found = by_kernel(equation, x, weight, result=jnp.float32)
        rounded = by_kernel(equation, x, weight)
    expected = expected_of(equation, x, weight)
    assert distance(found, expected) < 2e-6
    np.testing.assert_array_equal(np.asarray(rounded), np.asarray(found.astype(jnp.bfloat16)))
    assert found.shape == expected.shape


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "unpacked"),  # each map, and each number of rows, in both ways
    [
        ("q", 16, "by the chip's conversion"), ("k", 77, "by words"), ("out", 16, "by words"),
        ("up", 128, "by the chip's conversion"), ("down", 77, "by the chip's conversion"), ("out", 128, "by words"),
        ("k", 16, "by the chip's conversion"), ("down", 16, "by words"),
    ],
)  # fmt: skip
def test_products_of_the_release_are_those_of_the_weights_as_floats(name, rows, unpacked):
    equation, shape, scales = RELEASE[name]
    weight, x = weight_of(0, shape, scales), rows_of(1, equation, shape, rows)
    with interpreted(UNPACKED[unpacked]):
        found = by_kernel(equation, x, weight, result=jnp.float32)
    assert distance(found, expected_of(equation, x, weight)) < 2e-6


def test_two_cores_share_the_outputs():
    equation, shape, scales = SMALL["several blocks"]
    weight, x = weight_of(0, shape, scales), rows_of(1, equation, shape, 16)
    with interpreted(cores=2):
        assert distance(by_kernel(equation, x, weight, result=jnp.float32), expected_of(equation, x, weight)) < 2e-6


def test_a_row_does_not_depend_on_the_others():
    equation, shape, scales = SMALL["several blocks"]
    weight, x = weight_of(0, shape, scales), rows_of(1, equation, shape, 16)
    with interpreted():
        expected = np.asarray(by_kernel(equation, x, weight))
        others = np.asarray(by_kernel(equation, x.at[3].set(jnp.nan), weight))
    kept = np.arange(16) != 3
    np.testing.assert_array_equal(others[kept], expected[kept])
    assert np.isnan(others[3]).all()


@pytest.mark.parametrize("name", ["heads", "of heads", "several blocks"])
@pytest.mark.parametrize("sizes", fast_are([{"tensor": 2}], [{"tensor": 2}, {"context": 2, "tensor": 2}]), ids=str)
def test_on_a_mesh_each_device_multiplies_by_its_part(name, sizes):
    equation, shape, scales = SMALL[name]
    weight, x = weight_of(0, shape, scales), rows_of(1, equation, shape, 6)
    with interpreted(), jax.set_mesh(make_mesh(**sizes, devices=jax.devices()[:4])):
        found = by_kernel(equation, x, weight, result=jnp.float32)
    assert distance(found, expected_of(equation, x, weight)) < 2e-6


def test_gradients_are_those_of_the_weights_as_floats():
    equation, shape, scales = SMALL["of heads"]
    weight, x = weight_of(0, shape, scales), rows_of(1, equation, shape, 6)
    towards = rows_of(2, UP, (512,), 6)
    with interpreted():
        out, gradient = jax.vjp(lambda x: linear(equation, x, weight), x)
        (found,) = gradient(towards)
    assert out.dtype == found.dtype == jnp.bfloat16
    expected = np.einsum("BTD,NHD->BTNH", np.asarray(towards, np.float64), floats_of(weight))
    assert distance(found, expected) < 5e-3  # bfloat16's


@pytest.mark.parametrize("loop", [False, True], ids=["unrolled", "stacked"])
def test_adapters_are_added_in_layers_stacked_or_unrolled(loop):
    sizes = {"D": 128, "F": 256}
    projection = Projection(*GATE_UP, sizes, {"lora_speech": LoraConfig(8, 16, 0.0)})
    random = np.random.default_rng(3)
    weights = {name: [weight_of(i, (128, 256), (1, 256)) for i in range(2)] for name in ("gate", "up")}
    adapter = {
        name: jnp.asarray(random.standard_normal((2, *shape)) / 8, jnp.float32)
        for name, shape in {"a": (128, 8), "gate": (8, 256), "up": (8, 256)}.items()
    }
    x = rows_of(1, UP, (128,), 6)
    scales = {"lora_speech": jnp.asarray([2.0, 0, 2, 0, 2, 2])}
    stacked = {
        "params": {name + end: jnp.stack([w[at] for w in ws]) for name, ws in weights.items() for end, at in
                   (("", 0), ("_scales", 1))},
        "lora_speech": adapter,
    }  # fmt: skip

    def one_layer(_, layer):
        return None, projection.apply(layer, x, scales)

    with interpreted():
        if loop:
            found = jax.jit(lambda s: jax.lax.scan(one_layer, None, s)[1])(stacked)
        else:
            layers = [one_layer(None, jax.tree.map(lambda w, i=i: w[i], stacked))[1] for i in range(2)]
            found = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    for name, part in zip(("gate", "up"), found, strict=True):
        for i, weight in enumerate(weights[name]):
            low_rank = np.asarray(adapter["a"][i], np.float64) @ np.asarray(adapter[name][i], np.float64)
            added = np.asarray(x, np.float64) @ low_rank * np.asarray(scales["lora_speech"])[:, None, None]
            assert distance(part[i], expected_of(UP, x, weight) + added) < 5e-3


@pytest.mark.parametrize(
    ("case", "rows", "dtype"),
    [
        (SMALL["heads"], 300, jnp.bfloat16),
        (SMALL["heads"], 4, jnp.float32),
        (("BTD,DF->BTF", (192, 256), (1, 256)), 4, jnp.bfloat16),  # a group of 192 inputs
        (("BTD,DNH->BTNH", (128, 4, 32), (1, 4, 32)), 4, jnp.bfloat16),  # the small model's heads
    ],
    ids=["many rows", "float32", "other groups", "small heads"],
)
def test_others_are_multiplied_by_xla(case, rows, dtype):
    equation, shape, scales = case
    weight, x = weight_of(0, shape, scales), rows_of(1, equation, shape, rows).astype(dtype)
    with interpreted():
        assert "phi4mm_int4" not in str(jax.make_jaxpr(partial(linear, equation))(x, weight))
        found = linear(equation, x, weight)
    assert distance(found, expected_of(equation, x, weight)) < (5e-3 if dtype == jnp.bfloat16 else 2e-6)


CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@pytest.mark.tpu_compile
@pytest.mark.parametrize("chip", fast_are(["v6e"], CHIPS))
@pytest.mark.parametrize("rows", fast_are([16], [1, 16, 128]))
def test_weights_are_read_where_they_lie(chip, rows):
    """The release's maps, compiled for a chip, which may compute the rows within: no copy of a weight."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices
    mesh = Mesh(np.array(devices[:1]), ("tensor",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, jax.P())
    given = {
        name: [
            *(jax.ShapeDtypeStruct(size, dtype, sharding=tpu_format(name if name in "qk" else "", size, place))
              for size, dtype in ((shape, jnp.int4), (scales, jnp.bfloat16))),
            jax.ShapeDtypeStruct(rows_of(0, equation, shape, rows).shape, jnp.bfloat16, sharding=place),
        ]
        for name, (equation, shape, scales) in RELEASE.items()
    }  # fmt: skip

    def program(given):
        return {name: linear(RELEASE[name][0], 2 * x, QuantizedWeight(*w)) for name, (*w, x) in given.items()}

    with jax.set_mesh(mesh):
        text = jax.jit(program).lower(given).compile().as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') == len(RELEASE)
    smallest = 3072 * 1024
    assert copies(text, smallest) == float_copies(text, smallest, 0) == []
