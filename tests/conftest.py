"""Eight host devices for all tests, set before jax is imported."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import phi4mm_jax

FIXTURES = Path(__file__).parent / "fixtures"
TINY = FIXTURES / "ms_tiny"


def pytest_configure() -> None:
    assert jax.device_count() == 8, "the tests need 8 host devices; was jax imported before tests/conftest.py?"


@pytest.fixture(scope="session")
def tiny() -> phi4mm_jax.Model:
    """The tiny checkpoint in float32."""
    return phi4mm_jax.load(TINY, dtype="float32")


@pytest.fixture(scope="session")
def goldens() -> dict[str, np.ndarray]:
    """What the original implementation computes with the tiny checkpoint."""
    return load_file(TINY / "goldens.safetensors")


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
