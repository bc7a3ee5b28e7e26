"""Registry of the adapters: everything that names one, or loops over all of them, reads it.

One more entry adds one more adapter, which is loaded from its PEFT folder, requested by its name, computed, trained and
exported like the release's two:

    ADAPTERS["legal"] = Adapter("legal", index=3)
"""

import os
import re
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

Media = Literal["images", "clips"]
NO_ADAPTER, NONE = 0, "none"  # index of a row without adapter, and its name in requests
USERS = "lora_users"  # collection of the adapters that users bring: stacks of places, each of which holds one
_PLACE_BITS = 8  # a row's index has the built-in adapter below these bits, and above them 1 + the user's place, or 0
_NAME = re.compile(r"[a-z][a-z0-9_]*")
T = TypeVar("T")


@dataclass(frozen=True)
class Adapter:
    """Adapter of the mixture, on all of the decoder's projections.

    Attributes:
        name: in requests, on command lines, and in the names of tensors ("lora_A.vision").
        index: in `Batch.adapters`, of the rows that use it; no two have the same.
        media: rows with such media use it by default, images before clips; None: only rows that request it.
        targets: PEFT's target_modules for it, within the decoder that the release's code wraps.
    """

    name: str
    index: int
    media: Media | None = None
    targets: str = r"((layers.*self_attn\.(qkv|o)_proj)|(layers.*mlp\.(gate_up|down)_proj))"

    def __post_init__(self):
        is_reserved = self.name == NONE or self.collection == USERS
        if not _NAME.fullmatch(self.name) or is_reserved or not 0 < self.index < 1 << _PLACE_BITS:
            raise ValueError(
                f"adapter {self.name!r}, index {self.index}: expected a lower-case word that is not reserved, as none "
                "and users are, and 1 to 255"
            )

    @property
    def collection(self) -> str:
        """Collection of its parameters among the model's variables."""
        return f"lora_{self.name}"

    @property
    def folder(self) -> str:
        """PEFT folder within a checkpoint."""
        return f"{self.name}-lora"

    def folder_in(self, checkpoint: Path) -> Path:
        """Return its PEFT folder within a checkpoint: `speech-lora`, or where there is none `speech`, as PEFT saves one
        of several adapters beside the base."""
        usual, saved = checkpoint / self.folder, checkpoint / self.name
        return saved if not os.path.lexists(usual) and (saved / "adapter_config.json").is_file() else usual

    @property
    def config_key(self) -> str:
        """Key of its settings in the original layout's config.json."""
        return f"{self.name}_lora"


class _Registry(UserDict[str, Adapter]):
    """Adapters by name, each with an index of its own, by which rows ask for it."""

    def __setitem__(self, name: str, adapter: Adapter) -> None:
        """Add an adapter, or replace that of its name.

        Raises:
            ValueError: it has another name, or the index of another.
        """
        if name != adapter.name:
            raise ValueError(f"ADAPTERS[{name!r}] is the adapter {adapter.name!r}; enter it by its name")
        for other in self.values():
            if other.index == adapter.index and other.name != name:
                raise ValueError(f"adapter {name!r}: index {adapter.index} is that of {other.name!r}; take a free one")
        super().__setitem__(name, adapter)


ADAPTERS = _Registry(
    {
        adapter.name: adapter
        for adapter in (
            Adapter("vision", 1, "images", r"layers.*((self_attn\.(qkv_proj|o_proj))|(mlp\.(gate_up|down)_proj))"),
            Adapter("speech", 2, "clips"),
        )
    }
)


def adapter_choices() -> tuple[str, ...]:
    """Return the valid names in requests: "none" and every adapter's."""
    return NONE, *ADAPTERS


def adapter_indices() -> dict[str, int]:
    """Return each adapter's index by its collection."""
    return {adapter.collection: adapter.index for adapter in ADAPTERS.values()}


def index_of(name: str) -> int:
    """Return the index of an adapter by name, and `NO_ADAPTER` for "none"."""
    return NO_ADAPTER if name == NONE else ADAPTERS[name].index


def row_index(builtin: int, place: int | None) -> int:
    """Return the index of a row with a built-in adapter, or `NO_ADAPTER`, and a user's in a place, or None."""
    return builtin if place is None else builtin | (place + 1) << _PLACE_BITS


def split_index(index: T) -> tuple[T, T]:
    """Return the built-in adapter's index and 1 + the user's place, 0 for none; of one row's index, or of an array."""
    numbers: Any = index
    return numbers & ((1 << _PLACE_BITS) - 1), numbers >> _PLACE_BITS


def default_adapter(has_images: bool, has_clips: bool) -> Adapter | None:
    """Return the adapter of a row by its media: images decide, then clips."""
    media = "images" if has_images else "clips" if has_clips else None
    return next((adapter for adapter in ADAPTERS.values() if media is not None and adapter.media == media), None)


def used_collections(variables: Mapping[str, T], indices: set[int]) -> dict[str, T]:
    """Return the variables without the adapters of other indices, which then cost nothing."""
    builtin, places = zip(*map(split_index, indices), strict=True) if indices else ((), ())
    index = adapter_indices()
    used = {name for name in variables if name not in index or index[name] in builtin}
    return {name: value for name, value in variables.items() if name in used and (name != USERS or any(places))}
