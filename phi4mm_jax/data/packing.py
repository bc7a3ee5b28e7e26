"""Packing: the samples of each batch, and the arrays of static shapes that they make.

Planning knows samples by their sizes alone. So it looks far ahead at no cost in memory, and every host can make the
same plan for all and then load only what is its own: hosts have the same number of batches, of the same shapes, and
need not talk to each other.
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
from phi4mm_jax.utils.checks import is_whole


@dataclass(frozen=True)
class PackingConfig:
    """Shapes of batches. Each combination of sizes is compiled once, when it first comes.

    Rows, crops and chunks are those of the whole batch, of which every host has an equal part.

    Attributes:
        rows: of a batch at the longest length; of half the length there are twice as many, and so on.
        lengths: of rows, in tokens, ascending. Packed rows have one length.
        pack: several samples a row, which do not see each other; otherwise one.
        crops: sizes of the stack of crops, ascending; empty if the data have no images. A batch takes the smallest one
            that is enough; its samples never need more than the largest.
        chunks: likewise, of the stack of chunks of clips: one for each 40 s of a clip.
        chunk_tokens: tokens of a chunk, 80 ms each. 512 takes every clip; where all are shorter,
            less saves computing.
        window: samples that may wait for a later batch before one is closed that they do not fit into.

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
            if not _is_positive(value := getattr(self, name)):
                raise InputError(f"{name} is {value!r:.80}; expected a positive whole number")
        for name in ("lengths", "crops", "chunks"):
            values = getattr(self, name)
            ascending = isinstance(values, tuple) and list(values) == sorted(set(values))
            if not ascending or not all(map(_is_positive, values)):
                raise InputError(f"{name} is {values!r:.80}; expected positive whole numbers, ascending")
        if not self.lengths or (self.pack and len(self.lengths) != 1):
            expected = "one: packed rows all have the same length" if self.pack else "at least one"
            raise InputError(f"lengths is {self.lengths!r:.80}; expected {expected}")


def _is_positive(value: object) -> bool:
    return is_whole(value, 1)


class Waiting(NamedTuple):
    """Sample that is in no batch yet."""

    position: int  # in the stream
    size: Size


class Plan(NamedTuple):
    """Samples of a batch, for all hosts."""

    slots: tuple[tuple[tuple[int, ...], ...], ...]  # of each host, of each slot: positions of samples
    sizes: BatchSizes  # of each host's part


