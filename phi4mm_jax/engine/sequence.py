"""A request in a slot, from its prompt to its last token."""

from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from phi4mm_jax.adapters import index_of
from phi4mm_jax.engine.beam_search import BeamGroup
from phi4mm_jax.engine.detokenizer import IncrementalDetokenizer
from phi4mm_jax.engine.encoder_cache import MediaInputs
from phi4mm_jax.engine.page_allocator import Key, page_keys
from phi4mm_jax.engine.request import Request, TokenLogprobs
from phi4mm_jax.engine.sampling import Sampling
from phi4mm_jax.processing.batching import Row


class SequenceStatus(Enum):
    WAITING = "waiting"  # for its pages to be reserved: before admission, and once it is preempted
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """Tokens of a request, and their pages in the KV cache.

    Attributes:
        slot: row of the arrays that hold state on the device.
        max_new_tokens: tokens that may be drawn: as many as the request asks for and the context allows.
        max_pages: pages that it may come to need.
        tokens: drawn ones. With several beams none: the group has them.
        num_told: tokens that updates have told of.
        pages: page table; with several beams of the prompt's whole pages, which all share.
        page_keys: keys of the whole pages of what has to be prefilled.
        num_reserved: pages that are reserved and not yet allocated.
        num_computed: tokens whose keys and values are in the cache.
        prefill_end: tokens to prefill before it decodes.
        prefix_matched: it has looked for its prefix in the cache.
        use_long_rope: its keys are rotated by the long set of LongRoPE's factors.
        beams: of a request with several.
        sampling: the request's, with a seed.
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
    status: SequenceStatus = SequenceStatus.WAITING
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    top_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_told: int = 0
    pages: list[int] = field(default_factory=list)
    page_keys: list[Key] = field(default_factory=list)
    num_reserved: int = 0
    num_computed: int = 0
    prefill_end: int = 0
    prefix_matched: bool = False
    use_long_rope: bool = False

    @property
    def adapter(self) -> int:
        """Index of its adapter: the request's, by default that of its media."""
        asked = self.request.adapter
        return self.row.adapter if asked is None else index_of(asked)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.row.tokens)

    @property
    def num_drawn(self) -> int:
        """Tokens that were drawn; of each beam, where there are several."""
        return len(self.tokens) if self.beams is None else self.beams.search.num_drawn

    def token_ids(self, stop: int) -> np.ndarray:
        """Its first tokens, drawn ones included."""
        return np.concatenate([self.row.tokens, np.asarray(self.tokens, np.int32)])[:stop]

    def reset(self, page_size: int, long_rope_boundary: int) -> None:
        """Have everything prefilled: at first, and when it is about to outgrow the short rotary set."""
        self.status = SequenceStatus.WAITING
        self.num_computed, self.prefix_matched = 0, False
        self.prefill_end = self.num_prompt_tokens + len(self.tokens)
        self.use_long_rope = self.num_prompt_tokens + self.num_drawn > long_rope_boundary
        salt = bytes([self.adapter, self.use_long_rope])
        self.page_keys = list(page_keys(self.token_ids(self.prefill_end), self.media.spans, page_size, salt))
