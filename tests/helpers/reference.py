"""Logits of rows without a cache, to compare generation with."""

import numpy as np

import phi4mm_jax
from phi4mm_jax.batch import NO_MEDIA, Batch


def uncached_logits(model: phi4mm_jax.Model, batch: Batch, answers: list[list[int]]) -> list[np.ndarray]:
    """Logits before each token of the rows' answers, of whole rows without a cache.

    Where a row crosses LongRoPE's boundary, rows are computed up to it as well, where they have the other rotary set.
    """
    boundary, width = model.config.decoder.rope.original_length, max(map(len, answers))
    tokens = np.pad(batch.tokens, ((0, 0), (0, width)))
    media = np.pad(batch.media, ((0, 0), (0, width)), constant_values=NO_MEDIA)
    starts, ends = batch.lengths, batch.lengths.copy()
    for row, answer in enumerate(answers):
        tokens[row, starts[row] : starts[row] + len(answer)] = answer
        ends[row] += len(answer) - 1  # what follows the last one is not asked
    whole = batch._replace(tokens=tokens, media=media)
    short = long = np.asarray(model.logits(whole._replace(lengths=ends)))
    if ((starts <= boundary) & (ends > boundary)).any():
        short = np.asarray(model.logits(whole._replace(lengths=np.minimum(ends, boundary))))
    found = []
    for row, answer in enumerate(answers):
        places = np.arange(starts[row], starts[row] + len(answer))  # sequences of so many tokens
        found.append(np.where(places[:, None] <= boundary, short[row, places - 1], long[row, places - 1]))
    return found
