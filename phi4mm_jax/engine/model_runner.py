"""Model runner: an engine's state on the device, and the calls of the compiled steps."""

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import combinations, product, starmap
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from phi4mm_jax.adapters import USERS, adapter_indices, row_index, used_collections
from phi4mm_jax.batch import AudioStack, ImageStack
from phi4mm_jax.engine.beam_search import BeamGroup, max_stops
from phi4mm_jax.engine.config import DEFAULT_CACHE_TOKENS, PREFILL_ROWS, EngineConfig
from phi4mm_jax.engine.encoder_cache import BLOCK_SIZE, EncoderCache, group_sizes, warm_up_stacks
from phi4mm_jax.engine.grammar import is_installed
from phi4mm_jax.engine.inputs import DeviceCopies, GrammarMasks, beam_inputs, decode_inputs, prefill_inputs
from phi4mm_jax.engine.scheduler import DecodeBatch, PrefillBatch
from phi4mm_jax.engine.sequence import Sequence
from phi4mm_jax.engine.step_io import BeamInputs, Carried, DecodeInputs, PrefillInputs, SampledTokens, TopLogprobs
from phi4mm_jax.engine.steps import Programs
from phi4mm_jax.engine.token_history import TokenHistory
from phi4mm_jax.engine.user_adapters import UserAdapters, stack_bytes
from phi4mm_jax.errors import InputError
from phi4mm_jax.kernels.pages import held_as
from phi4mm_jax.model import KVCache

T = TypeVar("T")
_SLOT_FIELDS = ("tables", "adapters", "use_long_rope", "sampling", "with_top")  # of `DecodeInputs`


