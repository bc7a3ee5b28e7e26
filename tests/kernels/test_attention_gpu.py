"""Attention on GPUs, without one: cuDNN's calls in the lowered program, what they are told, and compiled PTX."""

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.attention import random, reference
from helpers.marks import fast_are
from helpers.paths import FIXTURES
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.engine import Programs, Sampling
from phi4mm_jax.engine.sampling import SamplingRows
from phi4mm_jax.engine.step_io import DecodeInputs
from phi4mm_jax.errors import InputError
from phi4mm_jax.kernels import cached, cudnn, decode_attention, flash_attention, gpu, pallas_gpu_decode
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.decoder import attend
from phi4mm_jax.model.kv_cache import CachedInputs, KVCache, cached_inputs
from phi4mm_jax.model.phi4mm import abstract_variables
from phi4mm_jax.testing.compiled import copies

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile, not to run
HOPPER, AMPERE, TURING = (gpu.Target(capability) for capability in ((9, 0), (8, 0), (7, 5)))
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def lowered(target, function, *arguments) -> str:
    """The program for CUDA, traced anew: jax does not know that the target changes what is traced."""
    with gpu.assumed(target):
        return jax.jit(lambda *x: function(*x)).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def calls(text: str) -> list[tuple[str, str]]:
    """cuDNN's calls in a lowered program, each with its kind of mask."""
    return re.findall(r"(__cudnn\$\w+)\(.*?mask_type[^A-Z]+([A-Z_]+)", text)


def gradients_of(**options):
    def program(q, k, v, limits):
        out, pull = jax.vjp(lambda *x: flash_attention(*x, **options, **limits), q, k, v)
        return pull(out)

    return program


IDS, LENGTHS = shape(2, 256, dtype=jnp.int32), {"kv_lengths": shape(2, dtype=jnp.int32)}
PROGRAMS = {
    "training": (gradients_of(causal=True), (24, 8, 128), {}, "CAUSAL"),
    "padded rows": (gradients_of(causal=True), (24, 8, 128), LENGTHS, "PADDING_CAUSAL"),
    "crops": (gradients_of(causal=False), (16, 16, 72), {"kv_mask": shape(2, 256, dtype=jnp.bool_)}, "PADDING"),
}


@pytest.mark.parametrize(("platform", "chosen"), [("gpu", gpu.Target((9, 0), 132)), ("tpu", None), ("cpu", None)])
def test_the_platform_is_that_of_the_mesh(monkeypatch, platform, chosen):
    """On a host with a GPU, programs for other devices can be compiled."""
    here = SimpleNamespace(platform="gpu", compute_capability="9.0", core_count=132)
    monkeypatch.setattr(jax, "devices", lambda: [here])
    assert gpu.target() == gpu.Target((9, 0), 132)
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=132, platform=platform)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("tensor",), abstract_device=device)):
        assert gpu.target() == chosen


@pytest.mark.parametrize(("program", "sizes", "limits", "mask"), PROGRAMS.values(), ids=PROGRAMS)
def test_cudnn_is_called_forward_and_backward(program, sizes, limits, mask):
    heads, kv_heads, size = sizes
    q, k = shape(2, 256, heads, size), shape(2, 256, kv_heads, size)
    assert calls(lowered(HOPPER, program, q, k, k, limits)) == [(FORWARD, mask), (BACKWARD, mask)]


