"""Drafts by prompt lookup: the next tokens are guessed to be those that followed the last ones before.

Copies are what this finds: of a document's lines, of names and numbers, of an answer's own pattern. A step of decoding
computes the guessed tokens beside the last one, and those that plain decoding would have given stay (`Programs`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from phi4mm_jax.engine.step_io import DecodeInputs

NO_TOKEN = -1  # in a history: of a medium, or unknown; it equals no token
MAX_NGRAM = 3  # tokens of context that are compared, at most


@jax.named_scope("drafts")
def propose(
    history: Int[Array, "N M"], lengths: Int[Array, " N"], count: int
) -> tuple[Int[Array, "N k"], Int[Array, " N"]]:
    """Guess each row's next `count` tokens from its own.

    The last `MAX_NGRAM` tokens are looked for among all before them, the last two if they are nowhere, then the last
    one; of several places the latest counts. What followed there is the draft, and where it reaches the end of the
    history it is repeated: the row then continues with its own draft.

    Args:
        history: tokens of each row, `NO_TOKEN` where a medium is; those behind the row's length are not read.
        lengths: tokens of each row.

    Returns:
        The drafts, and how many tokens each has: `count`, fewer before a `NO_TOKEN`, 0 where nothing was found.
    """
    rows, places = jnp.arange(len(history))[:, None], jnp.arange(history.shape[1])
    last = lengths[:, None] - 1
    matched = jnp.ones(history.shape, bool)
    same = jnp.zeros(history.shape, jnp.int32)  # tokens before each place, itself included, that are as the last ones
    for n in range(MAX_NGRAM):
        wanted = jnp.where(last >= n, history[rows, jnp.maximum(last - n, 0)], NO_TOKEN)
        shifted = jnp.pad(history, ((0, 0), (n, 0)), constant_values=NO_TOKEN)[:, : history.shape[1]]
        matched &= (shifted == wanted) & (wanted != NO_TOKEN)
        same += matched
    same = jnp.where(places < last, same, 0)
    place = jnp.argmax(same * history.shape[1] + places, -1)[:, None]  # the longest match, and of these the latest
    found = same[rows, place] > 0
    period = jnp.maximum(last - place, 1)
    drafts = history[rows, jnp.minimum(place + 1 + jnp.arange(count) % period, history.shape[1] - 1)]
    known = jnp.cumprod((drafts != NO_TOKEN) & found, -1)
    return drafts, known.sum(-1)


def verify(
    sample_at: Callable[..., Any], drafts: Int[Array, "N k"], sizes: Int[Array, " N"], active: Bool[Array, " N"],
    carry: Any,
) -> Any:  # fmt: skip
    """Sample the tokens of a step in each active row, up to the first that its draft does not have.

    Args:
        sample_at: sample_at(i, rows, carry) samples the next token of some rows after the i-th token of the step;
            returns the tokens, which rows may have more, and the carry.
        sizes: tokens of each draft.
    """

    def one(state):
        i, rows, carry = state
        tokens, more, carry = sample_at(i, rows, carry)
        return i + 1, rows & more & (i < sizes) & (tokens == drafts[:, i]), carry

    return jax.lax.while_loop(lambda state: state[1].any(), one, (jnp.int32(0), active, carry))[2]


def begin_round(inputs: DecodeInputs) -> tuple[DecodeInputs, Int[Array, " N"], Int[Array, " N"]]:
    """Let a round begin where the last one has ended, which the host had not read as it made the inputs.

    Returns:
        The inputs, without the tokens that the last round has not given; for each row the last token, and how many are
        to be decoded.
    """
    carried: Any = inputs.carried  # with drafts, never None
    last, limits, widths = (jnp.asarray(x) for x in (inputs.last, inputs.limits, inputs.widths))
    untaken = jnp.where((last < 0) & (limits > 0), carried.untaken, 0)  # an idle slot keeps a former sequence's
    last = jnp.where(last < 0, carried.last, last)
    inputs = inputs._replace(lengths=inputs.lengths - untaken, num_output_tokens=inputs.num_output_tokens - untaken)
    return inputs, last, jnp.minimum(limits - inputs.lengths, widths)


def decode_with_drafts(
    compute: Callable[..., Any], sample_next: Callable[..., Any], state: tuple[Any, ...], inputs: DecodeInputs,
    max_draft: int,
) -> tuple[tuple[Any, ...], Int[Array, " N"]]:  # fmt: skip
    """Decode at most `inputs.max_steps` steps of all rows, each with a draft where `inputs.with_drafts`.

    A step computes a row's last token and its draft. Then each position's token is sampled, as without drafts, up to
    the first that is not what the draft has: those behind belong to another sequence, and the next step overwrites
    their keys. A draft ends where the row's tokens do, so that no key is written that would not be without.

    Args:
        compute: compute(cache, ids, starts, lengths) puts tokens (N, T) of the rows into the cache, and returns it
            with the logits after each, (N, T, V).
        sample_next: sample_next(token_seen, logits, rows, last, sampled, left) samples the next token of some rows.
        state: the cache, the tokens seen, the history, and for each row the last token, those sampled, and how many
            are left to decode.
        inputs: as the round begins.

    Returns:
        The state, and how many steps each row has taken.
    """
    cache, token_seen, history, last, sampled, left = state
    rows, start, with_drafts = jnp.arange(len(history)), jnp.asarray(inputs.lengths), jnp.asarray(inputs.with_drafts)

    def record(history, last, place, at):
        return history.at[rows, jnp.where(at & with_drafts, place, history.shape[1])].set(last, mode="drop")

    def unfinished(carry):
        *_, left, _, done = carry
        return (left > 0).any() & (done < inputs.max_steps)

    def advance(carry):
        cache, token_seen, history, last, sampled, left, steps, done = carry
        active, lengths = left > 0, start + sampled.counts
        drafts, sizes = propose(history, lengths + 1, max_draft)
        sizes = jnp.where(active & with_drafts, jnp.minimum(sizes, left - 1), 0)
        ids = jnp.maximum(jnp.concatenate([last[:, None], drafts], 1), 0)
        starts, ends = (jnp.where(active, x, 0) for x in (lengths, lengths + 1 + sizes))
        cache, logits = compute(cache, ids, starts, ends)

        def sample_at(i, checked, carry):
            token_seen, history, last, sampled, left = carry
            token_seen = token_seen.at[rows, jnp.maximum(last, 0)].max(checked)
            at_i = jax.lax.dynamic_index_in_dim(logits, i, 1, keepdims=False)
            last, sampled, left = sample_next(token_seen, at_i, checked, last, sampled, left)
            history = record(history, last, start + sampled.counts, checked)
            return last, left > 0, (token_seen, history, last, sampled, left)

        carry = verify(sample_at, drafts, sizes, active, (token_seen, history, last, sampled, left))
        return cache, *carry, steps + active, done + 1

    history = record(history, last, start, left > 0)
    carry = cache, token_seen, history, last, sampled, left, jnp.zeros_like(start), jnp.int32(0)
    *found, steps, _ = jax.lax.while_loop(unfinished, advance, carry)
    return tuple(found), steps
