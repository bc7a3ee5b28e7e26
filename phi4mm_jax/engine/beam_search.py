"""Beam search on the host, by the rules of `transformers`' `generate(num_beams=n, early_stopping=False)`.

At each step every beam is extended by its likeliest tokens, and the n likeliest of all these are the next beams.
Finished ones are kept aside; the search is over once no beam can beat the worst of n finished ones. With a grammar
(`prefix_allowed_tokens_fn`) a beam is extended by what its own state of it allows.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, Int

from phi4mm_jax.engine.detokenizer import IncrementalDetokenizer
from phi4mm_jax.engine.grammar import GrammarMatcher
from phi4mm_jax.engine.page_allocator import PageAllocator
from phi4mm_jax.engine.request import Completion, FinishReason, Hypothesis
from phi4mm_jax.processing.tokenizer import Tokenizer

_MAX_STOPS = 8


def max_stops(stop_token_ids: Collection[int]) -> int:
    """Maximum number of stop tokens of a beam search: 8, or all of the model's own."""
    return max(_MAX_STOPS, len(stop_token_ids))


@dataclass(frozen=True)
class Beam:
    """A partial answer, or a whole one.

    Attributes:
        total: of the log-probabilities.
        matcher: state of the grammar after the tokens, if there is one.
        stopped: it has ended by a stop token, or with its grammar.
    """

    tokens: tuple[int, ...] = ()
    log_probabilities: tuple[float, ...] = ()
    total: float = 0.0
    matcher: GrammarMatcher | None = field(default=None, compare=False, repr=False)
    stopped: bool = False

    def then(self, token: int, log_probability: float, stop: bool) -> "Beam":
        """Return the beam with one more token, which may be a stop token."""
        matcher = None if stop or self.matcher is None else self.matcher.after(token)
        return Beam(
            (*self.tokens, token), (*self.log_probabilities, log_probability), self.total + log_probability, matcher,
            stop or (matcher is not None and matcher.over),
        )  # fmt: skip


@dataclass(frozen=True)
class Search:
    """State of a beam search.

    Attributes:
        width: number of beams, and of answers.
        limit: maximum number of tokens of an answer.
        length_penalty: the power of its length that divides an answer's log-probability; above 0 it favours long ones.
        stops: tokens that end an answer.
        beams: unfinished ones, all of one length, the likeliest first.
        ended: the best finished ones, the best first.
    """

    width: int
    limit: int
    length_penalty: float
    stops: frozenset[int]
    beams: tuple[Beam, ...] = (Beam(),)
    ended: tuple[Beam, ...] = ()
    over: bool = False

    @property
    def num_output_tokens(self) -> int:
        """Number of tokens of each beam."""
        return len(self.beams[0].tokens) if self.beams else 0

    @property
    def best(self) -> list[Beam]:
        """Best answers so far; before the search is over, unfinished beams among them."""
        going = [] if self.over else [beam for beam in self.beams if beam.tokens]
        return sorted([*self.ended, *going], key=self.score, reverse=True)[: self.width]

    def score(self, beam: Beam) -> float:
        return beam.total / len(beam.tokens) ** self.length_penalty


