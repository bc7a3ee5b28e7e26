"""Layers in stacks for all tests of the engine, as on accelerators: fewer operations to trace and compile."""

import pytest

import phi4mm_jax


@pytest.fixture(scope="session")
def tiny(scanned) -> phi4mm_jax.Model:
    return scanned
