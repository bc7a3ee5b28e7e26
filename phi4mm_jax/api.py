"""Public API: `load` a checkpoint, then `process`, `logits`, `generate`."""

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from phi4mm_jax.adapters import ADAPTERS, used_collections
from phi4mm_jax.batch import Batch
from phi4mm_jax.checkpoint.contents import (
    AdaptersFrom,
    adapters_line,
    folder_adapters,
    read_config,
    taken_line,
    with_adapters,
)
from phi4mm_jax.checkpoint.hub import local_folder
from phi4mm_jax.checkpoint.load import load_variables, open_checkpoint
from phi4mm_jax.checkpoint.peft import PeftAdapter, adapter_folders
from phi4mm_jax.checkpoint.tensor_types import UNUSED
from phi4mm_jax.checkpoint.unused_settings import unused_of_adapter, unused_settings
from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.engine import Completion, Engine, EngineConfig, Grammar, Hypothesis, Programs, Request, Sampling
from phi4mm_jax.engine.config import DRAFT_TOKENS
from phi4mm_jax.engine.encoder_cache import media_inputs
from phi4mm_jax.engine.request import Draft
from phi4mm_jax.errors import InputError
from phi4mm_jax.kernels.cpu import widen_int4
from phi4mm_jax.mesh import jit_on_mesh, on_one_cpu, shardings
from phi4mm_jax.model import Phi4MM
from phi4mm_jax.model.layers import unstack_layers
from phi4mm_jax.model.lora import merged
from phi4mm_jax.model.phi4mm import abstract_variables
from phi4mm_jax.processing.batching import Row
from phi4mm_jax.processing.processor import Processor, PromptLike
from phi4mm_jax.quantization import (
    Weights,
    check_weights,
    quantize_variables,
    quantized_abstract,
    stored_weights,
)
from phi4mm_jax.training.param_filter import not_quantized
from phi4mm_jax.utils.checks import is_whole
from phi4mm_jax.utils.compilation import keep_compiled_by_default

_log = logging.getLogger(__name__)
DType = Literal["float32", "bfloat16"]
MediaLists = Sequence[Sequence[Any] | None]
_MAX_SLOTS = 8  # of `generate`; an engine may have more