def test_cudnn_is_called_for_packed_rows_on_hopper_only():
    def program(q, k, v, ids, limits):
        return gradients_of(causal=True, q_segments=ids, kv_segments=ids)(q, k, v, limits)

    q, k = shape(2, 256, 24, 128), shape(2, 256, 8, 128)
    text = lowered(HOPPER, program, q, k, k, IDS, LENGTHS)
    assert calls(text) == [(FORWARD, "PADDING_CAUSAL"), (BACKWARD, "PADDING_CAUSAL")]
    assert re.findall(r"max_seg_per_batch\\22: (\d+)", text) == ["32", "32"]
    assert calls(lowered(AMPERE, program, q, k, k, IDS, LENGTHS)) == []


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_chunk_of_a_prompt_attends_by_cudnn(is_first, int8):
    """To its own keys, and in a loop to those before it; a first chunk is without what the host has to wait for."""
    pages = shape(3, 65, 8, 64, 128, dtype=jnp.int8 if int8 else jnp.bfloat16)
    scales = [shape(3, 65, 8, 64, dtype=jnp.float32)] * 2 if int8 else []
    numbers, places = shape(2, dtype=jnp.int32), shape(2, 4, dtype=jnp.int32)
    rows = CachedInputs(numbers, numbers, shape(2, 4 if is_first else 32, dtype=jnp.int32), places, places)
    tensors = *(shape(2, 256, n, 128) for n in (24, 8, 8)), shape(dtype=jnp.int32)
    text = lowered(HOPPER, attend, *tensors, rows, KVCache(pages, pages, *scales))
    assert sorted(calls(text)) == [(FORWARD, "PADDING")] * (not is_first) + [(FORWARD, "PADDING_CAUSAL")]
    assert len(re.findall(r"stablehlo\.(?:while|case|if)\b", text)) == (not is_first)


@pytest.mark.parametrize(
    ("target", "q", "options", "named"),
    [
        (TURING, shape(1, 64, 4, 128), {}, "8.0 or later"),
        (HOPPER, shape(1, 64, 4, 128, dtype=jnp.float32), {}, "q has dtype float32"),
        (HOPPER, shape(1, 64, 4, 20), {}, "multiples of 8 up to 256"),
        (AMPERE, shape(1, 64, 4, 256), {}, "multiples of 8 up to 128"),
        (HOPPER, shape(1, 64, 4, 128), {"kv_mask": np.ones((1, 64), bool)}, "kv_mask is given"),
        (AMPERE, shape(1, 64, 4, 128), {"segments": (1, 1)}, "9.0 on"),
        (HOPPER, shape(1, 64, 4, 128), {"segments": (1, 2)}, "q_segments and kv_segments differ"),
        (HOPPER, shape(1, 64, 4, 128), {"q_offset": 64}, "q_offset is given"),
    ],
)
def test_what_cudnn_cannot_take_is_named_and_left_to_xla(target, q, options, named):
    if "segments" in options:
        ids = {i: np.full((1, 64), i) for i in options["segments"]}
        of_q, of_keys = options["segments"]
        options = {"q_segments": ids[of_q], "kv_segments": ids[of_keys], **options}
        del options["segments"]

    def program(q, k, v, implementation=None):
        return flash_attention(q, k, v, causal=True, implementation=implementation, **options)

    assert calls(lowered(target, program, q, q, q)) == []
    with gpu.assumed(target), pytest.raises(InputError, match=f"flash_attention: .*{named}"):
        jax.eval_shape(lambda *x: program(*x, implementation="cudnn"), q, q, q)


def test_cudnn_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(gpu, "target", lambda: HOPPER)
    monkeypatch.setattr(cudnn, "cuda_versions", None)
    q = jnp.zeros((1, 64, 4, 128), jnp.bfloat16)
    with pytest.raises(InputError, match=r"needs cuDNN, .*jax\[cuda13\]"):
        flash_attention(q, q, q, causal=True, implementation="cudnn")