def advance(
    search: Search, tokens: Int[np.ndarray, "R C"], log_probabilities: Float[np.ndarray, "R C"]
) -> tuple[Search, list[int]]:
    """Extend all beams by a token.

    Args:
        tokens: the likeliest ones after each of the R beams, at least as many as its width and its stop tokens: then
            none is missed that the whole vocabulary would have brought. Those of -inf are not allowed.

    Returns:
        The search, and for each of its beams the index of its parent.
    """
    totals = np.asarray([beam.total for beam in search.beams])[:, None] + log_probabilities.astype(np.float64)
    order = [i for i in np.argsort(-totals, axis=None, kind="stable").tolist() if totals.flat[i] > -np.inf]
    full = search.num_output_tokens + 1 == search.limit
    stops = np.isin(tokens, list(search.stops)).ravel()
    ends = stops | full

    def grown(index: int) -> Beam:
        parent, place = divmod(index, tokens.shape[1])
        log_probability = float(log_probabilities[parent, place])
        return search.beams[parent].then(int(tokens[parent, place]), log_probability, bool(stops[index]))

    extended = [(grown(i), i // tokens.shape[1]) for i in [i for i in order if not ends[i]][: search.width]]
    # As in transformers, a finished beam counts only if it is among the `width` likeliest candidates; a grammar at its
    # end, where all that could follow is a stop token, if it would have been a beam.
    found = [grown(i) for i in order[: search.width] if ends[i]] + [beam for beam, _ in extended if beam.stopped]
    ended = tuple(sorted([*search.ended, *found], key=search.score, reverse=True)[: search.width])
    going = [(beam, parent) for beam, parent in extended if not beam.stopped]
    beams = tuple(beam for beam, _ in going)
    hopeless = len(ended) == search.width and bool(beams) and search.score(beams[0]) <= search.score(ended[-1])
    return replace(search, beams=beams, ended=ended, over=not beams or hopeless), [parent for _, parent in going]


@dataclass
class BeamGroup:
    """Beams of a request, and their pages of the KV cache. The whole pages of the prompt are shared by all.

    Attributes:
        pages: page table of each beam, from the prompt's last, partial page on.
        copies: pages to copy, source and target, before either is written to.
    """

    search: Search
    pages: list[list[int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_pages(self) -> int:
        """Number of distinct pages."""
        return len({page for pages in self.pages for page in pages})

    def start_grammar(self, matcher: GrammarMatcher | None) -> None:
        """Begin the search with the state of a grammar before the first token."""
        self.search = replace(self.search, beams=(Beam(matcher=matcher),))

    def fork(self, allocator: PageAllocator, parents: Sequence[int]) -> None:
        """Give each beam the pages of its parent, the beam that it continues."""
        before, self.pages = self.pages, [list(self.pages[parent]) for parent in parents]
        for pages in self.pages:
            allocator.incref(pages)
        for pages in before:
            allocator.decref(pages)

    def copy_on_write(self, allocator: PageAllocator, allocate: Callable[[], int]) -> None:
        """Give beams that share their last page copies of it, all but the first of them."""
        written: set[int] = set()
        for pages in self.pages:
            if pages[-1] in written:
                source, pages[-1] = pages[-1], allocate()
                allocator.decref([source])
                self.copies.append((source, pages[-1]))
            written.add(pages[-1])

    def release(self, allocator: PageAllocator) -> None:
        for pages in self.pages:
            allocator.decref(pages)
        self.pages, self.copies = [], []

    def completion(
        self, tokenizer: Tokenizer, prompt_tokens: int, reason: FinishReason | None = None, skip_special: bool = False
    ) -> Completion:
        """Return its best answers so far; without a `reason` the best one says why it ended."""
        search = self.search
        found = tuple(
            Hypothesis(
                _text(beam, search, tokenizer, skip_special), list(beam.tokens), search.score(beam),
                beam.log_probabilities, "stop" if beam.stopped else reason or "length",
            )
            for beam in search.best
        )  # fmt: skip
        if not found:
            return Completion("", [], reason or "cancelled", prompt_tokens)
        first = found[0]
        reason = reason or first.finish_reason
        return Completion.of(
            tokenizer, first.text, first.tokens, reason, prompt_tokens, log_probabilities=first.log_probabilities,
            alternatives=found, skip_special_tokens=skip_special,
        )  # fmt: skip


def _text(beam: Beam, search: Search, tokenizer: Tokenizer, skip_special: bool) -> str:
    text = IncrementalDetokenizer(tokenizer, (), skip_special)
    for token in beam.tokens:
        if token not in search.stops:
            text.add(token)
    text.finish()
    return text.text
