"""Loading: what is wrong with a checkpoint is an error that names the file or tensor."""

import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from helpers.cases import golden_cases
from helpers.checkpoints import joined, save_shards, shards
from helpers.paths import TINY
from safetensors.numpy import load_file, save_file

import phi4mm_jax
from phi4mm_jax import CheckpointError, InputError
from phi4mm_jax.checkpoint import orbax_io
from phi4mm_jax.checkpoint.convert import to_orbax
from phi4mm_jax.checkpoint.layouts.original import original_table
from phi4mm_jax.checkpoint.load import is_finite, open_checkpoint
from phi4mm_jax.checkpoint.safetensors_io import read_header
from phi4mm_jax.checkpoint.stacked import StackedTensors
from phi4mm_jax.checkpoint.tensor_types import UNUSED, Part, Tensor, linear, parameter_shapes
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.mesh import make_mesh
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.phi4mm import abstract_variables
from phi4mm_jax.processing.processor import Processor

SHARD = "model-00002-of-00003.safetensors"
LORA_B = "model.layers.1.mlp.down_proj.lora_B.vision.weight"  # in that shard or another


@pytest.fixture
def copy(tmp_path):
    """A copy of the tiny checkpoint to damage."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("goldens*", "inputs"))
    return folder


def rewrite(folder, change):
    """Apply `change` to the tensors of the shard that has what it wants; it returns whether it did.

    The adapters' folders, which would be taken in place of the shards' adapters, are removed.
    """
    for name in ("vision-lora", "speech-lora"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in sorted(folder.glob("model-*.safetensors")):
        tensors = load_file(path)
        if change(tensors):
            save_file(tensors, path)
            return
    raise AssertionError("nothing to change")


def replace(name, value):
    def change(tensors):
        found = name in tensors
        if found:
            tensors[name] = value(tensors[name])
        return found

    return change


def test_table_covers_the_checkpoint_and_the_model():
    config = Phi4MMConfig.from_folder(TINY)
    table = original_table(config)
    names = [t.name for t in table]
    assert len(set(names)) == len(names)
    assert set(names) == set(json.loads((TINY / "model.safetensors.index.json").read_text())["weight_map"])
    declared: dict = flatten_dict(nn.unbox(abstract_variables(Phi4MM(config))))
    read = {path: shape for path, shape in parameter_shapes(table).items() if path[0] != UNUSED}
    assert read == {path: leaf.shape for path, leaf in declared.items()}


@pytest.mark.parametrize("dtype", [jnp.float32, np.float32, np.dtype("float32"), "bfloat16", jnp.bfloat16])
def test_dtypes_of_numpy_and_jax(tmp_path, dtype):
    with pytest.raises(CheckpointError, match="no such folder"):  # the next thing that is checked
        phi4mm_jax.load(tmp_path / "nowhere", dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.float64, "float64"), (np.float16, "float16"), (None, "None"), ("half", "float16"), (3, "3")]
)
def test_other_dtypes_are_named(tmp_path, dtype, name):
    with pytest.raises(InputError, match=f"dtype is {name}; expected 'float32' or 'bfloat16'"):
        phi4mm_jax.load(tmp_path / "nowhere", dtype=dtype)


def test_table_is_a_bijection():
    """Splitting every tensor into parameters and joining them gives it back."""
    tensors = {}
    for path in TINY.glob("model-*.safetensors"):
        tensors |= load_file(path)
    for tensor in original_table(Phi4MMConfig.from_folder(TINY)):
        whole = tensors[tensor.name]
        assert whole.shape == tensor.shape
        parameters = [part.to_parameter(whole[a:b]) for part, a, b in tensor.spans()]
        np.testing.assert_array_equal(joined(tensor, parameters).reshape(tensor.shape), whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_long_tensors_are_read_in_strips(tmp_path, dtype):
    """A fused matrix and an embedding of several strips, in two layers, beside safetensors' own reading."""
    rng = np.random.default_rng(0)
    held = {name: rng.standard_normal((301, 5000)).astype(jnp.bfloat16) for name in ("0", "1", "embedding")}
    save_file(held, tmp_path / "model.safetensors")
    fused = (linear("params/q", (130,), (50, 100)), linear("params/k", (171,), (50, 100)))
    table = [Tensor(str(i), (301, 5000), fused, layer=i) for i in range(2)]
    table.append(Tensor("embedding", (301, 5000), (Part(("params", "embedding"), (301, 5000), (0, 1), (301, 5000)),)))
    checkpoint = StackedTensors(table, read_header(tmp_path / "model.safetensors"))
    read = {name: checkpoint.read(("params", name), np.dtype(dtype)) for name in ("q", "k", "embedding")}
    stacked = np.stack([held["0"].T, held["1"].T]).astype(dtype)
    np.testing.assert_array_equal(read["q"], stacked[..., :130].reshape(2, 50, 100, 130))
    np.testing.assert_array_equal(read["k"], stacked[..., 130:].reshape(2, 50, 100, 171))
    np.testing.assert_array_equal(read["embedding"], held["embedding"].astype(dtype))
    for array in read.values():  # as jax takes it without a copy, which would be all of the model once more
        assert array.dtype == dtype
        assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


