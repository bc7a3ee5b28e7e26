"""Scheduling: admission by pages, chunked prefill, multi-step decode.

Steps are scheduled before the results of earlier ones are read. A sequence has then computed and generated as many
tokens as it was scheduled for, or has ended: then what is scheduled for it is thrown away. With drafts it may have
fewer: it is counted as having all until the results are read, and the device knows better. Its pages may be freed while
a dispatched step still writes to them, since steps are dispatched in order and hand the cache on to each other:
whatever the pages' next sequence writes comes after.
"""

from typing import NamedTuple

import numpy as np

from phi4mm_jax.engine.beam_search import BeamGroup
from phi4mm_jax.engine.config import PREFILL_ROWS, EngineConfig
from phi4mm_jax.engine.encoder_cache import EncoderCache
from phi4mm_jax.engine.page_allocator import PageAllocator, PageHash
from phi4mm_jax.engine.sequence import Sequence, SequenceStatus


class PrefillBatch(NamedTuple):
    """Chunks of sequences with the same adapter, from `num_computed_tokens` to `stops`, padded to one width."""

    sequences: list[Sequence]
    stops: list[int]
    width: int
    with_cached: bool  # whether any of the sequences has tokens in the cache


class DecodeBatch(NamedTuple):
    """A round of decoding, by slot.

    Attributes:
        sequences: None for an idle slot.
        num_decode_steps: maximum number of tokens to decode; 1 where a sequence has a grammar, whose next mask
            depends on the token.
        preempted: sequences to be prefilled again with the long rotary set.
        with_drafts: slots whose tokens are guessed.
        limits: maximum number of tokens in the cache when the round ends, whatever an earlier one gives.
        widths: maximum number of tokens to decode where there is room for them.
        max_steps: of the round; with a draft a step gives several tokens.
    """

    sequences: list[Sequence | None]
    num_decode_steps: np.ndarray
    preempted: list[Sequence]
    with_drafts: np.ndarray
    limits: np.ndarray
    widths: np.ndarray
    max_steps: int = 1

    @classmethod
    def idle(cls, slots: int, max_steps: int = 1) -> "DecodeBatch":
        steps, limits, widths = np.zeros((3, slots), np.int32)
        return cls([None] * slots, steps, [], np.zeros(slots, bool), limits, widths, max_steps)

    def _set_steps(self, i: int, sequence: Sequence) -> int:
        room = int(self.limits[i]) - sequence.num_computed_tokens
        self.num_decode_steps[i] = count = min(room, int(self.widths[i]))
        return count

    def add(self, i: int, sequence: Sequence, limit: int, width: int) -> int:
        """Add a sequence; return the number of tokens that its pages are to hold."""
        self.sequences[i], self.limits[i], self.widths[i] = sequence, limit, width
        return sequence.num_computed_tokens + self._set_steps(i, sequence)

    def advance(self) -> None:
        """Count the batch, which is dispatched, as computed."""
        for sequence, count in zip(self.sequences, self.num_decode_steps.tolist(), strict=True):
            if sequence is not None:
                sequence.num_computed_tokens += count
                sequence.num_pending_tokens += count

    def complete(self, i: int, count: int, later: "DecodeBatch | None") -> None:
        """Count the tokens that the round has given the i-th slot's sequence, and what they leave for a later round."""
        sequence = self.sequences[i]
        assert sequence is not None
        counted = int(self.num_decode_steps[i])
        sequence.num_pending_tokens -= counted
        if not self.with_drafts[i]:
            return  # it has taken all, or has ended
        sequence.num_computed_tokens += count - counted
        if later is not None and later.sequences[i] is sequence:
            before = int(later.num_decode_steps[i])
            sequence.num_computed_tokens -= before
            now = later._set_steps(i, sequence)
            sequence.num_computed_tokens += now
            sequence.num_pending_tokens += now - before


