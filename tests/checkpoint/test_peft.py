"""Adapters in the folders that PEFT saves: computed as PEFT computes them, or refused by name."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.checkpoints import joined
from helpers.paths import TINY

pytest.importorskip("torch")
import torch
from helpers import torch_native
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import phi4mm_jax
from convert import record, verify
from infer import batch, chat, evaluate, generate
from phi4mm_jax import CheckpointError, ConfigError, InputError
from phi4mm_jax.checkpoint.convert import to_torch
from phi4mm_jax.checkpoint.load import open_checkpoint
from phi4mm_jax.checkpoint.peft import PeftAdapter, adapter_folders, user_adapter_folder
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.config.peft_settings import MODULES
from phi4mm_jax.engine.provenance import settings_of as settings_of_batch
from phi4mm_jax.evaluation.answers import settings_of as settings_of_evaluation
from phi4mm_jax.training.run_folder import CHECKPOINTS, RECIPE

pytestmark = pytest.mark.torch

DECODER = r"model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)"


@pytest.fixture(scope="module")
def reference():
    """transformers' model, of the tiny checkpoint's sizes."""
    config = torch_native.native_config(json.loads((TINY / "config.json").read_text()))
    return torch_native.Phi4MultimodalForCausalLM._from_config(config).eval()


def save_adapter(model: Any, folder: Path, **settings: Any) -> None:
    """Tensors that PEFT saves of an adapter, each of whose values was moved by training."""
    torch.manual_seed(0)
    settings = {"r": 8, "lora_alpha": 12, "target_modules": DECODER, "task_type": "CAUSAL_LM"} | settings
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    tuned.save_pretrained(folder)


def products(model: Any, folder: Path) -> dict[str, np.ndarray]:
    """Product that the adapter adds to each matrix of the decoder, in PEFT."""
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    modules: dict[str, Any] = dict(loaded.get_base_model().named_modules())
    decoder = [f"model.layers.{i}.{name}" for i in range(model.config.num_hidden_layers) for name in MODULES]
    return {
        name: modules[name].get_delta_weight("default").detach().numpy()
        if hasattr(modules[name], "lora_A")
        else np.zeros(modules[name].weight.shape, np.float32)
        for name in decoder
    }


def our_products(checkpoint: Any, scale: float, kind: str = "vision") -> dict[str, np.ndarray]:
    """The same of parameters that were read: `scale` times B A."""
    matrices: dict[str, np.ndarray] = {}
    for tensor in checkpoint.tensors:
        if tensor.collection == f"lora_{kind}":
            parts = [checkpoint.read(part.path, np.float32)[tensor.layer] for part in tensor.parts]
            name = tensor.name.removeprefix("base_model.model.").replace(f".{kind}.weight", ".weight")
            matrices[name] = joined(tensor, parts)
    a, b = ({n.partition(f".lora_{x}.")[0]: m for n, m in matrices.items() if f".lora_{x}." in n} for x in "AB")
    return {name: scale * b[name] @ a[name] for name in a}


def assert_same_products(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    assert any(np.any(product) for product in theirs.values())
    for name, product in theirs.items():
        np.testing.assert_allclose(ours[name], product, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 3, "use_rslora": True},
        {"rank_pattern": {r"1\.mlp\.down_proj": 16, "down_proj": 2, "o_proj": 4}},
        {"alpha_pattern": {r"^model\.layers\.0\..*": 5, "qkv_proj": 3.5}},
        {"use_rslora": True, "rank_pattern": {"mlp.*": 3}, "alpha_pattern": {"0.self_attn.qkv_proj": 7}},
        {"target_modules": ["qkv_proj"]},
        {"target_modules": ["self_attn.qkv_proj", "model.layers.1.mlp.down_proj"]},
        {"target_modules": ["qkv_proj", "gate_up_proj"], "layers_to_transform": [1], "layers_pattern": "layers",
         "exclude_modules": r".*(audio|image)_embed.*"},
        {"target_modules": ["qkv_proj"], "layers_to_transform": 0},
        {"exclude_modules": ["o_proj", "layers.0.mlp.down_proj"]},
        {"bias": "lora_only"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": False, "lora_dropout": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_products_are_pefts(reference, tiny, tmp_path, settings):
    save_adapter(reference, tmp_path, **settings)
    adapter = PeftAdapter(tmp_path, "vision", tiny.config)
    assert_same_products(our_products(adapter, adapter.lora.scale), products(reference, tmp_path))


@pytest.fixture(scope="module")
def two_adapters(native, tmp_path_factory):
    """The tiny checkpoint with adapters of other ranks and scales: of some modules, in two dtypes, with names that PEFT
    itself would not read; beside it as PEFT reads them. And the model that they are for."""
    folder = tmp_path_factory.mktemp("two") / "checkpoint"
    shutil.copytree(native, folder)
    for kind in ("vision", "speech"):
        shutil.rmtree(folder / f"{kind}-lora")
    model = torch_native.Phi4MultimodalForCausalLM.from_pretrained(native, attn_implementation="eager").eval()
    save_adapter(
        model, folder / "vision-lora", r=4, lora_alpha=6, rank_pattern={"1.self_attn.qkv_proj": 6},
        target_modules=r".*layers\.\d+\.(self_attn\.qkv_proj|mlp\.down_proj)", exclude_modules=r".*audio_embed.*",
    )  # fmt: skip
    save_adapter(model, folder / "speech-lora", r=8, lora_alpha=3, use_rslora=True)
    file = folder / "vision-lora" / "adapter_model.safetensors"
    save_file({n: x.bfloat16() if "lora_B" in n else x for n, x in load_file(file).items()}, file)
    for kind in ("vision", "speech"):
        shutil.copytree(folder / f"{kind}-lora", folder.with_name(kind))
    save_file({n.replace(".weight", ".default.weight"): x for n, x in load_file(file).items()}, file)
    return folder, model


@pytest.mark.parametrize("beside", [False, True])
def test_logits_are_pefts(two_adapters, beside):
    """Each row with its adapter, in one batch; the adapters in the checkpoint's folder, or beside one with others."""
    folder, model = two_adapters
    adapters = {"vision": folder.with_name("vision"), "speech": folder} if beside else None
    loaded = phi4mm_jax.load(TINY if beside else folder, dtype="float32", adapters=adapters)
    prompt = "<|user|>hello there<|end|><|assistant|>"
    batch = loaded.process([prompt, prompt])._replace(adapters=np.array([1, 2], np.int32))
    ours = np.asarray(loaded.logits(batch))
    tokens = torch.from_numpy(np.asarray(batch.tokens[:1, : batch.lengths[0]])).long()
    for row, kind in enumerate(("vision", "speech")):
        with torch.no_grad():
            tuned = PeftModel.from_pretrained(copy.deepcopy(model), str(folder.with_name(kind)))
            theirs = tuned(input_ids=tokens).logits[0]
            without = model(input_ids=tokens).logits[0]
        assert (theirs - without).abs().max() > 0.1
        np.testing.assert_allclose(ours[row, : tokens.shape[1]], theirs.numpy(), atol=1e-4)


