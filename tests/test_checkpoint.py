"""Loading: what is wrong with a checkpoint is an error that names the file or tensor."""

import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import TINY
from flax import linen as nn
from safetensors.numpy import load_file, save_file

import phi4mm_jax
from phi4mm_jax import CheckpointError
from phi4mm_jax.checkpoint import orbax
from phi4mm_jax.checkpoint.convert import to_orbax
from phi4mm_jax.checkpoint.load import is_finite, open_checkpoint
from phi4mm_jax.checkpoint.original import original_table
from phi4mm_jax.checkpoint.table import UNUSED
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.phi4mm import abstract_variables
from phi4mm_jax.sharding import make_mesh

SHARD = "model-00002-of-00003.safetensors"
LORA_B = "model.layers.1.mlp.down_proj.lora_B.vision.weight"  # in that shard or another


@pytest.fixture
def copy(tmp_path):
    """A copy of the tiny checkpoint to damage."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("goldens*", "inputs"))
    return folder


def rewrite(folder, change):
    """Apply `change` to the tensors of the shard that has what it wants; it returns whether it did."""
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
    paths = {part.path for t in table for part in t.parts}
    declared = nn.unbox(abstract_variables(Phi4MM(config)))
    read = {path for path in paths if path[0] != UNUSED}
    assert read == {tuple(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(declared)}


def test_table_is_a_bijection():
    """Splitting every tensor into parameters and joining them gives it back."""
    tensors = {}
    for path in TINY.glob("model-*.safetensors"):
        tensors |= load_file(path)
    for tensor in original_table(Phi4MMConfig.from_folder(TINY)):
        whole = tensors[tensor.name]
        assert whole.shape == tensor.shape
        parameters = [part.to_parameter(whole[a:b]) for part, a, b in tensor.spans()]
        np.testing.assert_array_equal(tensor.join(parameters).reshape(tensor.shape), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight", None) is not None, "model.norm.weight: missing"),
        (lambda t: t.update(surplus=np.zeros(3, np.float32)) is None, "surplus: not part"),
        (replace("model.layers.0.mlp.down_proj.base_layer.weight", lambda x: np.ascontiguousarray(x.T)),
         "mlp.down_proj.base_layer.weight: has shape"),
        (replace("model.norm.weight", lambda x: x.astype(np.int32)), "model.norm.weight: has dtype I32"),
        (replace(LORA_B, np.zeros_like), f"{LORA_B}: all zero"),
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


def test_pickles_are_not_read(copy):
    for path in copy.glob("model*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="Give the folder"):
        phi4mm_jax.load(copy)
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickle"):
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


def test_a_converted_value_that_is_not_finite_is_named(copy):
    """Where it lies on several devices, too."""
    to_orbax(TINY, copy / "converted")
    folder = copy / "converted" / orbax.FOLDER
    config = Phi4MMConfig.from_folder(TINY)
    converted = open_checkpoint(copy / "converted", config)
    name = ("params", "decoder", "norm", "scale")
    values = {path: converted.read(path) for path in converted.parameters}
    values[name] = values[name] * np.float32(np.nan).astype(values[name].dtype)
    parameters = dict(converted.parameters)
    shutil.rmtree(folder)
    orbax.write(folder, parameters, values.__getitem__)
    for mesh in (None, make_mesh(fsdp=4)):
        with pytest.raises(CheckpointError, match=r"norm\.weight: holds NaN or infinity"):
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
