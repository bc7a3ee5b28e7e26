from phi4mm_jax.utils.cli import started

started()
