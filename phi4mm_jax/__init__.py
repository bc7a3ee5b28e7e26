"""Phi-4-multimodal in JAX: text, images and speech in, text out, with PyTorch's numbers."""

from phi4mm_jax.api import Model, load
from phi4mm_jax.errors import CheckpointError, ConfigError, InputError
from phi4mm_jax.generation import Completion

__all__ = ["CheckpointError", "Completion", "ConfigError", "InputError", "Model", "load"]
