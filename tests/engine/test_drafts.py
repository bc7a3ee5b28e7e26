"""Drafts: with them an answer is what it is without, in fewer steps."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import golden_cases, media_of
from helpers.marks import fast_are
from helpers.reference import uncached_logits

from phi4mm_jax import InputError
from phi4mm_jax.engine import EngineConfig, Grammar, Request, Sampling, drafts
from phi4mm_jax.engine.drafts import NO_TOKEN, propose, verify
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
    found = dict(engine.run(asked))
    assert engine.scheduler.allocator.num_unreserved == engine.config.pages
    return [found[i] for i in range(len(found))], engine.runner


@pytest.fixture
def guesses(tiny, monkeypatch):
    """Replaces the lookup: drafts come from these sequences, every seventh of whose tokens is guessed wrongly."""

    def use(sequences):
        def guess(history, lengths, count):
            known = jnp.stack([jnp.pad(jnp.asarray(s), (0, history.shape[1] - len(s))) for s in sequences])
            same = (known == history[:, None]) | (jnp.arange(history.shape[1]) >= lengths[:, None, None])
            places = lengths[:, None] + jnp.arange(count)
            drafts = known[same.all(-1).argmax(-1)[:, None], places]
            return jnp.where(places % 7 == 0, drafts ^ 1, drafts), jnp.full(len(lengths), count)

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
    found, runner = answers(tiny, dataclasses.replace(DRAFTED, cache_dtype=cache_dtype), requests(24, "lookup"))
    assert [(a.tokens, a.text, a.finish_reason) for a in found] == [(a.tokens, a.text, a.finish_reason) for a in plain]
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
