"""Weights in int8 and int4: their rounding, what is computed with them, how they are stored."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.marks import fast_are
from helpers.paths import TINY
from helpers.quantized import dequantized

import phi4mm_jax
from phi4mm_jax import InputError
from phi4mm_jax.checkpoint import orbax_io
from phi4mm_jax.checkpoint.convert import to_orbax, to_torch
from phi4mm_jax.checkpoint.orbax_io import pack_int4, unpack_int4
from phi4mm_jax.mesh import make_mesh
from phi4mm_jax.quantization import quantize

WEIGHTS = ("int8", "int4")
NOT_QUANTIZED = {  # of the parameters with two axes or more, without that of layers
    "vision/patch_kernel", "vision/position", "vision/layers/q/bias", "vision/layers/k/bias", "vision/layers/v/bias",
    "speech/bias", "speech/stem/conv_0", "speech/stem/conv_1", "speech/stem/conv_2", "speech/layers/q/bias",
    "speech/layers/k/bias", "speech/layers/v/bias", "speech/layers/conv/depthwise",
}  # fmt: skip


@pytest.fixture(scope="module", params=fast_are(["int8"], WEIGHTS))
def quantized(request) -> phi4mm_jax.Model:
    return phi4mm_jax.load(TINY, "float32", weights=request.param, scan=True)


def batch_of(model: phi4mm_jax.Model):
    """Text, an image and a clip; one row with both."""
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (60, 80, 3), np.uint8)
    clip = random.standard_normal(8000).astype(np.float32) / 10, 16000
    prompts = [f"<|user|>{media}How many?<|end|><|assistant|>" for media in ("", "<|image_1|>", "<|audio_1|>")]
    both = "<|user|><|image_1|><|audio_1|>Who?<|end|><|assistant|>"
    return model.process([*prompts, both], [[], [image], [], [image]], [[], [], [clip], [clip]])


def distance(batch, found, expected) -> float:
    """Norm of the difference at valid tokens, over that of what is expected."""
    valid = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    found, expected = np.asarray(found)[valid], np.asarray(expected)[valid]
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_int8_rounds_each_output_by_its_largest_weight():
    weight = np.random.default_rng(0).standard_normal((2, 6, 5)).astype(np.float32)
    weight[1, :, 2] = 0
    found = quantize(("params", "decoder", "layers", "mlp", "gate_up", "up"), jnp.asarray(weight), "int8")
    largest = np.abs(weight).max(1, keepdims=True)
    scales = np.where(largest > 0, largest / np.float32(127), 1)
    assert (found.values.dtype, found.scales.shape) == (jnp.int8, (2, 1, 5))
    np.testing.assert_allclose(found.scales, scales, rtol=1e-6)
    np.testing.assert_allclose(found.values, np.round(weight / scales), atol=1)
    assert np.abs(np.asarray(found.values) * np.asarray(found.scales) - weight).max() <= scales.max() / 2 + 1e-6
    assert (np.asarray(found.values)[1, :, 2] == 0).all()


def test_int4_rounds_groups_of_inputs_with_the_least_error():
    weight = np.random.default_rng(0).standard_normal((256, 3)).astype(np.float32)
    weight[5, 1] = 20.0  # clipping the others' scale would cost more
    found = quantize(("params", "audio_projector", "up", "kernel"), jnp.asarray(weight), "int4")
    assert (found.values.dtype, found.scales.shape) == (jnp.int4, (2, 3))
    for group in range(2):
        for output in range(3):
            w = weight[128 * group :, output][:128]
            errors = {}
            for clip in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
                scale = np.float32(jnp.bfloat16(np.abs(w).max() * clip / 7))
                q = np.clip(np.round(w / scale), -7, 7)
                errors[((q * scale - w) ** 2).sum()] = scale, q
            scale, q = errors[min(errors)]
            own = np.asarray(found.values[128 * group :, output][:128]).astype(np.float32)
            np.testing.assert_allclose(float(found.scales[group, output]), scale, rtol=1e-6)
            np.testing.assert_allclose(own, q, atol=1)
            assert (own != q).sum() <= 1  # a tie between two integers, rounded otherwise


def test_all_linear_maps_are_quantised_and_nothing_else(quantized):
    params: dict[Any, Any] = flatten_dict(quantized.variables["params"])
    wide = {p for p, x in params.items() if x.ndim - ("layers" in p) > 1 and not p[-1].endswith("_scales")}
    kinds = {"/".join(p): params[p].dtype.name for p in wide}
    integers = {name for name, kind in kinds.items() if kind.startswith("int")}
    assert kinds.keys() - integers == NOT_QUANTIZED
    assert kinds["decoder/embedding"] == "int8"
    assert all(kind == "float32" for name, x in quantized.variables.items() if name != "params" for kind in dtypes(x))


def dtypes(tree) -> set[str]:
    return {x.dtype.name for x in jax.tree.leaves(tree)}


def test_logits_are_those_of_the_weights_as_floats(quantized):
    batch = batch_of(quantized)
    plain = phi4mm_jax.Model(quantized.module, dequantized(quantized.variables), quantized.processor)
    expected = plain.logits(batch)
    assert distance(batch, quantized.logits(batch), expected) < 1e-4


def test_int8_stays_near_float32_and_int4_is_farther(scanned, quantized):
    batch = batch_of(scanned)
    error = distance(batch, quantized.logits(batch), scanned.logits(batch))
    least, most = {"int8": (1e-3, 0.1), "int4": (0.1, 0.8)}[kind_of(quantized)]
    assert least < error < most


def kind_of(model: phi4mm_jax.Model) -> str:
    return model.variables["params"]["decoder"]["layers"]["mlp"]["down"]["down"].dtype.name


def test_answers_are_those_of_the_weights_as_floats(quantized):
    """Decoding takes few rows, a prefill many: both products are met."""
    plain = phi4mm_jax.Model(quantized.module, dequantized(quantized.variables), quantized.processor)
    prompts = ["<|user|>COPY one<|end|><|assistant|>", f"<|user|>{'word ' * 150}<|end|><|assistant|>"]
    found, expected = (m.generate(prompts, max_new_tokens=8) for m in (quantized, plain))
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-3)


@pytest.mark.parametrize("sizes", fast_are([{"tensor": 2}], [{"tensor": 2}, {"fsdp": 4, "tensor": 2}]))
def test_on_a_mesh_they_are_split_and_compute_the_same(quantized, sizes):
    mesh = make_mesh(**sizes)
    spread = phi4mm_jax.load(TINY, "float32", mesh, weights=kind_of(quantized))
    down = spread.variables["params"]["decoder"]["layers_0"]["mlp"]["down"]
    assert down["down"].addressable_shards[0].data.size * mesh.size == down["down"].size
    batch = batch_of(quantized)
    assert distance(batch, spread.logits(batch), quantized.logits(batch)) < 1e-4


@pytest.fixture(scope="module")
def stored(quantized, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / kind_of(quantized)
    to_orbax(TINY, folder, weights=kind_of(quantized), dtype="float32")
    return folder


def test_stored_ones_load_as_they_were(quantized, stored):
    bits = {"int4": 4, "int8": 8, "bfloat16": 16, "float32": 32}
    size = sum(x.size * bits[x.dtype.name] // 8 for x in jax.tree.leaves(quantized.variables["params"]))
    files = [f for f in stored.glob("parameters/params.*/*") if f.is_file() and not f.name.startswith(".")]
    assert sum(f.stat().st_size for f in files) == size  # two values of int4 in a byte
    found: dict[Any, Any] = flatten_dict(phi4mm_jax.load(stored, "float32", scan=True).variables)
    expected: dict[Any, Any] = flatten_dict(quantized.variables)
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        assert found[path].dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(x), str(path))


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}])
def test_stored_ones_load_onto_a_mesh(quantized, stored, sizes):
    """Also where a device's share of int4 values would end within a byte."""
    spread: Any = flatten_dict(phi4mm_jax.load(stored, "float32", make_mesh(**sizes), scan=True).variables)
    expected: Any = flatten_dict(quantized.variables)
    assert spread.keys() == expected.keys()
    for path, x in expected.items():
        assert spread[path].dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(spread[path]), np.asarray(x), str(path))


