"""Drafts: with them an answer is what it is without, in fewer steps."""

import dataclasses
import random
from concurrent.futures import Future, wait
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import golden_cases, media_of
from helpers.marks import fast_are
from helpers.reference import uncached_logits

from phi4mm_jax import InputError
from phi4mm_jax.engine import EngineConfig, Grammar, Request, Sampling, drafts
from phi4mm_jax.engine.drafts import NO_TOKEN, decode_with_drafts, propose, verify
from phi4mm_jax.engine.sequence import SequenceStatus
from phi4mm_jax.engine.step_io import SampledTokens
from phi4mm_jax.mesh import jit_on_mesh

PLAIN = EngineConfig(slots=3, cache_tokens=8192, page_size=64, chunk=256, steps=4)
DRAFTED = dataclasses.replace(PLAIN, draft_tokens=4)
WORDS = ["time", "light", "house", "water", "green", "small"]


def looked_up(tokens: list[int], count: int) -> list[int]:
    """A row's draft: for each n-gram, the longest first, each place before, the latest first."""
    for n in (3, 2, 1):
        wanted = tokens[-n:]
        if len(wanted) < n or NO_TOKEN in wanted:
            continue
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == wanted:
                row = list(tokens)
                for i in range(count):
                    row.append(row[end + i])
                draft = row[len(tokens) :]
                return draft[: draft.index(NO_TOKEN)] if NO_TOKEN in draft else draft
    return []


def test_drafts_are_what_followed_the_longest_latest_match():
    draw = np.random.default_rng(0)
    lengths = np.asarray([*range(1, 33), *draw.integers(1, 65, 96)], np.int32)
    history = draw.integers(0, 9, (128, 64)).astype(np.int32)
    history[draw.random((128, 64)) < 0.05] = NO_TOKEN
    drafts, sizes = jax.jit(lambda h, n: propose(h, n, 5))(history, lengths)
    found = [d[:n].tolist() for d, n in zip(np.asarray(drafts), np.asarray(sizes), strict=True)]
    expected = [looked_up(row[:n].tolist(), 5) for row, n in zip(history, lengths, strict=True)]
    assert found == expected
    assert {len(draft) for draft in expected} == {0, 1, 2, 3, 4, 5}


def test_a_repeated_token_is_drafted_beyond_the_end():
    drafts, sizes = propose(jnp.asarray([[7, 3, 3, 9, 9], [1, 2, 3, 1, 2]]), jnp.asarray([3, 5]), 4)
    assert (drafts.tolist(), sizes.tolist()) == ([[3, 3, 3, 3], [3, 1, 2, 3]], [4, 4])


def test_no_key_is_written_behind_the_last_token():
    """However long the draft: pages are allocated for what the row has left."""
    inputs = SimpleNamespace(lengths=jnp.asarray([4, 4, 4]), with_drafts=jnp.ones(3, bool), max_steps=5)
    history = jnp.full((3, 16), 7)

    def compute(max_end, ids, starts, ends):
        return jnp.maximum(max_end, ends), jnp.zeros((*ids.shape, 1))

    def sample_next(token_seen, logits, rows, last, sampled, left):
        return last, sampled._replace(counts=sampled.counts + rows), left - rows

    sampled, left = SampledTokens(*[jnp.zeros(3, jnp.int32)] * 4), jnp.asarray([1, 2, 9])
    state = jnp.zeros(3, jnp.int32), jnp.zeros((3, 9), bool), history, jnp.full(3, 7), sampled, left
    (max_end, *_), _ = decode_with_drafts(compute, sample_next, state, inputs, 3)
    assert max_end.tolist() == [5, 6, 13]  # the last token of each is not in the cache


