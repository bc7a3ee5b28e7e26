"""Inputs and outputs of the compiled steps, as arrays of R sequences or beams, or of all N slots."""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

from phi4mm_jax.engine.sampling import SamplingRows


class PrefillInputs(NamedTuple):
    """Next tokens of R sequences, whose earlier ones are in the cache."""

    tokens: Int[Any, "R T"]
    media: Int[Any, "R T"]  # rows of the table of features
    starts: Int[Any, " R"]
    lengths: Int[Any, " R"]  # tokens of each sequence, those of this chunk included; 0 for none
    tables: Int[Any, "R M"]  # page tables
    adapters: Int[Any, " R"]
    use_long_rope: Bool[Any, " R"]
    slots: Int[Any, " R"]
    num_output_tokens: Int[Any, " R"]  # tokens generated before
    sampling: SamplingRows
    allowed: Int[Any, "R W"] | None = None  # tokens that grammars allow next, a bit each; None: no grammars
    restricted: Bool[Any, ""] | None = None  # whether any sequence has a grammar
    with_beams: Bool[Any, " R"] | None = None  # sequences whose likeliest tokens are beams, among those allowed


class Carried(NamedTuple):
    """State of the N slots for the next round, whose inputs are made before this one's results are read."""

    last: Int[Any, " N"]  # last token; -1: it has ended
    untaken: Int[Any, " N"]  # tokens that the round might have given with drafts, and has not


class DecodeInputs(NamedTuple):
    """All N slots as a round of decoding begins. A slot's last token is not in the cache yet."""

    last: Int[Any, " N"]  # -1: it is in `carried`, or the slot is idle
    lengths: Int[Any, " N"]  # tokens in the cache; of a carried slot those `untaken` included, as in the others
    num_decode_steps: Int[Any, " N"]  # maximum number of tokens to decode in this round; 0 for an idle slot
    tables: Int[Any, "N M"]
    adapters: Int[Any, " N"]
    use_long_rope: Bool[Any, " N"]
    num_output_tokens: Int[Any, " N"]
    sampling: SamplingRows
    with_top: Bool[Any, " N"] | None = None  # slots whose likeliest tokens are asked for; None: of none
    carried: Carried | None = None  # of steps whose results the host has not read
    with_drafts: Bool[Any, " N"] | None = None  # slots whose tokens are guessed; None: of none
    limits: Int[Any, " N"] | None = None  # with drafts, maximum of `lengths` when the round ends
    widths: Int[Any, " N"] | None = None  # with drafts, maximum number of tokens of the round
    max_steps: Int[Any, ""] | None = None  # with drafts, which give several tokens a step


class SampledTokens(NamedTuple):
    """Tokens sampled in a round, and their log-probabilities by the model's own distribution.

    A sequence whose logits are not finite samples nothing from them, and idles.
    """

    tokens: Int[Array, "N W"]
    log_probabilities: Float[Array, "N W"]
    counts: Int[Array, " N"]
    finite: Bool[Array, " N"]  # whether all logits were
    top_tokens: Int[Array, "N W C"] | None = None  # the likeliest in place of each, likeliest first, where asked for
    top_log_probabilities: Float[Array, "N W C"] | None = None
    carried: Carried | None = None  # of decoding: `DecodeInputs.carried` of the next round
    num_steps: Int[Array, " N"] | None = None  # with drafts: steps that these tokens took


class BeamInputs(NamedTuple):
    """Last tokens of R beams, whose earlier ones are in the cache, and the C pages to copy before."""

    last: Int[Any, " R"]
    lengths: Int[Any, " R"]  # tokens of each beam, the last one included; 0 for none
    tables: Int[Any, "R M"]
    adapters: Int[Any, " R"]
    use_long_rope: Bool[Any, " R"]
    sources: Int[Any, " C"]
    targets: Int[Any, " C"]
    num_copies: Int[Any, ""]  # how many of these count; no target is a source
    allowed: Int[Any, "R W"] | None = None  # as of `PrefillInputs`
    restricted: Bool[Any, ""] | None = None


class TopLogprobs(NamedTuple):
    """The C likeliest tokens after each sequence or beam, likeliest first, with their log-probabilities.

    After beams with a grammar, those that it allows; log-probabilities are the model's own, and -inf for the others.
    """

    tokens: Int[Any, "R C"]
    log_probabilities: Float[Any, "R C"]
    finite: Bool[Any, " R"]  # whether all logits were
