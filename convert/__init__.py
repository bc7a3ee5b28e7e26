from phi4mm_jax.programs import started

started()