def test_tokens_up_to_the_first_that_the_draft_lacks_are_taken():
    """Of rows that idle none; of a row that stops none behind."""
    draw = np.random.default_rng(1)
    drafts, tokens = draw.integers(0, 2, (64, 3)), draw.integers(0, 2, (64, 4))
    sizes, active, stops = draw.integers(0, 4, 64), draw.random(64) < 0.9, draw.integers(0, 9, 64)

    def sample_at(i, rows, taken):
        return jnp.asarray(tokens)[:, i], i < stops, taken + rows

    rows = [jnp.asarray(x) for x in (drafts, sizes, active)]
    found = verify(sample_at, rows[0], rows[1], rows[2], jnp.zeros(64, jnp.int32))
    for row in range(64):
        expected = int(active[row])
        for i in range(min(sizes[row], stops[row]) * expected):
            if tokens[row, i] != drafts[row, i]:
                break
            expected += 1
        assert found[row] == expected


def requests(count, draft, seed=0):
    """Copies, most of them with drafts; greedy and sampled; most cross the LongRoPE boundary of 96."""
    draw = random.Random(seed)
    for i in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.randint(3, 12)))
        sampling = [
            Sampling(),
            Sampling(temperature=0.3, seed=i),
            Sampling(temperature=0.8, top_k=4, repetition_penalty=1.1, seed=i),
            Sampling(repetition_penalty=1.2),
        ][i % 4]
        yield Request(
            f"<|user|>{text} {text} {text}<|end|><|assistant|>", max_new_tokens=draw.randint(1, 70),
            sampling=sampling, draft=draft if draw.random() < 0.8 else None,
        )  # fmt: skip


def answers(model, config, asked):
    engine = model.engine(config)
    return answered(engine, asked), engine.runner


def answered(engine, asked):
    found = dict(engine.run(asked))
    assert engine.scheduler.allocator.num_unreserved == engine.config.pages
    return [found[i] for i in range(len(found))]


@pytest.fixture
def guesses(tiny, monkeypatch):
    """Replaces the lookup: drafts come from these sequences, each so manieth of whose tokens is guessed wrongly."""

    def use(sequences, wrong=7):
        def guess(history, lengths, count):
            known = jnp.stack([jnp.pad(jnp.asarray(s), (0, history.shape[1] - len(s))) for s in sequences])
            same = (known == history[:, None]) | (jnp.arange(history.shape[1]) >= lengths[:, None, None])
            places = lengths[:, None] + jnp.arange(count)
            drafts = known[same.all(-1).argmax(-1)[:, None], places]
            return jnp.where(places % wrong == 0, drafts ^ 1, drafts), jnp.full(len(lengths), count)

        def program(*arguments, **named):
            return tiny.programs._decode_drafts(*arguments, **named)

        monkeypatch.setattr(drafts, "propose", guess)
        static = "width", "candidates", "max_draft"
        compiled = jit_on_mesh(tiny.variables, program, donate_argnums=(1, 2, 3), static_argnames=static)
        monkeypatch.setattr(tiny.programs, "decode_drafts", compiled)

    return use


@pytest.mark.parametrize("cache_dtype", fast_are([None], [None, "int8"]))
def test_answers_are_those_without_drafts(tiny, guesses, cache_dtype):
    """Of right drafts and wrong ones, that end at a stop token, at the limit or at the LongRoPE boundary."""
    plain, _ = answers(tiny, dataclasses.replace(PLAIN, cache_dtype=cache_dtype), requests(24, None))
    encode = tiny.processor.tokenizer.encode
    guesses([[*encode(r.prompt, special=True), *a.tokens] for r, a in zip(requests(24, None), plain, strict=True)])
    engine, asked = tiny.engine(dataclasses.replace(DRAFTED, cache_dtype=cache_dtype)), list(requests(24, "lookup"))
    found, runner = [answer for i in range(0, 24, 3) for answer in answered(engine, asked[i : i + 3])], engine.runner
    for some in (found, answered(engine, asked)):  # none waits for a slot, then most do: rounds ahead and in turn
        assert [(a.tokens, a.text, a.finish_reason) for a in some] == [
            (a.tokens, a.text, a.finish_reason) for a in plain
        ]
    for ours, theirs in zip(found, plain, strict=True):
        np.testing.assert_allclose(ours.log_probabilities, theirs.log_probabilities, atol=1e-3)
    assert sum(a.prompt_tokens < 96 < a.prompt_tokens + len(a.tokens) for a in found) > 3
    assert 2 * runner.num_draft_steps < runner.num_draft_step_tokens < 5 * runner.num_draft_steps


