"""Calibration: what is measured of maps' inputs, the rounding by it, and what it makes of a model."""

import json
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax.traverse_util import flatten_dict
from helpers.manifests import assistant, user, write
from helpers.marks import fast_are
from helpers.paths import TINY
from PIL import Image

import phi4mm_jax
from convert import to_orbax as program
from phi4mm_jax import InputError, calibration
from phi4mm_jax.calibration import input_moments
from phi4mm_jax.checkpoint.convert import to_orbax
from phi4mm_jax.model.layers import LayerNorm, RMSNorm
from phi4mm_jax.model.speech import SpeechEncoder
from phi4mm_jax.model.vision import ImageEmbedder
from phi4mm_jax.quantization import quantize, quantize_to_inputs

UP = ("params", "audio_projector", "up", "kernel")
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
OUT = ("params", "decoder", "layers", "attention", "out", "out")


def correlated(random: np.random.Generator, inputs: int, *counts: int) -> list[np.ndarray]:
    """Sets of tokens whose inputs are alike, a few of them large, as activations are."""
    mix = random.standard_normal((inputs, inputs)) * np.linspace(1, 0, inputs)[:, None] ** 3
    sizes = np.exp(random.standard_normal(inputs))
    return [(random.standard_normal((n, inputs)) @ mix * sizes).astype(np.float32) for n in counts]


def moments_of(x: np.ndarray) -> np.ndarray:
    return x.T @ x


