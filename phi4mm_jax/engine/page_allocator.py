"""The pages of the cache, as the host keeps account of them: whose each is, and which prompts begin alike."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

Key = bytes  # of a page: of its tokens and media, and of all that comes before


class PagePool:
    """Hands out pages. A page whose last user is gone is kept for prompts that begin alike, until it is needed.

    Rows are admitted by the pages that they may come to need, so that no row is ever without one.
    """

    def __init__(self, pages: int):
        self.num_pages = pages
        self._free = list(range(pages))[::-1]
        self._users = [0] * pages
        self._promised = 0
        self._pages: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept without users, the longest unused first

    @property
    def available(self) -> int:
        """Pages that nobody uses or was promised."""
        return len(self._free) + len(self._idle) - self._promised

    @property
    def in_use(self) -> int:
        return self.num_pages - len(self._free) - len(self._idle)

    def promise(self, count: int) -> None:
        """Set pages aside; a negative count gives them back."""
        self._promised += count

    def take(self) -> int:
        """One of the pages that were promised."""
        self._promised -= 1
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._pages[self._keys.pop(page)]
        self._users[page] = 1
        return page

    def find(self, keys: Sequence[Key]) -> int:
        """How many of these pages, from the first on, are kept."""
        return next((i for i, key in enumerate(keys) if key not in self._pages), len(keys))

    def share(self, keys: Sequence[Key]) -> list[int]:
        """The pages with these keys, each with one user more."""
        pages = [self._pages[key] for key in keys]
        for page in pages:
            self._users[page] += 1
            self._idle.pop(page, None)
        return pages

    def hold(self, pages: Sequence[int]) -> None:
        """One user more for each of these pages, which have some."""
        for page in pages:
            self._users[page] += 1

    def publish(self, page: int, key: Key) -> None:
        """Others may share the page from now on; it is whole and is not written to again."""
        if key not in self._pages and page not in self._keys:
            self._pages[key], self._keys[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """One user less for each. What begins a prompt is kept longer than what ends it."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._keys:
                    self._idle[page] = None
                else:
                    self._free.append(page)


def page_keys(
    tokens: np.ndarray, media: Sequence[tuple[int, int, bytes]], page_size: int, salt: bytes
) -> Iterator[Key]:
    """The keys of the whole pages of a sequence.

    Args:
        media: for each medium its first position, one past its last, and what tells it from all others.
        salt: what else keys and values depend on: the adapter and the rotary set.
    """
    key = hashlib.blake2b(salt, digest_size=16).digest()
    for start in range(0, len(tokens) - page_size + 1, page_size):
        stop = start + page_size
        state = hashlib.blake2b(key, digest_size=16)
        state.update(np.ascontiguousarray(tokens[start:stop], np.int32).tobytes())
        for first, end, digest in media:
            if first < stop and end > start:
                state.update(digest + (start - first).to_bytes(8, "little", signed=True))
        yield (key := state.digest())