def test_drafted_tokens_are_the_largest_of_logits_without_a_cache(tiny):
    """Greedy ones of the logits, sampled ones with the noise of their place."""
    asked = [r for r in requests(24, "lookup", seed=1) if r.draft and r.sampling.repetition_penalty == 1.0]
    found, _ = answers(tiny, DRAFTED, asked)
    logits = uncached_logits(tiny, tiny.process([r.prompt for r in asked]), [a.tokens for a in found])
    for request, answer, of_row in zip(asked, found, logits, strict=True):
        sampling, scores = request.sampling, np.asarray(of_row)
        if sampling.temperature:
            key = jax.random.fold_in(jax.random.key(sampling.seed), 0)
            noise = [jax.random.gumbel(jax.random.fold_in(key, i), scores.shape[1:]) for i in range(len(scores))]
            scores = scores / sampling.temperature + np.asarray(noise)
        chosen = scores[np.arange(len(answer.tokens)), answer.tokens]
        np.testing.assert_allclose(chosen, scores.max(-1), atol=5e-3)


def test_drafts_beside_a_grammar_and_beams(tiny):
    """While a grammar is beside it, a row has no drafts; afterwards it has them again, of all of its tokens."""
    config = dataclasses.replace(DRAFTED, beams=2)
    (copied,) = [r for r in requests(2, "lookup") if r.sampling == Sampling()]
    copied = dataclasses.replace(copied, max_new_tokens=60)
    others = [
        Request("Say it", max_new_tokens=12, grammar=Grammar.regex("[a-c]{12}"), draft="lookup"),
        Request("Say it", max_new_tokens=4, beams=2, draft="lookup"),
    ]
    found, runner = answers(tiny, config, [copied, *others])
    plain, _ = answers(tiny, dataclasses.replace(PLAIN, beams=2), [
        dataclasses.replace(r, draft=None) for r in (copied, *others)
    ])  # fmt: skip
    assert [(a.tokens, a.text) for a in found] == [(a.tokens, a.text) for a in plain]
    assert runner.num_draft_step_tokens > runner.num_draft_steps > 0


class Dispatched(NamedTuple):
    """A round with drafts of the sequence in the first slot, as it is dispatched."""

    unread: int  # tokens of the rounds before, at most
    length: int  # tokens in the cache, at most
    limit: int  # of `length` as the round ends
    pages: int


def dispatched(monkeypatch, engine):
    """The rounds of the sequence in the first slot that are dispatched from now on."""
    rounds, decode = [], engine.runner.decode

    def record(batch):
        if (sequence := batch.sequences[0]) is not None:
            rounds.append(
                Dispatched(
                    sequence.num_pending_tokens, sequence.num_computed_tokens, int(batch.limits[0]), len(sequence.pages)
                )
            )
        return decode(batch)

    monkeypatch.setattr(engine.runner, "decode", record)
    return rounds


def prompt_of(tiny, count):
    """A prompt of so many tokens."""
    text = "<|user|>time light house<|end|><|assistant|>"
    return text + "<|tag|>" * (count - len(tiny.processor.tokenizer.encode(text, special=True)))


def wait_for_prompts(engine):
    """Have all waiting requests ready for the next step."""
    wait([waiting.processed for waiting in engine.queue._waiting])


def finished(engine, *, each_step=lambda: None):
    """Completions by request, of all steps until the engine is idle."""
    found = {}
    while not engine.idle:
        each_step()
        found |= {update.id: update.completion for update in engine.step() if update.completion}
    return found


