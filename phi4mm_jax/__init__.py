"""Phi-4-multimodal in JAX: text, images and speech in, text out, with PyTorch's numbers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi4mm_jax.api import Model, load
    from phi4mm_jax.engine import Completion
    from phi4mm_jax.errors import CheckpointError, ConfigError, ContextLengthError, InputError, MediaError

__version__ = "0.1.0"

__all__ = [
    "CheckpointError", "Completion", "ConfigError", "ContextLengthError", "InputError", "MediaError", "Model",
    "__version__", "load",
]  # fmt: skip

_MODULES = {
    "CheckpointError": "errors", "ConfigError": "errors", "ContextLengthError": "errors", "InputError": "errors",
    "MediaError": "errors", "Completion": "engine", "Model": "api", "load": "api",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import names and submodules on first use: a program must be able to fail well before jax is there."""
    import importlib
    import importlib.util

    if name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
