"""Auto settings by the data: batch sizes, and the trainable parameters."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from phi4mm_jax.adapters import ADAPTERS
from phi4mm_jax.data.examples import Kind, Size
from phi4mm_jax.data.packing import PackingConfig, PendingSample, Planner
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.batching import bucket

_MIN_STEPS = 8  # an epoch, where the samples are enough
_LENGTH, _ROWS = 4096, 8  # of large sets: tokens of a row, and rows at least
_MIN_LENGTH = 64
_MAX_PLANNED = 4096  # samples; the stacks of media that these need are those of all
_UNBOUNDED = 1 << 40
_USED_BY_DEFAULT = {"images": "images", "clips": "clips without images"}  # by `Adapter.media`


class Divisors(NamedTuple):
    """Divisors of the sizes of a batch."""

    devices: int = 1  # that split the rows
    hosts: int = 1
    parts: int = 1  # devices that split each row (context)


def propose_packing(
    sizes: Sequence[Size],
    others: Sequence[Size] = (),
    *,
    kind: Kind = "answers",
    accumulate: int = 1,
    divisors: Divisors = Divisors(),  # noqa: B008 (a tuple)
    context: int,
) -> PackingConfig:
    """Return sizes that every sample fits into, in any order.

    A step takes an eighth of the tokens, but not more than 8 rows of 4096 per micro-batch (or one row per device, if
    there are more). Rows are as long as that allows, or as the longest sample. The stacks of media are as large as
    batches of such rows need, so that batches are limited by tokens.

    Args:
        sizes: of all training samples.
        others: of the evaluation samples.
        accumulate: micro-batches of a step.
        context: tokens of the longest sequence.
    """
    pack = kind == "answers"
    sequences = 1 if pack else 2
    together = [*sizes, *others]
    longest = max(map(sum if pack else max, (size.tokens for size in together)))
    tokens = min(
        _LENGTH * max(_ROWS, divisors.devices),
        math.ceil(sum(sum(size.tokens) for size in sizes) / _MIN_STEPS / accumulate),
    )
    wanted = max(longest, min(_LENGTH, tokens // divisors.devices)) if pack else longest
    length = min(_multiple(bucket(wanted, _MIN_LENGTH), 2 * divisors.parts), context)
    rows = _multiple(math.ceil(tokens / length), divisors.devices, divisors.hosts * sequences)
    chunk_tokens = bucket(max(size.longest for size in together), _MIN_LENGTH)
    open_sizes = (_UNBOUNDED * divisors.hosts,)
    unbounded = PackingConfig(rows, (length,), pack, open_sizes, open_sizes, chunk_tokens)
    crops, chunks = _media_of_batches(sizes[:_MAX_PLANNED], Planner(unbounded, divisors.hosts, sequences))

    def stack(needed: int, each: Sequence[int]) -> tuple[int, ...]:
        if not any(each):
            return ()
        together = bucket(max(needed, *each)) * divisors.hosts
        return (_multiple(together, divisors.devices * divisors.parts, divisors.hosts),)

    return PackingConfig(
        rows, (length,), pack, stack(crops, [size.crops for size in together]),
        stack(chunks, [size.chunks for size in together]), chunk_tokens,
    )  # fmt: skip


def _media_of_batches(sizes: Sequence[Size], planner: Planner) -> tuple[int, int]:
    """Return the maximum of crops and chunks of a host's part of a batch."""
    max_ = [0, 0]

    def count_complete(ended: bool = False) -> None:
        while (plan := planner.next(ended)) is not None:
            for host in plan.bins:
                found = [sizes[at] for bin_ in host for at in bin_]
                max_[:] = max(max_[0], sum(s.crops for s in found)), max(max_[1], sum(s.chunks for s in found))

    for position, size in enumerate(sizes):
        planner.add(PendingSample(position, size))
        count_complete()
    count_complete(ended=True)
    return max_[0], max_[1]


def _multiple(count: int, *divisors: int) -> int:
    step = math.lcm(*divisors)
    return -(-count // step) * step


def propose_trainable(sizes: Sequence[Size]) -> tuple[str, ...]:
    """Return the adapters of the samples' media, or the decoder if all are text."""
    needed = {size.adapter for size in sizes}
    return tuple(adapter.collection for adapter in ADAPTERS.values() if adapter.index in needed) or ("params/decoder",)


def check_reached(sizes: Sequence[Size], trainable: Sequence[str]) -> None:
    """Raise InputError if no sample reaches a trainable parameter, for lack of its media or adapter."""
    images, clips = any(size.crops for size in sizes), any(size.chunks for size in sizes)
    needs = {  # of parameters: the samples that reach them, and whether there are any
        "params/vision": ("images", images),
        "params/image_embedder": ("images", images),
        "params/speech": ("clips", clips),
        "params/audio_projector": ("clips", clips),
    }
    for name, adapter in ADAPTERS.items():
        samples = f"the {name} adapter (data.adapter={name})"
        if adapter.media is not None:
            samples = _USED_BY_DEFAULT[adapter.media]
        needs[adapter.collection] = samples, any(size.adapter == adapter.index for size in sizes)
    patterns = [pattern for pattern in trainable if not pattern.startswith("!")]
    found = [next((need for path, need in needs.items() if _is_below(p, path)), ("", True)) for p in patterns]
    if found and not any(is_reached for _, is_reached in found):
        raise InputError(
            f"trainable is {', '.join(patterns)}, which need samples with {found[0][0]}, and the data have none; give "
            "such data, or trainable=auto"
        )


def _is_below(pattern: str, path: str) -> bool:
    return pattern == path or pattern.startswith(f"{path}/")


def describe(sizes: Sequence[Size]) -> str:
    """Return a one-line summary of the sizes of samples."""
    if not sizes:
        raise InputError("no sample can be trained on; repair the data")
    tokens = sorted(sum(size.tokens) for size in sizes)
    parts = [f"{len(sizes)} samples of {tokens[0]} to {tokens[-1]} tokens, median {tokens[len(tokens) // 2]}"]
    crops, chunks = max(size.crops for size in sizes), max(size.chunks for size in sizes)
    parts += [f"up to {crops} crop(s)"] if crops else []
    parts += [f"up to {chunks} chunk(s) of clips"] if chunks else []
    text = sum(size.adapter == 0 for size in sizes)
    parts += [f"{text} of text alone, which trains no adapter"] if 0 < text < len(sizes) else []
    return "; ".join(parts)
