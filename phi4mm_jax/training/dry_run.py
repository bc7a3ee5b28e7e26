"""Dry run: trainable parameters, memory of a step, and the first batch."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from phi4mm_jax.batch import TrainingBatch
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.training.sharding import shard_batches
from phi4mm_jax.training.step import TrainState, Variables

_GIB = 2**30


def describe_run(
    steps: int, step: Any, state: TrainState, frozen: Variables, batches: Sequence[TrainingBatch],
    processor: Processor, mesh: Mesh | None, key: jax.Array | None,
) -> str:  # fmt: skip
    """Return a description of the run, for the user.

    Args:
        step: of `compile_step`; it is compiled, but not run.
        batches: the micro-batches of the first step.
    """
    return "\n\n".join([
        trainable_table(state.trainable),
        f"{steps} steps of {len(batches)} micro-batches.",
        step_memory(step, state, frozen, shard_batches(batches, mesh), key),
        f"The first batch:\n{describe_batch(batches[0], processor)}",
    ])  # fmt: skip


def trainable_table(trainable: Variables) -> str:
    """Return the trainable parameters, one per line."""
    flat: dict[Any, Any] = flatten_dict(trainable)
    names = {"/".join(path): x for path, x in flat.items()}
    width = max(map(len, names))
    lines = [f"{name:{width}}  {x.shape!s:24} {x.size:>15,}" for name, x in sorted(names.items())]
    return "\n".join([*lines, f"{'all':{width}}  {'':24} {sum(x.size for x in flat.values()):>15,}"])


def step_memory(step: Any, state: TrainState, frozen: Variables, batches: Any, key: jax.Array | None) -> str:
    """Return the memory of a step per device, by XLA's memory analysis."""
    found = step.lower(state, frozen, batches, key).compile().memory_analysis()
    share = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(frozen))
    return (
        f"Each device holds {found.argument_size_in_bytes / _GIB:.2f} GiB ({share / _GIB:.2f} of frozen parameters; "
        f"trained ones, optimizer, batch), and a step needs {found.temp_size_in_bytes / _GIB:.2f} GiB besides."
    )


def describe_batch(batch: TrainingBatch, processor: Processor) -> str:
    """Return a batch's shapes, and its first row as text, with the loss mask in brackets."""
    inner = batch.batch
    lines = [f"{name} {x.shape}" for name, x in inner._asdict().items() if isinstance(x, np.ndarray)]
    lines += [f"crops {inner.images.crops.shape}"] if inner.images is not None else []
    lines += [f"frames of clips {inner.audio.frames.shape}"] if inner.audio is not None else []
    filled = inner.lengths.sum() / inner.tokens.size
    lines += [f"{filled:.0%} of the positions are filled; {np.count_nonzero(batch.weights)} targets in the loss mask"]
    return "\n".join([*lines, "", _first_row(batch, processor)])


def _first_row(batch: TrainingBatch, processor: Processor) -> str:
    length, config = int(batch.batch.lengths[0]), processor.config
    tokens = batch.batch.tokens[0, :length].tolist()
    loss_mask = [False, *(batch.weights[0, : max(length - 1, 0)] > 0).tolist()]
    media = (config.image_token_id, config.audio_token_id)
    pieces = []
    for (is_medium, is_target), places in groupby(range(length), lambda i: (tokens[i] in media, loss_mask[i])):
        own = [tokens[i] for i in places]
        text = f"<{len(own)} media tokens>" if is_medium else processor.tokenizer.decode(own)
        pieces.append(f"[[{text}]]" if is_target else text)
    return "".join(pieces)
