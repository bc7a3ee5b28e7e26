"""Admission: requests are checked against the engine's sizes and become sequences."""

import math
from collections.abc import Collection

from phi4mm_jax.adapters import ADAPTERS, NONE
from phi4mm_jax.engine.beam_search import BeamGroup, Search, max_stops
from phi4mm_jax.engine.config import EngineConfig
from phi4mm_jax.engine.detokenizer import IncrementalDetokenizer
from phi4mm_jax.engine.encoder_cache import EncoderCache, MediaInputs
from phi4mm_jax.engine.request import Request
from phi4mm_jax.engine.sequence import Sequence
from phi4mm_jax.engine.user_adapters import AdapterChoice
from phi4mm_jax.errors import ContextLengthError, InputError
from phi4mm_jax.processing.batching import Row
from phi4mm_jax.processing.processor import Processor


class Admission:
    """Turns requests into sequences, if the engine's sizes and the checkpoint allow."""

    def __init__(
        self, config: EngineConfig, processor: Processor, collections: Collection[str], encoder_cache: EncoderCache,
        stop_token_ids: Collection[int],
    ):  # fmt: skip
        self._config, self._processor, self._encoder_cache = config, processor, encoder_cache
        self._collections = frozenset(collections)
        self._stops = frozenset(stop_token_ids)

    def sequence(
        self, request_id: int, request: Request, row: Row, media: MediaInputs, slot: int, adapters: AdapterChoice
    ) -> Sequence:
        """Return the sequence of a request, to be prefilled, and without pages.

        Raises:
            ContextLengthError: the prompt fills the context.
            InputError: the engine has no room for it, or the checkpoint lacks what it asks for.
        """
        length, size, context = len(row.tokens), self._config.page_tokens, self._processor.context
        if length >= context:
            raise ContextLengthError(
                f"the prompt has {length} tokens, which leaves no room in the context of {context}; shorten it"
            )
        self.check_adapter(adapters.builtin)
        if request.top_logprobs > self._config.top_logprobs:
            raise InputError(
                f"top_logprobs is {request.top_logprobs}, but the engine gives {self._config.top_logprobs}; ask for "
                f"fewer, or allow more with {self._config.named('top_logprobs')}"
            )
        if request.draft is not None and not self._config.draft_tokens:
            raise InputError(
                f"draft is {request.draft!r}, but the engine guesses no tokens; leave it out, or allow it with "
                f"{self._config.named('draft_tokens')}"
            )
        self._check_media(media, length)
        limit = min(int(request.max_new_tokens), context - length)
        shared = length // size if request.beams > 1 else 0  # by all its beams
        max_pages = shared + request.beams * (math.ceil((length + limit) / size) - shared)
        if max_pages > self._config.pages:
            each = f" of each of {request.beams} beams" if request.beams > 1 else ""
            raise InputError(
                f"the prompt's {length} tokens and {limit} new ones{each} need {max_pages} pages of {size} tokens, but "
                f"the cache has {self._config.pages}; give it more tokens, or ask for fewer ("
                f"{self._config.named('cache_tokens')})"
            )
        detokenizer = IncrementalDetokenizer(self._processor.tokenizer, request.stop, request.skip_special_tokens)
        beams = self._beams(request, limit)
        sequence = Sequence(
            request_id, request, row, media, slot, limit, max_pages, detokenizer, beams, adapters=adapters
        )
        sequence.reset(size, self._processor.config.decoder.rope.original_length)
        return sequence

    def check_adapter(self, adapter: str | None) -> None:
        """Raise InputError for a built-in adapter that the checkpoint lacks, or has merged."""
        if adapter is not None and self._processor.merged is not None:
            raise InputError(
                f"adapter is {adapter!r}, but the {self._processor.merged} adapter is merged into the weights; load "
                "the checkpoint without merge"
            )
        if adapter not in (None, NONE) and ADAPTERS[adapter].collection not in self._collections:
            raise InputError(f"adapter is {adapter!r}, which this checkpoint lacks; use a checkpoint with it")

    def _check_media(self, media: MediaInputs, length: int) -> None:
        """Check that the media of each page, the smallest chunk, fit into the encoder cache together."""
        cache, size = self._encoder_cache, self._config.page_tokens
        if cache.max_stop(media, 0, length) == length:
            return
        for start in range(0, length, size):
            stop = min(start + size, length)
            if cache.max_stop(media, start, stop) < stop:
                raise InputError(
                    f"tokens {start} to {stop} of the prompt take features of more media than feature_blocks="
                    f"{self._config.feature_blocks} hold together; give the engine more"
                )

    def _beams(self, request: Request, limit: int) -> BeamGroup | None:
        if request.beams == 1:
            return None
        if request.beams > self._config.beams:
            raise InputError(
                f"beams is {request.beams}, but the engine allows {self._config.beams}; ask for fewer, or allow more "
                f"with {self._config.named('beams')}"
            )
        stops = frozenset({*self._stops, *request.stop_tokens})
        allowed = max_stops(self._stops)
        if len(stops) > allowed:
            raise InputError(
                f"stop_tokens and the model's own are {len(stops)} together, but beams may end by {allowed} at most; "
                "give fewer stop_tokens"
            )
        return BeamGroup(Search(int(request.beams), limit, float(request.length_penalty), stops))
