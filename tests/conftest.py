"""Eight host devices for all tests, set before jax is imported; what one process compiles, all can use."""

import os
from pathlib import Path

from helpers.environment import EIGHT_DEVICES

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT_DEVICES}".strip()
# A test's program compiles for longer than it runs: without LLVM's optimisations gradients take half of the time. The
# programs that tests start inherit this.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMP_WAIT_POLICY"] = "passive"  # PyTorch's threads would spin, on cores that other workers need
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers and programs inherit it; the next run finds it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(4 << 30)  # a bound makes jax lock the folder
# XLA's TPU compiler takes minutes to carry along where in pytest's deep calls an operation comes from.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "1"

import gc
import json
import shutil
from importlib.util import find_spec

import helpers.typed  # noqa: F401 - named below
import jax
import jaxtyping
import numpy as np
import pytest
from helpers.paths import TINY
from jax._src.lru_cache import LRUCache
from safetensors.numpy import load_file

TYPED = (  # what computes with arrays, and leaves checks to its callers
    "evaluation.intervals", "kernels.limits", "kernels.linear", "kernels.pallas_tpu", "kernels.pallas_tpu_append",
    "kernels.pallas_tpu_backward", "kernels.pallas_tpu_cached", "kernels.pallas_tpu_decode",
    "kernels.pallas_tpu_flash", "kernels.pallas_tpu_int4", "kernels.pallas_tpu_tiles", "kernels.partials",
    "kernels.ring", "kernels.xla", "model", "training.dpo", "training.losses", "training.step",
)  # fmt: skip
jaxtyping.Array = jax.Array | np.ndarray  # where jax takes its own arrays it takes those of the host
jaxtyping.install_import_hook([f"phi4mm_jax.{module}" for module in TYPED], "helpers.typed.check")

import phi4mm_jax  # noqa: E402

# Before it stores a program, jax reads what is known of all others. Those that tests start keep the folder in bounds.
LRUCache._evict_if_needed = lambda self, *, additional_size=0: None


def pytest_configure() -> None:
    assert jax.device_count() == 8, "the tests need 8 host devices; was jax imported before tests/conftest.py?"
    # At its first program jax settles whether it stores them, which must not be that of a test with
    # --compilation-cache "": it would store none from then on.
    jax.jit(abs)(1.0)


LONGEST = (
    "training/test_meshes.py",
    "training/test_step.py", "programs/test_small_model.py", "engine/test_engine.py", "training/test_runs.py",
    "programs/test_benchmarks.py", "programs/test_notebooks.py", "programs/test_ray.py", "programs/test_batch.py",
    "test_calibration.py", "programs/test_transcribe.py", "kernels/test_linear.py", "checkpoint/test_quantized.py",
    "engine/test_beam_search.py", "engine/test_engine_compiled.py", "kernels/test_attention_compiled.py",
    "training/test_hosts.py", "training/test_step_compiled.py", "engine/test_requests.py", "engine/test_soak.py",
    "model/test_rows.py", "model/test_goldens.py", "programs/test_readme.py", "test_mesh.py", "utils/test_cli.py",
    "checkpoint/test_convert.py", "programs/test_commands.py", "engine/test_user_adapters.py",
    "kernels/test_attention.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker is left with one of them at the end."""
    places = {Path(__file__).parent / file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Keep what is imported by now out of the garbage collector's walks: tracing makes objects by the million."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


# compiled as for users: the bounds are of that code, or it runs for longer than it is compiled
OPTIMIZED = (
    "kernels", "model/test_rows.py", "model/test_parity.py", "checkpoint/test_sidecar_files.py",
    "programs/test_transcribe.py", "engine/test_soak.py",
)  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item):
    place = item.path.relative_to(Path(__file__).parent).as_posix()
    optimized = place.startswith(OPTIMIZED) or item.get_closest_marker("tpu_compile") is not None
    jax.config.update("jax_disable_most_optimizations", not optimized)
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


STORING = (
    "jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _compiled_programs_are_stored_as_before():
    """What --compilation-cache sets would hold for all later tests of the process."""
    before = {name: jax.config.values[name] for name in STORING}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def _programs_are_forgotten():
    """Each file's compiled programs are freed after it: thousands at once exceed the memory maps a process may have."""
    yield
    jax.clear_caches()
