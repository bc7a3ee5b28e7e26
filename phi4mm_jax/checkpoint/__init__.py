"""Checkpoints: weight tables, and readers and writers of files."""

from phi4mm_jax.checkpoint.load import load_variables

__all__ = ["load_variables"]
