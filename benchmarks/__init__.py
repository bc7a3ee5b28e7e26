"""Measurements, each a program: python -m benchmarks.NAME."""

from phi4mm_jax.utils.cli import started

started()