def test_file_that_shrinks_after_its_header_was_read(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"x": np.zeros((8, 4), np.float32)}, file)
    stored = read_header(file)["x"]
    os.truncate(file, file.stat().st_size - 16)
    np.testing.assert_array_equal(stored.rows(0, 7), np.zeros((7, 4), np.float32))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(16 bytes are missing at its end"):
        stored.rows(0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight", None) is not None, "model.norm.weight: missing"),
        (lambda t: t.update(surplus=np.zeros(3, np.float32)) is None, "surplus: not part"),
        (replace("model.layers.0.mlp.down_proj.base_layer.weight", lambda x: np.ascontiguousarray(x.T)),
         "mlp.down_proj.base_layer.weight: has shape"),
        (replace("model.norm.weight", lambda x: x.astype(np.int32)), "model.norm.weight: has dtype I32"),
        (replace("model.norm.weight", lambda x: x.astype(np.float64)),
         r"has dtype F64, expected one of F32, BF16, F16 \(model.float\(\) in PyTorch"),
        (replace(LORA_B, np.zeros_like), f"{LORA_B}: all zero"),
        (lambda t: t.update({LORA_B.replace("vision", "default"): np.zeros((96, 8), np.float32)}) is None,
         "\nMerge this adapter of PEFT's"),
    ],
)  # fmt: skip
def test_wrong_tensors(copy, change, message):
    rewrite(copy, change)
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        phi4mm_jax.load(copy, dtype="float32")


def test_fresh_adapters_are_accepted_when_meant(copy):
    rewrite(copy, replace(LORA_B, np.zeros_like))
    model = phi4mm_jax.load(copy, dtype="float32", fresh_adapters=True)
    assert not np.asarray(model.variables["lora_vision"]["decoder"]["layers_1"]["mlp"]["down"]["down"]).any()


def test_wrong_files(copy, tmp_path):
    whole = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=SHARD):
        phi4mm_jax.load(copy)
    (copy / SHARD).unlink()
    with pytest.raises(CheckpointError, match=f"{SHARD}: is named by"):
        phi4mm_jax.load(copy)
    (copy / SHARD).write_bytes(whole)

    index = copy / "model.safetensors.index.json"
    index.unlink()
    phi4mm_jax.load(copy)  # the shards say it all
    shutil.copy(copy / SHARD, copy / "model-00004-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="and again in"):
        phi4mm_jax.load(copy)
    index.write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="weight_map"):
        phi4mm_jax.load(copy)

    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        phi4mm_jax.load(tmp_path / "nowhere")
    with pytest.raises(phi4mm_jax.InputError, match="float64"):
        phi4mm_jax.load(copy, dtype="float64")


EMBEDDING = "model.embed_tokens.weight"


