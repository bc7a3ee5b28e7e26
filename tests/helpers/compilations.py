"""Count of the programs that this process compiled."""

import jax

_compilations: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _seconds, **_: _compilations.append(event) if event.endswith("backend_compile_duration") else None
)


def count_compilations() -> int:
    """How many programs were compiled so far."""
    return len(_compilations)
