"""Programs of inference and evaluation: `python -m infer.NAME` in a clone, `phi4mm NAME` where installed."""

from phi4mm_jax.utils.cli import started

started()
