"""Host-side bookkeeping of the KV cache's pages: reference counts, reservations and the prefix cache."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

PageHash = bytes  # of a page's tokens and media, and of everything before them


class PageAllocator:
    """Hands out pages. Unreferenced pages stay in the prefix cache, evicted LRU.

    Sequences are admitted only once their pages of the worst case are reserved: none is ever preempted for lack of one.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages))[::-1]
        self._ref_counts = [0] * num_pages
        self._num_reserved = 0
        self._page_of: dict[PageHash, int] = {}  # the prefix cache
        self._hash_of: dict[int, PageHash] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached and unreferenced, least recently used first

    @property
    def num_unreserved(self) -> int:
        """Number of pages that are neither referenced nor reserved."""
        return len(self._free) + len(self._evictable) - self._num_reserved

    @property
    def in_use(self) -> int:
        """Number of referenced pages."""
        return self.num_pages - len(self._free) - len(self._evictable)

    def reserve(self, count: int) -> None:
        """Set pages aside for later calls of `allocate`."""
        self._num_reserved += count

    def unreserve(self, count: int) -> None:
        """Give back reserved pages that were not allocated."""
        self._num_reserved -= count

    def allocate(self) -> int:
        """Turn one reservation into a page with a reference count of 1, evicted from the prefix cache if need be."""
        self._num_reserved -= 1
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._evictable.popitem(last=False)
            del self._page_of[self._hash_of.pop(page)]
        self._ref_counts[page] = 1
        return page

    def match_prefix(self, hashes: Sequence[PageHash]) -> int:
        """Number of these pages, from the first on, that are in the prefix cache."""
        return next((i for i, page_hash in enumerate(hashes) if page_hash not in self._page_of), len(hashes))

    def acquire_cached(self, hashes: Sequence[PageHash]) -> list[int]:
        """Return the pages of these hashes, which are in the prefix cache, and increment their reference counts."""
        pages = [self._page_of[page_hash] for page_hash in hashes]
        for page in pages:
            self._ref_counts[page] += 1
            self._evictable.pop(page, None)
        return pages

    def incref(self, pages: Sequence[int]) -> None:
        """Increment the reference counts of already-referenced pages."""
        for page in pages:
            self._ref_counts[page] += 1

    def decref(self, pages: Sequence[int]) -> None:
        """Decrement reference counts. Pages at a prompt's end are evicted before those at its beginning."""
        for page in reversed(pages):
            self._ref_counts[page] -= 1
            if self._ref_counts[page] == 0:
                if page in self._hash_of:
                    self._evictable[page] = None
                else:
                    self._free.append(page)

    def cache_page(self, page: int, page_hash: PageHash) -> None:
        """Put a full page, which is never written to again, into the prefix cache, unless already cached."""
        if page_hash not in self._page_of and page not in self._hash_of:
            self._page_of[page_hash], self._hash_of[page] = page, page_hash


def page_hashes(
    tokens: np.ndarray, media: Sequence[tuple[int, int, bytes]], page_size: int, salt: bytes
) -> Iterator[PageHash]:
    """Yield the hashes of a sequence's full pages.

    Args:
        media: for each medium its first position, one past its last, and its content hash.
        salt: everything else that keys and values depend on: the adapter and the rotary set.
    """
    page_hash = hashlib.blake2b(salt, digest_size=16).digest()
    for start in range(0, len(tokens) - page_size + 1, page_size):
        stop = start + page_size
        state = hashlib.blake2b(page_hash, digest_size=16)
        state.update(np.ascontiguousarray(tokens[start:stop], np.int32).tobytes())
        for first, end, digest in media:
            if first < stop and end > start:
                state.update(digest + (start - first).to_bytes(8, "little", signed=True))
        yield (page_hash := state.digest())