class ModelRunner:
    """Computes batches of sequences.

    Shapes never change: a batch is padded to one of a few sizes, for which each step is compiled once, and once for
    every set of adapters, since an adapter that no sequence uses costs nothing.

    Attributes:
        kv_cache: on the device, as the following.
        token_seen: (slots, V); tokens of each slot's sequence, where it has a repetition penalty.
        carried: see `DecodeInputs.carried`.
        encoder_cache: encoded media.
        user_adapters: those that users have brought.
        num_prefilled_tokens: since the start.
        num_draft_steps, num_draft_step_tokens: steps of sequences with drafts, and the tokens that these gave.
        table_size: pages of the longest page table.
    """

    def __init__(self, programs: Programs, variables: Mapping[str, Any], config: EngineConfig, context: int):
        self._programs, self._config = programs, config
        self._encoders, self._decoder = _split_variables(variables)
        model = programs.model.config
        self.user_adapters = UserAdapters(programs, config)
        self.table_size = min(config.pages, math.ceil(context / config.page_tokens))
        self.kv_cache, features = _allocate(programs, config)
        sizes = group_sizes(len(programs.devices))
        self.encoder_cache = EncoderCache(lambda *given: self._encode_step(*given)(), features, sizes)
        self.token_seen = programs.place(jnp.zeros((config.slots, model.decoder.vocab_size), bool))
        self.carried: Carried = programs.place(Carried(*[jnp.zeros(config.slots, jnp.int32)] * 2))
        self._slots = DeviceCopies(programs.place)
        self.num_prefilled_tokens = 0
        candidates = config.beams + max_stops(model.stop_token_ids)  # tokens after each beam
        self._num_candidates = candidates if config.beams > 1 else 0
        self._num_prefill_candidates = max(self._num_candidates, config.top_logprobs)
        max_tokens = self.table_size * config.page_tokens
        self._history = TokenHistory(programs, config.slots, max_tokens) if config.draft_tokens else None
        self.num_draft_steps = self.num_draft_step_tokens = 0
        self._with_grammars = is_installed()
        self._masks = GrammarMasks(programs.place, model.decoder.vocab_size)

    # ------------------------------------------------------------------------------------------ batches

    def prefill(self, batch: PrefillBatch) -> tuple[SampledTokens, TopLogprobs | None]:
        """Dispatch the encoding of a chunk's media and the chunk, for each sequence; samples the next token of all.

        As of the following, the results are on the device, and may not be there yet.
        """
        chunks = list(zip(batch.sequences, batch.stops, strict=True))
        rows = self.encoder_cache.lookup_or_encode(
            [(s.media, s.num_computed_tokens, min(stop, s.num_prompt_tokens)) for s, stop in chunks]
        )
        self.num_prefilled_tokens += sum(stop - s.num_computed_tokens for s, stop in chunks)
        inputs = self._prefill_inputs(batch, rows, len(chunks))
        sampled, top = self.run_prefill({s.adapter for s, _ in chunks}, inputs)
        self.run_carry_first([s.slot if stop == s.num_tokens_to_prefill else -1 for s, stop in chunks], sampled)
        return sampled, top

    def decode(self, batch: DecodeBatch) -> SampledTokens:
        """Dispatch the decoding of up to `num_decode_steps` tokens of each slot."""
        adapters = {s.adapter for s in batch.sequences if s is not None}
        if self._history is not None and batch.with_drafts.any():
            self._history.write(batch.sequences)
            return self.run_decode_drafts(adapters, self._decode_inputs(batch, with_drafts=True))
        if self._history is not None:
            self._history.forget(batch.sequences)
        inputs = self._decode_inputs(batch)
        matchers = [None if s is None else s.matcher for s in batch.sequences]
        if all(matcher is None for matcher in matchers):
            return self.run_decode(adapters, inputs)
        return self.run_decode_allowed(adapters, inputs, lambda: self._masks.allowed(matchers, self._config.slots))

    def count_drafts(self, batch: DecodeBatch, sampled: SampledTokens) -> None:
        """Count the steps of a round, whose results are read, in the sequences with drafts."""
        if sampled.num_steps is not None:
            self.num_draft_steps += int(sampled.num_steps[batch.with_drafts].sum())
            self.num_draft_step_tokens += int(sampled.counts[batch.with_drafts].sum())

    def beam_step(self, groups: Items[tuple[Sequence, BeamGroup]]) -> TopLogprobs:
        """Extend beams by a token; return the likeliest tokens after each."""
        count = sum(len(beams.search.beams) for _, beams in groups)
        size = next(size for size in self._config.beam_batch_sizes if size >= count)
        return self.run_beam_step({s.adapter for s, _ in groups}, self._beam_inputs(groups, size))

    def set_penalty_mask(self, sequence: Sequence) -> None:
        """Set a sequence's penalty mask to its tokens so far, if it has a repetition penalty; decoding adds its own."""
        if sequence.request.sampling.repetition_penalty != 1.0:
            seen = np.zeros(self.token_seen.shape[1], bool)
            seen[sequence.token_ids(sequence.num_tokens_to_prefill)] = True
            self.run_set_penalty_mask(sequence.slot, seen)

    def _prefill_inputs(self, batch: PrefillBatch, media: Items[np.ndarray], count: int) -> PrefillInputs:
        """Arrays of a batch, with the grammars of sequences whose last chunk this is."""
        size, own = self.table_size, batch.width // self._config.page_tokens
        if self._programs.has_first_chunks:  # which `cached_attention` knows by their tables
            size = max(size, own + 1) if batch.with_cached else own
        inputs = prefill_inputs(batch, media, count, size, with_beams=self._config.beams > 1)
        chunks = zip(batch.sequences, batch.stops, strict=True)
        matchers = [s.matcher if stop == s.num_tokens_to_prefill else None for s, stop in chunks]
        return inputs._replace(**self._masks.of(matchers, count)) if self._with_grammars else inputs

    def _beam_inputs(self, groups: Items[tuple[Sequence, BeamGroup]], size: int) -> BeamInputs:
        """Arrays of all groups' beams, with their grammars."""
        inputs = beam_inputs(groups, size, self.table_size)
        matchers = [beam.matcher for _, group in groups for beam in group.search.beams]
        return inputs._replace(**self._masks.of(matchers, size)) if self._with_grammars else inputs

    def _decode_inputs(self, batch: DecodeBatch, with_drafts: bool = False) -> DecodeInputs:
        """Arrays of all slots; those that change only with the sequences are on the device already."""
        inputs = decode_inputs(batch, self.table_size, self._config.top_logprobs > 0, with_drafts)
        return inputs._replace(**self._slots.of({name: getattr(inputs, name) for name in _SLOT_FIELDS}))

    # ------------------------------------------------------------------------------------------ calls

    def run_prefill(self, adapters: set[int], inputs: PrefillInputs) -> tuple[SampledTokens, TopLogprobs | None]:
        self.kv_cache, sampled, top = self._prefill_step(adapters, inputs)()
        return _copy_to_host_async((sampled, top))

    def run_carry_first(self, slots: Items[int], sampled: SampledTokens) -> None:
        """Let these slots decode from the tokens that they have sampled by prefill; -1 for none."""
        rows = np.asarray([self._config.slots if slot < 0 else slot for slot in slots], np.int32)
        self.carried = self._programs.carry_first(self.carried, rows, sampled)

    def run_decode(self, adapters: set[int], inputs: DecodeInputs) -> SampledTokens:
        self.kv_cache, self.token_seen, sampled = self._decode_step(adapters, inputs)()
        return self._keep_carried(sampled)

    def run_decode_drafts(self, adapters: set[int], inputs: DecodeInputs) -> SampledTokens:
        assert self._history is not None
        self.kv_cache, self.token_seen, self._history.tokens, sampled = self._drafts_step(adapters, inputs)()
        return self._keep_carried(sampled)

    def _keep_carried(self, sampled: SampledTokens) -> SampledTokens:
        """Keep what a round carries to the next; the rest is for the host."""
        assert sampled.carried is not None
        self.carried = sampled.carried
        return _copy_to_host_async(sampled._replace(carried=None))

    def run_decode_allowed(
        self, adapters: set[int], inputs: DecodeInputs, allowed: Callable[[], np.ndarray]
    ) -> SampledTokens:
        """Decode a token of each slot; the masks of the grammars are computed while the device works."""
        self.kv_cache, self.token_seen, logits = self._logits_step(adapters, inputs)()
        mask = self._programs.place(allowed())
        return self._programs.sample_allowed(
            logits, self.token_seen, inputs, mask, candidates=self._config.top_logprobs
        )

    def run_beam_step(self, adapters: set[int], inputs: BeamInputs) -> TopLogprobs:
        self.kv_cache, top = self._beam_step(adapters, inputs)()
        return top

    def run_set_penalty_mask(self, slot: int, seen: np.ndarray) -> None:
        self.token_seen = self._programs.set_penalty_mask(self.token_seen, np.int32(slot), seen)

    # Calls of the compiled steps with the state as it is; only the variables of these adapters are handed over.

    def _encode_step(self, table: Any, stack: ImageStack | AudioStack, rows: np.ndarray) -> partial:
        return partial(self._programs.encode, self._encoders, table, self._programs.place_media(stack), rows)

    def _prefill_step(self, adapters: set[int], inputs: PrefillInputs) -> partial:
        state, candidates = (self.kv_cache, self.encoder_cache.table, self.token_seen), self._num_prefill_candidates
        return partial(self._programs.prefill, self._variables_of(adapters), *state, inputs, candidates=candidates)

    def _decode_step(self, adapters: set[int], inputs: DecodeInputs) -> partial:
        state = self.kv_cache, self.token_seen, inputs._replace(carried=self.carried)
        sizes = {"width": self._config.steps, "candidates": self._config.top_logprobs}
        return partial(self._programs.decode, self._variables_of(adapters), *state, **sizes)

    def _drafts_step(self, adapters: set[int], inputs: DecodeInputs) -> partial:
        assert self._history is not None
        config, inputs = self._config, inputs._replace(carried=self.carried)
        state = self.kv_cache, self.token_seen, self._history.tokens
        sizes = {"width": config.decode_width, "max_draft": config.draft_tokens, "candidates": config.top_logprobs}
        return partial(self._programs.decode_drafts, self._variables_of(adapters), *state, inputs, **sizes)

    def _logits_step(self, adapters: set[int], inputs: DecodeInputs) -> partial:
        return partial(
            self._programs.decode_logits, self._variables_of(adapters), self.kv_cache, self.token_seen, inputs
        )

    def _beam_step(self, adapters: set[int], inputs: BeamInputs) -> partial:
        state, candidates = (self._variables_of(adapters), self.kv_cache), self._num_candidates
        return partial(self._programs.beam_step, *state, inputs, candidates=candidates)

    def _variables_of(self, adapters: set[int]) -> dict[str, Any]:
        stacks = self.user_adapters.stacks
        variables = self._decoder if stacks is None else {**self._decoder, USERS: stacks}
        return used_collections(variables, adapters)

    # ------------------------------------------------------------------------------------------ warm-up

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile every step for every shape; the state stays as it is. See `Engine.warm_up`."""
        calls = self._warm_up_calls()
        advance = _counter(progress, len(calls))
        if (workers := self._config.num_compile_workers) > 1:
            compile_in_threads([step for _, step in calls if step is not None], workers, advance)
        for count, (call, _) in enumerate(calls, 1):  # is compiled, or compiles
            call()
            advance(count)

    def _warm_up_calls(self) -> list[tuple[Callable[[], Any], Callable[[], partial] | None]]:
        """Return a call for each shape of each step, with the step where that takes long to compile."""
        config, slots = self._config, self._config.slots
        idle = self._decode_inputs(DecodeBatch.idle(slots))
        each, together = _adapter_sets(self._decoder, self.user_adapters.stacks is not None)

        def encode(stack: ImageStack | AudioStack, features: int) -> tuple[Callable, Callable]:
            cache, rows = self.encoder_cache, np.zeros(features, np.int32)
            return partial(cache.warm_up, stack, features), lambda: self._encode_step(cache.table, stack, rows)

        def prefill(adapter: int, count: int, width: int, with_cached: bool) -> tuple[Callable, Callable]:
            inputs = self._prefill_inputs(PrefillBatch([], [], width, with_cached), [], count)

            def call() -> None:
                sampled, _ = self.run_prefill({adapter}, inputs)
                self.run_carry_first([-1] * count, sampled)

            return call, partial(self._prefill_step, {adapter}, inputs)

        def decode(adapters: set[int]) -> tuple[Callable, Callable]:
            return partial(self.run_decode, adapters, idle), partial(self._decode_step, adapters, idle)

        def decode_drafts(adapters: set[int]) -> tuple[Callable, Callable]:
            inputs = self._decode_inputs(DecodeBatch.idle(slots), with_drafts=True)
            return partial(self.run_decode_drafts, adapters, inputs), partial(self._drafts_step, adapters, inputs)

        def decode_allowed(adapters: set[int]) -> tuple[Callable, Callable]:
            call = partial(self.run_decode_allowed, adapters, idle, lambda: self._masks.allowed([], slots))
            return call, partial(self._logits_step, adapters, idle)

        def beam_step(adapters: set[int], size: int) -> tuple[Callable, Callable]:
            inputs = self._beam_inputs([], size)
            return partial(self.run_beam_step, adapters, inputs), partial(self._beam_step, adapters, inputs)

        with_cached = {True, not self._programs.has_first_chunks}
        stacks = warm_up_stacks(self._programs.model.config, self.encoder_cache.group_sizes)
        sets = [partial(self.run_set_penalty_mask, slots, np.zeros(self.token_seen.shape[1], bool))]  # out of range
        if self._history is not None:
            sets.append(partial(self._history.set, slots, np.zeros(0, np.int32)))
        return [
            *(encode(stack, features) for stack, features in stacks),
            *starmap(prefill, product(each, PREFILL_ROWS, config.prefill_widths, with_cached)),
            *(decode(adapters) for adapters in together),
            *(decode_drafts(adapters) for adapters in together if self._history is not None),
            *(decode_allowed(adapters) for adapters in together if self._with_grammars),
            *(beam_step(adapters, size) for adapters in together for size in config.beam_batch_sizes),
            *((call, None) for call in sets),
        ]


def _allocate(programs: Programs, config: EngineConfig) -> tuple[KVCache, jax.Array]:
    """Return the KV cache and the table of encoded media, in what the platform holds them as."""
    decoder, dtype = programs.model.config.decoder, jnp.dtype(programs.model.dtype)
    cache_dtype = jnp.dtype(config.cache_dtype or dtype)
    if cache_dtype not in (dtype, jnp.int8):
        raise InputError(
            f"cache_dtype is {cache_dtype.name!r}, but the model computes in {dtype.name}; expected None, "
            f"{dtype.name!r} or 'int8'"
        )
    of_pages, of_features = (held_as(kind, programs.devices[0].platform) for kind in (cache_dtype, dtype))
    cache = programs.place(KVCache.allocate(decoder, config.pages, config.page_tokens, of_pages))
    features = jnp.zeros((config.feature_blocks * BLOCK_SIZE, decoder.embed_dim), of_features)
    return cache, programs.place(features)


def _split_variables(variables: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the variables of the encoders' programs and of the decoder's: a call pays for each array it is given."""
    encoders = {name: x for name, x in variables["params"].items() if name != "decoder"}
    return {"params": encoders}, {name: {"decoder": x["decoder"]} for name, x in variables.items()}