def load(
    path: str | Path,
    dtype: DType | Any = "bfloat16",
    mesh: Mesh | None = None,
    *,
    weights: Weights | None = None,
    trainable: Sequence[str] = (),
    adapters: Mapping[str, str | Path] | None = None,
    adapters_from: AdaptersFrom | None = None,
    fresh_adapters: bool = False,
    merge: str | None = None,
    scan: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> "Model":
    """Load a checkpoint folder.

    Programs that are compiled from now on are kept for the next start, in the user's cache, unless jax is configured
    otherwise (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE).

    Args:
        path: a folder in either published layout (config.json, the safetensors shards, the tokenizer's files) or a
            converted one; or a repository on the Hub, "org/name", which is downloaded.
        dtype: of parameters and activations: "float32" or "bfloat16", or that of numpy or jax.
        weights: quantise the linear maps of all three stacks, to "int8" or "int4" (see `phi4mm_jax.quantization`); by
            default as they are stored.
        trainable: patterns of parameters that `weights` leaves in `dtype`, since they will be trained, as a recipe has
            them (see `phi4mm_jax.training.param_filter`).
        mesh: the devices to shard the parameters over (see `phi4mm_jax.mesh`); by default the first device.
        adapters: PEFT folders, or exports of `train.export --adapters-only`, whose adapters are added to the
            checkpoint's own, or take the place of those of the same names: {"speech": FOLDER}.
        adapters_from: where adapters come from in the original layout, which has them in its shards and in the folders
            vision-lora and speech-lora: "shards" or "folders". By default from a folder where it differs from the
            shards, as after fine-tuning, which is logged; see `checkpoint.contents.folder_adapters`.
        fresh_adapters: accept an adapter whose B matrices are all zero, as an untrained one's are.
        merge: merge this adapter ("vision", "speech") into the weights, and drop all: prompts of its modality are
            answered as before, without the adapter's cost; others are errors.
        scan: whether the decoder's layers are one loop over stacked parameters, or unrolled ("layers_0", ...), and on
            one CPU those of the encoders with them. The loop compiles faster, but XLA cuts each layer's parameters out
            of the stack at every call.
        progress: called with the bytes of parameters read so far, and of all.

    Raises:
        CheckpointError: a file or tensor is missing, extra, misshapen or unreadable; the message names it.
        ConfigError: config.json asks for something unsupported.
        InputError: an unknown dtype, no such adapter to replace or to merge, nothing to quantise beside `trainable`, or
            something quantised among it.
    """
    dtype = _dtype_name(dtype)
    check_weights(weights)
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path is a {type(path).__name__}; expected the checkpoint's folder")
    keep_compiled_by_default()
    path = local_folder(path)
    own = read_config(path)
    opened = cache(partial(open_checkpoint, path, own))
    given = [PeftAdapter(folder, kind, own) for kind, folder in adapter_folders(adapters).items()]
    if newer := folder_adapters(path, opened, own, adapters_from, [adapter.kind for adapter in given]):
        _log.warning("%s", taken_line(path, newer))
    given += newer
    config = with_adapters(own, given)
    if merge is not None and merge not in config.loras:
        found = list(config.loras)
        raise InputError(f"merge is {merge!r}; expected None or one of this checkpoint's adapters: {found}")
    if (line := adapters_line(path, config, given)) is not None:
        _log.warning("%s", line)
    processor = Processor.from_folder(path, config)
    beside = (line for adapter in given for line in unused_of_adapter(adapter.folder, processor.tokenizer))
    for line in (*unused_settings(path, config, processor.tokenizer), *beside):
        _log.warning("%s", line)
    abstract = None if mesh is None else abstract_variables(Phi4MM(config))  # a trace of the model: seconds
    stored = stored_weights(opened().parameters)
    if stored is not None and (merge is not None or weights not in (None, stored)):
        asked = f"merge={merge!r}" if merge is not None else f"weights={weights!r}"
        raise InputError(f"{path}: its weights are {stored}, so {asked} is not possible; use what it was made from")
    at_load = None if merge else weights  # an adapter is merged into floats
    floats: set[tuple[str, ...]] = set()
    if trainable:
        parameters = {p: x for p, x in opened().parameters.items() if p[0] != UNUSED}
        floats = not_quantized(parameters | {p: x for a in given for p, x in a.parameters.items()}, trainable, weights)
    if abstract is not None and (kind := stored or at_load) is not None:
        abstract = quantized_abstract(abstract, kind, floats)
    places = None if abstract is None else shardings(abstract, mesh)
    variables = load_variables(
        path, opened(), own, dtype, places, weights=at_load, floats=floats, adapters=given,
        fresh_adapters=fresh_adapters, progress=progress,
    )  # fmt: skip
    if merge is not None:
        variables = merged(variables, ADAPTERS[merge].collection, config.loras[merge].scale)
        if weights is not None:
            variables = quantize_variables(variables, weights, floats)
        config = dataclasses.replace(config, loras={})
        processor = Processor(config, processor.tokenizer, processor.dynamic_hd, processor.context, merge)
    by_cpu = mesh is None and on_one_cpu()
    scan_encoders = scan or not by_cpu
    if not scan_encoders:
        variables = unstack_layers(variables)
    elif not scan:
        for collection in variables.values():
            collection["decoder"] = unstack_layers(collection["decoder"])
    if by_cpu:
        variables = widen_int4(variables)
    module = Phi4MM(config, jnp.dtype(dtype), scan, scan_encoders)
    return Model(module, variables, processor)


def _dtype_name(dtype: Any) -> DType:
    try:
        name = repr(dtype) if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in ("float32", "bfloat16"):
        raise InputError(f"dtype is {name:.60}; expected 'float32' or 'bfloat16'")
    return name


class Model:
    """A loaded model: the network, its variables and the processor of its inputs.

    Attributes:
        module: the Linen module; `module.apply(variables, batch)` is the pure function behind `logits`.
        variables: "params", and each adapter's parameters in its collection: "lora_vision", "lora_speech".
        processor: turns prompts into batches; has the tokenizer.
    """

    def __init__(self, module: Phi4MM, variables: dict[str, Any], processor: Processor):
        self.module, self.variables, self.processor = module, variables, processor
        self._logits = jit_on_mesh(variables, module.apply)
        self._last_engine: Engine | None = None

    @property
    def config(self) -> Phi4MMConfig:
        return self.module.config

    def process(
        self,
        prompts: Sequence[PromptLike],
        images: MediaLists | None = None,
        audios: MediaLists | None = None,
        *,
        max_crops: int | None = None,
        continue_final_message: bool = False,
    ) -> Batch:
        """Return prompts, images and audio as a static-shaped batch; see `Processor.__call__`."""
        return self.processor(prompts, images, audios, max_crops, continue_final_message=continue_final_message)

    def logits(self, batch: Batch) -> Float[Array, "B T V"]:
        """Return the float32 logits of every position; those past a row's length are meaningless.

        Raises:
            InputError: the batch is not one that `process` made.
        """
        if not isinstance(batch, Batch):
            raise InputError(f"batch is a {type(batch).__name__}; expected what process(prompts) returns")
        return self._logits(self._variables_for(batch), batch)

    def generate(
        self,
        prompts: Sequence[PromptLike],
        images: MediaLists | None = None,
        audios: MediaLists | None = None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        beams: int = 1,
        length_penalty: float = 1.0,
        n: int = 1,
        adapter: str | None = None,
        logprobs: bool = True,
        max_crops: int | None = None,
        continue_final_message: bool = False,
        grammar: Grammar | None = None,
        draft: Draft | None = None,
    ) -> list[Completion]:
        """Answer the prompts, all in one batch, in their order.

        Args:
            prompts: one per row: a raw string with placeholders such as `<|image_1|>`, or a list of chat messages.
            images: for each row a list of images, in any form that `Processor.__call__` takes.
            audios: for each row a list of clips, likewise.
            max_new_tokens: maximum number of tokens to generate per row.
            temperature: 0 is greedy.
            top_k: sample from this many likeliest tokens; 0 from all.
            top_p: sample from the fewest tokens whose probabilities reach this.
            min_p: drop tokens less likely than this fraction of the likeliest's probability.
            repetition_penalty: divides positive logits of tokens that the row has, and multiplies negative ones.
            seed: of the sampling. By default each row is seeded by its prompt and media: the same again in any other
                call, while equal prompts sample independently. A given seed is that of every row, so that rows with
                different prompts have the same noise.
            stop: strings that end an answer; they are not part of its text.
            stop_tokens: ids that end an answer, besides the model's own.
            beams: width of the beam search; the answers are the completion's `alternatives`.
            length_penalty: see `Request`.
            n: number of sampled answers per row, the completion's `alternatives`; the first is its own.
            adapter: "none" or an adapter's name ("vision", "speech") for all rows; by default each has that of its
                media.
            logprobs: whether completions have the log-probabilities of their tokens.
            max_crops: maximum number of crops per image, see `Processor.__call__`.
            continue_final_message: the last message of each chat, the assistant's, is the beginning of its answer.
            grammar: what all answers obey; see `Request`.
            draft: "lookup" makes copies faster, and changes no answer; see `Request`.

        Raises:
            InputError: a prompt, medium or argument that cannot be used.
        """
        if isinstance(prompts, Batch):
            raise InputError("prompts is a Batch; give generate the prompts and media themselves")
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        earlier: Counter[bytes] | None = Counter() if seed is None else None
        if not is_whole(n, 1):
            raise InputError(f"n is {n!r:.60}; expected a positive whole number")
        if n > 1 and (beams != 1 or temperature == 0):
            raise InputError(f"n is {n}, which draws by chance; give a temperature above 0, and 1 beam")
        each = self.processor.rows(
            prompts, images, audios, max_crops, continue_final_message=continue_final_message, adapter=adapter
        )
        rows = [row for row in each for _ in range(n)]
        requests = [
            Request(
                "",
                max_new_tokens=max_new_tokens,
                sampling=dataclasses.replace(sampling, stream=stream),
                stop=stop,
                stop_tokens=stop_tokens,
                beams=beams,
                length_penalty=length_penalty,
                adapter=adapter,
                grammar=grammar,
                draft=draft,
            )
            for stream in (_streams(rows, self.config) if seed is not None else [None] * len(rows))
        ]
        full = [i for i, row in enumerate(each) if len(row.tokens) >= self.processor.context]
        if full:
            raise InputError(
                f"prompt {full[0]} fills the context of {self.processor.context}, with no room for an answer; "
                "shorten it"
            )
        sizes = {"beams": int(beams), "draft_tokens": 0 if draft is None else DRAFT_TOKENS}
        engine = self._engine_for(rows, requests[0].max_new_tokens, sizes)
        engine.check_adapter(adapter)
        self._last_engine = None  # an interrupted engine is not used again
        numbers = [engine.submit(request, row, earlier=earlier) for request, row in zip(requests, rows, strict=True)]
        answers: dict[int, Completion] = {}
        while len(answers) < len(numbers):
            answers |= {u.id: u.completion for u in engine.updates_of(set(numbers)) if u.completion is not None}
        self._last_engine = engine
        found = [answers[number] for number in numbers]
        found = found if n == 1 else [_together(found[i : i + n]) for i in range(0, len(found), n)]
        return found if logprobs else [_without_logprobs(completion) for completion in found]

    def engine(self, config: EngineConfig | None = None) -> Engine:
        """Return an engine for many requests; see `phi4mm_jax.engine`."""
        return Engine(self.programs, self.variables, self.processor, config or EngineConfig())

    @cached_property
    def programs(self) -> Programs:
        """Compiled steps, which all engines of the model share."""
        return Programs(self.module, self.variables)

    def _engine_for(self, rows: Sequence[Row], max_new_tokens: int, sizes: Mapping[str, Any]) -> Engine:
        """Return the engine of the last call if it has room for this one, and the same sizes, else a new one."""
        slots = min(1 << (len(rows) - 1).bit_length(), _MAX_SLOTS)
        page = EngineConfig().page_tokens
        lengths = sorted(min(len(row.tokens) + max_new_tokens, self.processor.context) for row in rows)
        pages = sizes["beams"] * sum(-(-length // page) for length in lengths[-slots:])
        last = self._last_engine
        wanted: dict[str, Any] = {"slots": slots, **sizes}
        same = last is not None and {name: getattr(last.config, name) for name in wanted} == wanted
        if last is None or not same or last.config.pages < pages:
            self._last_engine = None  # its memory is free before the next takes its own
            tokens = page * (1 << (pages - 1).bit_length())
            self._last_engine = last = self.engine(EngineConfig(cache_tokens=tokens, **wanted))
        return last

    def _variables_for(self, batch: Batch) -> dict[str, Any]:
        """Return the variables without the adapters that no row uses, which then cost nothing."""
        return used_collections(self.variables, set(np.unique(batch.adapters).tolist()))


def _together(drawn: Sequence[Completion]) -> Completion:
    """Return one completion of all answers that were sampled for a prompt."""
    found = tuple(
        Hypothesis(
            c.text, c.tokens, float(np.mean(c.log_probabilities or (0.0,))), c.log_probabilities, c.finish_reason
        )
        for c in drawn
    )
    return dataclasses.replace(drawn[0], alternatives=found)


def _without_logprobs(completion: Completion) -> Completion:
    others = tuple(dataclasses.replace(found, log_probabilities=()) for found in completion.alternatives)
    return dataclasses.replace(completion, log_probabilities=(), alternatives=others)


def _streams(rows: Sequence[Row], config: Phi4MMConfig) -> list[int]:
    """Return per row the number of rows before it with the same prompt, so that equal prompts sample independently."""
    texts = Counter(row.tokens.tobytes() for row in rows)
    earlier: Counter[Any] = Counter()
    streams = []
    for row in rows:
        prompt: Any = row.tokens.tobytes()
        if texts[prompt] > 1:  # only then are their media looked at
            prompt = prompt, media_inputs(row, config).spans
        streams.append(earlier[prompt])
        earlier[prompt] += 1
    return streams