def test_two_values_of_int4_are_a_byte():
    values = np.array([[7, -8, -1, 0], [3, 5, -4, 1]]).astype(jnp.int4)
    packed = pack_int4(values)
    np.testing.assert_array_equal(packed, np.array([[0x87, 0x0F], [0x53, 0x1C]], np.uint8))
    found = unpack_int4(packed)
    assert found.dtype == jnp.int4
    np.testing.assert_array_equal(found.astype(np.int8), values.astype(np.int8))


@pytest.mark.parametrize(("shape", "stored_as"), [((3, 5), ((3, 5), "int4")), ((3, 6), ((3, 3), "uint8"))])
def test_an_odd_number_of_int4_values_is_stored_as_it_is(tmp_path, shape, stored_as):
    """As all were before two of them were one byte: such checkpoints still load."""
    values = np.random.default_rng(0).integers(-8, 8, shape).astype(jnp.int4)
    orbax_io.write(tmp_path / "out", {("params", "x"): jax.ShapeDtypeStruct(shape, jnp.int4)}, lambda path: values)
    array = json.loads((tmp_path / "out" / "params.x" / ".zarray").read_text())
    assert (tuple(array["shape"]), np.dtype(array["dtype"]).name) == stored_as
    found = orbax_io.OrbaxCheckpoint((tmp_path / "out").absolute(), [("params", "x")])
    np.testing.assert_array_equal(found.read(("params", "x")).astype(np.int8), values.astype(np.int8))


