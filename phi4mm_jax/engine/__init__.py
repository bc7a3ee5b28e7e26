"""From logits to text: sampling, the paged cache, and the engine."""

from phi4mm_jax.engine.async_engine import Answer, AsyncEngine
from phi4mm_jax.engine.engine import Engine, EngineConfig, Update
from phi4mm_jax.engine.request import Completion, Hypothesis, Request
from phi4mm_jax.engine.sampling import Sampling
from phi4mm_jax.engine.steps import Programs
from phi4mm_jax.engine.tool_calls import ToolCall

__all__ = [
    "Answer", "AsyncEngine",
    "Completion", "Engine", "EngineConfig", "Hypothesis", "Programs", "Request", "Sampling", "ToolCall", "Update",
]  # fmt: skip