class Planner:
    """Planner that fills batches first-fit, in the order in which samples come.

    A slot is what a sample is put into: of packed batches a row, otherwise a row, or for preferences two. All that it
    will do depends on `pending` alone, which may be added again to a new planner.
    """

    def __init__(self, config: PackingConfig, hosts: int = 1, sequences: int = 1):
        """Args:
            sequences: of a sample: 2 for preferences.

        Raises:
            InputError: rows, crops or chunks cannot be divided among the hosts.
        """
        per_slot = 1 if config.pack else sequences
        for name, values, divisor in (
            ("rows", (config.rows,), hosts * per_slot), ("crops", config.crops, hosts), ("chunks", config.chunks, hosts)
        ):  # fmt: skip
            for value in values:
                if value % divisor:
                    each = f"{hosts} hosts" + (" and the two rows of a preference" if divisor > hosts else "")
                    raise InputError(f"{name} is {value}, which cannot be divided by {each}; give a multiple")
        longest = config.lengths[-1]
        self.config, self.hosts = config, hosts
        self.crops, self.chunks = ([n // hosts for n in sizes] for sizes in (config.crops, config.chunks))
        self._open = {
            length: _Open(self, length, config.rows * (longest // length) // (hosts * per_slot))
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
                f"the sample has {parts} tokens (text: {text}{media}), and a row {longest}, which would cut its "
                "answer; shorten it, raise lengths, or give data.packing=auto",
            )
        self.check_media(size)

    def check_media(self, size: Size) -> None:
        """Raise BadSample if the media of a sample are more than a host's part of any batch."""
        config = self.config
        share = f" a host ({self.hosts} share those of a batch)" if self.hosts > 1 else ""
        for name, needed, sizes in (("crops", size.crops, self.crops), ("chunks", size.chunks, self.chunks)):
            if needed > max(sizes, default=0):
                remedy = f"raise {name}, {'lower max_crops, ' if name == 'crops' else ''}or give data.packing=auto"
                raise BadSample(
                    "length", f"the sample has {needed} {name}, and a batch {max(sizes, default=0)}{share}; {remedy}"
                )
        if size.longest > config.chunk_tokens:
            raise BadSample(
                "length",
                f"a clip has {size.longest} tokens, and a chunk {config.chunk_tokens}; raise chunk_tokens (512 takes "
                "every clip)",
            )

    def add(self, sample: Waiting) -> None:
        """Take a sample that `check` has passed."""
        size = sample.size
        tokens = sum(size.tokens) if self.config.pack else max(size.tokens)
        length = next(n for n in self.config.lengths if n >= tokens)
        self._open[length].add(sample)

    @property
    def pending(self) -> list[Waiting]:
        """Samples that are in no batch yet, in the order of the stream."""
        return sorted(sample for batch in self._open.values() for sample in batch.pending)

    def next(self, ended: bool = False) -> Plan | None:
        """Return the next batch, if one is complete; once the stream has ended, what is left, until there is none."""
        complete = [b for b in self._open.values() if b.pending and (ended or b.is_complete)]
        return min(complete, key=lambda batch: batch.pending[0].position).take() if complete else None


class _Open:
    """Batch of one length that is being filled."""

    def __init__(self, planner: Planner, length: int, slots: int):
        self.planner, self.length, self.num_slots = planner, length, slots
        self.waiting: list[Waiting] = []
        self._clear()

    def _clear(self) -> None:
        hosts = self.planner.hosts
        self.placed: list[Waiting] = []
        self.slots: list[list[list[Waiting]]] = [[[] for _ in range(self.num_slots)] for _ in range(hosts)]
        self.crops, self.chunks = [0] * hosts, [0] * hosts

    @property
    def pending(self) -> list[Waiting]:
        return sorted(self.placed + self.waiting)

    @property
    def is_complete(self) -> bool:
        return len(self.waiting) > self.planner.config.window or self._is_full

    @property
    def _is_full(self) -> bool:
        """True if no sample can be added any more."""
        slots = [slot for host in self.slots for slot in host]
        if self.planner.config.pack:
            return all(_tokens(slot) == self.length for slot in slots)
        return len(self.placed) == len(slots)

    def add(self, sample: Waiting) -> None:
        """Put a sample into the first slot with room.

        Media go to all hosts in turn, so that each has its share. Texts go to rows in their order, so that batches of
        texts are the same for any number of hosts.
        """
        crops, chunks = (max(sizes, default=0) for sizes in (self.planner.crops, self.planner.chunks))
        slots, hosts = range(self.num_slots), range(self.planner.hosts)
        in_turn = sample.size.crops or sample.size.chunks
        order = (
            ((host, s) for s in slots for host in hosts) if in_turn else ((host, s) for host in hosts for s in slots)
        )
        for host, s in order:
            fits_media = (
                self.crops[host] + sample.size.crops <= crops and self.chunks[host] + sample.size.chunks <= chunks
            )
            slot = self.slots[host][s]
            if fits_media and self._fits(sample, slot):
                slot.append(sample)
                self.placed.append(sample)
                self.crops[host] += sample.size.crops
                self.chunks[host] += sample.size.chunks
                return
        self.waiting.append(sample)

    def _fits(self, sample: Waiting, slot: list[Waiting]) -> bool:
        if not slot:
            return True
        if not self.planner.config.pack or slot[0].size.adapter != sample.size.adapter:
            return False
        return _tokens([*slot, sample]) <= self.length

    def take(self) -> Plan:
        """Return the batch; the samples that wait then begin the next one."""
        config, planner = self.planner.config, self.planner
        sizes = BatchSizes(
            self.length,
            _size(planner.crops, max(self.crops)),
            _size(planner.chunks, max(self.chunks)),
            config.chunk_tokens,
        )
        plan = Plan(tuple(tuple(tuple(w.position for w in slot) for slot in host) for host in self.slots), sizes)
        waiting, self.waiting = self.waiting, []
        self._clear()
        for sample in waiting:
            self.add(sample)
        return plan


def _tokens(slot: Sequence[Waiting]) -> int:
    return sum(sum(w.size.tokens) for w in slot)


def _size(sizes: Sequence[int], needed: int) -> int:
    return next((n for n in sizes if n >= needed), 0)


def build(
    processor: Processor,
    config: PackingConfig,
    plan: Plan,
    host: int,
    examples: Mapping[int, Sequence[Example]],
    sequences: int = 1,
    adapter: str | None = None,
) -> TrainingBatch:
    """Return a host's part of a batch. Joined along the first axis of every array, the parts are the batch.

    Rows of a packed batch have the sequences of their samples one after another: of preferences, segments 1, 3, ... are
    chosen and 2, 4, ... rejected. Otherwise the rows 0, 2, ... are chosen and 1, 3, ... rejected. Rows that are left
    empty have length 0.

    Args:
        examples: of the plan's positions; a sample that is not among them, since it cannot be read, leaves its place
            empty.
        sequences: of a sample: 2 for preferences.
        adapter: of all rows; by default each has that of its media.
    """
    rows: list[list[Example]] = []
    for slot in plan.slots[host]:
        found = [example for at in slot for example in examples.get(at, ())]
        rows += [found] if config.pack else [[example] for example in found] or [[]] * sequences
    batch = assemble([[e.row for e in row] for row in rows], plan.sizes, processor.config, host, len(plan.slots))
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
