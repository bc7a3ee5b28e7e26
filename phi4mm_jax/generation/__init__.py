"""The public names of `phi4mm_jax.engine`, as they were called before."""

from phi4mm_jax.engine import *  # noqa: F403
from phi4mm_jax.engine import __all__ as __all__
