"""From logits to text: sampling, the paged cache, and the engine."""

from phi4mm_jax.generation.async_engine import Answer, AsyncEngine
from phi4mm_jax.generation.engine import Engine, EngineConfig, Update
from phi4mm_jax.generation.programs import Programs
from phi4mm_jax.generation.request import Completion, Hypothesis, Request
from phi4mm_jax.generation.sampling import Sampling
from phi4mm_jax.generation.tools import ToolCall

__all__ = [
    "Answer", "AsyncEngine",
    "Completion", "Engine", "EngineConfig", "Hypothesis", "Programs", "Request", "Sampling", "ToolCall", "Update",
]  # fmt: skip
