"""A model spread over devices answers as it does on one."""

import json
import re
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import golden_cases, media_of
from helpers.marks import fast_are
from helpers.merging import write_adapter, write_merged
from helpers.paths import FIXTURES, TINY
from helpers.reference import uncached_logits
from jax.sharding import NamedSharding

import phi4mm_jax
from phi4mm_jax.batch import ImageStack
from phi4mm_jax.checkpoint.random import write_random_checkpoint
from phi4mm_jax.config import Phi4MMConfig, read_json
from phi4mm_jax.engine import EngineConfig, Grammar, Programs, Request
from phi4mm_jax.engine.model_runner import default_cache_tokens
from phi4mm_jax.errors import InputError
from phi4mm_jax.kernels.cached import count_in_part
from phi4mm_jax.kernels.pages import as_cached
from phi4mm_jax.mesh import inference_mesh, make_mesh, training_mesh
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.decoder import attend
from phi4mm_jax.model.kv_cache import KVCache, cached_inputs, copy_pages

RELEASE = Phi4MMConfig.from_dict(read_json(FIXTURES / "ms_release_config.json"))
DECODER = RELEASE.decoder
LAYERS, PAGES, HEADS, PAGE, SIZE = 2, 9, 8, 16, 32  # of a small cache


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint with eight KV heads, so that up to eight devices can share them."""
    folder = tmp_path_factory.mktemp("wide")
    config = json.loads((TINY / "config.json").read_text())
    config |= {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    write_random_checkpoint(folder / "config.json", folder / "checkpoint", TINY)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def alone(wide):
    """The checkpoint on one device; all tests share what is compiled for it."""
    return phi4mm_jax.load(wide, dtype="float32", scan=True)


@pytest.fixture(scope="module")
def spread_over(wide):
    """The checkpoint over eight devices, loaded once for each mesh."""
    return cache(
        lambda tensor, context: phi4mm_jax.load(wide, dtype="float32", mesh=make_mesh(tensor=tensor, context=context))
    )


@pytest.mark.parametrize(
    ("tensor", "context", "cache_dtype", "beams"),
    fast_are([(4, 2, None, 1)], [(8, 1, None, 2), (4, 2, None, 1), (2, 4, "int8", 2), (1, 4, None, 1)]),
)
def test_engine_over_eight_devices(alone, spread_over, tensor, context, cache_dtype, beams):
    """Logits, and answers to ragged rows, fewer than the devices, of text and of image and speech, and of beams.

    Of one row the prompt's first pages are in the cache already, and one has a grammar.
    """
    spread = spread_over(tensor, context)
    case = next(c for c in golden_cases() if c["name"] == "vision_speech")
    texts = ["<|user|>Hello<|end|><|assistant|>", "<|user|>The light of seven stones" + " is green" * 9]
    batch = alone.process(texts)
    found, logits = (np.asarray(model.logits(batch)) for model in (spread, alone))
    for row, length in enumerate(batch.lengths):
        np.testing.assert_allclose(found[row, :length], logits[row, :length], atol=1e-4, rtol=0)
    media = {kind: of_row[0] for kind, of_row in media_of(case).items()}
    requests = [
        Request(case["prompt"], **media, max_new_tokens=3),  # in chunks, of which each attends to those before
        *(Request(text, max_new_tokens=6, adapter="vision") for text in texts),
        Request(texts[1] + "?", max_new_tokens=4, adapter="vision"),
        Request(texts[0], max_new_tokens=4, adapter="vision", grammar=Grammar.regex("[a-m]{12}")),
        Request(texts[0], max_new_tokens=4, beams=beams),
    ]
    sizes: Any = {"slots": 2, "cache_tokens": 4096, "steps": 4, "beams": beams, "cache_dtype": cache_dtype}
    config = EngineConfig(page_size=64, chunk=64, **sizes)
    of_pages = EngineConfig(page_size=64 // context, chunk=64, **sizes)  # of which each device has its part
    found, expected = (dict(m.engine(c).run(requests)) for m, c in ((spread, of_pages), (alone, config)))
    for i in range(len(requests)):
        assert found[i].tokens == expected[i].tokens
        np.testing.assert_allclose(found[i].log_probabilities, expected[i].log_probabilities, atol=1e-4)


def test_users_adapters_over_eight_devices(wide, alone, spread_over, tmp_path):
    """Rows of two and without one, in one batch: log-probabilities are those of weights merged by numpy."""
    spread, models = spread_over(4, 2), {}
    config = EngineConfig(
        slots=2, cache_tokens=4096, page_size=32, chunk=64, steps=4, max_adapters=2, max_adapter_rank=4
    )
    engine = spread.engine(config)
    for seed, (name, rank) in enumerate((("legal", 2), ("tax", 4))):
        matrices = write_adapter(tmp_path / name, rank, 6.0, seed, checkpoint=wide)
        engine.load_adapter(name, tmp_path / name)
        write_merged(tmp_path / f"{name}-merged", matrices, 6.0 / rank, checkpoint=wide)
        models[name] = phi4mm_jax.load(tmp_path / f"{name}-merged", dtype="float32", scan=True)
    models[None] = alone
    prompt = "<|user|>Hello<|end|><|assistant|>"
    found = dict(engine.run(Request(prompt, max_new_tokens=5, adapter=name) for name in models))
    for answer, model in zip([found[i] for i in range(len(models))], models.values(), strict=True):
        (logits,) = uncached_logits(model, model.process([prompt]), [answer.tokens])
        expected = np.asarray(jax.nn.log_softmax(logits, -1))[np.arange(5), answer.tokens]
        np.testing.assert_allclose(answer.log_probabilities, expected, atol=1e-4)
    assert len({tuple(answer.tokens) for answer in found.values()}) == 3


def test_each_device_encodes_its_crops(alone, spread_over):
    """Eight crops: a device has one of them, and the weights of a layer at a time."""
    draw = np.random.default_rng(0)
    spread = spread_over(4, 2)
    vision = alone.config.vision
    side, patches = vision.crop_size, vision.patches_per_side
    crops = draw.standard_normal((8, side, side, 3)).astype(np.float32)
    stack = ImageStack(crops, np.ones((8, patches, patches), bool))
    count = 8 * vision.features_per_crop + 2
    table, rows = np.zeros((count, alone.config.decoder.embed_dim), np.float32), np.arange(count, dtype=np.int32)
    programs = Programs(spread.module, spread.variables)
    arguments = programs.place(table), programs.place_media(stack), rows
    compiled = programs.encode.lower(spread.variables, *arguments).compile()
    text = str(compiled.as_text())
    assert f"f32[1,{side},{side},3]" in text
    assert f"f32[1,{patches**2},{vision.embed_dim}]" in text
    assert f"f32[8,{patches**2},{vision.embed_dim}]" not in text
    gathered = [line for line in text.splitlines() if " all-gather(" in line and "vision/" in line]
    shapes = (re.search(r"= \(?\w+\[([\d,]*)\]", line) for line in gathered)
    largest = max(np.prod([int(n) for n in shape[1].split(",")]) for shape in shapes if shape)
    assert largest <= max(vision.embed_dim * vision.mlp_dim, side**2)
    found = compiled(spread.variables, *arguments)
    expected = Programs(alone.module, alone.variables).encode(alone.variables, table, stack, rows)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def attended(q, k, v):
    """A query's attention to all keys, in numpy: (N, H) of (S, K, H)."""
    k, v = (np.repeat(x, q.shape[0] // x.shape[1], 1) for x in (k, v))
    scores = np.einsum("NH,SNH->NS", q, k) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("NS,SNH->NH", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(
    ("tensor", "fsdp", "context", "dtype"),
    [(2, 1, 1, "float32"), (4, 2, 1, "int8"), (8, 1, 1, "float32"), (2, 1, 4, "float32"), (4, 1, 2, "int8")],
)
def test_attention_keeps_the_cache_on_its_devices(tensor, fsdp, context, dtype):
    """A chunk, then a token, of three rows that have none, some and many tokens in the cache, in plain XLA.

    Then that token again, with up to two more.

    With a context axis, queries and results are sent: all new tokens' are less than a layer's cached keys.
    """
    mesh = make_mesh(fsdp, tensor, context=context)
    draw = np.random.default_rng(0)
    tables = np.array([[5, 2, 0, 0], [1, 6, 3, 4], [0, 7, 8, 0]], np.int32)
    starts, lengths = np.array([0, 2 * PAGE, PAGE]), np.array([PAGE + 4, 4 * PAGE - 1, PAGE + 9])
    few = np.array([3, 1, 2])  # the second row is full then
    pages = draw.standard_normal((2, LAYERS, PAGES + 1, HEADS, PAGE, SIZE)).astype(np.float32)
    new = draw.standard_normal((2, 3, 2 * PAGE + 3, HEADS, SIZE)).astype(np.float32)
    q = draw.standard_normal((3, 2 * PAGE + 3, 2 * HEADS, SIZE)).astype(np.float32)
    place = NamedSharding(mesh, jax.P(None, None, "tensor", "context"))
    cache = jax.device_put(KVCache(*as_cached(pages, dtype)), place)

    def chunk_and_token(cache, q, k, v):
        chunk = cached_inputs(cache, starts, lengths, tables, 2 * PAGE)
        token = cached_inputs(cache, lengths, lengths + 1, tables, 1)
        more = cached_inputs(cache, lengths, lengths + few, tables, 3)
        out, cache = attend(q[:, :-3], k[:, :-3], v[:, :-3], jnp.int32(1), chunk, cache)
        last, cache = attend(q[:, -3:-2], k[:, -3:-2], v[:, -3:-2], jnp.int32(1), token, cache)
        several, cache = attend(q[:, -3:], k[:, -3:], v[:, -3:], jnp.int32(1), more, cache)
        return out, last, several, cache

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        arguments = cache, *(jax.device_put(x, NamedSharding(mesh, jax.P(None, None, "tensor"))) for x in (q, *new))
        compiled = jax.jit(chunk_and_token).lower(*arguments).compile()
    found = set(re.findall("all-gather|all-reduce|all-to-all|reduce-scatter|collective", str(compiled.as_text())))
    assert found <= ({"all-gather", "all-reduce", "reduce-scatter"} if context > 1 else set())
    sent = re.findall(r"= \(?\w+\[([\d,]+)\].* all-gather\(", str(compiled.as_text()))
    of_layer = PAGES * HEADS * PAGE * SIZE // tensor
    assert all(np.prod([int(n) for n in shape.split(",")]) < of_layer for shape in sent)
    out, last, several, cache = compiled(*arguments)
    assert cache.k.sharding.is_equivalent_to(place, 5)
    atol = 1e-4 if dtype == "float32" else 0.05
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        earlier = pages[:, 1, tables[row]].swapaxes(2, 3).reshape(2, -1, HEADS, SIZE)[:, :start]
        both = np.concatenate([earlier, new[:, row, : length - start]], 1)
        for t in range(length - start):
            np.testing.assert_allclose(out[row, t], attended(q[row, t], *both[:, : start + t + 1]), atol=atol, rtol=0)
        for t in range(few[row]):
            both = np.concatenate([both, new[:, row, t - 3][:, None]], 1)
            for found in (last, several)[t > 0 :]:
                np.testing.assert_allclose(found[row, t], attended(q[row, t - 3], *both), atol=atol, rtol=0)


@pytest.mark.parametrize("parts", [2, 4])
def test_context_shares_the_pairs_of_a_long_prompt_evenly(parts):
    """Each query attends to the keys before it, of which each device has those of its part of every page."""
    size, length = 128, 131072
    owner = np.arange(length) % (size * parts) // size
    found = [np.asarray(count_in_part(jnp.arange(1, length + 1), size, part, parts)) for part in range(parts)]
    for part, keys in enumerate(found):
        np.testing.assert_array_equal(keys, np.cumsum(owner == part))
    pairs = np.sum(found, axis=1, dtype=np.int64)
    assert pairs.sum() == length * (length + 1) // 2
    assert pairs.max() < 1.01 * pairs.mean()


def test_pages_are_copied_where_they_lie():
    mesh = make_mesh(tensor=8)
    pages = np.arange(LAYERS * 7 * HEADS * PAGE).reshape(LAYERS, 7, HEADS, PAGE, 1).astype(np.float32)
    cache = jax.device_put(KVCache(pages, -pages), NamedSharding(mesh, jax.P(None, None, "tensor")))
    numbers = np.array([3, 5, 1]), np.array([0, 4, 2]), np.int32(2)  # the last copy does not count
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(copy_pages).lower(cache, *numbers).compile()
    assert "all-gather" not in str(compiled.as_text())
    found = compiled(cache, *numbers)
    expected = pages[:, [3, 1, 2, 3, 5, 5, 6]]
    np.testing.assert_array_equal(found.k, expected)
    np.testing.assert_array_equal(found.v, -expected)


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("tensor", "expected axes with their sizes"),
        ("tensor=0", "expected axes with their sizes"),
        ("model=2", "'model' is not a mesh axis; choose from data, fsdp, context, tensor"),
        ("tensor=2,tensor=2", "has tensor twice"),
        ("fsdp=4,tensor=2", "inference splits over tensor and context; leave fsdp out"),
        ("tensor=4,context=4", "there are 8 devices; tensor can be 1 or 2"),
        ("context=7", "context=7, which does not divide 3072 values of the embedding; give 1 or 2 or 3 or 4 or 6"),
        ("tensor=16", "there are 8 devices; tensor can be 1 or 2 or 4 or 8"),
        ("tensor=3", "tensor=3, which does not divide 8 KV heads; give 1 or 2 or 4 or 8"),
    ],
)
def test_meshes_that_inference_cannot_use(spec, error):
    with pytest.raises(InputError, match=re.escape(error)):
        inference_mesh(spec, DECODER)


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("tensor=3", "which 8 devices cannot make; give sizes whose product divides it"),
        ("fsdp=16", "a mesh of fsdp=16: expected positive sizes, and at most 8 devices in all"),
        ("fsdp=1,tensor=6", "tensor=6, which does not divide the decoder's 8 KV heads; give 1 or 2 or 4 or 8"),
        ("fsdp=5", "fsdp times context=5, which does not divide the decoder's 3072 values of the embedding"),
    ],
)
def test_meshes_that_training_cannot_use(spec, error):
    with pytest.raises(InputError, match=re.escape(error)):
        training_mesh(spec, RELEASE)


