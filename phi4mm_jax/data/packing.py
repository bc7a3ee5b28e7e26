"""Packing: which samples form a batch, and the batch's arrays of static shapes.

Planning uses the samples' sizes alone. So it looks far ahead at no cost in memory, and every host makes the same plan
for all hosts and then loads only its own part: hosts have equally many batches, of the same shapes, without
communication.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from phi4mm_jax.adapters import NO_ADAPTER, index_of
from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.data.examples import BadSample, Example, Size
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.batching import BatchSizes, Outline, assemble
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.utils.checks import check_positive, is_whole


@dataclass(frozen=True)
class PackingConfig:
    """Shapes of batches. Each combination of sizes is compiled once, at its first batch.

    Rows, crops and chunks are those of the whole batch, of which every host has an equal part.

    Attributes:
        rows: per batch at the longest length; scaled inversely with length, so twice as many at half of it.
        lengths: of rows, in tokens, ascending. Packed rows have one length.
        pack: several samples per row, without cross-sample attention; otherwise one.
        crops: sizes of the stack of crops, ascending; empty if the data have no images. A batch takes the smallest one
            that is enough; its samples never need more than the largest.
        chunks: likewise, of the stack of audio chunks: one per 40 s of a clip.
        chunk_tokens: maximum number of tokens of an audio chunk (80 ms per token). 512 takes every clip; where all are
            shorter, less saves computing.
        window: look-ahead: number of samples held back before an unfilled batch is emitted.

    Raises:
        InputError: a value out of range.
    """

    rows: int
    lengths: tuple[int, ...]
    pack: bool = True
    crops: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()
    chunk_tokens: int = 512
    window: int = 64

    def __post_init__(self):
        for name in ("rows", "chunk_tokens", "window"):
            check_positive(name, getattr(self, name))
        for name in ("lengths", "crops", "chunks"):
            values = getattr(self, name)
            ascending = isinstance(values, tuple) and list(values) == sorted(set(values))
            if not ascending or not all(is_whole(value, 1) for value in values):
                raise InputError(f"{name} is {values!r:.80}; expected positive whole numbers, ascending")
        if not self.lengths or (self.pack and len(self.lengths) != 1):
            expected = "one: packed rows all have the same length" if self.pack else "at least one"
            raise InputError(f"lengths is {self.lengths!r:.80}; expected {expected}")


class PendingSample(NamedTuple):
    """Sample that is not in a batch yet."""

    position: int  # in the stream
    size: Size


class Plan(NamedTuple):
    """Samples of a batch, for all hosts."""

    bins: tuple[tuple[tuple[int, ...], ...], ...]  # per host, per bin: positions of samples
    sizes: BatchSizes  # of each host's part


class Planner:
    """Packs samples into batches first-fit, in the order of the stream.

    A bin is a row; for preferences that are not packed, the two rows of a pair. `pending` is the whole state: adding
    its samples to a new planner restores it.

    Args:
        sequences_per_sample: 1, or 2 for preference pairs.

    Raises:
        InputError: rows, crops or chunks cannot be divided among the hosts.
    """

    def __init__(self, config: PackingConfig, hosts: int = 1, sequences_per_sample: int = 1):
        rows_per_bin = 1 if config.pack else sequences_per_sample
        for name, values, divisor in (
            ("rows", (config.rows,), hosts * rows_per_bin),
            ("crops", config.crops, hosts),
            ("chunks", config.chunks, hosts),
        ):
            for value in values:
                if value % divisor:
                    pairs = " x 2 rows per preference pair" if divisor > hosts else ""
                    raise InputError(f"{name} is {value}; it must be a multiple of {divisor} ({hosts} hosts{pairs})")
        longest = config.lengths[-1]
        self.config, self.hosts = config, hosts
        self.crops, self.chunks = ([n // hosts for n in sizes] for sizes in (config.crops, config.chunks))
        self._open = {
            length: _OpenBatch(self, length, config.rows * (longest // length) // (hosts * rows_per_bin))
            for length in config.lengths
        }

    def check(self, size: Size, outline: Outline) -> None:
        """Raise BadSample if no batch can ever take a sample."""
        longest, config = self.config.lengths[-1], self.config
        tokens = sum(size.tokens) if config.pack else max(size.tokens)
        if tokens > longest:
            counts = {"image": outline.images, "audio": outline.clips}
            media = "".join(f", {kind} {i}: {n}" for kind, of_kind in counts.items() for i, n in enumerate(of_kind, 1))
            text = sum(size.tokens) - len(size.tokens) * (sum(outline.images) + sum(outline.clips))
            parts = " + ".join(map(str, size.tokens))
            raise BadSample(
                "length",
                f"the sample has {parts} tokens (text: {text}{media}), but the row length is {longest}, which would "
                "cut its answer; shorten it, raise lengths, or give data.packing=auto",
            )
        self.check_media(size)

    def check_media(self, size: Size) -> None:
        """Raise BadSample if the media of a sample exceed a host's part of every batch."""
        config = self.config
        limit = f"the per-host limit (of a batch over {self.hosts} hosts)" if self.hosts > 1 else "a batch's limit"
        for name, needed, sizes in (("crops", size.crops, self.crops), ("chunks", size.chunks, self.chunks)):
            if needed > max(sizes, default=0):
                remedy = f"raise {name}, {'lower max_crops, ' if name == 'crops' else ''}or give data.packing=auto"
                raise BadSample(
                    "length",
                    f"the sample has {needed} {name}, which exceeds {limit} of {max(sizes, default=0)}; {remedy}",
                )
        if size.longest > config.chunk_tokens:
            raise BadSample(
                "length",
                f"a clip has {size.longest} tokens, but chunk_tokens is {config.chunk_tokens}; raise it (512 takes "
                "every clip)",
            )

    def add(self, sample: PendingSample) -> None:
        """Add a sample that `check` has passed."""
        size = sample.size
        tokens = sum(size.tokens) if self.config.pack else max(size.tokens)
        length = next(n for n in self.config.lengths if n >= tokens)
        self._open[length].add(sample)

    @property
    def pending(self) -> list[PendingSample]:
        """Samples that are not in a batch yet, in the order of the stream."""
        return sorted(sample for batch in self._open.values() for sample in batch.pending)

    def next(self, ended: bool = False) -> Plan | None:
        """Return the next complete batch, or None; with `ended`, the remaining partial ones, too."""
        complete = [b for b in self._open.values() if b.pending and (ended or b.is_complete)]
        return min(complete, key=lambda batch: batch.pending[0].position).take() if complete else None