def test_buffers_and_a_tied_head_are_left_out(copy, goldens):
    """The head in a file of its own beside the embedding, or alone, as safetensors' save_model may leave it."""
    tensors = shards(copy)
    head = tensors[EMBEDDING]
    buffers = {
        "model.rotary_emb.inv_freq": np.ones(4, np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "model.embed_tokens_extend.image_embed.img_processor.embeddings.position_ids": np.arange(4)[None],
    }
    for head_alone in (False, True):
        if head_alone:
            del tensors[EMBEDDING]
        save_shards(copy, tensors | buffers)
        save_file({"lm_head.weight": head}, copy / "model_head.safetensors")
        case = next(c for c in golden_cases() if c["name"] == "text")
        model = phi4mm_jax.load(copy, dtype="float32")
        logits = model.logits(model.process([case["prompt"]]))[0, : case["tokens"]]
        last = goldens["text.logits"]
        np.testing.assert_allclose(logits[-len(last) :], last, atol=3e-4)


@pytest.mark.parametrize("change", [lambda x: x * 2, lambda x: x[:-8], lambda x: x.astype(ml_dtypes.bfloat16)])
def test_an_untied_head_is_refused(copy, change):
    tensors = shards(copy)
    save_shards(copy, tensors | {"lm_head.weight": np.ascontiguousarray(change(tensors[EMBEDDING]))})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .*only a head that is tied to the embedding"):
        open_checkpoint(copy, Phi4MMConfig.from_folder(copy))


@pytest.mark.parametrize(
    ("rename", "named"),
    [
        (lambda n: f"module.{n}", "the prefix 'module.'.*DDP's"),
        (lambda n: f"_orig_mod.{n}", "the prefix '_orig_mod.'.*torch.compile's"),
        (lambda n: f"base_model.model.{n}", "the prefix 'base_model.model.'.*PEFT's"),
        (lambda n: f"model.{n}", r"the prefix 'model\.'.*model\.model\."),
        (lambda n: n.replace("model.", "model.language_model.", 1), "the prefix 'model.language_model.'"),
        (lambda n: n.removeprefix("model."), "no prefix 'model.'"),
        (lambda n: re.sub(r"(layers\.\d+)\.", r"\1._checkpoint_wrapped_module.", n), "the prefix '_checkpoint_"),
    ],
)
def test_a_prefix_is_named(copy, rename, named):
    save_shards(copy, {rename(name): x for name, x in shards(copy).items()})
    with pytest.raises(CheckpointError, match=f"(?s)tensors have {named}"):
        open_checkpoint(copy, Phi4MMConfig.from_folder(copy))


MATRIX = "model.layers.0.mlp.down_proj.base_layer.weight"


@pytest.mark.parametrize(
    "as_saved",
    [
        lambda name, x: {name: x.astype(np.int8), name.replace("weight", "SCB"): np.ones(len(x), np.float32)},
        lambda name, x: {name: x.astype(np.uint8), f"{name}.absmax": np.ones(4, np.float32)},  # bitsandbytes
        lambda name, x: {name.replace("weight", f"q{n}"): np.ones((4, 4), np.int32) for n in ("weight", "zeros")},
        lambda name, x: {name: x, f"{name}_scale": np.ones(1, np.float32)},  # in float32, as some save fp8
        lambda name, x: {name: x.astype(ml_dtypes.float8_e4m3fn), f"{name}_scale_inv": np.ones((1, 1), np.float32)},
        lambda name, x: {f"{name}_packed": np.ones((4, 4), np.int32), f"{name}_scale": np.ones((4, 4), np.float32)},
    ],
)  # fmt: skip
def test_quantised_tensors_are_refused(copy, as_saved):
    tensors = shards(copy)
    save_shards(copy, tensors | as_saved(MATRIX, tensors.pop(MATRIX)))
    with pytest.raises(CheckpointError, match=r"down_proj.*the weights are quantised.*bfloat16"):
        open_checkpoint(copy, Phi4MMConfig.from_folder(copy))


def test_files_of_quantisation_are_refused(copy):
    (copy / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: says that the weights are quantised"):
        open_checkpoint(copy, Phi4MMConfig.from_folder(copy))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(phi4mm_jax.ConfigError, match=r"quantization_config is set \(awq\): the weights are quantised"):
        phi4mm_jax.load(copy)


def test_a_shard_that_is_not_there_is_named_without_an_index(copy):
    (copy / "model.safetensors.index.json").unlink()
    (copy / SHARD).unlink()
    with pytest.raises(CheckpointError, match=f"{SHARD}: belongs to model-00001.*not there"):
        phi4mm_jax.load(copy)


def test_a_vocabulary_of_another_size(copy):
    tensors = shards(copy)
    rows = np.concatenate([tensors[EMBEDDING], tensors[EMBEDDING][:8]])
    save_shards(copy, tensors | {EMBEDDING: rows})
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight: has shape.*resize_token_embeddings"):
        open_checkpoint(copy, Phi4MMConfig.from_folder(copy))


def test_a_file_beside_an_index_that_does_not_name_it(copy):
    """transformers reads it, and not the shards."""
    save_file({"model.norm.weight": np.ones(4, np.float32)}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is there besides the shards"):
        phi4mm_jax.load(copy)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("preprocessor_config.json", {"image_mean": [0.48, 0.46, 0.41]}, "image_mean is"),
        ("preprocessor_config.json", {"do_rescale": False}, "do_rescale is False"),
        ("preprocessor_config.json", {"size": {"height": 224, "width": 224}}, "size is .*; only 448, config.json's"),
        ("preprocessor_config.json", {"patch_size": 16}, "patch_size is 16; only 14"),
        ("processor_config.json", {"image_processor": {"resample": 2}}, "resample is 2; only 3"),
        ("processor_config.json", {"feature_extractor": {"sampling_rate": 8000}}, "sampling_rate is 8000"),
        ("processor_config.json", {"audio_processor": {"mel_max_frequency": 8000}}, "mel_max_frequency is 8000"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5], "rescale_factor": 0.00392156862745098}, None),
        ("preprocessor_config.json", {"size": {"height": 448, "width": 448}, "mel_max_frequency": 7690.0}, None),
    ],
)
def test_other_processing_is_refused(copy, name, change, named):
    path = copy / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change))
    if named is None:
        Processor.from_folder(copy, Phi4MMConfig.from_folder(copy))
        return
    with pytest.raises(CheckpointError, match=named):
        Processor.from_folder(copy, Phi4MMConfig.from_folder(copy))


