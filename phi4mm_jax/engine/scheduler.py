"""Who is computed next: admission by pages, chunks of prefill, rounds of decoding."""

from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np

from phi4mm_jax.engine.beam_search import BeamGroup
from phi4mm_jax.engine.config import PREFILL_ROWS, EngineConfig
from phi4mm_jax.engine.encoder_cache import EncoderCache
from phi4mm_jax.engine.page_allocator import Key, PageAllocator
from phi4mm_jax.engine.sequence import Sequence, SequenceStatus


class PrefillBatch(NamedTuple):
    """Chunks of sequences with the same adapter, each from its `num_computed` to its stop, padded to one width."""

    sequences: list[Sequence]
    stops: list[int]
    width: int


class DecodeBatch(NamedTuple):
    """A round of decoding, by slot: the sequence, or None for a slot that rests, and its steps at most."""

    sequences: list[Sequence | None]
    steps: np.ndarray
    preempted: list[Sequence]  # those that wait to be prefilled again with the long rotary set


class Scheduler:
    """Keeps the slots filled, and the page tables of what is in them.

    Args:
        long_rope_boundary: tokens up to which keys are rotated by the short set. A sequence that outgrows it is
            preempted and prefilled again, since all its keys depend on the set.
    """

    def __init__(self, config: EngineConfig, encoder_cache: EncoderCache, long_rope_boundary: int):
        self._config, self._encoder_cache, self._boundary = config, encoder_cache, long_rope_boundary
        self.allocator = PageAllocator(config.pages)
        self.slots: list[Sequence | None] = [None] * config.slots

    @property
    def running(self) -> list[Sequence]:
        """Sequences that have a slot."""
        return [sequence for sequence in self.slots if sequence is not None]

    @property
    def free_slot(self) -> int | None:
        return self.slots.index(None) if None in self.slots else None

    # ------------------------------------------------------------------------------------------ admission

    def readmit_preempted(self) -> bool:
        """Reserve pages for preempted sequences, in the order of their requests; False if one has to wait."""
        preempted = (s for s in self.running if s.status is SequenceStatus.WAITING)
        return all(self._reserve(sequence) for sequence in sorted(preempted, key=lambda s: s.id))

    def admit(self, sequence: Sequence) -> bool:
        """Give a new sequence its slot and reserve its pages; False if there are too few.

        Ask in the order of the requests: then none that needs many pages is overtaken for ever.
        """
        if not self._reserve(sequence):
            return False
        self.slots[sequence.slot] = sequence
        return True

    def finish(self, sequence: Sequence) -> None:
        """Free its slot and its pages."""
        self._release(sequence)
        self.slots[sequence.slot] = None
        sequence.status = SequenceStatus.FINISHED

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.reset(self._config.page_size, self._boundary)

    def _reserve(self, sequence: Sequence) -> bool:
        if sequence.max_pages > self.allocator.available:
            return False
        self.allocator.reserve(sequence.max_pages)
        sequence.num_reserved, sequence.status = sequence.max_pages, SequenceStatus.PREFILLING
        return True

    def _release(self, sequence: Sequence) -> None:
        self.allocator.decref(sequence.pages)
        if sequence.beams is not None:
            sequence.beams.release(self.allocator)
        self.allocator.unreserve(sequence.num_reserved)
        sequence.pages, sequence.num_reserved = [], 0

    # ------------------------------------------------------------------------------------------ prefill

    def next_prefill(self) -> PrefillBatch | None:
        """Chunks to compute next, of the sequences that wait longest; allocates their pages."""
        sequences = self._next_prefilled()
        if not sequences:
            return None
        stops = [self._chunk_end(sequence) for sequence in sequences]
        for sequence, stop in zip(sequences, stops, strict=True):
            self._allocate_to(sequence, stop)
        return PrefillBatch(sequences, stops, self._next_width(sequences[0]))

    def complete_chunk(self, sequence: Sequence, stop: int) -> bool:
        """Put a computed chunk's whole pages into the prefix cache; returns whether the sequence decodes from now on.

        Chunks whose logits are not finite are not completed: their pages may hold NaN, which none may share.
        """
        size = self._config.page_size
        for page in range(sequence.num_computed // size, min(stop // size, len(sequence.page_keys))):
            self.allocator.cache_page(sequence.pages[page], sequence.page_keys[page])
        sequence.num_computed = stop
        if stop == sequence.prefill_end:
            sequence.status = SequenceStatus.DECODING
        return sequence.status is SequenceStatus.DECODING

    def _next_prefilled(self) -> list[Sequence]:
        """Sequences with the same adapter and the same width of chunk."""
        computed: set[Key] = set()  # pages that a sequence before will put into the prefix cache
        chosen: list[Sequence] = []
        prefilling = (s for s in self.running if s.status is SequenceStatus.PREFILLING)
        for sequence in sorted(prefilling, key=lambda s: s.id):
            if not sequence.prefix_matched:
                # The last token is always computed, or else there would be no logits to draw from.
                cached = self.allocator.match_prefix(sequence.page_keys)
                cached = min(cached, (sequence.prefill_end - 1) // self._config.page_size)
                if any(key in computed for key in sequence.page_keys[cached : cached + 1]):
                    continue  # another is about to compute the page that this one needs next
                self._acquire_prefix(sequence, cached)
            computed.update(sequence.page_keys[sequence.num_computed // self._config.page_size :])
            if not chosen or self._batch_key(sequence) == self._batch_key(chosen[0]):
                chosen.append(sequence)
        chosen = chosen[: next((n for n in PREFILL_ROWS if n <= len(chosen)), 0)]
        media = [(s.media, s.num_computed, min(self._chunk_end(s), s.num_prompt_tokens)) for s in chosen]
        return chosen if self._encoder_cache.fits(media) else chosen[:1]

    def _acquire_prefix(self, sequence: Sequence, count: int) -> None:
        """Take its first pages from the prefix cache; they need no reservation any more."""
        sequence.pages = self.allocator.acquire_cached(sequence.page_keys[:count])
        self.allocator.unreserve(count)
        sequence.num_reserved -= count
        sequence.num_computed, sequence.prefix_matched = count * self._config.page_size, True

    def _batch_key(self, sequence: Sequence) -> tuple[int, int]:
        return sequence.adapter, self._next_width(sequence)

    def _next_width(self, sequence: Sequence) -> int:
        return self._config.prefill_width(self._chunk_end(sequence) - sequence.num_computed)

    def _chunk_end(self, sequence: Sequence) -> int:
        """End of its next chunk: as far as the chunk's size and the room for its media go; else a page's border."""
        size = self._config.page_size
        stop = min(sequence.num_computed + self._config.chunk, sequence.prefill_end)
        prompt = min(stop, sequence.num_prompt_tokens)
        fitting = self._encoder_cache.max_stop(sequence.media, sequence.num_computed, prompt)
        return stop if fitting >= prompt else fitting // size * size

    # ------------------------------------------------------------------------------------------ decoding

    def next_decode(self, max_steps: int) -> DecodeBatch:
        """Sequences that decode, and their steps; allocates their pages, and preempts what outgrows the short set."""
        sequences: list[Sequence | None] = [None] * len(self.slots)
        steps, preempted = np.zeros(len(self.slots), np.int32), []
        for i, sequence in enumerate(self.slots):
            if sequence is None or sequence.status is not SequenceStatus.DECODING or sequence.beams is not None:
                continue
            room = sequence.max_new_tokens - len(sequence.tokens)
            if not sequence.use_long_rope:
                room = min(room, self._boundary - sequence.num_computed)
            if room:
                sequences[i], steps[i] = sequence, min(room, max_steps)
                self._allocate_to(sequence, sequence.num_computed + int(steps[i]))
            else:
                self._preempt(sequence)
                preempted.append(sequence)
        return DecodeBatch(sequences, steps, preempted)

    def _allocate_to(self, sequence: Sequence, num_tokens: int) -> None:
        """Allocate pages for its first tokens."""
        while len(sequence.pages) * self._config.page_size < num_tokens:
            sequence.pages.append(self._allocate(sequence))

    def _allocate(self, sequence: Sequence) -> int:
        sequence.num_reserved -= 1
        return self.allocator.allocate()

    # ------------------------------------------------------------------------------------------ beams

    def next_beams(self) -> list[tuple[Sequence, BeamGroup]]:
        """Sequences whose beams are extended next; allocates pages for the beams' next tokens."""
        ready: list[tuple[Sequence, BeamGroup]] = []
        for sequence in self.running:
            if sequence.beams is None or sequence.status is not SequenceStatus.DECODING:
                continue
            if not sequence.use_long_rope and sequence.num_computed == self._boundary:
                self._preempt(sequence)
            else:
                ready.append((sequence, sequence.beams))
        for sequence, beams in ready:
            for pages in beams.pages:
                if (len(sequence.pages) + len(pages)) * self._config.page_size == sequence.num_computed:
                    pages.append(self._allocate(sequence))
        return ready

    def start_beams(self, sequence: Sequence, beams: BeamGroup) -> None:
        """Hand the page after the prompt's whole ones to the beams, which write to it."""
        whole = sequence.num_prompt_tokens // self._config.page_size
        beams.pages, sequence.pages = [sequence.pages[whole:]], sequence.pages[:whole]

    def fork(self, sequence: Sequence, beams: BeamGroup, parents: Items[int]) -> None:
        """Give each beam its parent's pages, and a copy of the page that it is about to write to."""
        beams.fork(self.allocator, parents)
        # What beams without a child had allocated may be needed again.
        num_reserved = sequence.max_pages - len(sequence.pages) - beams.num_pages
        self.allocator.reserve(num_reserved - sequence.num_reserved)
        sequence.num_reserved = num_reserved
        if sequence.num_computed % self._config.page_size:
            beams.copy_on_write(self.allocator, lambda: self._allocate(sequence))
