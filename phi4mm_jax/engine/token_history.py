"""Token history: the tokens of the slots' sequences, on the device, in which drafts are looked up."""

from collections.abc import Sequence as Items

import jax.numpy as jnp
import numpy as np

from phi4mm_jax.engine.drafts import NO_TOKEN
from phi4mm_jax.engine.sequence import Sequence
from phi4mm_jax.engine.steps import Programs


class TokenHistory:
    """Keeps the rows of sequences that ask for drafts.

    A row is written once; from then on the step that decodes with drafts adds what it samples. A round without drafts
    adds nothing, so that the row is written again after it.

    Attributes:
        tokens: (slots, M), on the device.
    """

    def __init__(self, programs: Programs, slots: int, max_tokens: int):
        self._programs = programs
        self._written: list[int | None] = [None] * slots  # ids of the sequences whose rows are there
        self.tokens = programs.place(jnp.full((slots, max_tokens), NO_TOKEN, jnp.int32))

    def write(self, sequences: Items[Sequence | None]) -> None:
        """Write the rows of the sequences that are to have drafts, where they are not there."""
        for slot, sequence in enumerate(sequences):
            if sequence is not None and sequence.is_drafted and self._written[slot] != sequence.id:
                self.set(slot, sequence.known_tokens)
                self._written[slot] = sequence.id

    def forget(self, sequences: Items[Sequence | None]) -> None:
        """Take note that the sequences of these slots decode without drafts."""
        for slot, sequence in enumerate(sequences):
            if sequence is not None:
                self._written[slot] = None

    def set(self, slot: int, tokens: np.ndarray) -> None:
        """Set a slot's row; none where the slot is out of range."""
        row = np.full(self.tokens.shape[1], NO_TOKEN, np.int32)
        row[: len(tokens)] = tokens
        self.tokens = self._programs.set_history(self.tokens, np.int32(slot), row)