@pytest.mark.parametrize("layout", ["original", "native"])
def test_exports_are_what_peft_computed(two_adapters, tmp_path, layout):
    """One rank and alpha stand for all that the source's settings say, in both layouts and for PEFT."""
    folder, model = two_adapters
    to_torch(folder, tmp_path / "out", layout)
    config = Phi4MMConfig.from_folder(tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out", config)
    assert list(config.loras) == ["vision", "speech"]
    for kind, lora in config.loras.items():
        theirs = products(model, folder.with_name(kind))
        assert_same_products(our_products(checkpoint, lora.scale, kind), theirs)
    to_torch(tmp_path / "out", tmp_path / "adapters", "native", adapters_only=True)
    for kind in ("vision", "speech"):
        ours = products(model, tmp_path / "adapters" / f"{kind}-lora")
        assert_same_products(ours, products(model, folder.with_name(kind)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "qkv_proj"]}, r"q_proj\.lora_A\.weight: target_modules reached a module"),
        ({"target_modules": ["fc1"]}, "target_modules is .*fc1.*none of the decoder's 3 layers"),
    ],
)  # fmt: skip
def test_adapters_of_other_modules_are_refused(reference, tiny, tmp_path, settings, message):
    save_adapter(reference, tmp_path, **settings)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        PeftAdapter(tmp_path, "vision", tiny.config)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda t, n: t.pop(n), {}, r"1\.mlp\.down_proj\.lora_B\.weight: missing"),
        (lambda t, n: t.update({n: t[n][:, :4].clone()}), {}, r"has shape \(96, 4\), expected \(96, 8\)"),
        (lambda t, n: t.update({n: t[n].int()}), {}, "has dtype I32"),
        (lambda t, n: t.update({n.replace("lora_B", "lora_B.default"): t[n].clone()}), {}, "is there twice"),
        (lambda t, n: t.update({n.replace("layers.1", "layers.9"): t[n].clone()}), {}, "layers.9.*not part"),
        (lambda t, n: None, {"target_modules": ["qkv_proj"]}, "is there, but by target_modules"),
        (lambda t, n: None, {"target_modules": "(qkv"}, "cannot be matched with names"),
        (lambda t, n: None, {"rank_pattern": {"qkv_proj": 0}}, "rank_pattern is 0; expected a positive whole number"),
        (lambda t, n: None, {"alpha_pattern": ["qkv_proj"]}, r"alpha_pattern is \['qkv_proj'\]; expected an object"),
        (lambda t, n: t.update({n: torch.zeros(0)}), {}, r"has shape \(0,\), expected .*ZeRO-3 leaves it"),
        (lambda t, n: t.update({n.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(96)}), {},
         "lora_magnitude_vector: is no matrix of plain LoRA"),
        (lambda t, n: None, {"use_rslora": "yes"}, "use_rslora is 'yes'; expected true or false"),
        (lambda t, n: None, {"modules_to_save": ["img_projection_up"]}, r"modules_to_save is .*merge_and_unload\(\)"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_their_settings(reference, tiny, tmp_path, change, settings, message):
    save_adapter(reference, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors, "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | settings))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        PeftAdapter(tmp_path, "vision", tiny.config)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda n: f"_orig_mod.{n}", "the prefix '_orig_mod.', .* It is torch.compile's"),
        (lambda n: n.replace("model.model.", "model._orig_mod.model."), "the prefix '_orig_mod.', .* torch.compile's"),
        (lambda n: f"module.{n}".replace(".weight", ".default.weight"), "the prefix 'module.', .* DDP's"),
        (lambda n: n.replace("layers.1.", "layers.1._fsdp_wrapped_module."), "names of 8 tensors .* It is FSDP's"),
        (lambda n: n.removeprefix("base_model.model."), "in place of base_model.model.model.layers.0.mlp.down_proj"),
        (lambda n: n.replace("model.layers", "model.language_model.layers"), "prefix 'base_model.*language_model.', "),
    ],
)  # fmt: skip
def test_a_prefix_of_an_adapters_names_is_named(reference, tiny, tmp_path, change, named):
    save_adapter(reference, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=f"{file}: the names of .*{named.removeprefix('names of ')}"):
        PeftAdapter(tmp_path, "vision", tiny.config)


