"""Users' adapters: PEFT folders that come and go while an engine runs, each in a place of stacks on the device.

The stacks are allocated at the start, and a row chooses its place by an index: nothing is compiled when an adapter
comes or goes.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int

from phi4mm_jax.adapters import ADAPTERS, NONE, adapter_choices, index_of, row_index
from phi4mm_jax.checkpoint.load import is_finite
from phi4mm_jax.checkpoint.peft import PeftAdapter, user_adapter_folder
from phi4mm_jax.checkpoint.unused_settings import unused_of_adapter
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.engine.config import EngineConfig
from phi4mm_jax.engine.steps import Programs
from phi4mm_jax.errors import CheckpointError, InputError
from phi4mm_jax.mesh import LOGICAL_AXES, sharding_within
from phi4mm_jax.model.decoder import BlockConfig
from phi4mm_jax.model.lora import PROJECTIONS
from phi4mm_jax.processing.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][\w.:/-]{0,199}", re.ASCII)
_BESIDE = "+"  # between a built-in adapter and a user's on top of it
Parameters = dict[tuple[str, str, str], np.ndarray]  # by block, projection and part; (L, ...), scaled and padded


@dataclass(frozen=True, eq=False)
class UserAdapter:
    """An adapter that a user has brought.

    Attributes:
        folder: that was given.
        replaces: the built-in adapter in whose place it stands; None: it is added to that of a row, or to the base.
        rank: its own, which is padded.
        parameters: on the host.
    """

    name: str
    folder: Path
    replaces: str | None
    rank: int
    parameters: Parameters = field(repr=False)


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """A user's adapter in its place.

    Attributes:
        id: never used again, not even for the same name.
    """

    adapter: UserAdapter
    place: int
    id: int


@dataclass(frozen=True)
class AdapterChoice:
    """The adapters that a request asks for.

    Attributes:
        builtin: "none" or a built-in adapter's name; None: that of the row's media.
        user: a user's on top.
    """

    builtin: str | None = None
    user: LoadedAdapter | None = None

    def index(self, default: int) -> int:
        """Return a row's index; `default` is the built-in adapter of its media."""
        builtin = default if self.builtin is None else index_of(self.builtin)
        return row_index(builtin, None if self.user is None else self.user.place)

    @property
    def salt(self) -> bytes:
        """Bytes that set keys and values of a user's adapter apart."""
        return b"" if self.user is None else self.user.id.to_bytes(8, "little")


