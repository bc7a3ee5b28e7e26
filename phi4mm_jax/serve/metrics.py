"""Metrics for Prometheus."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from phi4mm_jax.engine import Update

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "phi4mm_requests", "Requests answered, by path and status (499: the client had gone)", ["path", "status"],
            registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("phi4mm_prompt_tokens", "Tokens of answered prompts", registry=registry)
        self.generated_tokens = Counter("phi4mm_generated_tokens", "Tokens that were generated", registry=registry)
        self.first_token = Histogram(
            "phi4mm_time_to_first_token_seconds", "From a request's arrival to its first token, waiting included",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.per_token = Histogram(
            "phi4mm_time_per_output_token_seconds", "After the first one, the mean of each answer",
            buckets=_TOKEN_SECONDS, registry=registry,
        )  # fmt: skip
        self.duration = Histogram(
            "phi4mm_answer_seconds", "From arrival to the answer's end", buckets=_SECONDS, registry=registry
        )

    def watch(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Add a metric that is read when it is asked for."""
        Gauge(f"phi4mm_{name}", what, registry=self.registry).set_function(value)

    def meter(self, began: float) -> "Meter":
        """Return the meter of one answer."""
        return Meter(self, began)


@dataclass
class Meter:
    """Counts the tokens of an answer, and its time."""

    metrics: Metrics
    began: float  # by time.monotonic
    first: float | None = None
    tokens: int = field(default=0)

    def count(self, update: Update) -> None:
        now = time.monotonic()
        if update.tokens and self.first is None:
            self.first = now
            self.metrics.first_token.observe(now - self.began)
        self.tokens += len(update.tokens)
        self.metrics.generated_tokens.inc(len(update.tokens))
        if update.completion is not None:
            self.metrics.prompt_tokens.inc(update.completion.prompt_tokens)
            self.metrics.duration.observe(now - self.began)
            if self.first is not None and self.tokens > 1:
                self.metrics.per_token.observe((now - self.first) / (self.tokens - 1))
