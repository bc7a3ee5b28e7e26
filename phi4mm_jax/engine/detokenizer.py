"""Incremental detokenization."""

import codecs
from collections.abc import Sequence

from phi4mm_jax.engine.tool_calls import without_special
from phi4mm_jax.processing.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Text so far, in pieces of whole characters that hold back the possible beginning of a stop string.

    Args:
        skip_special: see `Request.skip_special_tokens`.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], skip_special: bool = False):
        self._tokenizer, self._stop, self._skip_special = tokenizer, tuple(s.encode() for s in stop), skip_special
        self._bytes = b""
        self._num_decoded = 0  # bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pieces: list[str] = []
        self.stopped = False  # a stop string was met

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def add(self, token: int) -> str:
        """Append a token; returns the text that can be shown now."""
        before = len(self._bytes)
        shown = without_special([token], self._tokenizer) if self._skip_special else [token]
        self._bytes += self._tokenizer.decode_bytes(shown)
        longest = max(map(len, self._stop), default=1) - 1
        found = [at for s in self._stop if (at := self._bytes.find(s, max(before - longest, 0))) >= 0]
        if found:
            self.stopped = True
            self._bytes = self._bytes[: min(found)]
            return self._decode_to(len(self._bytes))
        return self._decode_to(len(self._bytes) - self._num_held_back())

    def finish(self) -> str:
        """End the text; returns what was held back."""
        rest = self._decode_to(len(self._bytes))
        self._pieces.append(last := self._decoder.decode(b"", final=True))
        return rest + last

    def _num_held_back(self) -> int:
        """Return the number of bytes at the end that may begin a stop string."""
        return max(
            (n for s in self._stop for n in range(1, len(s)) if self._bytes.endswith(s[:n])),
            default=0,
        )

    def _decode_to(self, stop: int) -> str:
        piece = self._decoder.decode(self._bytes[self._num_decoded : stop]) if stop > self._num_decoded else ""
        self._num_decoded = max(self._num_decoded, stop)
        self._pieces.append(piece)
        return piece