def check_name(name: Any) -> None:
    """Raise InputError for a name that no user's adapter can have."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in adapter_choices():
        reserved = ", ".join(adapter_choices())
        raise InputError(
            f"adapter name is {name!r:.80}; expected letters, digits and any of . _ - : / after the first, at most 200 "
            f"of them, and not one of {reserved}"
        )


def read_user_adapter(
    name: str, folder: str | Path, model: Phi4MMConfig, tokenizer: Tokenizer, config: EngineConfig
) -> UserAdapter:
    """Read a user's adapter; takes no room on the device. What is not used of its folder is logged.

    Raises:
        InputError: a bad name, or its rank is above the engine's limit.
        CheckpointError: a file or tensor is missing, extra, misshapen, unreadable or not finite; or B is all zero.
        ConfigError: a setting of PEFT's is not supported; it names the key.
    """
    check_name(name)
    place, replaces = user_adapter_folder(folder)
    kind = replaces or next(iter(ADAPTERS))  # parameters have the same form whatever the name
    source = PeftAdapter(place, kind, model)
    for line in unused_of_adapter(place, tokenizer):
        _log.warning("%s", line)
    rank, limit = source.lora.rank, config.max_adapter_rank
    if rank > limit:
        raise InputError(
            f"{place}: the adapter has rank {rank}, but the engine has room for {limit}; allow more with "
            f"{config.named('max_adapter_rank')}"
        )
    parameters: Parameters = {}
    for path in source.parameters:  # (collection, "decoder", "layers", block, projection, part)
        block, projection, part = path[-3:]
        values = source.read(path, np.float32)
        if not is_finite(values):
            raise CheckpointError(f"{place}: {'/'.join(path[3:])}: holds NaN or infinity; use an earlier checkpoint")
        axis = values.ndim - 1 if part == "a" else 1
        values = values if part == "a" else values * np.float32(source.lora.scale)
        widths = [(0, limit - rank if i == axis else 0) for i in range(values.ndim)]
        parameters[block, projection, part] = np.pad(values, widths)
    if not any(values.any() for (*_, part), values in parameters.items() if part != "a"):
        raise CheckpointError(f"{place}: all its B matrices are zero, so the adapter does nothing; train it first")
    return UserAdapter(name, Path(folder), replaces, rank, parameters)


class UserAdapters:
    """The places of an engine, and what is in them.

    Attributes:
        stacks: the parameters of all places, on the device, as the model takes them; None where there are no places.
    """

    def __init__(self, programs: Programs, config: EngineConfig):
        self._config, self._model, self._scan = config, programs.model.config, programs.model.scan
        self._dtype = jnp.dtype(programs.model.dtype)
        self._loaded: dict[str, LoadedAdapter] = {}
        self._next_id = 1
        self._in_places: list[LoadedAdapter | None] = [None] * config.max_adapters
        self.stacks: dict[str, Any] | None = None
        if not config.max_adapters:
            return
        axes = _stack_axes(self._model, config, self._scan)
        boxed = {
            path: nn.Partitioned(jax.ShapeDtypeStruct(shape, self._dtype), names=names)
            for path, (shape, names) in axes.items()
        }
        self._shardings = programs.param_shardings(unflatten_dict(boxed))
        self.stacks = unflatten_dict({
            path: jax.device_put(np.zeros(shape, self._dtype), self._shardings[path])
            for path, (shape, _) in axes.items()
        })  # fmt: skip
        outputs = unflatten_dict(self._shardings)
        set_place = partial(_set_place, axis=1 if self._scan else 0)
        self._set_place = jax.jit(set_place, donate_argnums=0, out_shardings=outputs)
        self._place(config.max_adapters, {})  # compiles it: out of range, so that nothing is set

    @property
    def loaded(self) -> Mapping[str, LoadedAdapter]:
        """Those that requests may ask for, by name."""
        return self._loaded

    def read(self, name: str, folder: str | Path, tokenizer: Tokenizer) -> UserAdapter:
        """Read an adapter, in any thread; see `read_user_adapter`."""
        self._check_places(name)
        return read_user_adapter(name, folder, self._model, tokenizer, self._config)

    def add(self, adapter: UserAdapter, in_use: set[LoadedAdapter]) -> None:
        """Put an adapter into a place.

        Args:
            in_use: adapters of requests that are not answered yet, whose places are kept.

        Raises:
            InputError: the name is loaded already, or no place is free.
        """
        self._check_places(adapter.name)
        if adapter.name in self._loaded:
            raise InputError(f"adapter {adapter.name!r} is loaded already; unload it first, or give another name")
        kept = {*in_use, *self._loaded.values()}
        place = next((i for i, loaded in enumerate(self._in_places) if loaded is None or loaded not in kept), None)
        if place is None:
            names = ", ".join(sorted(loaded.adapter.name for loaded in self._in_places if loaded is not None))
            raise InputError(
                f"adapter {adapter.name!r} finds all {len(self._in_places)} places taken, by {names}; unload one and "
                f"let its requests end, or allow more with {self._config.named('max_adapters')}"
            )
        self._place(place, adapter.parameters)
        loaded = LoadedAdapter(adapter, place, self._next_id)
        self._next_id += 1
        self._in_places[place] = self._loaded[adapter.name] = loaded

    def remove(self, name: str) -> None:
        """Forget a name; requests that have it already are answered with it.

        Raises:
            InputError: there is no such adapter.
        """
        if name not in self._loaded:
            raise InputError(f"adapter {name!r:.200} is not loaded; loaded are: {', '.join(self._loaded) or 'none'}")
        del self._loaded[name]

    def choose(self, asked: str | None) -> AdapterChoice:
        """Return what a request's `adapter` asks for: a built-in one, a user's, or "BUILTIN+USER'S".

        Raises:
            InputError: there is no such adapter, or a user's does not go with the built-in one.
        """
        if asked is None or asked in adapter_choices():
            return AdapterChoice(asked)
        builtin, beside, name = asked.rpartition(_BESIDE)
        loaded = self._loaded.get(name)
        if loaded is None or (beside and builtin not in adapter_choices()):
            names = ", ".join((*adapter_choices(), *self._loaded))
            raise InputError(f"adapter is {asked!r:.60}; expected one of {names}")
        replaces = loaded.adapter.replaces
        if replaces is None:
            return AdapterChoice(builtin if beside else None, loaded)
        if beside and builtin not in (NONE, replaces):
            raise InputError(
                f"adapter is {asked!r:.60}, but {name} takes the place of {replaces}; ask for it alone ({name!r})"
            )
        return AdapterChoice(NONE, loaded)

    def _check_places(self, name: str) -> None:
        if not self._config.max_adapters:
            raise InputError(
                f"adapter {name!r:.80} has no place in this engine; make some with {self._config.named('max_adapters')}"
            )

    def _place(self, place: int, parameters: Parameters) -> None:
        """Set a place's parameters; those that are not given are zero."""
        axis = 1 if self._scan else 0

        def values(path: tuple[str, ...], stack: Any) -> Any:
            shape = [size for i, size in enumerate(stack.shape) if i != axis]
            given = parameters.get(path[-3:])  # type: ignore[arg-type]
            if given is not None and not self._scan:
                given = given[int(path[1].removeprefix("layers_"))]
            found = np.zeros(shape, self._dtype) if given is None else given.astype(self._dtype)
            return jax.device_put(found, sharding_within(self._shardings[path], axis))

        assert self.stacks is not None
        flat: dict[Any, Any] = flatten_dict(self.stacks)
        given = unflatten_dict({path: values(path, stack) for path, stack in flat.items()})
        self.stacks = self._set_place(self.stacks, np.int32(place), given)