def test_a_round_with_drafts_is_dispatched_before_the_last_one_is_read(tiny, guesses, monkeypatch):
    """As if whole drafts were taken, 5 tokens a step; of 3 a step in fact (1 in the first), it has all of its steps."""
    request = Request(prompt_of(tiny, 20), max_new_tokens=41)
    (plain,), _ = answers(tiny, PLAIN, [request])
    guesses([[*tiny.processor.tokenizer.encode(request.prompt, special=True), *plain.tokens]], wrong=3)
    engine = tiny.engine(DRAFTED)
    rounds = dispatched(monkeypatch, engine)
    ((_, found),) = engine.run([dataclasses.replace(request, draft="lookup")])
    assert (found.tokens, found.finish_reason) == (plain.tokens, "length")
    assert rounds == [Dispatched(*unread, 60, 1) for unread in ((1, 20), (20, 40), (20, 50), (18, 60), (6, 60))]


def test_rounds_with_drafts_are_read_in_turn_while_a_request_waits_beside_others(tiny, monkeypatch):
    """Its slot is free once an end is read; one that decodes alone holds nobody up, and is dispatched ahead.

    So is a round beside a request whose media are still processed, as long as a slot is free.
    """
    asked = [Request(prompt_of(tiny, 20 + n), max_new_tokens=60, draft="lookup") for n in range(3)]
    for slots, processed, waits in ((2, 3, True), (1, 3, False), (3, 3, False), (2, 2, True), (3, 2, False)):
        engine = tiny.engine(dataclasses.replace(DRAFTED, slots=slots))
        rounds, ends = dispatched(monkeypatch, engine), []
        for request in asked:
            engine.submit(request)
        wait_for_prompts(engine)
        late = {waiting: waiting.processed for waiting in list(engine.queue._waiting)[processed:]}
        for waiting in late:
            waiting.processed = Future()
        while not ends:
            ends = [update for update in engine.step() if update.completion]
        assert [r.unread > 0 for r in rounds] == [not waits] * len(rounds)
        assert len(rounds) > 1
        for waiting, result in late.items():
            waiting.processed = result
        finished(engine)


@pytest.mark.parametrize("wrong", [1, 3, 1000])
def test_longrope_crossing_inside_a_draft_with_a_later_round_in_flight(tiny, guesses, monkeypatch, wrong):
    """By then the boundary may be reached, or not: the device knows, and stops there."""
    asked = [Request(prompt_of(tiny, 80), max_new_tokens=40), Request(prompt_of(tiny, 91), max_new_tokens=40)]
    plain, _ = answers(tiny, PLAIN, asked)
    encode = tiny.processor.tokenizer.encode
    guesses([[*encode(r.prompt, special=True), *a.tokens] for r, a in zip(asked, plain, strict=True)], wrong)
    engine = tiny.engine(DRAFTED)
    rounds = dispatched(monkeypatch, engine)
    found = dict(engine.run([dataclasses.replace(request, draft="lookup") for request in asked]))
    assert [found[i].tokens for i in range(2)] == [a.tokens for a in plain]
    assert all(len(a.tokens) == 40 for a in plain)
    assert any(r.unread and r.length == r.limit == 96 for r in rounds)
    assert {r.limit for r in rounds} == {96, 119}


def test_pages_of_guessed_tokens_are_reserved(tiny, guesses, monkeypatch):
    """The cache just holds the worst case of those that decode; no draft is right, so that bounds are far ahead."""
    sizes = [((50, 46), (64, 32)), ((20, 44), (33, 31), (60, 68))]  # prompts and answers, of pages of 64 tokens
    asked = [[Request(prompt_of(tiny, n), max_new_tokens=m) for n, m in some] for some in sizes]
    plain = [answers(tiny, PLAIN, some)[0] for some in asked]
    encode = tiny.processor.tokenizer.encode
    both = zip([*asked[0], *asked[1]], [*plain[0], *plain[1]], strict=True)
    guesses([[*encode(r.prompt, special=True), *a.tokens] for r, a in both], wrong=1)
    engine = tiny.engine(dataclasses.replace(DRAFTED, cache_tokens=64 * 4))
    rounds, allocator = dispatched(monkeypatch, engine), engine.scheduler.allocator

    def check():
        assert allocator.num_unreserved >= 0
        for s in engine.scheduler.resident:
            assert min(s.num_reserved_pages, s.num_pending_tokens) >= 0
            assert len(s.pages) + s.num_reserved_pages in (0, s.max_pages)
            if s.output_token_ids and s.num_computed_tokens:
                assert s.num_computed_tokens - s.num_pending_tokens == s.num_prompt_tokens + s.num_output_tokens - 1

    for some, expected in zip(asked, plain, strict=True):
        numbers = [engine.submit(dataclasses.replace(request, draft="lookup")) for request in some]
        found = finished(engine, each_step=check)
        assert [found[i].tokens for i in numbers] == [a.tokens for a in expected]
        assert allocator.num_unreserved == 4
    assert rounds[0] == Dispatched(1, 50, 95, 2)  # 70 tokens at most after 4 steps, which give 4
    assert engine.runner.num_draft_step_tokens == engine.runner.num_draft_steps