def test_meshes_for_training():
    """What is not said is of the rows."""
    config = RELEASE
    assert training_mesh("fsdp=1", config) is None
    for spec, expected in ((None, (1, 8, 1, 1)), ("context=2,tensor=2", (1, 2, 2, 2)), ("data=4", (4, 2, 1, 1))):
        mesh = training_mesh(spec, config)
        assert mesh is not None
        assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "context", "tensor")) == expected


@dataclass(frozen=True)
class Chip:
    """What `make_mesh` asks of a device."""

    slice_index: int
    id: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_only_data_crosses_slices():
    """Two slices of four devices: neighbours on every other axis are of one slice."""
    devices = [Chip(i // 4, i) for i in range(8)]
    with pytest.raises(InputError, match=r"of 2 slices; give data=2 or a multiple"):
        make_mesh(fsdp=8, devices=devices)
    mesh = make_mesh(fsdp=2, context=2, data=2, devices=devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    np.testing.assert_array_equal(slices, np.broadcast_to(np.arange(2)[:, None, None, None], (2, 2, 2, 1)))


def test_meshes_for_inference():
    """On CPUs one device, unless it is said otherwise."""
    assert inference_mesh(None, DECODER) is None
    assert inference_mesh("tensor=1", DECODER) is None
    for spec, expected in (("tensor=4", (1, 4)), ("context=2,tensor=4", (2, 4)), ("context=4", (4, 1))):
        mesh = inference_mesh(spec, DECODER)
        assert mesh is not None
        assert (mesh.shape["context"], mesh.shape["tensor"]) == expected
        assert mesh.size == expected[0] * expected[1]


def test_heads_that_the_devices_cannot_share(scanned):
    """Two KV heads on four devices: an error, where each device would have the whole cache."""
    mesh = make_mesh(tensor=4)
    place = NamedSharding(mesh, jax.P())
    variables = {"params": jax.ShapeDtypeStruct((1,), jnp.float32, sharding=place)}
    with pytest.raises(InputError, match="tensor=4, which does not divide 2 KV heads; give 1 or 2"):
        Programs(scanned.module, variables)


@pytest.mark.parametrize(
    ("free", "cache_dtype", "expected"),
    [
        (17.0, None, 805 * 128),  # 12.6 GiB beside features; a page of 128 tokens takes 16 MiB; one is the scratch page
        (2.0, "int8", 167 * 128),
        (400.0, None, 8 * 131072),  # all that eight slots can use
    ],
)
def test_the_default_cache_is_what_fits(free, cache_dtype, expected):
    stats = {"bytes_limit": 1000 << 30, "bytes_in_use": (1000 << 30) - int(free * 2**30)}
    model = Phi4MM(Phi4MMConfig.from_dict(read_json(FIXTURES / "ms_release_config.json")))
    programs = SimpleNamespace(model=model, shares=1, devices=[SimpleNamespace(memory_stats=lambda: stats)])
    config = EngineConfig(page_size=128, cache_dtype=cache_dtype)
    assert default_cache_tokens(config, programs, 131072) == expected
    stats["bytes_in_use"] = (1000 << 30) - (1 << 27)
    with pytest.raises(InputError, match="which is no room for a cache"):
        default_cache_tokens(config, programs, 131072)