def stack_bytes(programs: Programs, config: EngineConfig) -> int:
    """Return the bytes that a device's part of the stacks takes, at most."""
    if not config.max_adapters:
        return 0
    axes = _stack_axes(programs.model.config, config, scan=True)
    return sum(math.prod(shape) for shape, _ in axes.values()) * jnp.dtype(programs.model.dtype).itemsize


def _stack_axes(
    model: Phi4MMConfig, config: EngineConfig, scan: bool
) -> dict[tuple[str, ...], tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Return each stack's shape and logical axes: (L, U, ...) with layers in stacks, else (U, ...) for each layer."""
    sizes = {**BlockConfig(model.decoder, ()).sizes, "R": config.max_adapter_rank, "U": config.max_adapters}
    layers = model.decoder.num_layers
    names = ["layers"] if scan else [f"layers_{i}" for i in range(layers)]
    found = {}
    for (block, projection), (inputs, outputs) in PROJECTIONS.items():
        parts = {"a": f"U{inputs}R", **{part: f"UR{axes}" for part, axes in outputs.items()}}
        for part, axes in parts.items():
            shape, logical = tuple(sizes[x] for x in axes), tuple(LOGICAL_AXES[x] for x in axes)
            if scan:
                shape, logical = (layers, *shape), ("layers", *logical)
            found |= {("decoder", name, block, projection, part): (shape, logical) for name in names}
    return found


def _set_place(stacks: Any, place: Int[Array, ""], values: Any, *, axis: int) -> Any:
    before = (slice(None),) * axis
    return jax.tree.map(lambda stack, value: stack.at[*before, place].set(value, mode="drop"), stacks, values)