@pytest.mark.parametrize("saved", [{}, {"save_embedding_layers": False}])
def test_an_embedding_that_peft_saved_is_said_to_be_of_a_resized_vocabulary(native, tiny, tmp_path, saved):
    model = torch_native.Phi4MultimodalForCausalLM.from_pretrained(native)  # PEFT compares with its config.json
    model.resize_token_embeddings(model.config.vocab_size + 8)
    get_peft_model(model, LoraConfig(r=8, lora_alpha=12, target_modules=DECODER)).save_pretrained(tmp_path, **saved)
    if saved:
        PeftAdapter(tmp_path, "vision", tiny.config)
        return
    with pytest.raises(CheckpointError) as error:
        PeftAdapter(tmp_path, "vision", tiny.config)
    assert "model.embed_tokens.weight: saved by PEFT, as of a resized vocabulary" in str(error.value)
    assert "save_embedding_layers=False" in str(error.value)
    assert "target_modules" not in str(error.value)


# Adapters beside a checkpoint.


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"text": TINY}, "'text' is not known; an adapter takes the place of 'vision' or 'speech'"),
        ({"speech": 3}, "'speech' is a int; expected the adapter's folder"),
        ("speech=x", "adapters is a str"),
        ({"speech": TINY / "inputs"}, r"inputs: holds no speech adapter: neither adapter_config\.json, nor"),
        ({"speech": TINY / "nowhere"}, "nowhere: no such folder for the speech adapter; in .* there are .*speech-lora"),
        ({"speech": TINY / "vision-lora"}, "vision-lora: is the folder of a vision adapter, given as speech"),
    ],
)  # fmt: skip
def test_no_such_adapter_beside(adapters, message):
    with pytest.raises((InputError, CheckpointError), match=message):
        phi4mm_jax.load(TINY, adapters=adapters)


def test_places_of_an_adapter_beside(tmp_path):
    """PEFT saves one of several adapters in a folder of its name; a folder of another name is pointed at."""
    for name in ("vision", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    assert adapter_folders({"vision": tmp_path}) == {"vision": tmp_path / "vision"}
    assert adapter_folders({"speech": tmp_path / "tuned"}) == {"speech": tmp_path / "tuned"}
    with pytest.raises(CheckpointError, match=f"there are adapters in {tmp_path}/tuned, {tmp_path}/vision"):
        adapter_folders({"speech": tmp_path})


def test_an_adapter_beside_another_is_ambiguous(tmp_path):
    """PEFT saves "default" in the folder itself, and one that is named in a folder within."""
    for folder in (tmp_path, tmp_path / "vision"):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")
    message = f"{tmp_path}: holds adapters in the folder itself and in vision; give .* such as {tmp_path}/vision; move"
    with pytest.raises(CheckpointError, match=message):
        adapter_folders({"vision": tmp_path})
    with pytest.raises(CheckpointError, match=message):
        user_adapter_folder(tmp_path)
    assert adapter_folders({"speech": tmp_path}) == {"speech": tmp_path}
    assert user_adapter_folder(tmp_path / "vision") == (tmp_path / "vision", None)
    shutil.copytree(tmp_path / "vision", tmp_path / "vision-lora")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="holds adapters in vision-lora and in vision; give"):
        adapter_folders({"vision": tmp_path})