class Scheduler:
    """Keeps the slots filled, and the page tables of the sequences in them.

    Args:
        long_rope_boundary: `original_max_position_embeddings`, up to which keys are rotated by the short set. A
            sequence that crosses it is preempted and prefilled again, since all its keys depend on the set.
    """

    def __init__(self, config: EngineConfig, encoder_cache: EncoderCache, long_rope_boundary: int):
        self._config, self._encoder_cache, self._long_rope_boundary = config, encoder_cache, long_rope_boundary
        self.allocator = PageAllocator(config.pages)
        self.slots: list[Sequence | None] = [None] * config.slots
        self._computing: set[PageHash] = set()  # pages of dispatched chunks whose results are not read

    @property
    def resident(self) -> list[Sequence]:
        """Sequences that have a slot, preempted ones (WAITING) included."""
        return [sequence for sequence in self.slots if sequence is not None]

    @property
    def free_slot(self) -> int | None:
        return self.slots.index(None) if None in self.slots else None

    # ------------------------------------------------------------------------------------------ admission

    def readmit_preempted(self) -> bool:
        """Reserve pages for preempted sequences, in the order of their requests.

        Returns:
            Whether there were enough for all of them.
        """
        preempted = (s for s in self.resident if s.status is SequenceStatus.WAITING)
        return all(self._reserve(sequence) for sequence in sorted(preempted, key=lambda s: s.id))

    def admit(self, sequence: Sequence) -> bool:
        """Give a new sequence its slot and reserve its pages. Call it FCFS, so that large requests do not starve.

        Returns:
            Whether there were enough pages; otherwise nothing has changed.
        """
        if not self._reserve(sequence):
            return False
        self.slots[sequence.slot] = sequence
        return True

    def finish(self, sequence: Sequence) -> None:
        """Free its slot and its pages, unless it is retired."""
        self._retire(sequence)
        sequence.status = SequenceStatus.FINISHED

    def retire_ending(self) -> None:
        """Free slots and pages of sequences whose last tokens are dispatched; with drafts they may not be the last."""
        for sequence in self.resident:
            ends = sequence.num_pending_tokens and sequence.num_sampled_tokens == sequence.max_new_tokens
            if ends and not sequence.is_drafted:
                self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        self._release(sequence)
        if self.slots[sequence.slot] is sequence:
            self.slots[sequence.slot] = None

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.reset(self._config.page_tokens, self._long_rope_boundary)

    def _reserve(self, sequence: Sequence) -> bool:
        if sequence.max_pages > self.allocator.num_unreserved:
            return False
        self.allocator.reserve(sequence.max_pages)
        sequence.num_reserved_pages, sequence.status = sequence.max_pages, SequenceStatus.PREFILLING
        return True

    def _release(self, sequence: Sequence) -> None:
        self.allocator.decref(sequence.pages)
        if sequence.beams is not None:
            sequence.beams.release(self.allocator)
        self.allocator.unreserve(sequence.num_reserved_pages)
        sequence.pages, sequence.num_reserved_pages = [], 0

    # ------------------------------------------------------------------------------------------ prefill

    def next_prefill(self) -> PrefillBatch | None:
        """Return the chunks to compute next, of the oldest requests, and allocate their pages."""
        sequences = self._select_prefill()
        if not sequences:
            return None
        stops = [self._chunk_end(sequence) for sequence in sequences]
        for sequence, stop in zip(sequences, stops, strict=True):
            self._allocate_to(sequence, stop)
        with_cached = any(sequence.num_computed_tokens for sequence in sequences)
        return PrefillBatch(sequences, stops, self._next_width(sequences[0]), with_cached)

    def advance_prefill(self, batch: PrefillBatch) -> None:
        """Count a batch that is dispatched as computed; sequences whose last chunk it is decode from now on."""
        for sequence, stop in zip(batch.sequences, batch.stops, strict=True):
            self._computing.update(sequence.page_hashes[self._full_pages(sequence.num_computed_tokens, stop)])
            sequence.num_computed_tokens = stop
            if stop == sequence.num_tokens_to_prefill:
                sequence.status = SequenceStatus.DECODING
                sequence.num_pending_tokens = 1 if sequence.beams is None else 0

    def complete_chunk(self, sequence: Sequence, start: int, stop: int, finite: bool) -> bool:
        """Put a computed chunk's full pages into the prefix cache.

        Args:
            finite: whether the logits are; pages may hold NaN otherwise, and are not shared.

        Returns:
            Whether it is the last one.
        """
        pages = self._full_pages(start, stop)
        self._computing.difference_update(sequence.page_hashes[pages])
        if finite:
            for page, page_hash in zip(sequence.pages[pages], sequence.page_hashes[pages], strict=False):
                self.allocator.cache_page(page, page_hash)
        return stop == sequence.num_tokens_to_prefill

    def _full_pages(self, start: int, stop: int) -> slice:
        return slice(start // self._config.page_tokens, stop // self._config.page_tokens)

    def _select_prefill(self) -> list[Sequence]:
        """Return sequences with the same adapter and the same chunk width."""
        computed = set(self._computing)  # pages that an earlier sequence will put into the prefix cache
        chosen: list[Sequence] = []
        prefilling = (s for s in self.resident if s.status is SequenceStatus.PREFILLING)
        for sequence in sorted(prefilling, key=lambda s: s.id):
            if not sequence.prefix_matched:
                # The last token is always computed, or else there would be no logits to sample from.
                max_cached = (sequence.num_tokens_to_prefill - 1) // self._config.page_tokens
                cached = min(self.allocator.match_prefix(sequence.page_hashes), max_cached)
                if cached < max_cached and sequence.page_hashes[cached] in computed:
                    continue  # another sequence is about to compute the next page of this one
                self._acquire_prefix(sequence, cached)
            computed.update(sequence.page_hashes[sequence.num_computed_tokens // self._config.page_tokens :])
            if not chosen or self._batch_key(sequence) == self._batch_key(chosen[0]):
                chosen.append(sequence)
        chosen = chosen[: next((n for n in PREFILL_ROWS if n <= len(chosen)), 0)]
        media = [(s.media, s.num_computed_tokens, min(self._chunk_end(s), s.num_prompt_tokens)) for s in chosen]
        return chosen if self._encoder_cache.fits(media) else chosen[:1]

    def _acquire_prefix(self, sequence: Sequence, count: int) -> None:
        """Take its first pages from the prefix cache, and give up their reservation."""
        sequence.pages = self.allocator.acquire_cached(sequence.page_hashes[:count])
        self.allocator.unreserve(count)
        sequence.num_reserved_pages -= count
        sequence.num_computed_tokens, sequence.prefix_matched = count * self._config.page_tokens, True

    def _batch_key(self, sequence: Sequence) -> tuple[int, int]:
        return sequence.adapter, self._next_width(sequence)

    def _next_width(self, sequence: Sequence) -> int:
        return self._config.prefill_width(self._chunk_end(sequence) - sequence.num_computed_tokens)

    def _chunk_end(self, sequence: Sequence) -> int:
        """End of its next chunk.

        Limited by the chunk size and the encoder cache's room; by the latter it is rounded down to a page boundary.
        """
        size = self._config.page_tokens
        stop = min(sequence.num_computed_tokens + self._config.chunk, sequence.num_tokens_to_prefill)
        prompt = min(stop, sequence.num_prompt_tokens)
        fitting = self._encoder_cache.max_stop(sequence.media, sequence.num_computed_tokens, prompt)
        return stop if fitting >= prompt else fitting // size * size

    # ------------------------------------------------------------------------------------------ decoding

    @property
    def decodes_by_grammar(self) -> bool:
        """Return whether a sequence that decodes has a grammar, whose next mask depends on the token before.

        Beams are extended a token at a time in any case.
        """
        decoding = (s for s in self.resident if s.beams is None and s.status is SequenceStatus.DECODING)
        return any(s.matcher is not None for s in decoding)

    @property
    def decodes_with_drafts(self) -> bool:
        """Return whether a sequence that decodes may have drafts."""
        return any(s.is_drafted and s.status is SequenceStatus.DECODING for s in self.resident)

    def next_decode(self, max_steps: int) -> DecodeBatch:
        """Return the sequences that decode; allocate their pages, preempt those that cross the LongRoPE boundary."""
        by_grammar = self.decodes_by_grammar
        max_steps = 1 if by_grammar else max_steps
        batch = DecodeBatch.idle(len(self.slots), max_steps)
        for i, sequence in enumerate(self.slots):
            if sequence is None or sequence.status is not SequenceStatus.DECODING or sequence.beams is not None:
                continue
            room = sequence.max_new_tokens - sequence.num_sampled_tokens
            left = room if sequence.use_long_rope else self._long_rope_boundary - sequence.num_computed_tokens
            is_drafted = sequence.is_drafted and not by_grammar
            if (room and left) or (is_drafted and sequence.num_pending_tokens):  # which may be fewer
                batch.with_drafts[i] = is_drafted
                width = max_steps * (1 + self._config.draft_tokens * is_drafted)
                limit = sequence.num_computed_tokens + min(room, left)
                self._allocate_to(sequence, batch.add(i, sequence, limit, width))
            elif not sequence.num_pending_tokens:  # else its tokens are to be known first
                self._preempt(sequence)
                batch.preempted.append(sequence)
        return batch

    def _allocate_to(self, sequence: Sequence, num_tokens: int) -> None:
        """Allocate pages for its first tokens."""
        while len(sequence.pages) * self._config.page_tokens < num_tokens:
            sequence.pages.append(self._allocate(sequence))

    def _allocate(self, sequence: Sequence) -> int:
        sequence.num_reserved_pages -= 1
        return self.allocator.allocate()

    # ------------------------------------------------------------------------------------------ beams

    def next_beams(self) -> list[tuple[Sequence, BeamGroup]]:
        """Return the sequences whose beams are extended next, and allocate pages for the beams' next tokens."""
        ready: list[tuple[Sequence, BeamGroup]] = []
        for sequence in self.resident:
            if sequence.beams is None or sequence.status is not SequenceStatus.DECODING:
                continue
            if not sequence.use_long_rope and sequence.num_computed_tokens == self._long_rope_boundary:
                self._preempt(sequence)
            else:
                ready.append((sequence, sequence.beams))
        for sequence, beams in ready:
            for pages in beams.pages:
                if (len(sequence.pages) + len(pages)) * self._config.page_tokens == sequence.num_computed_tokens:
                    pages.append(self._allocate(sequence))
        return ready

    def start_beams(self, sequence: Sequence, beams: BeamGroup) -> None:
        """Hand the prompt's last, partially filled page to the beams, which write to it."""
        num_full = sequence.num_prompt_tokens // self._config.page_tokens
        beams.pages, sequence.pages = [sequence.pages[num_full:]], sequence.pages[:num_full]

    def fork(self, sequence: Sequence, beams: BeamGroup, parents: list[int]) -> None:
        """Give each beam its parent's pages, and a copy of the page that it is about to write to."""
        beams.fork(self.allocator, parents)
        # Pages freed by dropped beams go back to the reservation.
        self.allocator.unreserve(sequence.num_reserved_pages)
        sequence.num_reserved_pages = sequence.max_pages - len(sequence.pages) - beams.num_pages
        self.allocator.reserve(sequence.num_reserved_pages)
        if sequence.num_computed_tokens % self._config.page_tokens:
            beams.copy_on_write(self.allocator, lambda: self._allocate(sequence))