SCALES = "params.decoder.layers.mlp.down.down_scales/.zarray"


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        (None, None, f"{SCALES}: no such file, so that params/decoder/layers/mlp/down/down_scales is missing; convert"),
        ('"order":"C"', '"order":"F"', f"{SCALES}: its dtype is .* and its order 'F', expected one of <f4, .* and C"),
        (r'"dtype":"[^"]*"', '"dtype":"uint4"', f"{SCALES}: its dtype is 'uint4' and its order 'C', expected one of"),
        (r'"dtype":"[^"]*"', '"dtype":"<f2"', "down_scales: has dtype float16, expected (float32|bfloat16); convert"),
        (r'"shape":\[', '"shape":["x",', f"{SCALES}: its shape is .'x', .*, expected a list of integers; convert"),
    ],
)
def test_damaged_scales_are_named(stored, tmp_path, before, after, error):
    array = Path(shutil.copytree(stored, tmp_path / "damaged")) / "parameters" / SCALES
    if before is None:
        array.unlink()
    else:
        text, count = re.subn(before, after, array.read_text().replace(": ", ":"))
        assert count == 1
        array.write_text(text)
    with pytest.raises(phi4mm_jax.CheckpointError, match=error):
        phi4mm_jax.load(tmp_path / "damaged", "float32")


def test_what_stored_ones_cannot_be_is_refused(stored, tmp_path):
    other = "int4" if stored.name == "int8" else "int8"
    for options in ({"weights": other}, {"merge": "speech"}):
        with pytest.raises(InputError, match=f"its weights are {stored.name}, so .* is not possible"):
            phi4mm_jax.load(stored, **options)
    with pytest.raises(InputError, match=r"trainable has params/.*kernel, which this checkpoint has quantised; begin"):
        phi4mm_jax.load(stored, trainable=["params/speech"])
    with pytest.raises(InputError, match="trainable has params/decoder/layers/mlp/down/down_scales, which this"):
        phi4mm_jax.load(stored, trainable=["params/decoder/layers/mlp/down/down_scales"])
    phi4mm_jax.load(stored, trainable=["lora_speech"])
    for convert in (lambda to: to_orbax(stored, to), lambda to: to_torch(stored, to, "native")):
        with pytest.raises(phi4mm_jax.CheckpointError, match=f"its weights are {stored.name}, from which no others"):
            convert(tmp_path / "other")
    to_torch(stored, tmp_path / "adapters", "native", adapters_only=True)
    assert sorted(p.name for p in (tmp_path / "adapters").iterdir() if p.is_dir()) == ["speech-lora", "vision-lora"]


def test_unknown_weights_are_refused(tmp_path):
    with pytest.raises(InputError, match="weights is 'int2'; expected 'int8', 'int4' or None"):
        phi4mm_jax.load(TINY, weights="int2")
    with pytest.raises(InputError, match="weights is 'int2'"):
        to_orbax(TINY, tmp_path / "out", weights="int2")


def test_what_will_be_trained_stays_as_it_is(scanned):
    """On a mesh as well; patterns select it, and something is to be left to quantise."""
    given = {"weights": "int8", "trainable": ["params/speech", "!params/speech/layers/q", "lora_speech"], "scan": True}
    whole, spread = (phi4mm_jax.load(TINY, "float32", mesh, **given) for mesh in (None, make_mesh(tensor=2)))
    found, expected = (dict[Any, Any](flatten_dict(m.variables)) for m in (whole, scanned))
    kept = {path for path in expected if path[:2] == ("params", "speech") and path[2:4] != ("layers", "q")}
    for path in kept:
        np.testing.assert_array_equal(found[path], expected[path], str(path))
    assert {p for p in found if p[:2] == ("params", "speech")} - kept == {
        ("params", "speech", "layers", "q", name) for name in ("kernel", "kernel_scales", "bias")
    }
    assert found["params", "vision", "layers", "up", "kernel"].dtype == jnp.int8
    jax.tree.map(np.testing.assert_array_equal, whole.variables, spread.variables)
    for patterns in (["params"], ["params", "!**/bias", "!**/scale"]):
        with pytest.raises(InputError, match=r"trainable=\['params'.*\] has all linear maps: none is frozen, to be"):
            phi4mm_jax.load(TINY, weights="int8", trainable=patterns)
    with pytest.raises(InputError, match="trainable: the pattern 'params/sight' matches no parameter"):
        phi4mm_jax.load(TINY, weights="int8", trainable=["params/sight"])


def test_an_adapter_is_merged_before_they_are_quantised(quantized):
    kind = kind_of(quantized)
    merged = phi4mm_jax.load(TINY, "float32", weights=kind, merge="speech", scan=True)
    plain = phi4mm_jax.load(TINY, "float32", merge="speech", scan=True)
    path = ("params", "decoder", "layers", "mlp", "down", "down")
    expected = quantize(path, flatten_dict(plain.variables)[path], kind)
    np.testing.assert_array_equal(np.asarray(flatten_dict(merged.variables)[path]), np.asarray(expected.values))
