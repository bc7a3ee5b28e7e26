"""Sizes of an engine."""

import math
from dataclasses import dataclass, field

import jax

from phi4mm_jax.errors import InputError
from phi4mm_jax.utils.checks import check_positive, check_whole

DEFAULT_CACHE_TOKENS = 32768  # where the memory is not known
PREFILL_ROWS = (4, 1)  # sequences that are prefilled at once
CACHE_DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class EngineConfig:
    """Sizes; all memory is taken at the start.

        model.engine(EngineConfig(slots=16, cache_tokens=65536, cache_dtype="int8"))

    Attributes:
        slots: sequences that are decoded at once.
        cache_tokens: what the KV cache holds, of all sequences together. By default three quarters of what is free of
            each device's memory, at most what the slots can use; 32768 on CPUs, which do not tell.
        page_size: tokens of a page; prompts share whole pages, and prefill at least one. By default 128 on TPUs, whose
            kernel asks for that, and 64 elsewhere, where a short prompt then costs half as much.
        chunk: tokens of a sequence that are prefilled at once, at most; a multiple of the page size.
        steps: tokens that are decoded before the host looks at them.
        cache_dtype: the model's by default, else "int8".
        feature_blocks: of 64 features each: room for encoded media. A crop takes 4, a 40 s chunk of a clip 8.
        beams: the most that a request may ask for. They take no memory but pages, of which a request with n beams comes
            to need as many for its answer as n others.
        top_logprobs: the most likeliest tokens in place of each drawn one that a request may ask for.
        cli: messages name the sizes as the options of a program (`--beams`).
        workers: threads that process prompts and their media: so many slow ones hold up no other.
        media_seconds: that this may take for one request, which else ends with an error.
    """

    slots: int = 8
    cache_tokens: int | None = None
    page_size: int = field(default_factory=lambda: 128 if jax.default_backend() == "tpu" else 64)
    chunk: int = 2048
    steps: int = 8
    cache_dtype: str | None = None
    feature_blocks: int = 512
    beams: int = 1
    top_logprobs: int = 0
    cli: bool = False
    workers: int = 4
    media_seconds: int = 300

    def __post_init__(self):
        sizes = ("slots", "cache_tokens", "page_size", "chunk", "steps", "feature_blocks", "beams")
        for name in (*sizes, "workers", "media_seconds"):
            if name != "cache_tokens" or self.cache_tokens is not None:
                check_positive(name, getattr(self, name))
        check_whole("top_logprobs", self.top_logprobs, 0)
        if self.chunk % self.page_size:
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
    def pages(self) -> int:
        return math.ceil((self.cache_tokens or DEFAULT_CACHE_TOKENS) / self.page_size)

    def prefill_width(self, num_tokens: int) -> int:
        """Width that a chunk is padded to: a page times a power of two, at most `chunk`."""
        pages = math.ceil(num_tokens / self.page_size)
        return min(self.page_size << (pages - 1).bit_length(), self.chunk)

    @property
    def prefill_widths(self) -> list[int]:
        """All widths that chunks are padded to."""
        return sorted({self.prefill_width(n) for n in range(self.page_size, self.chunk + 1, self.page_size)})

    @property
    def beam_batch_sizes(self) -> list[int]:
        """Beams that are extended at once: those of one request, or of as many as there are slots."""
        return sorted({self.beams, self.beams * self.slots}) if self.beams > 1 else []