@pytest.mark.parametrize("end", ["stop token", "stop string", "cancelled", "length"])
def test_pages_are_reused_while_a_round_with_drafts_writes_to_them(tiny, guesses, monkeypatch, end):
    """A request that comes once another has ended, within a draft and with a round in flight, takes its pages."""
    asked = [Request(prompt_of(tiny, n), max_new_tokens=m) for n, m in ((150, 40), (20, 70), (140, 40))]
    plain, _ = answers(tiny, PLAIN, asked)
    encode = tiny.processor.tokenizer.encode
    guesses([[*encode(r.prompt, special=True), *a.tokens] for r, a in zip(asked, plain, strict=True)], wrong=5)
    tokens, text = plain[0].tokens, plain[0].text
    words = [text[i : i + 3] for i in range(len(text))]
    settings: dict[str, Any] = {
        "stop token": {"stop_tokens": [next(x for i, x in enumerate(tokens) if i > 3 and x not in tokens[:i])]},
        "stop string": {"stop": [next(x for i, x in enumerate(words) if i > 5 and x not in words[:i])]},
        "cancelled": {}, "length": {"max_new_tokens": 12},
    }[end]  # fmt: skip
    engine = tiny.engine(dataclasses.replace(DRAFTED, cache_tokens=64 * 5))  # 3 pages, and 2
    written, prefill = [], engine.runner.prefill

    def record(batch):
        written.extend(zip(batch.sequences, ([*s.pages] for s in batch.sequences), strict=True))
        return prefill(batch)

    monkeypatch.setattr(engine.runner, "prefill", record)
    first = engine.submit(dataclasses.replace(asked[0], draft="lookup", **settings))
    other = engine.submit(dataclasses.replace(asked[1], draft="lookup"))
    wait_for_prompts(engine)
    engine.step()
    sequence, updates = engine.scheduler.slots[0], []
    while sequence.status is not SequenceStatus.FINISHED:
        updates += engine.step()
        if end == "cancelled" and len(sequence.output_token_ids) > 1:
            engine.cancel(first)
    in_flight = engine._core._decoding.batch.sequences[0]
    last = engine.submit(dataclasses.replace(asked[2], draft="lookup"))
    found = {u.id: u.completion for u in (*updates, *engine.step()) if u.completion} | finished(engine)
    assert in_flight is sequence
    pages_of = {s.id: pages for s, pages in reversed(written)}  # as each is prefilled first
    assert sequence.slot == next(s.slot for s, _ in written if s.id == last)
    assert pages_of[first][-1] in pages_of[last]
    assert 1 < len(found[first].tokens) < len(plain[0].tokens)
    assert found[first].tokens == plain[0].tokens[: len(found[first].tokens)]
    assert [found[i].tokens for i in (other, last)] == [a.tokens for a in plain[1:]]
    assert engine.scheduler.allocator.num_unreserved == engine.config.pages


