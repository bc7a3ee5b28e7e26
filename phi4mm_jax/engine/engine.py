"""The batch engine: continuous batching, with fixed slots over a paged KV cache.

Each round admits waiting requests into free slots, prefills a chunk of some sequences, and decodes all others several
tokens in one compiled program (multi-step decoding). Only then does the host look at the tokens. The host decides, with
numpy; the device computes, with a handful of programs whose shapes never change.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from phi4mm_jax.engine.config import EngineConfig
from phi4mm_jax.engine.core import EngineCore
from phi4mm_jax.engine.model_runner import default_cache_tokens
from phi4mm_jax.engine.output_processor import Update
from phi4mm_jax.engine.request import Completion, Request
from phi4mm_jax.engine.steps import Programs
from phi4mm_jax.engine.user_adapters import UserAdapter
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.batching import Row
from phi4mm_jax.processing.processor import Processor


class Engine:
    """Answers requests, many at a time. Not thread-safe; see `AsyncEngine`.

    Life of a request, from prompt to text:

    1. `submit` puts it into the `RequestQueue`, whose threads run `Processor.row` (chat template, tokens, media) and
       cut its media into encoder inputs (`encoder_cache.media_inputs`).
    2. `EngineCore.round` takes it, once that is done and a slot is free: `Admission.sequence` checks it and makes it a
       `Sequence`, for whose worst case `Scheduler.admit` reserves pages.
    3. Prefill: `Scheduler.next_prefill` looks up its prefix in the cache, picks the next chunk and allocates pages;
       `ModelRunner.prefill` encodes media that are not in the `EncoderCache`, has `inputs.py` build the arrays and
       calls `Programs.prefill` (`steps.py`). The last chunk samples the first token.
    4. Decoding: `Scheduler.next_decode` and `ModelRunner.decode` take all slots up to `EngineConfig.steps` tokens
       further; for beam search `Scheduler.next_beams` and `ModelRunner.beam_step` do.
    5. `OutputProcessor` detokenizes, looks for stop tokens, stop strings and limits, collects an `Update` for the
       caller and in the end has the `Scheduler` free slot and pages.

    Attributes:
        queue: requests that wait for a slot.
        scheduler: sequences in the slots, and the pages of the KV cache.
        runner: the state on the device, and the calls of the compiled steps.

    Raises:
        InputError: sizes that do not fit, or a mesh of several hosts.
    """

    def __init__(self, programs: Programs, variables: Mapping[str, Any], processor: Processor, config: EngineConfig):
        if not jax.tree.leaves(variables)[0].sharding.is_fully_addressable:  # each host's would run other steps
            raise InputError(
                "the model's mesh is of several hosts, and an engine is of one; give a mesh of jax.local_devices(), "
                "and each host its prompts, or use infer.ray"
            )
        config = replace(config, page_size=config.page_tokens * programs.context)  # each device has its part of a page
        if config.cache_tokens is None:
            tokens = default_cache_tokens(config, programs, processor.context)
            config = replace(config, cache_tokens=tokens)
        self.config = config
        self._core = EngineCore(programs, variables, processor, config)
        self._tokenizer = processor.tokenizer
        self.queue, self.scheduler, self.runner = self._core.queue, self._core.scheduler, self._core.runner
        self._outputs = self._core.outputs
        self._next_id = 0

    # ------------------------------------------------------------------------------------------ requests

    def submit(self, request: Request, row: Row | None = None, *, earlier: Counter[bytes] | None = None) -> int:
        """Queue a request; returns the id that its updates carry. Its prompt is processed in the background.

        Without a seed a request samples by its prompt and media: the same again whenever it is submitted. One that
        cannot be served raises nothing: its completion has an `error`.

        Args:
            row: the prompt and its media, where they are processed already.
            earlier: one counter for a group of requests, of which equal ones then sample independently.
        """
        request_id, self._next_id = self._next_id, self._next_id + 1
        try:
            adapters = self.runner.user_adapters.choose(request.adapter)
        except InputError as error:
            self._outputs.reject(request_id, "error", error)
        else:
            self.queue.add(request_id, request, row, earlier, adapters)
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request now; its slot and pages are free at once. The tokens generated so far are its answer."""
        self._core.cancel(request_id)

    def check_adapter(self, adapter: str | None) -> None:
        """Raise InputError for an adapter that no request may ask for."""
        self._core.check_adapter(adapter)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the users' adapters that are loaded."""
        return tuple(self.runner.user_adapters.loaded)

    def read_adapter(self, name: str, folder: str | Path) -> UserAdapter:
        """Read a user's adapter for `load_adapter`, in any thread, while the engine runs.

        Raises:
            InputError, CheckpointError, ConfigError: see `read_user_adapter`.
        """
        return self.runner.user_adapters.read(name, folder, self._tokenizer)

    def load_adapter(self, name: str, folder: str | Path | UserAdapter) -> None:
        """Load a user's adapter, which requests then ask for by its name. Nothing is compiled.

        Args:
            folder: as PEFT or `train.export --adapters-only` has written it, or what `read_adapter` has read.

        Raises:
            InputError: the name cannot be used or is loaded, the rank is too large, or no place is free.
            CheckpointError, ConfigError: the folder cannot be used.
        """
        adapter = folder if isinstance(folder, UserAdapter) else self.read_adapter(name, folder)
        waiting, running = self.queue.adapters, [sequence.adapters for sequence in self.scheduler.resident]
        self.runner.user_adapters.add(adapter, {c.user for c in (*waiting, *running) if c.user is not None})

    def unload_adapter(self, name: str) -> None:
        """Unload a user's adapter. Requests that have it already are answered with it; its place is free after them.

        Raises:
            InputError: there is no such adapter.
        """
        self.runner.user_adapters.remove(name)

    @property
    def idle(self) -> bool:
        return self._core.idle

    def step(self) -> list[Update]:
        """Run one round; return its updates, by slot. A request that cannot be served ends with an error.

        A request that runs alone has an update after every token, others after `EngineConfig.steps`.
        """
        self._core.round(watched=True)
        return self._outputs.take()

    def updates_of(self, ids: Collection[int], watched: bool = False) -> list[Update]:
        """Take the updates of these requests, if need be after a round. Those of others stay.

        Args:
            watched: return after each token where possible (streaming).
        """
        if not (updates := self._outputs.take(ids)):
            self._core.round(watched)
            updates = self._outputs.take(ids)
        return updates

    def run(self, requests: Iterable[Request], ahead: int | None = None) -> Iterator[tuple[int, Completion]]:
        """Answer requests as they come, in the order in which they end.

        Args:
            requests: read as slots become free, and some more whose media are processed meanwhile. Equal ones without
                a seed sample independently.
            ahead: how many more; by default as many as there are slots.

        Yields:
            The request's index in `requests`, and its answer. That of a request that cannot be served has an `error`,
            and nothing is raised: check it, or call `raise_for_error`.
        """
        ahead = self.config.slots if ahead is None else ahead
        incoming = enumerate(requests)
        places: dict[int, int] = {}
        earlier: Counter[bytes] = Counter()
        more = True
        try:
            while more or places:
                while more and len(self.queue) < ahead + self.config.slots - len(self.scheduler.resident):
                    place, request = next(incoming, (None, None))
                    if request is None or place is None:
                        more = False
                    else:
                        places[self.submit(request, earlier=earlier)] = place
                for update in self.updates_of(places):
                    if update.completion is not None:
                        yield places.pop(update.id), update.completion
        finally:
            self._discard(list(places))

    def stream(self, request: Request) -> Iterator[str]:
        """Yield the answer in pieces of whole characters. Closing the iterator cancels the request.

        Raises:
            InputError: the request cannot be served; see `Completion.raise_for_error`.
        """
        request_id, done = self.submit(request), False
        try:
            while not done:
                for update in self.updates_of([request_id], watched=True):
                    done = update.completion is not None
                    if update.completion is not None:
                        update.completion.raise_for_error()
                    if update.text:
                        yield update.text
        finally:
            if not done:
                self._discard([request_id])

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile every program for every shape: no request will have to wait for a compilation.

        May be called while requests are being answered.

        Args:
            progress: called with the number of programs compiled, and of all.
        """
        self.queue.warm_up()
        self.runner.warm_up(progress)

    def _discard(self, ids: Collection[int]) -> None:
        """Cancel requests whose answers nobody waits for."""
        for request_id in ids:
            self.cancel(request_id)
        self._outputs.take(ids)
