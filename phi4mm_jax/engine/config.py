"""Sizes of an engine."""

import math
import os
from dataclasses import dataclass

import jax

from phi4mm_jax.errors import InputError
from phi4mm_jax.utils.checks import check_positive, check_whole

DEFAULT_CACHE_TOKENS = 32768  # where the device's memory is unknown
LARGEST_DEFAULT_PAGE = 128  # on TPUs, whose kernel requires that
PREFILL_ROWS = (4, 1)  # sequences that are prefilled at once
DRAFT_TOKENS = 5  # that programs guess in a step, if they are asked for drafts
CACHE_DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine; all memory is allocated at the start.

        model.engine(EngineConfig(slots=16, cache_tokens=65536, cache_dtype="int8"))

    Attributes:
        slots: sequences that are decoded at once (vLLM: max_num_seqs).
        cache_tokens: capacity of the KV cache in tokens, of all sequences together. By default three quarters of each
            device's free memory, at most as much as the slots can use; 32768 on CPUs, whose free memory is unknown.
        page_size: tokens per page (vLLM: block_size); prompts share full pages, and prefill at least one. By default
            128 on TPUs, whose kernel requires that, and 64 elsewhere, where a short prompt then costs half as much;
            the engine sets it, so that a configuration can be made where no device may be touched. On a mesh with
            `context`, each of its devices has that many of every page.
        chunk: maximum number of tokens of a sequence that are prefilled at once; a multiple of the page size.
        steps: tokens that are decoded before the host looks at them (multi-step decoding).
        cache_dtype: the model's by default, else "int8".
        feature_blocks: room for encoded media, in blocks of 64 features. A crop takes 4, a 40 s audio chunk 8.
        beams: maximum number of beams of a request. They take no memory but pages; the answer of a request with n
            beams needs as many as n other answers.
        top_logprobs: maximum number of likeliest tokens per generated token that a request may ask for.
        draft_tokens: maximum number of tokens that are guessed in a step, for requests that ask for drafts; 0, the
            default, is none, and costs nothing. Each step of a round with such a request computes as many more.
        max_adapters: places for adapters that users bring (`Engine.load_adapter`), allocated at the start; 0, the
            default, is none, and costs nothing (vLLM: max_loras).
        max_adapter_rank: the largest rank of theirs, to which the others are padded (vLLM: max_lora_rank).
        cli: messages name the sizes as the options of a program (`--beams`).
        workers: threads that process prompts and their media: up to so many slow ones delay no other.
        compile_workers: programs that `Engine.warm_up` compiles at once. By default as many as there are cores, at most
            16; one after the other where there are one or two.
        media_seconds: limit for the processing of one request's media; past it the request ends with an error.
    """

    slots: int = 8
    cache_tokens: int | None = None
    page_size: int | None = None
    chunk: int = 2048
    steps: int = 8
    cache_dtype: str | None = None
    feature_blocks: int = 512
    beams: int = 1
    top_logprobs: int = 0
    draft_tokens: int = 0
    max_adapters: int = 0
    max_adapter_rank: int = 64
    cli: bool = False
    workers: int = 4
    compile_workers: int | None = None
    media_seconds: int = 300

    def __post_init__(self):
        sizes = ("slots", "chunk", "steps", "feature_blocks", "beams", "max_adapter_rank", "workers", "media_seconds")
        given = [x for x in ("cache_tokens", "page_size", "compile_workers") if getattr(self, x) is not None]
        for name in (*sizes, *given):
            check_positive(name, getattr(self, name))
        for name in ("top_logprobs", "draft_tokens", "max_adapters"):
            check_whole(name, getattr(self, name), 0)
        if self.page_size == 1:
            raise InputError(f"page_size is {self.page_size}; expected at least 2")
        page = self.page_size or LARGEST_DEFAULT_PAGE
        if self.draft_tokens + 1 >= page:
            raise InputError(
                f"draft_tokens is {self.draft_tokens}; expected at most {page - 2}, with pages of {page} tokens"
            )
        if self.page_size is not None and self.chunk % self.page_size:
            raise InputError(f"chunk is {self.chunk}; expected a multiple of the page size of {self.page_size}")
        if self.cache_dtype is not None and self.cache_dtype not in CACHE_DTYPES:
            raise InputError(
                f"cache_dtype is {self.cache_dtype!r}; expected None, for the model's, or one of "
                f"{', '.join(CACHE_DTYPES)}"
            )
        if self.feature_blocks < 16:
            raise InputError(f"feature_blocks is {self.feature_blocks}; expected at least 16")

    def named(self, size: str) -> str:
        """Name of a size in messages."""
        return f"--{size.replace('_', '-')}" if self.cli else f"EngineConfig({size}=...)"

    @property
    def num_compile_workers(self) -> int:
        cores = os.cpu_count() or 1
        return self.compile_workers or (min(cores, 16) if cores > 2 else 1)

    @property
    def page_tokens(self) -> int:
        """Tokens per page, which depend on the device where they are not given; asking for it starts the backend."""
        return self.page_size or (LARGEST_DEFAULT_PAGE if jax.default_backend() == "tpu" else 64)

    @property
    def pages(self) -> int:
        return math.ceil((self.cache_tokens or DEFAULT_CACHE_TOKENS) / self.page_tokens)

    @property
    def decode_width(self) -> int:
        """Maximum number of tokens of a sequence in a round with drafts."""
        return self.steps * (self.draft_tokens + 1)

    def prefill_width(self, num_tokens: int) -> int:
        """Width that a chunk is padded to: a page times a power of two, at most `chunk`."""
        pages = math.ceil(num_tokens / self.page_tokens)
        return min(self.page_tokens << (pages - 1).bit_length(), self.chunk)

    @property
    def prefill_widths(self) -> list[int]:
        """All widths that chunks are padded to."""
        return sorted({self.prefill_width(n) for n in range(self.page_tokens, self.chunk + 1, self.page_tokens)})

    @property
    def beam_batch_sizes(self) -> list[int]:
        """Beams that are extended at once: those of one request, or of as many as there are slots."""
        return sorted({self.beams, self.beams * self.slots}) if self.beams > 1 else []
