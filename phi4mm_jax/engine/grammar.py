"""Grammars that answers obey (structured output), by llguidance: which tokens may come next."""

import copy
import json
import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from jaxtyping import Int

from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.utils.checks import is_unicode
from phi4mm_jax.utils.strict_json import parse_json

T = TypeVar("T")
Kind = Literal["json_schema", "regex", "choice", "lark"]

_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_BITS = 32  # of a mask's words
_MAX_LENGTH = 65536  # characters of a text: llguidance goes as deep as a chain of definitions, which a stack bounds
_STACK = 256 << 20  # bytes, for ten times such a chain
_stack_size_lock = threading.Lock()  # the size is one for all threads that are made


@dataclass(frozen=True)
class Grammar:
    r"""A language that a whole answer is in.

        Grammar.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]})
        Grammar.regex(r"\d{4}-\d{2}-\d{2}")
        Grammar.choice(["yes", "no"])
        Grammar.lark('start: "a"+ <|tag|>')

    Attributes:
        kind: what the text is.
        text: a JSON schema; a regular expression in Rust's syntax, which has no look-around, for the whole answer; a
            JSON list of answers; or a grammar in llguidance's dialect of Lark, in which `<|name|>` is a special token.

    Raises:
        InputError: the text is not valid or too long, has a keyword that cannot be honoured, or llguidance is not
            installed.
    """

    kind: Kind
    text: str

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise InputError(f"grammar is of kind {self.kind!r:.60}; expected one of {', '.join(get_args(Kind))}")
        if not isinstance(self.text, str):
            raise InputError(f"grammar is a {self.kind} as {type(self.text).__name__}; expected its text")
        if (problem := _problem(self.kind, self.text)) is not None:
            raise InputError(f"grammar is not a valid {self.kind}: {problem}")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> "Grammar":
        """JSON that obeys a schema, which may be text."""
        return cls("json_schema", schema if isinstance(schema, str) else _dumped("json_schema", schema))

    @classmethod
    def json_object(cls) -> "Grammar":
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """Text that a regular expression matches as a whole."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, answers: Sequence[str]) -> "Grammar":
        """One of several answers."""
        return cls("choice", _dumped("choice", answers if isinstance(answers, str) else list(answers)))

    @classmethod
    def lark(cls, text: str) -> "Grammar":
        """Text of a context-free grammar."""
        return cls("lark", text)

    @classmethod
    def of(cls, values: Any) -> "Grammar":
        """Grammar of an object with one key, as lines of a batch have it: {"regex": "[0-9]+"}."""
        kinds = get_args(Kind)
        if not isinstance(values, Mapping) or len(values) != 1 or next(iter(values)) not in kinds:
            raise InputError(f"grammar is {values!r:.80}; expected an object with one of {', '.join(kinds)}")
        ((kind, value),) = values.items()
        if kind in ("json_schema", "choice") and not isinstance(value, str):
            value = _dumped(kind, value)
        return cls(kind, value)


def _dumped(kind: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"grammar is not a valid {kind}: {error}") from None


def _guidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise InputError("grammar needs llguidance, which is not installed; pip install '.[grammar]'") from None
    return llguidance


def is_installed() -> bool:
    """Return whether grammars can be used; does not import the library, which takes a while."""
    return find_spec("llguidance") is not None


@lru_cache(256)
def _problem(kind: Kind, text: str) -> str | None:
    """Say why a grammar cannot be used."""
    guidance = _guidance()
    if len(text) > _MAX_LENGTH:
        return f"it has {len(text)} characters; expected {_MAX_LENGTH} at most"
    if not is_unicode(text):
        return "it has half a surrogate pair; expected text"
    try:
        form = _compiled(kind, text)
        failed, messages = _with_deep_stack(lambda: guidance.LLMatcher.validate_grammar_with_warnings(form))
    except (ValueError, RecursionError) as error:
        return _one_line(str(error))
    return _one_line(messages[0]) if failed else None


def _compiled(kind: Kind, text: str) -> str:
    """Return the form that matchers take.

    Raises:
        ValueError: the text is not JSON where it should be, or no list of answers.
    """
    matcher = _guidance().LLMatcher
    if kind == "json_schema":
        return matcher.grammar_from_json_schema(json.dumps(on_one_line(parse_json(text))))
    if kind == "regex":
        return matcher.grammar_from_regex(text)
    if kind == "choice":
        answers = parse_json(text)
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise ValueError("expected a list of answers, each a string")
        return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(a, ensure_ascii=False) for a in answers))
    return matcher.grammar_from_lark(text)


def on_one_line(schema: Any) -> Any:
    """Return a schema of JSON on one line, with a space or none behind commas and colons, unless it says otherwise.

    Where whitespace is free, a model may write little else.
    """
    if schema is True:
        schema = {}  # the same
    if not isinstance(schema, Mapping) or not isinstance(own := schema.get("x-guidance", {}), Mapping):
        return schema
    if "whitespace_flexible" in own or "whitespace_pattern" in own:
        return schema
    return {**schema, "x-guidance": {**_ONE_LINE, **own}}


def _with_deep_stack(work: Callable[[], T]) -> T:
    """Run what may recurse deeply, and would end the process beyond its stack."""
    found: list[T] = []
    with _stack_size_lock:
        before = threading.stack_size(_STACK)
        thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
        thread.start()
        threading.stack_size(before)
    thread.join()
    return found[0]


def _one_line(message: str) -> str:
    """Return the cause that llguidance gives, without its state and the excerpt of the grammar."""
    cause = " ".join(re.split(r"<state>|\n +\d+ \|", message)[0].split())[:300]
    return cause if " " in cause else "no token obeys it"  # else the name of a state


class GrammarMatcher:
    """State of a grammar within one answer.

    Attributes:
        error: why no token can come next, where none can; None otherwise.
        over: the grammar is at its end, where nothing but a stop token may follow.
    """

    def __init__(self, matcher: Any, num_words: int, stop_tokens: Iterable[int]):
        self._matcher, self._stop_tokens = matcher, [t for t in stop_tokens if 0 <= t < num_words * _BITS]
        self._mask = np.zeros(num_words, np.int32)
        self._is_current = False  # whether the mask is that of the next token
        self.error: str | None = None

    def allowed(self) -> Int[np.ndarray, " W"]:
        """Return the tokens that may come next, a bit each; stop tokens where the answer may end."""
        if not self._is_current:
            self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
            self._is_current = True
            if self._matcher.is_error():
                self.error = _one_line(self._matcher.get_error())
                self._mask[:] = 0  # it allows to end here
            elif self._stop_tokens and self._matcher.is_accepting():
                bits = self._mask.view(np.uint32)
                for token in self._stop_tokens:
                    bits[token // _BITS] |= np.uint32(1 << token % _BITS)
            if not self._mask.any():
                self.error = self.error or "no token obeys it"
        return self._mask

    def after(self, token: int) -> "GrammarMatcher":
        """Return the state after a token that is allowed; this one stays as it is."""
        forked = copy.copy(self)
        forked._matcher, forked._mask = self._matcher.deep_copy(), self._mask.copy()
        forked.accept(token)
        return forked

    def accept(self, token: int) -> None:
        """Take the next token of the answer, one that is allowed."""
        self._is_current = False
        self._matcher.consume_token(token)

    @property
    def over(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()


def start_matcher(
    grammar: Grammar, tokenizer: Tokenizer, vocab_size: int, stop_token_ids: Collection[int],
    stop_tokens: Collection[int] = (),
) -> GrammarMatcher:  # fmt: skip
    """Return the state of a grammar before the first token, whose mask is computed.

    Args:
        vocab_size: of the model's logits.
        stop_token_ids: the model's own, which end an answer.
        stop_tokens: further ones.

    Raises:
        InputError: it names a special token that the tokenizer lacks, or no answer obeys it.
    """
    guidance = _guidance()
    tokens = _ll_tokenizer(tokenizer, vocab_size, tuple(stop_token_ids))
    form = _compiled(grammar.kind, grammar.text)
    matcher = _with_deep_stack(lambda: guidance.LLMatcher(tokens, form, log_level=0))
    found = GrammarMatcher(matcher, num_words(vocab_size), stop_tokens)
    found.allowed()
    if found.error is not None:
        raise InputError(f"grammar is not a {grammar.kind} that an answer can obey: {found.error}")
    return found


def num_words(vocab_size: int) -> int:
    """Number of int32 words of a mask."""
    return -(-vocab_size // _BITS)


@lru_cache(2)
def _ll_tokenizer(tokenizer: Tokenizer, vocab_size: int, stop_token_ids: tuple[int, ...]) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, stop_token_ids)), vocab_size,
                       list(stop_token_ids))  # fmt: skip


class _Vocabulary:
    """A tokenizer as llguidance wants one."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_token_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self.eos_token_id = stop_token_ids[0]
        self.tokens = [tokenizer.decode_bytes([token]) for token in range(vocab_size)]
        self.special_token_ids = sorted(tokenizer.control_tokens)

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="replace") if isinstance(text, bytes) else text)