def test_pickles_are_not_read(copy):
    for path in copy.glob("model*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="Give the folder"):
        phi4mm_jax.load(copy)
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickle"):
        phi4mm_jax.load(copy)
    (copy / "model-Q4_K_M.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model-Q4_K_M\.gguf: GGUF"):
        phi4mm_jax.load(copy)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("__0_0.distcp", "merge-weights"),
        ("pytorch_model_fsdp_0", "merge-weights"),
        ("global_step100", "zero_to_fp32"),
        ("model.pt", "safe_serialization"),
        ("consolidated.safetensors", "call it model.safetensors"),
    ],
)
def test_checkpoints_of_trainers_are_named_with_their_remedy(copy, name, remedy):
    for path in copy.glob("model*"):
        path.unlink()
    (copy / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: .*{remedy}"):
        phi4mm_jax.load(copy)


def test_a_trainers_output_names_the_last_checkpoint(copy, tmp_path):
    for step in (500, 1000):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        shutil.copy(copy / "config.json", tmp_path / "run" / f"checkpoint-{step}")
    with pytest.raises(CheckpointError, match=r"run: has no config\.json, but .* 2 checkpoints; .*checkpoint-1000$"):
        phi4mm_jax.load(tmp_path / "run")


def test_tensors_that_deepspeed_left_empty_are_named(copy):
    tensors = {name: x[:0].reshape(0) if name == "model.norm.weight" else x for name, x in shards(copy).items()}
    save_shards(copy, tensors)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: .* empty, as DeepSpeed's ZeRO-3"):
        phi4mm_jax.load(copy)


def test_a_link_to_no_file_is_named(copy):
    """As in a cache of the Hub whose blobs were cleared."""
    for path in copy.glob("model*"):
        path.unlink()
    (copy / "model.safetensors").symlink_to(copy / "gone")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a link to what is not there"):
        phi4mm_jax.load(copy)


def test_an_adapter_that_transformers_would_load_is_refused(copy):
    """On top of the model beside it, or of the base that adapter_config.json names."""
    with pytest.raises(CheckpointError, match=r"is an adapter without its base; .* --adapter-folder"):
        phi4mm_jax.load(copy / "speech-lora")
    shutil.copy(copy / "speech-lora" / "adapter_config.json", copy)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json beside config\.json"):
        phi4mm_jax.load(copy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.self_attn.qkv_proj.base_layer.weight", np.nan),
        ("model.layers.1.mlp.down_proj.lora_A.speech.weight", -np.inf),
        ("model.norm.weight", np.inf),
    ],
)
def test_a_value_that_is_not_finite_is_named(copy, name, value):
    def one_of_them(array):
        array = array.copy()
        array.flat[-1] = value
        return array

    rewrite(copy, replace(name, one_of_them))
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}.*: holds NaN or infinity; the checkpoint is dam"):
        phi4mm_jax.load(copy, dtype="float32")


@pytest.mark.parametrize(
    ("name", "layer", "named"),
    [
        ("norm/scale", ..., r" model\.norm\.weight: holds"),
        ("layers/mlp/down/down", 1, r" model\.layers\.1\.mlp\.down_proj\.base_layer\.weight: holds"),
    ],
)
def test_a_converted_value_that_is_not_finite_is_named(copy, name, layer, named):
    """Where it lies on several devices, too."""
    to_orbax(TINY, copy / "converted")
    folder = copy / "converted" / orbax_io.FOLDER
    config = Phi4MMConfig.from_folder(TINY)
    converted = open_checkpoint(copy / "converted", config)
    values = {path: np.array(converted.read(path)) for path in converted.parameters}
    values["params", "decoder", *name.split("/")][layer] = np.nan
    parameters = dict(converted.parameters)
    shutil.rmtree(folder)
    orbax_io.write(folder, parameters, values.__getitem__)
    for mesh in (None, make_mesh(fsdp=4)):
        with pytest.raises(CheckpointError, match=f"{named} NaN or infinity"):
            phi4mm_jax.load(copy / "converted", dtype="float32", mesh=mesh)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_finite_values(dtype):
    """As numpy tells, of every pattern of bits that there is in 16, and of the borders in 32."""
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if dtype.itemsize == 2:
        values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    else:
        limits = [0.0, np.finfo(np.float32).max, np.finfo(np.float32).tiny, np.inf, np.nan, 1e-45]
        values = np.asarray([*limits, *(-x for x in limits)], np.float32)
    expected = np.isfinite(values.astype(np.float64))
    assert [is_finite(values[i : i + 1]) for i in range(len(values))] == expected.tolist()