class _OpenBatch:
    """Batch of one length that is being filled."""

    def __init__(self, planner: Planner, length: int, num_bins: int):
        self.planner, self.length, self.num_bins = planner, length, num_bins
        self.waiting: list[PendingSample] = []
        self._clear()

    def _clear(self) -> None:
        hosts = self.planner.hosts
        self.placed: list[PendingSample] = []
        self.bins: list[list[list[PendingSample]]] = [[[] for _ in range(self.num_bins)] for _ in range(hosts)]
        self.crops, self.chunks = [0] * hosts, [0] * hosts

    @property
    def pending(self) -> list[PendingSample]:
        return sorted(self.placed + self.waiting)

    @property
    def is_complete(self) -> bool:
        return len(self.waiting) > self.planner.config.window or self._is_full

    @property
    def _is_full(self) -> bool:
        """True once no sample can be added any more."""
        bins = [bin_ for host in self.bins for bin_ in host]
        if self.planner.config.pack:
            return all(_tokens(bin_) == self.length for bin_ in bins)
        return len(self.placed) == len(bins)

    def add(self, sample: PendingSample) -> None:
        """Put a sample into the first bin with room.

        Samples with media are assigned to hosts round-robin, so that each has its share. Texts are packed first-fit
        over all rows, so that batches of texts are the same for any number of hosts.
        """
        crops, chunks = (max(sizes, default=0) for sizes in (self.planner.crops, self.planner.chunks))
        bins, hosts = range(self.num_bins), range(self.planner.hosts)
        has_media = sample.size.crops or sample.size.chunks
        order = (
            ((host, b) for b in bins for host in hosts) if has_media else ((host, b) for host in hosts for b in bins)
        )
        for host, b in order:
            fits_media = (
                self.crops[host] + sample.size.crops <= crops and self.chunks[host] + sample.size.chunks <= chunks
            )
            bin_ = self.bins[host][b]
            if fits_media and self._fits(sample, bin_):
                bin_.append(sample)
                self.placed.append(sample)
                self.crops[host] += sample.size.crops
                self.chunks[host] += sample.size.chunks
                return
        self.waiting.append(sample)

    def _fits(self, sample: PendingSample, bin_: list[PendingSample]) -> bool:
        if not bin_:
            return True
        if not self.planner.config.pack or bin_[0].size.adapter != sample.size.adapter:
            return False
        return _tokens([*bin_, sample]) <= self.length

    def take(self) -> Plan:
        """Return the batch; the samples that were held back seed the next one."""
        config, planner = self.planner.config, self.planner
        sizes = BatchSizes(
            self.length,
            _smallest_bucket(planner.crops, max(self.crops)),
            _smallest_bucket(planner.chunks, max(self.chunks)),
            config.chunk_tokens,
        )
        plan = Plan(tuple(tuple(tuple(w.position for w in bin_) for bin_ in host) for host in self.bins), sizes)
        waiting, self.waiting = self.waiting, []
        self._clear()
        for sample in waiting:
            self.add(sample)
        return plan


