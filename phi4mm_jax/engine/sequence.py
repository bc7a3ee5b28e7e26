"""Sequence: a request in a slot, from its prompt to its last token."""

from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from phi4mm_jax.adapters import split_index
from phi4mm_jax.engine.beam_search import BeamGroup
from phi4mm_jax.engine.detokenizer import IncrementalDetokenizer
from phi4mm_jax.engine.encoder_cache import MediaInputs
from phi4mm_jax.engine.grammar import GrammarMatcher
from phi4mm_jax.engine.page_allocator import PageHash, page_hashes
from phi4mm_jax.engine.request import Request, TokenLogprobs
from phi4mm_jax.engine.sampling import Sampling
from phi4mm_jax.engine.user_adapters import AdapterChoice
from phi4mm_jax.processing.batching import Row


class SequenceStatus(Enum):
    WAITING = "waiting"  # its pages are not reserved: before admission, and after a preemption
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """Tokens of a request, and their pages in the KV cache.

    Attributes:
        slot: row of the arrays that hold state on the device.
        max_new_tokens: limit of generated tokens, by the request and by the context.
        max_pages: pages in the worst case.
        output_token_ids: generated so far; empty for beam search, see `BeamGroup`.
        num_reported_tokens: generated tokens that are in an update.
        pages: page table; for beam search the prompt's full pages only, which all beams share.
        page_hashes: of the full pages of the tokens to prefill.
        num_reserved_pages: reserved and not yet allocated.
        num_computed_tokens: tokens whose keys and values are in the cache.
        num_tokens_to_prefill: in total, before it decodes.
        prefix_matched: prefix-cache lookup done.
        use_long_rope: its keys are rotated by the long set of LongRoPE's factors.
        beams: None unless beam search.
        sampling: the request's, with a seed.
        adapters: that it is computed with.
        matcher: state of the request's grammar after the generated tokens.
    """

    id: int
    request: Request
    row: Row
    media: MediaInputs
    slot: int
    max_new_tokens: int
    max_pages: int
    detokenizer: IncrementalDetokenizer
    beams: BeamGroup | None = None
    sampling: Sampling = field(default_factory=Sampling)
    adapters: AdapterChoice = field(default_factory=AdapterChoice)
    matcher: GrammarMatcher | None = None
    status: SequenceStatus = SequenceStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    top_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_reported_tokens: int = 0
    pages: list[int] = field(default_factory=list)
    page_hashes: list[PageHash] = field(default_factory=list)
    num_reserved_pages: int = 0
    num_computed_tokens: int = 0
    num_tokens_to_prefill: int = 0
    prefix_matched: bool = False
    use_long_rope: bool = False

    @property
    def adapter(self) -> int:
        """Index of its adapters: the request's, by default that of its media."""
        return self.adapters.index(self.row.adapter)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.row.tokens)

    @property
    def num_output_tokens(self) -> int:
        """Number of generated tokens; for beam search, of each beam."""
        return len(self.output_token_ids) if self.beams is None else self.beams.search.num_output_tokens

    def token_ids(self, stop: int) -> np.ndarray:
        """Its first `stop` tokens, generated ones included."""
        return np.concatenate([self.row.tokens, np.asarray(self.output_token_ids, np.int32)])[:stop]

    def reset(self, page_size: int, long_rope_boundary: int) -> None:
        """Reset for (re)prefill from token 0: at first, and when it is about to cross the LongRoPE boundary."""
        self.status = SequenceStatus.WAITING
        self.num_computed_tokens, self.prefix_matched = 0, False
        self.num_tokens_to_prefill = self.num_prompt_tokens + len(self.output_token_ids)
        self.use_long_rope = self.num_prompt_tokens + self.num_output_tokens > long_rope_boundary
        builtin, _ = split_index(self.adapter)
        salt = bytes([builtin, self.use_long_rope]) + self.adapters.salt
        self.page_hashes = list(
            page_hashes(self.token_ids(self.num_tokens_to_prefill), self.media.spans, page_size, salt)
        )
