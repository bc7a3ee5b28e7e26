"""Programs of conversion: `python -m convert.NAME` in a clone, `phi4mm convert|verify|record` where installed."""

from phi4mm_jax.utils.cli import started

started()