def _tokens(samples: Sequence[PendingSample]) -> int:
    return sum(sum(sample.size.tokens) for sample in samples)


def _smallest_bucket(sizes: Sequence[int], needed: int) -> int:
    return next((n for n in sizes if n >= needed), 0)


def build_batch(
    processor: Processor,
    config: PackingConfig,
    plan: Plan,
    host: int,
    examples: Mapping[int, Sequence[Example]],
    sequences_per_sample: int = 1,
    adapter: str | None = None,
) -> TrainingBatch:
    """Return a host's part of a batch. Joined along the first axis of every array, the parts are the batch.

    Rows of a packed batch are the concatenated sequences of their samples: for preferences, segments 1, 3, ... are
    chosen and 2, 4, ... rejected. Otherwise the rows 0, 2, ... are chosen and 1, 3, ... rejected. Empty rows have
    length 0.

    Args:
        examples: by position; an unreadable sample, which is not among them, leaves its place empty.
        sequences_per_sample: 1, or 2 for preference pairs.
        adapter: of all rows; by default each has that of its media.
    """
    rows: list[list[Example]] = []
    for bin_ in plan.bins[host]:
        found = [example for at in bin_ for example in examples.get(at, ())]
        rows += [found] if config.pack else [[example] for example in found] or [[]] * sequences_per_sample
    batch = assemble([[e.row for e in row] for row in rows], plan.sizes, processor.config, host, len(plan.bins))
    if adapter is not None:
        batch = batch._replace(adapters=np.where(batch.lengths > 0, index_of(adapter), NO_ADAPTER).astype(np.int32))
    targets = np.full(batch.tokens.shape, processor.config.pad_token_id, np.int32)
    weights = np.zeros(batch.tokens.shape, np.float32)
    for b, row in enumerate(rows):
        start = 0
        for example in row:
            stop = start + len(example.loss_mask)
            targets[b, start : stop - 1] = example.row.tokens[1:]
            weights[b, start : stop - 1] = example.loss_mask[1:]
            start = stop
    return TrainingBatch(batch if config.pack else batch._replace(segments=None), targets, weights)
