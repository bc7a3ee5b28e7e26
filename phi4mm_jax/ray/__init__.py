"""Offline batches on Ray Data: an engine on each chip, or group of chips, of any number of hosts."""

from phi4mm_jax.ray.answer import Answer

__all__ = ["Answer"]