def test_cancelled_with_drafts_in_flight(tiny):
    """At any time: its tokens are the first ones of the whole answer, and others' answers are as without it."""
    asked = [dataclasses.replace(r, draft="lookup", max_new_tokens=60) for r in requests(3, None, seed=3)]
    plain, _ = answers(tiny, PLAIN, [dataclasses.replace(r, draft=None) for r in asked])
    engine, counts = tiny.engine(DRAFTED), set()
    for rounds in range(1, 7):
        first, *others = map(engine.submit, asked)
        updates = [update for _ in range(rounds) for update in engine.step()]
        engine.cancel(first)
        found = {u.id: u.completion for u in updates if u.completion} | finished(engine)
        cancelled = found[first].tokens
        counts.add(len(cancelled))
        assert cancelled == plain[0].tokens[: len(cancelled)]
        assert [found[i].tokens for i in others] == [a.tokens for a in plain[1:]]
        assert engine.scheduler.allocator.num_unreserved == engine.config.pages
    assert len(counts) > 3


def test_a_grammar_that_comes_and_goes_beside_drafts_in_flight(tiny):
    """Beside rows with drafts and without, which are read before the grammar's first token and ahead again after."""
    copied, sampled = (dataclasses.replace(r, max_new_tokens=60) for r in list(requests(2, None)))
    obeying = Request("Say it", max_new_tokens=9, grammar=Grammar.regex("[a-c]{9}"))
    plain, _ = answers(tiny, PLAIN, [copied, sampled, obeying])
    for rounds in range(1, 5):
        engine = tiny.engine(DRAFTED)
        engine.submit(dataclasses.replace(copied, draft="lookup"))
        engine.submit(sampled)
        for _ in range(rounds):
            engine.step()
        assert engine.submit(obeying) == 2
        found = finished(engine)
        assert [found[i].tokens for i in range(3)] == [a.tokens for a in plain]


def test_a_drafted_row_whose_logits_are_not_finite_ends_with_what_it_had(tiny):
    engine, (request, *_) = tiny.engine(DRAFTED), requests(1, "lookup")
    request = dataclasses.replace(request, max_new_tokens=70, draft="lookup")
    engine.submit(request)
    updates = engine.step()
    pages, cache = engine.scheduler.slots[0].pages, engine.runner.kv_cache
    engine.runner.kv_cache = cache._replace(v=cache.v.at[:, pages].set(np.nan))
    while not engine.idle:
        updates += engine.step()
    (bad,) = (u.completion for u in updates if u.completion)
    (plain,), _ = answers(tiny, PLAIN, [dataclasses.replace(request, draft=None)])
    assert bad.finish_reason == "error"
    assert "not finite" in bad.error
    assert 0 < len(bad.tokens) < len(plain.tokens)
    assert bad.tokens == plain.tokens[: len(bad.tokens)]


@pytest.mark.slow
def test_drafts_with_media_and_top_logprobs(tiny, goldens):
    config = dataclasses.replace(DRAFTED, top_logprobs=3)
    cases = [c for c in golden_cases() if c["tokens"] < 100 or c["name"] == "vision"]
    asked = [
        Request(
            c["prompt"], **{kind: of_row[0] for kind, of_row in media_of(c).items()}, top_logprobs=3, draft="lookup",
            max_new_tokens=len(goldens[f"{c['name']}.generated"]),
        )
        for c in cases
    ]  # fmt: skip
    found, _ = answers(tiny, config, asked)
    for case, answer in zip(cases, found, strict=True):
        assert answer.tokens == goldens[f"{case['name']}.generated"].tolist(), case["name"]
        assert [top[0][0] for top in answer.top_logprobs] == answer.tokens  # greedy: the likeliest
        assert [top[0][1] for top in answer.top_logprobs] == pytest.approx(answer.log_probabilities, abs=1e-6)


def test_bad_drafts_are_named(tiny):
    with pytest.raises(InputError, match="draft is 'other'; expected None or 'lookup'"):
        Request("a", draft="other")
    with pytest.raises(InputError, match="page_size is 1; expected at least 2"):
        EngineConfig(page_size=1)
    with pytest.raises(InputError, match="draft_tokens is 63; expected at most 62, with pages of 64 tokens"):
        EngineConfig(page_size=64, draft_tokens=63)
    ((_, answer),) = tiny.engine(PLAIN).run([Request("a", draft="lookup")])
    assert answer.finish_reason == "error"
    assert "the engine guesses no tokens; leave it out, or allow it with EngineConfig(draft_tokens=...)" in answer.error