def _adapter_sets(variables: Mapping[str, Any], with_users: bool) -> tuple[list[int], list[set[int]]]:
    """Indices of single adapters, and the sets of them, for which steps are compiled."""
    index = adapter_indices()
    present = [index[name] for name in variables if name in index]
    places = (None, 0) if with_users else (None,)  # without users' adapters, and with them
    each = [row_index(adapter, place) for place in places for adapter in (0, *present)]
    together = [
        {row_index(0, place), *some}
        for place in places for n in range(len(present) + 1) for some in combinations(present, n)
    ]  # fmt: skip
    return each, together


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """Return a function that takes a count and passes on each number up to it, once."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        while done < count:
            done += 1
            if progress is not None:
                progress(done, total)

    return advance


def compile_in_threads(steps: Items[Callable[[], partial]], workers: int, advance: Callable[[int], None]) -> None:
    """Compile calls of jitted functions, several at once; when they are called they are found compiled.

    They are traced and lowered in this thread, whose contexts count, and then compiled without Python's lock.

    Args:
        steps: return a call; one is asked for when it is lowered.
        advance: called with how many are compiled.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="phi4mm-compile")
    try:
        futures: list[Future] = []
        for step in steps:
            call = step()
            jitted: Any = call.func
            futures.append(pool.submit(jitted.lower(*call.args, **call.keywords).compile))
            advance(sum(future.done() for future in futures))
        for count, future in enumerate(futures, 1):
            future.result()
            advance(count)
    finally:
        pool.shutdown(cancel_futures=True)


