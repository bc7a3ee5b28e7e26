"""Messages between a server and the engine, which may be in another process. None, to the engine, ends both."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from phi4mm_jax.engine import Request, Update
from phi4mm_jax.engine.user_adapters import UserAdapter

# ---------------------------------------------------------------------------------------------- to the engine


@dataclass(frozen=True)
class MakeEngine:
    """Make an engine, with users' adapters; compile everything if it is to `warm_up`."""

    warm_up: bool
    adapters: Mapping[str, UserAdapter]


@dataclass(frozen=True)
class Submit:
    """Answer a request; its updates carry the number."""

    number: int
    request: Request


@dataclass(frozen=True)
class Cancel:
    number: int


@dataclass(frozen=True)
class LoadAdapter:
    number: int
    adapter: UserAdapter


@dataclass(frozen=True)
class UnloadAdapter:
    number: int
    name: str


# ---------------------------------------------------------------------------------------------- from the engine


@dataclass(frozen=True)
class ModelLoaded:
    """Notice that the weights are on the device, or of the `error` that kept them from it."""

    error: Exception | None


@dataclass(frozen=True)
class WarmingUp:
    """Notice that so many programs of all are compiled."""

    done: int
    total: int


@dataclass(frozen=True)
class EngineStats:
    """Sizes of an engine and what is in use."""

    slots: int = 0
    slots_in_use: int = 0
    cache_pages: int = 0
    cache_pages_in_use: int = 0
    prefilled_tokens: int = 0


@dataclass(frozen=True)
class EngineMade:
    stats: EngineStats


@dataclass(frozen=True)
class Failure:
    """Notice that the engine could not be made, or has stopped; `kind` names the error's class."""

    kind: str
    message: str


@dataclass(frozen=True)
class Round:
    """Updates of a round, each with its request's number, and the stats after it."""

    updates: list[tuple[int, Update]] = field(repr=False)
    stats: EngineStats


@dataclass(frozen=True)
class Done:
    """Notice that an adapter is loaded or unloaded, or of the `error` that kept it from it."""

    number: int
    error: Exception | None