def test_a_damaged_adapter_beside_is_named(two_adapters, tmp_path):
    shutil.copytree(two_adapters[0].with_name("speech"), tmp_path / "damaged")
    file = tmp_path / "damaged" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"
    save_file(tensors | {name: torch.full_like(tensors[name], float("inf"))}, file)
    with pytest.raises(CheckpointError, match=r"damaged: .*layers\.2\.mlp\.down_proj\.lora_B.*NaN or infinity"):
        phi4mm_jax.load(TINY, adapters={"speech": tmp_path / "damaged"})
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, file)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.down_proj\.lora_B\.weight: all zero"):
        phi4mm_jax.load(TINY, adapters={"speech": tmp_path / "damaged"})


def test_answers_depend_on_the_adapter_beside(two_adapters, tmp_path):
    """A copy counts as the same, another adapter or none does not."""
    shutil.copytree(two_adapters[0].with_name("speech"), tmp_path / "copy")
    vision = two_adapters[0].with_name("vision")
    given = [{"speech": two_adapters[0].with_name("speech")}, {"speech": tmp_path / "copy"}, {}, {"speech": vision}]
    for weights in (
        [settings_of_batch(TINY, adapters)["weights"] for adapters in given],
        [settings_of_evaluation(TINY, "float32", None, 4, [], adapters).weights for adapters in given],
    ):
        assert weights[0] == weights[1]
        assert len(set(weights)) == 3


class _Loads(Exception):
    """Stand-in for what a program would load."""


def _loads(path: str | Path, **options: Any) -> None:
    raise _Loads(options["adapters"])


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (generate, ["--model", str(TINY), "hello"]),
        (chat, ["--model", str(TINY)]),
        (batch, ["--model", str(TINY), "--input", "{folder}/in.jsonl", "--output", "{folder}/out.jsonl"]),
        (evaluate, ["--model", str(TINY), "--task", "exact", "--output", "{folder}/out", "{folder}/in.jsonl"]),
        (verify, [str(TINY), "--goldens", str(TINY)]),
    ],
)  # fmt: skip
def test_programs_take_adapter_folders(two_adapters, tmp_path, capsys, monkeypatch, program, arguments):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "0", "messages": messages}) + "\n")
    folders = {kind: str(two_adapters[0].with_name(kind)) for kind in ("vision", "speech")}
    arguments = [argument.format(folder=tmp_path) for argument in arguments]

    def start(*options: str) -> int:
        monkeypatch.setattr("sys.argv", ["program", *options, *arguments])
        return program.main()

    monkeypatch.setattr(phi4mm_jax, "load", _loads)
    with pytest.raises(_Loads) as loads:
        start(*(f"--adapter-folder={kind}={folder}" for kind, folder in folders.items()))
    assert loads.value.args == (folders,)
    assert start("--adapter-folder", "speech") == 2
    assert "--adapter-folder is 'speech'; expected vision=FOLDER or speech=FOLDER" in capsys.readouterr().err
    assert start("--adapter-folder=vision=a", "--adapter-folder=vision=b") == 2
    assert "--adapter-folder has vision twice: a and b" in capsys.readouterr().err


def test_goldens_of_adapters_beside_are_recorded(two_adapters, native):
    """The reference's adapters are those of the folders, on the modules that they are on."""
    folder, model = two_adapters
    places = {kind: folder.with_name(kind) for kind in ("vision", "speech")}
    reference = record.load_reference(native, Phi4MMConfig.from_folder(folder), "float32", places)
    modules: dict[str, Any] = dict(reference.model.named_modules())
    for kind, place in places.items():
        theirs = products(model, place)
        ours = {
            name: modules[name].get_delta_weight(kind).detach().numpy()
            for name in theirs
            if kind in getattr(modules[name], "lora_A", ())
        }
        assert ours.keys() == {name for name, product in theirs.items() if product.any()}
        assert_same_products({**theirs, **ours}, theirs)


def test_a_runs_folder_is_no_model(tmp_path):
    (tmp_path / RECIPE).touch()
    (tmp_path / CHECKPOINTS).mkdir()
    with pytest.raises(CheckpointError, match=f"{tmp_path}: is the output of a training run.*python -m train.export"):
        phi4mm_jax.load(tmp_path)
    remedy = f"{tmp_path}: is the output of a training run.*python -m train.export {tmp_path} FOLDER --adapters-only"
    with pytest.raises(CheckpointError, match=remedy):
        adapter_folders({"speech": tmp_path})