def default_cache_tokens(config: EngineConfig, programs: Programs, context: int) -> int:
    """Tokens of KV cache that the devices have room for, see `EngineConfig`.

    Raises:
        InputError: there is no room for one page.
    """
    stats = [device.memory_stats() for device in programs.devices]
    if not all(found and "bytes_limit" in found for found in stats):
        return DEFAULT_CACHE_TOKENS
    free = min(found["bytes_limit"] - found["bytes_in_use"] for found in stats)
    decoder, itemsize = programs.model.config.decoder, jnp.dtype(programs.model.dtype).itemsize
    features = config.feature_blocks * BLOCK_SIZE * decoder.embed_dim * itemsize
    of_slot = decoder.vocab_size + (4 * context if config.draft_tokens else 0)  # its tokens, seen and in order
    rest = features + config.slots * of_slot + stack_bytes(programs, config)
    cached = jnp.dtype(config.cache_dtype or programs.model.dtype)
    head = decoder.head_size * cached.itemsize + (4 if cached == jnp.int8 else 0)  # with its scale
    token = 2 * decoder.num_layers * decoder.num_kv_heads * head // programs.shares
    pages = int(0.75 * (free - rest)) // (token * config.page_tokens) - 1  # the scratch page
    if pages < 1:
        raise InputError(
            f"of a device's memory {free / 2**30:.1f} GiB are free, which is no room for a cache; use more devices "
            "(mesh), cache_dtype int8 or fewer feature_blocks, or say what to try with cache_tokens"
        )
    return config.page_tokens * min(pages, config.slots * config.beams * math.ceil(context / config.page_tokens))


def _copy_to_host_async(results: T) -> T:
    """Have results copied to the host as soon as they are there."""
    for array in jax.tree.leaves(results):
        array.copy_to_host_async()
    return results
