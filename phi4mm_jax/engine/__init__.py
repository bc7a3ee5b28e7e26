"""Batched generation: the engine, its requests and their answers."""

from phi4mm_jax.engine.async_engine import Answer, AsyncEngine
from phi4mm_jax.engine.config import EngineConfig
from phi4mm_jax.engine.engine import Engine
from phi4mm_jax.engine.grammar import Grammar
from phi4mm_jax.engine.output_processor import Update
from phi4mm_jax.engine.request import Completion, Hypothesis, Request
from phi4mm_jax.engine.sampling import Sampling
from phi4mm_jax.engine.steps import Programs
from phi4mm_jax.engine.tool_calls import ToolCall

__all__ = [
    "Answer", "AsyncEngine", "Completion",
    "Engine", "EngineConfig", "Grammar", "Hypothesis", "Programs", "Request", "Sampling", "ToolCall", "Update",
]  # fmt: skip