def dense(q, k, q_lengths, kv_lengths, starts, call):
    """Scores of all pairs in the layout that cuDNN is given, and where it is told that they count."""
    batch, length, heads, size = q.shape
    keys = k.shape[1]
    if starts is None:
        starts, keep = jnp.arange(batch) * length, jnp.eye(batch, dtype=bool)[:, None, :, None]
        q_lengths = jnp.full(batch, length) if q_lengths is None else q_lengths
        kv_lengths = jnp.full(batch, keys) if kv_lengths is None else kv_lengths
        t, s = jnp.arange(length), jnp.arange(keys)
        allowed = (t < q_lengths[:, None])[:, :, None] & (s < kv_lengths[:, None])[:, None]
        allowed = keep & allowed[:, :, None]
        allowed &= (s <= t[:, None])[:, None] if call.causal else True  # (B, T, B, S)
    else:
        at = jnp.arange(batch * length)
        within = (at >= starts[:, None]) & (at < (starts + q_lengths)[:, None])  # (R, B T)
        valid = (at >= starts[:, None]) & (at < (starts + kv_lengths)[:, None])
        allowed = jnp.einsum("RT,RS->TS", within.astype(int), valid.astype(int)) > 0
        allowed &= (at <= at[:, None]) if call.causal else True
    allowed = allowed.reshape(batch * length, batch * keys)
    k = jnp.repeat(k, heads // k.shape[2], 2).reshape(-1, heads, size)
    scores = jnp.einsum("TNH,SNH->NTS", q.reshape(-1, heads, size), k) * call.scale
    return scores, allowed


def forward(q, k, v, q_lengths, kv_lengths, starts, call):
    """What cuDNN is told to compute; rows that nothing is said about are not a number."""
    batch, length, heads, size = q.shape
    scores, allowed = dense(q, k, q_lengths, kv_lengths, starts, call)
    scores = jnp.where(allowed, scores, -jnp.inf)
    log_sum = jax.nn.logsumexp(scores, -1)
    v = jnp.repeat(v, heads // v.shape[2], 2).reshape(-1, heads, size)
    out = jnp.einsum("NTS,SNH->TNH", jnp.exp(scores - log_sum[..., None]), v).reshape(q.shape)
    if starts is None:
        return out, log_sum.reshape(heads, batch, length).swapaxes(0, 1)
    place = jnp.arange(length)
    rows = log_sum[:, jnp.minimum(starts[:, None] + place, batch * length - 1)].swapaxes(0, 1)  # (R, N, T)
    return out, jnp.where((place < q_lengths[:, None])[:, None], rows, jnp.nan)


def backward(q, k, v, q_lengths, kv_lengths, starts, log_sum, out, d_out, call):
    """From the log-sum-exp as it is handed over: with a wrong one the weights are wrong."""
    batch, length, heads, size = q.shape
    scores, allowed = dense(q, k, q_lengths, kv_lengths, starts, call)
    if starts is None:
        flat = log_sum.swapaxes(0, 1).reshape(heads, -1)
    else:
        at = jnp.arange(batch * length)
        run = ((at >= starts[:, None]) & (at < (starts + q_lengths)[:, None])).argmax(0)
        flat = log_sum[run, :, at - starts[run]].T
    weights = jnp.where(allowed, jnp.exp(scores - flat[..., None]), 0.0)
    d_out, out = (x.reshape(-1, heads, size) for x in (d_out, out))
    wide = [jnp.repeat(x, heads // x.shape[2], 2).reshape(-1, heads, size) for x in (k, v)]
    d_scores = weights * (jnp.einsum("TNH,SNH->NTS", d_out, wide[1]) - (d_out * out).sum(-1).T[..., None]) * call.scale
    dq = jnp.einsum("NTS,SNH->TNH", d_scores, wide[0]).reshape(q.shape)
    d_wide = (
        jnp.einsum("NTS,TNH->SNH", d_scores, q.reshape(-1, heads, size)),
        jnp.einsum("NTS,TNH->SNH", weights, d_out),
    )
    group = heads // k.shape[2]
    return dq, *(x.reshape(*k.shape[:3], group, size).sum(3) for x in d_wide)


PACKED = np.array([[1] * 20 + [2] * 7 + [5] * 13 + [0] * 8, [3] * 48])  # padding behind the first row's samples
SCATTERED = np.arange(48)[None] % np.array([[3], [5]])  # segments in many pieces: not for cuDNN
CASES = {
    "causal": (True, 48, {}),
    "lengths, one of nothing": (True, 48, {"lengths": [30, 0]}),
    "keys before the queries": (False, 64, {"lengths": [64, 5]}),
    "packed": (True, 48, {"segments": PACKED, "lengths": [40, 47]}),
    "packed, a segment without keys": (True, 48, {"segments": PACKED, "lengths": [21, 48]}),
    "segments in many pieces": (True, 48, {"segments": SCATTERED, "lengths": [48, 33]}),
    "mask": (False, 48, {"kv_mask": np.random.default_rng(0).integers(0, 2, (2, 48)).astype(bool)}),
    "mask of nothing": (False, 48, {"kv_mask": np.arange(48)[None] >= np.array([[48], [9]])}),
}
FAST = ("lengths, one of nothing", "packed, a segment without keys")


@pytest.mark.parametrize("case", fast_are(FAST, CASES))
def test_what_cudnn_is_told_gives_attention(monkeypatch, case):
    """Its contract written out stands in for cuDNN: lengths, offsets of segments, the log-sum-exp there and back."""
    causal, count, limits = CASES[case]
    monkeypatch.setattr(cudnn, "_bind_forward", forward)
    monkeypatch.setattr(cudnn, "_bind_backward", backward)
    q, k, v, d_out = random(0, (2, 48, 6, 16), *[(2, count, 2, 16)] * 2, (2, 48, 6, 16))
    keys = cudnn.Keys(**{name: jnp.asarray(x, jnp.int32) for name, x in limits.items() if name != "kv_mask"})

    def program(q, k, v, d_out):
        def attention(q, k, v):
            return cudnn.flash_attention(q, k, v, keys, limits.get("kv_mask"), causal=causal, scale=0.25)

        ours, pull = jax.vjp(lambda *x: attention(*x)[0], q, k, v)
        log_sum = attention(q, k, v)[1]
        return ours, log_sum, *pull(d_out)

    names = {"lengths": "kv_lengths", "kv_mask": "kv_mask"}
    options = {names[name]: np.asarray(x) for name, x in limits.items() if name in names}
    if "segments" in limits:
        options |= {"q_segments": limits["segments"], "kv_segments": limits["segments"]}
    with jax.enable_x64(True):
        wide = [x.astype(np.float64) for x in (q, k, v)]
        (out, log_sum), pull = jax.vjp(lambda *x: reference(*x, causal=causal, scale=0.25, **options), *wide)
        expected = out, log_sum, *pull((d_out.astype(np.float64), np.zeros(log_sum.shape)))
    for ours, theirs in zip(jax.jit(program, compiler_options=QUICK)(q, k, v, d_out), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_log_sum_exp_has_a_gradient(monkeypatch):
    """Which cuDNN has not: parts that are merged by it are differentiated by XLA."""
    monkeypatch.setattr(cudnn, "_bind_forward", forward)
    q, k, v, d_log_sum = random(1, (2, 48, 6, 16), *[(2, 48, 2, 16)] * 2, (2, 48, 6))
    call = {"causal": True, "scale": 0.25}

    def log_sum_exp(q, k, v):
        return cudnn.flash_attention(q, k, v, cudnn.Keys(), None, **call)[1]

    def program(q, k, v, d_log_sum):
        return jax.vjp(log_sum_exp, q, k, v)[1](d_log_sum)

    with jax.enable_x64(True):
        _, expected = jax.vjp(lambda *x: reference(*x, **call)[1], *(x.astype(np.float64) for x in (q, k, v)))
        expected = expected(d_log_sum.astype(np.float64))
    for ours, theirs in zip(jax.jit(program, compiler_options=QUICK)(q, k, v, d_log_sum), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(
    ("target", "q", "pages", "named"),
    [
        (TURING, (1, 8, 128), (1, 4, 4, 64, 128), "8.0 or later"),
        (HOPPER, (1, 8, 128), (1, 4, 4, 24, 128), "pages of 16 n tokens"),
        (HOPPER, (1, 8, 72), (1, 4, 4, 64, 72), "head sizes 16, 32, 64"),
        (AMPERE, (1, 68, 128), (1, 4, 4, 64, 128), "up to 16 heads"),
    ],
)
def test_what_the_decoding_kernel_cannot_take_is_named(target, q, pages, named):
    def program(q, k, v):
        return decode_attention(
            q, k, v, layer=0, lengths=jnp.ones(1, jnp.int32), tables=jnp.zeros((1, 4), jnp.int32),
            implementation="pallas_gpu",
        )  # fmt: skip

    with gpu.assumed(target), pytest.raises(InputError, match=named):
        jax.eval_shape(program, shape(*q), shape(*pages), shape(*pages))


def test_splits_keep_all_multiprocessors_busy():
    splits = [pallas_gpu_decode.splits_of(batch, 8, 2048, HOPPER.cores) for batch in (1, 8, 64)]
    assert splits == [128, 16, 2]
    assert pallas_gpu_decode.splits_of(1, 8, 3, HOPPER.cores) == 2  # tiles are not shared
    assert [pallas_gpu_decode.splits_of(batch, 8, 2048, HOPPER.cores, 2) for batch in (1, 8, 64)] == [32, 4, 1]


@pytest.mark.parametrize(
    ("target", "page", "size", "dtype", "backend"),
    [
        (HOPPER, 64, 128, jnp.bfloat16, "mosaic_gpu"),
        (HOPPER, 128, 128, jnp.int8, "triton"),
        (HOPPER, 16, 128, jnp.bfloat16, "triton"),
        (HOPPER, 64, 32, jnp.bfloat16, "triton"),
        (AMPERE, 64, 128, jnp.bfloat16, "triton"),
        (gpu.Target((10, 0)), 64, 128, jnp.bfloat16, "triton"),
    ],
)
def test_hopper_decodes_by_a_kernel_of_its_own(target, page, size, dtype, backend):
    def program(q, k, v, scales):
        k_scales, v_scales = scales or (None, None)
        options = {"k_scales": k_scales, "v_scales": v_scales, "tables": jnp.zeros((1, 4), jnp.int32)}
        return decode_attention(q, k, v, layer=0, lengths=jnp.ones(1, jnp.int32), **options)

    pages = shape(1, 4, 2, page, size, dtype=dtype)
    scales = (shape(*pages.shape[:4], dtype=jnp.float32),) * 2 if dtype == jnp.int8 else None
    with gpu.assumed(target):
        traced = str(jax.make_jaxpr(program)(shape(1, 6, size), pages, pages, scales))
    assert ("WGMMA" in traced) == (backend == "mosaic_gpu")
    assert ("num_stages" in traced) == (backend == "triton")


def test_cached_rows_on_gpus_attend_as_whole_ones(monkeypatch):
    """Two chunks and a decoded token, of which the second row rests in the second chunk; pages are shuffled."""
    monkeypatch.setattr(cached, "KEYS_PER_BLOCK_ON_GPU", 16)
    lengths = np.array([49, 18])
    q, k, v = random(3, (2, 49, 6, 16), *[(2, 49, 2, 16)] * 2)
    expected, _ = reference(q, k, v, causal=True)
    pages = jnp.full((2, 9, 2, 16, 16), 7.0)
    cache, tables = KVCache(pages, pages), jnp.asarray([[5, 0, 7, 2], [1, 6, 3, 4]], jnp.int32)
    with gpu.assumed(gpu.Target(cores=3, interpret=True)):
        for starts, ends in (([0, 0], [32, 17]), ([32, 0], [48, 0]), ([48, 17], [49, 18])):
            width = 1 if ends[0] == 49 else ends[0] - starts[0]
            at = np.minimum(np.array(starts)[:, None] + np.arange(width), 48)[..., None, None]
            new = (jnp.asarray(np.take_along_axis(x, at, 1)) for x in (q, k, v))
            own = width // 16 if width > 1 and not any(starts) else 4  # pages of a first chunk alone, as the engine's
            rows = cached_inputs(cache, jnp.asarray(starts), jnp.asarray(ends), tables[:, :own], width)
            out, cache = jax.jit(attend, compiler_options=QUICK)(*new, jnp.int32(1), rows, cache)
            for row in range(2):
                count = max(ends[row] - starts[row], 0)
                theirs = expected[row, starts[row] : starts[row] + count]
                np.testing.assert_allclose(out[row, :count], theirs, atol=3e-6)
    assert (cache.k[0] == 7).all()  # the other layer
    written = np.asarray(cache.k[1][tables]).swapaxes(2, 3).reshape(2, -1, 2, 16)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(written[row, :length], k[row, :length])


def mesh_of(config: str) -> Mesh:
    """A mesh of one GPU that there is not, to compile for; it takes jax's CUDA plugin, not a GPU."""
    if find_spec("jax_plugins") is None or find_spec("jax_plugins.xla_cuda13") is None:
        pytest.skip("jax-cuda13-plugin is not installed: nothing can be compiled for a GPU")
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="gpu", target_config=config, topology="1x1x1"
    )
    return Mesh(np.array(topology.devices), ("x",))


@pytest.fixture(scope="module")
def h200():
    return mesh_of((FIXTURES / "h200_target_config.txtpb").read_text())


@pytest.fixture(scope="module")
def a100():
    config = (FIXTURES / "h200_target_config.txtpb").read_text()
    for ours, theirs in {
        "major: 9 feature_extension: ACCELERATED_FEATURES": "major: 8",
        "shared_memory_per_core: 233472": "shared_memory_per_core: 167936",
        "shared_memory_per_block_optin: 232448": "shared_memory_per_block_optin: 166912",
        "core_count: 132": "core_count: 108",
        "Compute Capability 9.0a": "Compute Capability 8.0",
        "NVIDIA H200 141GB HBM3e": "NVIDIA A100-SXM4-80GB",
    }.items():
        assert ours in config
        config = config.replace(ours, theirs)
    return mesh_of(config)


def compiled(mesh, target, function, arguments, **options):
    place = NamedSharding(mesh, jax.P())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    with gpu.assumed(target), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Triton asks it for the GPU
        return jax.jit(function).lower(*arguments).compile(options)


def decoding_at_128k(page, int8, heads=8):
    """A program and its arguments: the release's heads of 128 over all layers' cache."""

    def program(q, k, v, lengths, tables, scales):
        k_scales, v_scales = scales or (None, None)
        return decode_attention(q, k, v, layer=1, lengths=lengths, tables=tables, k_scales=k_scales, v_scales=v_scales)

    count = 131_072 // page + 1
    pages = shape(32, count, heads, page, 128, dtype=jnp.int8 if int8 else jnp.bfloat16)
    scales = (shape(32, count, heads, page, dtype=jnp.float32),) * 2 if int8 else None
    numbers, tables = shape(1, dtype=jnp.int32), shape(1, count - 1, dtype=jnp.int32)
    return program, (shape(1, 3 * heads, 128), pages, pages, numbers, tables, scales)


@pytest.mark.parametrize("int8", [False, True])
def test_decoding_lowers_for_hopper_with_one_call_of_mosaic(monkeypatch, int8):
    """Everywhere: its lowering raises where layouts do not fit, or more shared memory is taken than a block has."""
    monkeypatch.setattr(pallas_gpu_decode, "triton", None)  # which would take int8
    program, arguments = decoding_at_128k(64, int8)
    assert re.findall(r"custom_call @(mosaic_gpu\w*)", lowered(HOPPER, program, *arguments)) == ["mosaic_gpu_v2"]


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    """One folder for what the compiler writes: it keeps to the first that a process names."""
    return tmp_path_factory.mktemp("dumps")


@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize("int8", [False, True])
def test_decoding_at_128k_compiles_without_spills(a100, dumps, int8, page):
    """By Triton, for an A100; within the shared memory of a block."""
    program, arguments = decoding_at_128k(page, int8)
    text = compiled(
        a100, AMPERE, program, arguments, xla_gpu_fail_ptx_compilation_on_register_spilling=True,
        xla_dump_to=str(dumps), xla_dump_emitter_re=".*",
    ).as_text()  # fmt: skip
    assert copies(text or "", arguments[1].size) == []
    written = sorted(dumps.glob("*.ptx"), key=lambda path: path.stat().st_mtime_ns)
    path = [x for x in written if ".entry phi4mm_decode(" in x.read_text()][-1]
    ptx = path.read_text()
    assert ".target sm_80" in ptx
    assert "mma.sync" in ptx
    assert "cp.async" in ptx  # tiles on their way while others are worked on
    assert "ld.local" not in ptx
    assert "st.local" not in ptx


@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize("int8", [False, True])
def test_decoding_at_128k_compiles_for_hopper_without_spills(h200, monkeypatch, tmp_path, int8, page):
    """By Mosaic GPU, with shared memory for two blocks on a multiprocessor, each with 1 KiB of the system's."""
    monkeypatch.setattr(pallas_gpu_decode, "triton", None)  # which would take int8
    for name, value in {"PTX": "1", "PTXAS": "1", "TO": str(tmp_path)}.items():
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", value)
    program, arguments = decoding_at_128k(page, int8)
    text = compiled(h200, HOPPER, program, arguments).as_text()
    assert copies(text or "", arguments[1].size) == []
    ptx, report, passes = (next(tmp_path.glob(f"phi4mm_decode*.{kind}")) for kind in ("ptx", "ptxas", "*passes.log"))
    shared = max(int(n) for n in re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", passes.read_text()))
    assert 2 * (shared + 1024) <= 233_472
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report.read_text()
    assert ".target sm_90a" in ptx.read_text()
    assert "wgmma.mma_async" in ptx.read_text()
    assert "cp.async.bulk.tensor" in ptx.read_text()  # tiles by TMA


@pytest.mark.parametrize("rows", [1, 64])
def test_a_decoding_step_copies_neither_cache_nor_weights(h200, rows):
    """Two layers of the release's widths, unrolled: beside parameters and cache less is held than one matrix."""
    config = Phi4MMConfig.from_dict(json.loads((FIXTURES / "ms_release_config.json").read_text()))
    config = replace(config, decoder=replace(config.decoder, vocab_size=1024, num_layers=2))
    abstract = nn.unbox(abstract_variables(Phi4MM(config, jnp.bfloat16)))["params"]
    abstract = jax.tree.map(lambda x: shape(*x.shape), abstract)
    stacked = abstract["decoder"].pop("layers")
    for i in range(2):
        abstract["decoder"][f"layers_{i}"] = jax.tree.map(lambda x: shape(*x.shape[1:]), stacked)
    cache = jax.eval_shape(lambda: KVCache.allocate(config.decoder, 2048, 64, jnp.bfloat16))
    numbers = shape(rows, dtype=jnp.int32)
    inputs = DecodeInputs(
        numbers, numbers, numbers, shape(rows, 2048, dtype=jnp.int32), numbers, shape(rows, dtype=jnp.bool_), numbers,
        SamplingRows.of([Sampling()] * rows),
    )  # fmt: skip
    place = NamedSharding(h200, jax.P())
    arguments = {"params": abstract}, cache, shape(rows, 1024, dtype=jnp.bool_), inputs
    variables, *state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    with gpu.assumed(HOPPER):
        programs = Programs(Phi4MM(config, jnp.bfloat16, scan=False), variables)
        program = programs.decode.lower(variables, *state, width=8).compile({"xla_gpu_autotune_level": 0})
    assert copies(program.as_text(), 3072 * 1024) == []
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * cache.k.size * 2  # the cache is donated
    assert memory.temp_size_in_bytes < 3072 * 3072 * 2
