"""Requests to the engine, and its answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from phi4mm_jax.adapters import adapter_choices
from phi4mm_jax.engine.grammar import Grammar
from phi4mm_jax.engine.sampling import Sampling
from phi4mm_jax.engine.tool_calls import ToolCall, parse_tool_calls, without_special
from phi4mm_jax.errors import ContextLengthError, InputError, MediaError
from phi4mm_jax.processing.images import check_max_crops
from phi4mm_jax.processing.processor import PromptLike
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.utils.checks import check_positive, check_whole, is_number, is_unicode, is_whole

Draft = Literal["lookup"]
_MAX_PENALTY = 10  # of a length, either way


@dataclass(frozen=True)
class Request:
    """One prompt and how to answer it.

        Request("<|user|><|image_1|>What is this?<|end|><|assistant|>", images=["a.png"], max_new_tokens=64)
        Request([{"role": "user", "content": "Name a colour."}], sampling=Sampling(temperature=0.8), stop=["."])

    Attributes:
        prompt: a raw string with placeholders such as `<|image_1|>`, or a list of chat messages.
        images: PIL images, paths, bytes or arrays.
        audios: (samples, sampling rate), paths or bytes.
        max_new_tokens: maximum number of tokens to generate.
        stop: strings that end the answer; they are not part of its text.
        stop_tokens: ids that end the answer, besides the model's own.
        skip_special_tokens: leave special tokens out of the answer's text, but for those that mark tool calls; stop
            strings are looked for in that text. By default the text has those that are drawn within an answer.
        beams: width of the beam search, which gives as many answers (n-best); 1 is no beam search. Not with sampling or
            stop strings, and only in an engine whose `EngineConfig.beams` allows it.
        length_penalty: the power of its length that divides an answer's log-probability when beams are compared.
        max_crops: maximum number of crops per image; by default the checkpoint's.
        top_logprobs: number of likeliest tokens to give in place of each generated one; at most
            `EngineConfig.top_logprobs`, and none for beam search.
        grammar: what the answer obeys, from its first token on. It may end only where the grammar may, or by a stop
            string, a limit, or an error if no token obeys. Not for beam search.
        adapter: "none" or an adapter's name ("vision", "speech"), whatever the media; by default that of the media.
            Or the name of a user's (`Engine.load_adapter`), which is on top of that of the media; "none+NAME" or
            "speech+NAME" says what it is on top of. It does not change how media are encoded.
        draft: "lookup" guesses the next tokens to be those that followed the last ones before, in the prompt or in the
            answer, and computes several in a step; the answer is the same. It makes copies faster: OCR, extraction,
            corrections, tool calls. Not used with beams or a grammar, and only in an engine whose
            `EngineConfig.draft_tokens` allows it.
        continue_final_message: the chat's last message, the assistant's, is the beginning of the answer.

    Raises:
        InputError: an argument out of range.
    """

    prompt: PromptLike
    images: Sequence[Any] = ()
    audios: Sequence[Any] = ()
    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    beams: int = 1
    length_penalty: float = 1.0
    max_crops: int | None = None
    adapter: str | None = None
    continue_final_message: bool = False
    draft: Draft | None = None
    top_logprobs: int = 0
    grammar: Grammar | None = None
    skip_special_tokens: bool = False

    def __post_init__(self):
        stop = self.stop
        check_positive("max_new_tokens", self.max_new_tokens)
        if not isinstance(stop, Sequence) or isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise InputError(f"stop is {stop!r}; expected a list of non-empty strings")
        if not all(map(is_unicode, stop)):
            raise InputError(f"stop is {stop!r}, which has half a surrogate pair; expected text")
        tokens = self.stop_tokens
        if not isinstance(tokens, Sequence) or isinstance(tokens, str) or not all(is_whole(t) for t in tokens):
            raise InputError(f"stop_tokens is {self.stop_tokens!r}; expected a list of token ids")
        check_positive("beams", self.beams)
        check_whole("top_logprobs", self.top_logprobs, 0)
        penalty = self.length_penalty
        if not is_number(penalty) or not abs(penalty) <= _MAX_PENALTY:
            raise InputError(f"length_penalty is {penalty!r}; expected a number from -{_MAX_PENALTY} to {_MAX_PENALTY}")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise InputError(f"grammar is a {type(self.grammar).__name__}; expected a Grammar")
        if self.beams > 1:
            self._check_beams()
        if self.max_crops is not None:
            check_max_crops("max_crops", self.max_crops)
        for name in ("continue_final_message", "skip_special_tokens"):
            if not isinstance(value := getattr(self, name), bool):
                raise InputError(f"{name} is {value!r:.60}; expected true or false")
        if self.draft is not None and self.draft not in get_args(Draft):
            raise InputError(f"draft is {self.draft!r:.60}; expected None or {' or '.join(map(repr, get_args(Draft)))}")
        if self.adapter is not None and not isinstance(self.adapter, str):
            names = ", ".join(adapter_choices())
            raise InputError(f"adapter is {self.adapter!r:.60}; expected one of {names}, or the name of a user's")

    def _check_beams(self) -> None:
        plain = Sampling()
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            value, expected = getattr(self.sampling, name), getattr(plain, name)
            if value != expected:
                raise InputError(
                    f"{name} is {value} with {self.beams} beams, which draw nothing by chance and go by the model's "
                    f"own probabilities; leave it at {expected}, or ask for 1 beam"
                )
        if self.top_logprobs:
            raise InputError(
                f"top_logprobs is {self.top_logprobs} with {self.beams} beams; ask for none, or for 1 beam"
            )
        if self.stop:
            raise InputError(
                f"stop is {list(self.stop)!r} with {self.beams} beams, which end by tokens only; give stop_tokens, or "
                "ask for 1 beam"
            )


TokenLogprobs = tuple[tuple[int, float], ...]  # tokens and their log-probabilities, the likeliest first
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Hypothesis:
    """One of the answers of a beam search.

    Attributes:
        text: the answer, without stop tokens.
        tokens: the generated ids, a final stop token included.
        score: the sum of the tokens' log-probabilities, divided by their number to the power of the length penalty.
        log_probabilities: of each token.
        finish_reason: see `Completion`.
    """

    text: str
    tokens: list[int]
    score: float
    log_probabilities: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Completion:
    """Answer that was generated for one prompt.

    Attributes:
        text: the answer, without stop tokens; cut before a stop string.
        tokens: the generated ids, a final stop token included.
        finish_reason: "stop" by a stop token or string, or where a grammar is at its end; "length" by max_new_tokens or
            the context, whether a grammar is at its end or not; "cancelled", and "error" for a request that could not
            be served, whose logits became NaN or infinite, or whose grammar came to allow no token.
        prompt_tokens: the prompt's length.
        log_probabilities: of each token, by the model's own distribution, whatever a grammar allows. Their last
            digits depend on the engine's sizes, so they do not count when completions are compared.
        top_logprobs: for each token the likeliest ones in its place, where the request asks for them; like
            log_probabilities.
        error: what was wrong with a request that ended with an error, whose finish reason is "error"; else None. Such
            a completion is returned, not raised: `raise_for_error` raises it.
        error_type: name of the class of that error: "InputError", "MediaError" or "ContextLengthError" for a request
            that cannot be served; "FloatingPointError" for logits that are not finite; that of a library otherwise.
        tool_calls: the functions that the answer calls, by its special tokens; text that spells a call is text.
        content: the text without its tool calls.
        alternatives: of a request with several beams the best answers, as many as beams, the best first; the first is
            what `text` and `tokens` are. Of a cancelled one, what it had so far.
        skip_special_tokens: the request's.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    log_probabilities: tuple[float, ...] = field(default=(), compare=False)
    error: str | None = None
    alternatives: tuple[Hypothesis, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    content: str = ""
    error_type: str | None = None
    top_logprobs: tuple[TokenLogprobs, ...] = field(default=(), compare=False)
    skip_special_tokens: bool = False

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, text: str, tokens: list[int], finish_reason: FinishReason, prompt_tokens: int,
        *, skip_special_tokens: bool = False, **rest: Any,
    ) -> "Completion":  # fmt: skip
        """Return a completion with the tool calls that its tokens have, as far as its text goes."""
        shown = without_special(tokens, tokenizer) if skip_special_tokens else tokens
        content, calls = parse_tool_calls(shown, tokenizer, len(text))
        return cls(
            text, tokens, finish_reason, prompt_tokens, **rest, tool_calls=tuple(calls), content=content,
            skip_special_tokens=skip_special_tokens,
        )  # fmt: skip

    def answers(self, tokenizer: Tokenizer) -> list["Completion"]:
        """Return each of the alternatives as a completion; itself where there are none."""
        skip = self.skip_special_tokens
        made = [
            Completion.of(
                tokenizer, a.text, a.tokens, a.finish_reason, self.prompt_tokens, skip_special_tokens=skip,
                log_probabilities=a.log_probabilities,
            )
            for a in self.alternatives
        ]  # fmt: skip
        return made or [self]

    def raise_for_error(self) -> None:
        """Raise the error of this completion, if it has one.

        Raises:
            InputError: the request was not served, or not to its end; MediaError or ContextLengthError where
                `error_type` says so.
        """
        if self.error is not None:
            raise _ERRORS.get(self.error_type or "", InputError)(self.error)


_ERRORS = {kind.__name__: kind for kind in (InputError, MediaError, ContextLengthError)}
