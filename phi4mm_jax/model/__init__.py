"""The network: Linen modules that declare parameters, and plain functions of arrays."""

from phi4mm_jax.model.decoder import Cache
from phi4mm_jax.model.phi4mm import Phi4MM

__all__ = ["Cache", "Phi4MM"]
