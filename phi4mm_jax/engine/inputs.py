"""Inputs of the compiled steps: arrays of sequences on the host, padded to the sizes that are compiled."""

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Int

from phi4mm_jax.batch import NO_MEDIA
from phi4mm_jax.engine.beam_search import BeamGroup
from phi4mm_jax.engine.grammar import GrammarMatcher, num_words
from phi4mm_jax.engine.sampling import Sampling, SamplingRows
from phi4mm_jax.engine.scheduler import DecodeBatch, PrefillBatch
from phi4mm_jax.engine.sequence import Sequence
from phi4mm_jax.engine.step_io import BeamInputs, DecodeInputs, PrefillInputs

T = TypeVar("T")


def prefill_inputs(
    batch: PrefillBatch, media: Items[np.ndarray], count: int, table_size: int, with_beams: bool = False
) -> PrefillInputs:
    """Arrays of a batch, padded to `count` rows; without grammars.

    Args:
        media: for each sequence the rows of the table of features, see `EncoderCache.lookup_or_encode`.
        table_size: pages of a page table; further ones of a sequence are left out.
        with_beams: whether the engine has beams.
    """
    sequences, stops, width, _ = batch
    tokens = np.zeros((count, width), np.int32)
    features = np.full((count, width), NO_MEDIA, np.int32)
    for i, (sequence, stop) in enumerate(zip(sequences, stops, strict=True)):
        tokens[i, : stop - sequence.num_computed_tokens] = sequence.token_ids(stop)[sequence.num_computed_tokens :]
        features[i, : len(media[i])] = media[i]
    return PrefillInputs(
        tokens, features,
        starts=_column(sequences, count, lambda s: s.num_computed_tokens),
        lengths=_padded(stops, count),
        tables=_page_tables([s.pages for s in sequences], count, table_size),
        adapters=_column(sequences, count, lambda s: s.adapter),
        use_long_rope=_column(sequences, count, lambda s: s.use_long_rope).astype(bool),
        slots=_column(sequences, count, lambda s: s.slot),
        num_output_tokens=_column(sequences, count, lambda s: len(s.output_token_ids)),
        sampling=_sampling_rows(sequences, count),
        with_beams=_column(sequences, count, lambda s: s.beams is not None).astype(bool) if with_beams else None,
    )  # fmt: skip


def decode_inputs(batch: DecodeBatch, table_size: int, with_top: bool, with_drafts: bool = False) -> DecodeInputs:
    """Arrays of all slots.

    Args:
        with_top: whether the engine gives likeliest tokens.
        with_drafts: whether they are for the step that guesses tokens.
    """
    sequences, count = batch.sequences, len(batch.sequences)
    drafted: dict[str, Any] = {}
    if with_drafts:
        drafted = {"with_drafts": batch.with_drafts, "limits": batch.limits, "widths": batch.widths}
        drafted |= {"max_steps": np.int32(batch.max_steps)}
    return DecodeInputs(
        last=_padded([-1 if s is None or s.num_pending_tokens else s.output_token_ids[-1] for s in sequences], count),
        lengths=_column(sequences, count, lambda s: s.num_computed_tokens),
        num_decode_steps=batch.num_decode_steps.copy(),  # the batch's own change when the round before is read
        tables=_page_tables([() if s is None else s.pages for s in sequences], count, table_size),
        adapters=_column(sequences, count, lambda s: s.adapter),
        use_long_rope=_column(sequences, count, lambda s: s.use_long_rope).astype(bool),
        num_output_tokens=_column(sequences, count, lambda s: s.num_sampled_tokens),
        sampling=_sampling_rows(sequences, count),
        with_top=_column(sequences, count, lambda s: s.request.top_logprobs > 0).astype(bool) if with_top else None,
        **drafted,
    )


def beam_inputs(groups: Items[tuple[Sequence, BeamGroup]], size: int, table_size: int) -> BeamInputs:
    """Arrays of all groups' beams, padded to `size` of them; without grammars."""
    rows = [(s, beam, pages) for s, g in groups for beam, pages in zip(g.search.beams, g.pages, strict=True)]
    copies = [copy for _, group in groups for copy in group.copies]
    return BeamInputs(
        last=_padded([beam.tokens[s.num_computed_tokens - s.num_prompt_tokens] for s, beam, _ in rows], size),
        lengths=_padded([s.num_computed_tokens + 1 for s, _, _ in rows], size),
        tables=_page_tables([s.pages + pages for s, _, pages in rows], size, table_size),
        adapters=_padded([s.adapter for s, _, _ in rows], size),
        use_long_rope=_padded([s.use_long_rope for s, _, _ in rows], size).astype(bool),
        sources=_padded([source for source, _ in copies], size),
        targets=_padded([target for _, target in copies], size),
        num_copies=np.int32(len(copies)),
    )


class GrammarMasks:
    """Masks of the tokens that the grammars of rows allow, for the inputs of steps.

    Args:
        place: puts arrays on the device.
    """

    def __init__(self, place: Callable[[Any], Any], vocab_size: int):
        self._place, self._vocab_size = place, vocab_size
        self._unrestricted: dict[int, Any] = {}  # on the device, by number of rows: masks that allow all

    def allowed(self, matchers: Items[GrammarMatcher | None], count: int) -> Int[np.ndarray, "{count} W"]:
        """Return the tokens that may come next in each row, a bit each: all where there is no grammar."""
        allowed = np.full((count, num_words(self._vocab_size)), -1, np.int32)
        for row, matcher in zip(allowed, matchers, strict=False):
            if matcher is not None:
                row[:] = matcher.allowed()
        return allowed

    def of(self, matchers: Items[GrammarMatcher | None], count: int) -> dict[str, Any]:
        """Return `allowed` and `restricted` of a step's inputs."""
        restricted = any(matcher is not None for matcher in matchers)
        if count not in self._unrestricted:
            self._unrestricted[count] = self._place(self.allowed([], count))
        allowed = self._place(self.allowed(matchers, count)) if restricted else self._unrestricted[count]
        return {"allowed": allowed, "restricted": np.asarray(restricted)}


class DeviceCopies:
    """Copies of arrays on the device; an array is uploaded only where it differs from that of the last time.

    Args:
        place: puts arrays on the device.
    """

    def __init__(self, place: Callable[[Any], Any]):
        self._place = place
        self._copies: dict[Any, tuple[np.ndarray, Any]] = {}  # by the place in a tree: the array, and its copy

    def of(self, tree: T) -> T:
        """Return a tree of copies. Its arrays must not be changed afterwards."""
        return jax.tree.map_with_path(self._copy, tree)

    def _copy(self, path: Any, array: np.ndarray) -> Any:
        held = self._copies.get(path)
        if held is None or not np.array_equal(held[0], array):
            held = self._copies[path] = array, self._place(array)
        return held[1]


def _page_tables(tables: Items[Items[int]], count: int, size: int) -> np.ndarray:
    padded = np.zeros((count, size), np.int32)
    for i, pages in enumerate(tables):
        padded[i, : len(pages)] = pages[:size]
    return padded


def _column(sequences: Items[Sequence | None], count: int, value: Callable[[Sequence], int]) -> np.ndarray:
    return _padded([0 if s is None else value(s) for s in sequences], count)


def _padded(values: Items[int], count: int) -> np.ndarray:
    return np.asarray([*values, *[0] * (count - len(values))], np.int32)


def _sampling_rows(sequences: Items[Sequence | None], count: int) -> SamplingRows:
    settings = [Sampling() if s is None else s.sampling for s in sequences]
    return SamplingRows.of(settings + [Sampling()] * (count - len(settings)))