def as_floats(found) -> np.ndarray:
    scales = np.asarray(found.scales).astype(np.float32)
    return np.asarray(found.values).astype(np.float32) * np.repeat(scales, len(found.values) // len(scales), 0)


def scales_of(weight: np.ndarray) -> np.ndarray:
    """The scale of each group of 128 inputs and output, by the least squared error, repeated for each input."""
    scales = []
    for group in weight.reshape(-1, 128, weight.shape[1]):
        tried = [np.asarray(jnp.bfloat16(np.abs(group).max(0) * c / 7)).astype(float) for c in CLIPS]
        errors = [np.square(np.clip(np.round(group / s), -7, 7) * s - group).sum(0) for s in tried]
        scales.append(np.choose(np.argmin(errors, 0), tried))
    return np.repeat(scales, 128, 0)


def by_textbook(weight: np.ndarray, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of arXiv:2210.17323, row by row by the inverse's root, in float64; and the scales of all rows."""
    order = np.argsort(-np.diag(moments))
    damped = (moments + 0.01 * np.diag(moments).mean() * np.eye(len(moments)))[np.ix_(order, order)].astype(float)
    root = np.linalg.cholesky(np.linalg.inv(damped)).T  # upper triangular
    rest, values, scales = weight[order].astype(float), np.zeros(weight.shape), scales_of(weight)
    for row, place in enumerate(order):
        values[place] = np.clip(np.round(rest[row] / scales[place]), -7, 7)
        error = (rest[row] - values[place] * scales[place]) / root[row, row]
        rest[row:] -= np.outer(root[row, row:], error)
    return values, scales


def test_rounding_is_that_of_the_textbook():
    """Two layers, two heads of 128 inputs each, and so two groups."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((2, 2, 128, 5)).astype(np.float32)
    moments = [moments_of(*correlated(random, 256, 400)) for _ in range(2)]
    found = quantize_to_inputs(OUT, weight, moments)
    assert (found.values.dtype, found.scales.dtype, found.scales.shape) == (jnp.int4, jnp.bfloat16, (2, 2, 1, 5))
    for layer in range(2):
        values, scales = by_textbook(weight[layer].reshape(256, 5), moments[layer])
        np.testing.assert_array_equal(np.asarray(found.values[layer]).astype(int).reshape(256, 5), values)
        np.testing.assert_allclose(found.scales[layer].astype(float).reshape(2, 5), scales[::128], rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_outputs_on_other_inputs_are_nearer_than_by_rounding_to_nearest(seed):
    random = np.random.default_rng(seed)
    weight = random.standard_normal((384, 64)).astype(np.float32)
    seen, unseen = correlated(random, 384, 1000, 1000)
    errors = [
        np.linalg.norm(unseen @ (as_floats(found) - weight))
        for found in (quantize_to_inputs(UP, weight, [moments_of(seen)]), quantize(UP, jnp.asarray(weight), "int4"))
    ]
    assert errors[0] < 0.4 * errors[1]


@pytest.mark.parametrize("scale", [0, 3])
def test_uncorrelated_inputs_of_one_size_round_to_nearest(scale):
    weight = np.random.default_rng(0).standard_normal((256, 7)).astype(np.float32)
    found = quantize_to_inputs(UP, weight, [scale * np.eye(256, dtype=np.float32)])
    expected = quantize(UP, jnp.asarray(weight), "int4")
    np.testing.assert_array_equal(as_floats(found), as_floats(expected))


@pytest.mark.parametrize("moments", [np.eye(128), np.eye(256) * np.nan])
def test_moments_that_are_not_the_maps_are_refused(moments):
    with pytest.raises(InputError, match="audio_projector/up/kernel: the moments of its inputs are"):
        quantize_to_inputs(UP, np.ones((256, 3), np.float32), [moments.astype(np.float32)])


def test_moments_of_unknown_maps_are_refused(tmp_path):
    moments = {("decoder", "layers", "nothing"): [np.eye(3, dtype=np.float32)]}
    with pytest.raises(InputError, match="calibrate gave moments of decoder/layers/nothing, which is no linear map"):
        to_orbax(TINY, tmp_path / "out", weights="int4", calibrate=lambda folder: moments)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def manifest(tmp_path_factory, request):
    """Texts of several lengths, an image, a short clip, both, and a clip of two chunks; one is a prompt alone.

    As a parameter, how many of them.
    """
    folder = tmp_path_factory.mktemp("examples")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (60, 80, 3), np.uint8)).save(folder / "a.png")
    Image.fromarray(random.integers(0, 256, (500, 700, 3), np.uint8)).save(folder / "b.png")
    for name, seconds in (("a", 1.3), ("b", 2.1), ("long", 43)):
        soundfile.write(folder / f"{name}.wav", random.standard_normal(int(16000 * seconds)) / 10, 16000)
    image = [{"type": "image", "image": f"{name}.png"} for name in "ab"]
    clip = {name: {"type": "audio", "audio": f"{name}.wav"} for name in ("a", "b", "long")}
    chats = [
        [user("one two three")],
        [user("word " * 70), assistant("yes")],
        [user(image[0], "How many?"), assistant("two of them")],
        [user(clip["a"], "Who?"), assistant("me")],
        [user(image[1], clip["b"]), assistant("no")],
        [user(clip["long"], "What?"), assistant("noise")],
    ]
    return write(folder / "examples.jsonl", [{"messages": chat} for chat in chats[: getattr(request, "param", None)]])


@pytest.fixture(scope="module")
def measured(manifest):
    return input_moments(TINY, manifest)


@pytest.fixture(scope="module")
def recorded(manifest) -> dict[str, Any]:
    """All examples in one batch, and what modules give of it, by the unrolled model."""
    model = phi4mm_jax.load(TINY)
    prompts = [line["messages"] for line in map(json.loads, manifest.read_text().splitlines())]
    rows = []
    for chat in prompts:
        for part in [part for message in chat for part in message["content"] if isinstance(part, dict)]:
            part |= {kind: str(manifest.parent / part[kind]) for kind in ("image", "audio") if kind in part}
        answered = len(chat) > 1
        text = chat[-1]["content"] + "<|end|><|endoftext|>" if answered else ""
        row = model.processor.row(chat[:1])
        tokens = [*row.tokens, *model.processor.tokenizer.encode(text, special=True)]
        rows.append(row._replace(tokens=np.asarray(tokens, np.int32)))
    batch = model.processor.batch(rows)
    _, found = model.module.clone(dtype=jnp.float32).apply(
        model.variables, batch, mutable=["intermediates"],
        capture_intermediates=lambda module, _: isinstance(module, RMSNorm | LayerNorm | SpeechEncoder | ImageEmbedder),
    )  # fmt: skip
    outputs: dict[Any, Any] = flatten_dict(found["intermediates"])
    return {"batch": batch} | {"/".join(path[:-1]): np.asarray(x) for path, (x,) in outputs.items()}


@pytest.mark.parametrize("manifest", fast_are([2], [2, 6]), indirect=True)
def test_moments_are_those_of_the_valid_tokens_of_all_examples(measured, recorded):
    batch = recorded["batch"]
    valid = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    assert batch.lengths.min() < 0.5 * batch.lengths.max()
    for layer in range(len(measured["decoder", "layers", "mlp", "down"])):
        for norm, own in (("attention_norm", ("attention", "qkv")), ("mlp_norm", ("mlp", "gate_up"))):
            x = recorded[f"decoder/layers_{layer}/{norm}"][valid]
            check(measured[("decoder", "layers", *own)][layer], x)


@pytest.mark.parametrize("manifest", fast_are([2], [2, 6]), indirect=True)
def test_padding_adds_nothing_to_moments(measured, manifest, monkeypatch):
    """Lengths of texts and clips are rounded up, so that few are compiled; here they are not."""
    sizes = []

    def exact(length: int) -> int:
        sizes.append((length, padded(length)))
        return length

    padded = calibration._padded
    monkeypatch.setattr(calibration, "_padded", exact)
    expected = input_moments(TINY, manifest)
    assert all(length < size for length, size in sizes if length)
    assert measured.keys() == expected.keys()
    for path, layers in expected.items():
        for found, moments in zip(measured[path], layers, strict=True):
            assert np.linalg.norm(found - moments) < 1e-5 * np.linalg.norm(moments), path


def check(found: np.ndarray, x: np.ndarray) -> None:
    expected = x.T.astype(np.float64) @ x
    assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)


@pytest.mark.slow
def test_moments_of_images_are_those_of_their_patches(measured, recorded):
    images = recorded["batch"].images
    mask = images.patch_mask.reshape(len(images.crops), -1)
    assert not mask.all()
    for layer in range(len(measured["vision", "layers", "up"])):
        for name, norm in (("q", "attention_norm"), ("v", "attention_norm"), ("up", "mlp_norm")):
            of_crops = recorded[f"vision/layers_{layer}/{norm}"].reshape(*mask.shape, -1)
            check(measured["vision", "layers", name][layer], of_crops[mask])


@pytest.mark.slow
def test_moments_of_clips_are_those_of_their_tokens(measured, recorded):
    """The long clip has two chunks, which are measured one by one."""
    audio, features = recorded["batch"].audio, recorded["speech"]
    tokens = np.zeros(len(features), int)
    tokens[:4] = 16, 26, 500, 38  # of 128, 208 and 4298 frames
    used = np.arange(features.shape[1]) < tokens[:, None]
    assert audio.with_images.tolist()[:4] == [False, True, False, False]
    for name, chosen in (("audio_projector", ~audio.with_images), ("audio_projector_with_images", audio.with_images)):
        check(measured[name, "up"][0], features[used & chosen[:, None]])
    check(measured["speech", "layers", "conv", "gate"][1], recorded["speech/layers_1/conv/norm"][used])


@pytest.mark.slow
def test_calibrated_weights_are_stored_and_nearer_to_the_float_models(manifest, measured, tmp_path):
    """Logits of other examples; what is not rounded is as without calibration, and so are the scales."""
    to_orbax(TINY, tmp_path / "tiny", dtype="float32", weights="int4", calibrate=lambda _: measured)
    plain, nearest = (phi4mm_jax.load(TINY, "float32", weights=weights, scan=True) for weights in (None, "int4"))
    calibrated = phi4mm_jax.load(tmp_path / "tiny", "float32", scan=True)
    found, expected = (dict[Any, Any](flatten_dict(m.variables)) for m in (calibrated, nearest))
    changed = {path for path, x in expected.items() if (np.asarray(x) != np.asarray(found[path])).any()}
    assert changed == {path for path, x in expected.items() if x.dtype == jnp.int4}
    prompts = ["<|user|>four five six seven<|end|><|assistant|>", "<|user|><|image_1|>Where?<|end|><|assistant|>"]
    image = np.random.default_rng(1).integers(0, 256, (90, 70, 3), np.uint8)
    batch = plain.process(prompts, [[], [image]])
    valid = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    logits, *others = (np.asarray(m.logits(batch))[valid] for m in (plain, calibrated, nearest))
    errors = [np.linalg.norm(x - logits) for x in others]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.slow
def test_maps_that_no_example_reaches_are_rounded_to_nearest(tmp_path, caplog):
    manifest = write(tmp_path / "texts.jsonl", [{"messages": [user("one two"), assistant("three")]}])
    found = input_moments(TINY, manifest)
    assert {path[0] for path in found} == {"decoder"}
    assert (
        "no example reaches all maps of audio_projector, audio_projector_with_images, image_embedder, speech, vis"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "examples.jsonl: has no samples"),
        ([{"messages": []}], "examples.jsonl: line 1: messages"),
        ([["a"]], "examples.jsonl: line 1: the example is a list; expected an object with messages"),
        ([{"messages": [user("a")]}, {"messages": [user({"type": "image", "image": "no.png"})]}],
         "examples.jsonl: line 2: .*no.png.* Repair the example, or take it out"),
    ],
)  # fmt: skip
def test_bad_examples_are_named(lines, message, tmp_path):
    with pytest.raises(InputError, match=message):
        input_moments(TINY, write(tmp_path / "examples.jsonl", lines))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["--weights", "int8"], "--calibrate is for --weights int4, but --weights is int8; give that, or leave"),
        ([], "--calibrate is for --weights int4; give that, or leave --calibrate out"),
        (["--weights", "int4", "--max-examples", "0"], "--max-examples is 0"),
    ],
)
def test_the_program_refuses_other_weights(weights, message, manifest, tmp_path, monkeypatch, capsys):
    given = ["to_orbax", TINY, tmp_path / "out", "--calibrate", manifest, *weights]
    monkeypatch.setattr(sys, "argv", list(map(str, given)))
    assert program.main() == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="weights is None, but only int4 is calibrated"):
        to_orbax(TINY, tmp_path / "out", calibrate=lambda _: {})


def test_the_program_refuses_examples_without_calibration(tmp_path, monkeypatch, capsys):
    given = ["to_orbax", TINY, tmp_path / "out", "--weights", "int4", "--max-examples", "8"]
    monkeypatch.setattr(sys, "argv", list(map(str, given)))
    assert program.main() == 2
    assert "--max-examples is of --calibrate, which is not given" in capsys.readouterr().err


@pytest.mark.slow
def test_the_program_calibrates(manifest, measured, tmp_path, monkeypatch):
    given = ["to_orbax", TINY, tmp_path / "out", "--weights", "int4", "--calibrate", manifest]
    monkeypatch.setattr(sys, "argv", list(map(str, given)))
    assert program.main() == 0
    path = ("params", "decoder", "layers", "mlp", "down", "down")
    weight = np.asarray(flatten_dict(phi4mm_jax.load(TINY, "float32", scan=True).variables)[path])
    expected = quantize_to_inputs(path, weight, measured[path[1:-1]])
    found: Any = flatten_dict(phi4mm_jax.load(tmp_path / "out", scan=True).variables)
    np.testing.assert_array_equal(np.asarray(found[path]), expected.values)
