"""Eight host devices for all tests, set before jax is imported; what one process compiles, all can use."""

import atexit
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers and programs inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="phi4mm-jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(4 << 30)  # a bound makes jax lock the folder
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# XLA's TPU compiler takes minutes to carry along where in pytest's deep calls an operation comes from.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "1"

import json
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import phi4mm_jax
from phi4mm_jax.batch import NO_MEDIA, Batch
from phi4mm_jax.checkpoint.table import UNUSED, Tensor

FIXTURES = Path(__file__).parent / "fixtures"
TINY = FIXTURES / "ms_tiny"


def pytest_configure() -> None:
    assert jax.device_count() == 8, "the tests need 8 host devices; was jax imported before tests/conftest.py?"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup():
    return (yield from _skipped_without_pytorch())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    return (yield from _skipped_without_pytorch())


def _skipped_without_pytorch():
    """Skip what imports torch, peft or transformers where they are not installed: the extra tests-without-torch."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("torch", "peft", "transformers") or find_spec(package):
            raise
        pytest.skip(f"{package} is not installed; it is in the extra oracle")


@pytest.fixture(scope="session")
def tiny() -> phi4mm_jax.Model:
    """The tiny checkpoint in float32."""
    return phi4mm_jax.load(TINY, dtype="float32")


@pytest.fixture(scope="session")
def scanned() -> phi4mm_jax.Model:
    """The same with its layers in stacks, as on accelerators and in training."""
    return phi4mm_jax.load(TINY, dtype="float32", scan=True)


@pytest.fixture(scope="session")
def goldens() -> dict[str, np.ndarray]:
    """What the original implementation computes with the tiny checkpoint."""
    return load_file(TINY / "goldens.safetensors")


@pytest.fixture(scope="session")
def native(tmp_path_factory) -> Path:
    """The tiny checkpoint, saved by transformers; the adapters' folders and the tokenizer as they are."""
    from helpers import torch_native
    from transformers import Phi4MultimodalForCausalLM

    folder = tmp_path_factory.mktemp("native") / "checkpoint"
    original = json.loads((TINY / "config.json").read_text())
    model = Phi4MultimodalForCausalLM(torch_native.native_config(original))
    names = set(model.state_dict()) - {"lm_head.weight"}
    tensors = {}
    for path in TINY.glob("model-*.safetensors"):
        tensors |= load_file(path)
    base = {torch_native.original_to_native(n): v for n, v in tensors.items() if ".lora_" not in n}
    assert set(base) == names
    model.load_state_dict({n: torch_native._tensor(v, model.dtype) for n, v in base.items()}, strict=False)
    model.save_pretrained(folder, max_shard_size="1MB")
    for name in ("vision-lora", "speech-lora"):
        shutil.copytree(TINY / name, folder / name)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _programs_are_forgotten():
    """Each file's compiled programs are freed after it: thousands at once exceed the memory maps a process may have."""
    yield
    jax.clear_caches()


_compilations: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _seconds, **_: _compilations.append(event) if event.endswith("backend_compile_duration") else None
)


def count_compilations() -> int:
    """How many programs were compiled so far."""
    return len(_compilations)


def golden_cases() -> list[dict]:
    return json.loads((TINY / "goldens.json").read_text())["cases"]


def golden_gradient_cases() -> list[dict]:
    return json.loads((TINY / "goldens.json").read_text())["grad_cases"]


def media_of(case: dict) -> dict:
    """The case's media, as the arguments of `process` and `generate` for one row."""
    return {
        "images": [[TINY / "inputs" / f"image_{i}.png" for i in case["images"]]],
        "audios": [[TINY / "inputs" / f"audio_{i}.flac" for i in case["audios"]]],
    }


def uncached_logits(model: phi4mm_jax.Model, batch: Batch, answers: list[list[int]]) -> list[np.ndarray]:
    """Logits before each token of the rows' answers, of whole rows without a cache.

    Where a row crosses LongRoPE's boundary, rows are computed up to it as well, where they have the other rotary set.
    """
    boundary, width = model.config.decoder.rope.original_length, max(map(len, answers))
    tokens = np.pad(batch.tokens, ((0, 0), (0, width)))
    media = np.pad(batch.media, ((0, 0), (0, width)), constant_values=NO_MEDIA)
    starts, ends = batch.lengths, batch.lengths.copy()
    for row, answer in enumerate(answers):
        tokens[row, starts[row] : starts[row] + len(answer)] = answer
        ends[row] += len(answer) - 1  # what follows the last one is not asked
    whole = batch._replace(tokens=tokens, media=media)
    short = long = np.asarray(model.logits(whole._replace(lengths=ends)))
    if ((starts <= boundary) & (ends > boundary)).any():
        short = np.asarray(model.logits(whole._replace(lengths=np.minimum(ends, boundary))))
    found = []
    for row, answer in enumerate(answers):
        places = np.arange(starts[row], starts[row] + len(answer))  # sequences of so many tokens
        found.append(np.where(places[:, None] <= boundary, short[row, places - 1], long[row, places - 1]))
    return found


def shards(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint's main shards."""
    return {name: x for path in sorted(folder.glob("model*.safetensors")) for name, x in load_file(path).items()}


def save_shards(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """All tensors in one file, as small models are saved."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def original_tensor(tensor: Tensor, variables) -> np.ndarray:
    """A tensor of the original layout, from variables with stacked layers; zeros for one that is never used."""
    if tensor.collection == UNUSED:
        return np.zeros(tensor.shape)
    values = []
    for part in tensor.parts:
        value = variables
        for key in part.path:
            value = value[key]
        values.append(np.asarray(value if tensor.layer is None else value[tensor.layer]))
    return tensor.join(values)
