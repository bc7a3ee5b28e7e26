"""Programs of training: `python -m train.NAME` in a clone, `phi4mm train NAME` where installed."""

from phi4mm_jax.utils.cli import started

started()
