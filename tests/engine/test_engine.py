"""The engine: what a request is answered depends on nothing but the request."""

import dataclasses
import os
import random
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cases import golden_cases, media_of
from helpers.compilations import compilations_since, count_compilations
from helpers.marks import fast_are
from helpers.paths import TINY
from helpers.reference import uncached_logits
from PIL import Image
from scipy.special import log_softmax

import phi4mm_jax
from phi4mm_jax import InputError
from phi4mm_jax.batch import NO_MEDIA, Batch
from phi4mm_jax.engine import EngineConfig, Grammar, Request, Sampling
from phi4mm_jax.engine import encoder_cache as media
from phi4mm_jax.engine.detokenizer import IncrementalDetokenizer
from phi4mm_jax.engine.page_allocator import PageAllocator, page_hashes
from phi4mm_jax.kernels import gpu
from phi4mm_jax.kernels.pages import as_cached
from phi4mm_jax.model.kv_cache import KVCache, cached_inputs, fill

CASES = golden_cases()
SMALL = EngineConfig(slots=3, cache_tokens=8192, page_size=64, chunk=256, steps=4)
WARMED = dataclasses.replace(SMALL, slots=4, chunk=192)  # widths of 1, 2 and 3 pages
NARROW = dataclasses.replace(SMALL, slots=2, chunk=64, compile_workers=3)  # a width of one page
OTHER_CACHE = 64 * 131  # tokens: a shape that the first test below compiles


def request_of(case, tokens, **settings):
    media = {kind: of_row[0] for kind, of_row in media_of(case).items()}
    return Request(case["prompt"], **media, max_new_tokens=tokens, **settings)


def texts(count, seed=0):
    """Prompts of many lengths, below and beyond the LongRoPE boundary of 96."""
    words = ["time", "light", "house", "water", "green", "small", "never", "write", "seven", "stone"]
    draw = random.Random(seed)
    return [f"<|user|>{' '.join(draw.choices(words, k=draw.randint(1, 40)))}<|end|><|assistant|>" for _ in range(count)]


def prompt_of(tokenizer, count):
    """A prompt of exactly this many tokens."""
    text = "light of seven stones " * (count // 40)
    return text + "<|tag|>" * (count - len(tokenizer.encode(text, special=True)))


def recompute(model, prompt, answer, adapter=0):
    """Logits before each of the answer's tokens, each of its whole sequence without a cache."""
    tokens = model.processor.tokenizer.encode(prompt, special=True)
    count, whole = len(answer), np.asarray(tokens + answer, np.int32)
    lengths = len(tokens) + np.arange(count, dtype=np.int32)
    rows = np.where(np.arange(len(whole)) < lengths[:, None], whole, 0)
    media = np.full_like(rows, NO_MEDIA)
    logits = model.logits(Batch(rows, lengths, np.full(count, adapter, np.int32), media, None, None))
    return np.asarray(logits)[np.arange(count), lengths - 1]


def check_greedy(model, prompt, completion, adapter=0, atol=1e-3):
    logits = recompute(model, prompt, completion.tokens, adapter)
    assert completion.tokens == logits.argmax(-1).tolist()
    expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(logits)), completion.tokens]
    np.testing.assert_allclose(completion.log_probabilities, expected, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "cache_tokens"), [(1, 2560), (SMALL.slots, SMALL.cache_tokens), (8, 2560 * 8)])
def test_mixed_requests_give_the_golden_tokens(tiny, goldens, slots, cache_tokens):
    engine = tiny.engine(dataclasses.replace(SMALL, slots=slots, cache_tokens=cache_tokens))
    cases = random.Random(slots).sample(CASES, len(CASES))
    requests = [request_of(c, len(goldens[f"{c['name']}.generated"])) for c in cases]
    answers = dict(engine.run(requests))
    assert len(answers) == len(cases)
    for place, case in enumerate(cases):
        assert answers[place].tokens == goldens[f"{case['name']}.generated"].tolist(), case["name"]
        assert answers[place].prompt_tokens == case["tokens"]
    assert engine.idle
    assert engine.scheduler.allocator.in_use == 0
    assert engine.scheduler.allocator.num_unreserved == engine.config.pages


@pytest.mark.slow
def test_many_mixed_requests_are_as_each_alone(tiny, goldens):
    """200 texts, images and clips with settings of their own, in slots that are refilled.

    Texts are drawn as by a plain sampler from logits without a cache; prompts of the goldens are answered as there.
    """
    draw = random.Random(1)
    cases = [c for c in CASES if c["tokens"] < 100 or c["name"] == "vision"]
    prompts = texts(160)
    settings = [
        Sampling(draw.choice([0.0, 0.8]), draw.choice([0, 5]), seed=draw.randrange(100), stream=i) for i in range(160)
    ]
    requests = {
        i: Request(prompt, max_new_tokens=draw.randint(1, 24), sampling=settings[i]) for i, prompt in enumerate(prompts)
    }
    expected = {}
    for i in range(160, 200):
        case = draw.choice(cases)
        generated = goldens[f"{case['name']}.generated"].tolist()
        count = draw.randint(1, min(12, len(generated)))
        requests[i], expected[i] = request_of(case, count), generated[:count]
    order = draw.sample(sorted(requests), len(requests))
    engine = tiny.engine(dataclasses.replace(SMALL, slots=8, cache_tokens=2560 * 8))  # as for the goldens
    found = {order[place]: answer for place, answer in engine.run([requests[i] for i in order])}
    assert {i: found[i].tokens for i in expected} == expected
    answers = [found[i].tokens for i in range(160)]
    assert all(len(a) == requests[i].max_new_tokens or found[i].finish_reason == "stop" for i, a in enumerate(answers))
    logits = uncached_logits(tiny, tiny.process(prompts), answers)
    for i, answer in enumerate(answers):
        log_probabilities = log_softmax(logits[i], -1)[np.arange(len(answer)), answer]
        np.testing.assert_allclose(found[i].log_probabilities, log_probabilities, atol=1e-3)
        scores = plain_scores(logits[i], settings[i])
        chosen = scores[np.arange(len(answer)), answer]
        np.testing.assert_allclose(chosen, scores.max(-1), atol=2e-3, err_msg=str(requests[i]))


def plain_scores(logits: np.ndarray, settings: Sampling) -> np.ndarray:
    """Values that a token is the largest of: logits, or those that are left, divided, with the noise of their place."""
    if not settings.temperature:
        return logits
    noise = gumbel(settings.seed, settings.stream)[: len(logits)]
    least = np.sort(logits, -1)[:, -settings.top_k] if settings.top_k else np.full(len(logits), -np.inf)
    return np.where(logits >= least[:, None] - 1e-4, logits / settings.temperature + noise, -np.inf)


@jax.jit
def gumbel(seed, stream):
    """Noise of the first 24 places."""
    key = jax.random.fold_in(jax.random.key(seed), stream)
    return jax.vmap(lambda place: jax.random.gumbel(jax.random.fold_in(key, place), 768))(jnp.arange(24))


@pytest.mark.parametrize("config", fast_are([NARROW], [NARROW, WARMED]), ids=["one width", "three widths"])
def test_nothing_compiles_after_warm_up(tiny, config):
    """Whatever comes: the shapes are those of the first requests. Each program is compiled once, also in threads."""
    engine, start = tiny.engine(dataclasses.replace(config, cache_tokens=OTHER_CACHE)), count_compilations()
    engine.warm_up()
    before = count_compilations()
    found = [(c.function, c.thread.rpartition("_")[0]) for c in compilations_since(start)]
    widths, thread = {NARROW: (1, "phi4mm-compile"), WARMED: (3, "")}[config]
    assert Counter(x for x in found if x[0] in ("jit(_prefill)", "jit(_decode)", "jit(_decode_logits)")) == {
        ("jit(_prefill)", thread): 3 * 2 * widths,  # adapters, numbers of rows
        ("jit(_decode)", thread): 4,  # sets of adapters
        ("jit(_decode_logits)", thread): 4,
    }
    requests = [Request(p, max_new_tokens=9, sampling=Sampling(t / 10, t)) for t, p in enumerate(texts(12, seed=5))]
    requests += [request_of(c, 5, grammar=Grammar.regex("[a-z]*") if i % 3 == 0 else None) for i, c in enumerate(CASES)]
    answers = dict(engine.run(requests))
    assert {answer.finish_reason for answer in answers.values()} <= {"stop", "length"}
    assert len(answers) == len(requests)
    assert count_compilations() == before


@pytest.mark.slow
def test_warming_up_changes_nothing_for_a_busy_engine(tiny):
    """The tokens that a row's penalty counts stay marked, its keys and values and all features as they were."""
    engine = tiny.engine(dataclasses.replace(WARMED, cache_tokens=OTHER_CACHE))  # whose programs are compiled by now
    settings = Sampling(repetition_penalty=1000.0)
    engine.submit(Request("<|user|>Tell me<|end|><|assistant|>", max_new_tokens=12, sampling=settings))
    engine.step()

    def state():
        """But for the scratch page."""
        cache = engine.runner.kv_cache
        kept = engine.runner.token_seen, cache.k[:, :-1], cache.v[:, :-1], engine.runner.encoder_cache.table
        return jax.device_get(kept)

    before = state()
    engine.warm_up()
    after = state()
    for ours, theirs in zip(after, before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    (sequence,) = engine.scheduler.resident
    assert tokens_seen(engine, sequence) == {*sequence.row.tokens.tolist(), *sequence.output_token_ids}


def test_prefix_cache_shares_pages_and_encoded_media(tiny):
    """Ten questions about an image: it is encoded once, and its pages are there once."""
    image = [TINY / "inputs" / "image_0.png"]
    engine = tiny.engine(SMALL)
    questions = [f"<|user|><|image_1|>Question number {i}?<|end|><|assistant|>" for i in range(10)]
    answers = dict(engine.run([Request(q, image, max_new_tokens=4) for q in questions]))
    assert engine.runner.encoder_cache.num_encoded == 1  # its only crop is its global view, too
    # The image once, ten times what follows its last whole page.
    assert engine.runner.num_prefilled_tokens < 600 + 10 * 2 * 64
    for i, question in enumerate(questions):
        (alone,) = tiny.generate([question], [image], max_new_tokens=4)
        assert answers[i].tokens == alone.tokens


@pytest.mark.slow
def test_prefix_cache_is_not_shared_between_adapters(tiny):
    prompt = prompt_of(tiny.processor.tokenizer, 200)
    engine = tiny.engine(SMALL)
    for index, adapter in enumerate(["none", "vision", "speech"]):
        ((_, answer),) = engine.run([Request(prompt, max_new_tokens=4, adapter=adapter)])
        check_greedy(tiny, prompt, answer, index)


def test_a_cached_prompt_of_whole_pages_is_prefilled(tiny):
    """The last page is computed again, or else there would be no logits to draw from."""
    prompt = prompt_of(tiny.processor.tokenizer, 128)
    engine = tiny.engine(SMALL)
    for _ in range(2):
        ((_, answer),) = engine.run([Request(prompt, max_new_tokens=4)])
        assert answer.prompt_tokens == 128
        check_greedy(tiny, prompt, answer)


def test_equal_prompts_of_whole_pages_start_together(tiny):
    """Each computes the last page itself, so that none has to wait for another's."""
    prompt = prompt_of(tiny.processor.tokenizer, 64)
    engine = tiny.engine(SMALL)
    numbers, updates = [engine.submit(Request(prompt, max_new_tokens=4)) for _ in range(3)], []
    while not engine.idle:
        updates += engine.step()
        assert all(sequence.num_computed_tokens > 0 for sequence in engine.scheduler.resident)
    assert engine.runner.num_prefilled_tokens == 3 * 64
    answers = {update.id: update.completion for update in updates if update.completion}
    for number in numbers:
        check_greedy(tiny, prompt, answers[number])


def test_an_idle_slot_writes_no_page(tiny):
    """It ends early in a round that another goes on with; a longer prompt then shares all its pages."""
    prompt = prompt_of(tiny.processor.tokenizer, 128)
    engine = tiny.engine(SMALL)
    beside = Request("<|user|>another<|end|><|assistant|>", max_new_tokens=16)
    list(engine.run([Request(prompt, max_new_tokens=2), beside]))
    longer = prompt + "<|tag|>" * 10
    ((_, answer),) = engine.run([Request(longer, max_new_tokens=4)])
    check_greedy(tiny, longer, answer)
    logits = recompute(tiny, longer, answer.tokens)
    expected = log_softmax(logits, -1)[np.arange(4), answer.tokens]
    np.testing.assert_allclose(answer.log_probabilities, expected, atol=1e-4)


def test_a_short_row_fills_no_page_too_many():
    """Beyond its tokens a row's table names page 0, which is another row's."""
    k, v = np.random.default_rng(0).normal(size=(2, 2, 8, 1, 2)).astype(np.float32)
    empty = jnp.zeros((1, 5, 1, 4, 2))
    cache = KVCache(empty, empty)
    starts, lengths, tables = map(jnp.asarray, ([0, 4], [7, 6], [[0, 3, 0], [1, 2, 0]]))
    rows = cached_inputs(cache, starts, lengths, tables, 8)
    filled = fill(cache, jnp.asarray(k), jnp.asarray(v), jnp.int32(0), rows)
    for pages, new in zip(filled[:2], (k, v), strict=True):
        expected = np.stack([new[0, :4], np.zeros((4, 1, 2)), new[1, :4], new[0, 4:]]).swapaxes(1, 2)
        np.testing.assert_array_equal(pages[0, :4], expected)


def test_a_row_that_ends_with_a_page_fills_no_other():
    k, v = np.random.default_rng(0).normal(size=(2, 1, 8, 1, 2)).astype(np.float32)
    empty = jnp.zeros((1, 3, 1, 4, 2))
    cache = KVCache(empty, empty)
    starts, lengths, tables = map(jnp.asarray, ([0], [4], [[1, 0]]))  # page 0 is another row's
    rows = cached_inputs(cache, starts, lengths, tables, 8)
    filled = fill(cache, jnp.asarray(k), jnp.asarray(v), jnp.int32(0), rows)
    for pages, new in zip(filled[:2], (k, v), strict=True):
        np.testing.assert_array_equal(pages[0, :2], np.stack([np.zeros((4, 1, 2)), new[0, :4]]).swapaxes(1, 2))


def test_draws_continue_across_the_longrope_boundary(tiny):
    """Each token is the largest of logits plus Gumbel noise of its own position."""
    prompt = prompt_of(tiny.processor.tokenizer, 85)
    settings = Sampling(temperature=1.0, seed=3, stream=5)
    ((_, answer),) = tiny.engine(SMALL).run([Request(prompt, max_new_tokens=24, sampling=settings)])
    assert len(answer.tokens) > 14  # beyond 96 positions
    key = jax.random.fold_in(jax.random.key(3), 5)
    logits = recompute(tiny, prompt, answer.tokens)
    noise = [jax.random.gumbel(jax.random.fold_in(key, i), logits.shape[1:]) for i in range(len(logits))]
    assert answer.tokens == (logits + np.asarray(noise)).argmax(-1).tolist()


def test_page_hashes_depend_on_salt_and_media():
    tokens = np.arange(256, dtype=np.int32)
    keys = [list(page_hashes(tokens, [], 64, bytes(salt))) for salt in ([0, 0], [1, 0], [0, 1])]
    assert len({key for of_salt in keys for key in of_salt}) == 12
    with_medium = list(page_hashes(tokens, [(70, 80, b"a")], 64, bytes([0, 0])))
    other = list(page_hashes(tokens, [(70, 80, b"b")], 64, bytes([0, 0])))
    assert with_medium[0] == other[0] == keys[0][0]
    assert not set(with_medium[1:]) & set(other[1:])
    assert list(page_hashes(tokens[:250], [], 64, bytes([0, 0]))) == keys[0][:3]  # whole pages alone


def test_equal_crops_in_another_layout_are_another_medium(tiny):
    """White images of two crops side by side, and of two one above the other."""
    side = tiny.config.vision.crop_size
    images = [Image.new("RGB", size, "white") for size in ((2 * side, side), (side, 2 * side))]
    rows = [tiny.processor.row("<|image_1|>", [image]) for image in images]
    assert np.array_equal(rows[0].images[0].crops, rows[1].images[0].crops)
    digests = {media.media_inputs(row, tiny.config).spans[0][2] for row in rows}
    assert len(digests) == 2


def test_rows_wait_for_pages_and_none_is_lost(tiny):
    """A pool with room for two of them at a time."""
    config = dataclasses.replace(SMALL, slots=4, cache_tokens=64 * 6)
    requests = [Request(p, max_new_tokens=60) for p in texts(7, seed=3)]
    engine, alone_in = tiny.engine(config), tiny.engine(SMALL)
    answers = dict(engine.run(requests))
    for place, request in enumerate(requests):
        ((_, alone),) = alone_in.run([request])
        assert answers[place].tokens == alone.tokens
    (_, refused), (_, served) = sorted(engine.run([Request("a b", max_new_tokens=1000), Request("a b c")]))
    assert refused.finish_reason == "error"
    assert "pages" in refused.error
    assert served.finish_reason in ("stop", "length")


def test_a_long_answer_is_recomputed_across_the_longrope_boundary(tiny):
    """A short prompt's long answer crosses the LongRoPE boundary; it is computed anew in chunks of its own."""
    request = Request("<|user|>Tell me about the light of seven stones<|end|><|assistant|>", max_new_tokens=100)
    ((_, answer),) = tiny.engine(dataclasses.replace(SMALL, chunk=64)).run([request])
    (whole,) = tiny.generate([request.prompt], max_new_tokens=100)
    assert len(answer.tokens) == 100
    assert answer.tokens == whole.tokens


def tokens_seen(engine, sequence):
    """Tokens that a sequence's repetition penalty counts, those included that are decoded from and not read yet."""
    return set(np.flatnonzero(engine.runner.token_seen[sequence.slot]).tolist())


def test_repetition_penalty_survives_the_longrope_boundary(tiny):
    """A row that is computed anew beyond the LongRoPE boundary still knows all of its tokens."""
    engine = tiny.engine(SMALL)
    settings = Sampling(repetition_penalty=3.0)
    engine.submit(Request(f"<|user|>{'a b ' * 40}<|end|><|assistant|>", max_new_tokens=60, sampling=settings))
    for _ in range(44):  # a request that is alone draws a token a round
        engine.step()
    (sequence,) = engine.scheduler.resident
    assert sequence.num_prompt_tokens < 90
    assert sequence.use_long_rope
    assert sequence.num_pending_tokens == 1
    assert tokens_seen(engine, sequence) == {*sequence.row.tokens.tolist(), *sequence.output_token_ids}


def test_media_beyond_the_encoder_cache_are_an_error(tiny):
    """A page of this image takes features of five crops: too many for 16 blocks. Others are served."""
    engine = tiny.engine(dataclasses.replace(SMALL, feature_blocks=16))
    wide = Request("<|user|><|image_1|>What?<|end|><|assistant|>", [np.zeros((100, 3600, 3), np.uint8)])
    (_, refused), (_, served) = sorted(engine.run([wide, Request("a b c", max_new_tokens=3)]))
    assert "more media than feature_blocks=16 hold together; give the engine more" in refused.error
    assert len(served.tokens) == 3


def test_an_engine_that_was_stopped_in_a_round_says_so(tiny, monkeypatch):
    engine = tiny.engine(SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "decode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(engine.run([Request("a b c", max_new_tokens=3)]))
    with pytest.raises(InputError, match=r"stopped in the middle of a round.* make another"):
        list(engine.run([Request("a b c")]))


@pytest.mark.slow
def test_log_probabilities_of_an_int8_cache(tiny):
    """Log-probabilities of tokens that were decoded from quantised keys and values, near those without a cache."""
    engine = tiny.engine(dataclasses.replace(SMALL, cache_dtype="int8"))
    requests = [Request(p, max_new_tokens=8) for p in texts(6, seed=9)]
    for place, answer in engine.run(requests):
        logits = recompute(tiny, requests[place].prompt, answer.tokens)
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(logits)), answer.tokens]
        np.testing.assert_allclose(answer.log_probabilities, expected, atol=0.1)
    assert engine.runner.kv_cache.k.dtype == np.int8


def test_quantised_values_use_all_of_int8():
    tokens = np.asarray([[1.0, -0.5, 0.25, 0.0], [0.0] * 4, [-254.0, 127.0, 2.0, 1.9]], np.float32)
    values, scales = as_cached([tokens], np.int8)
    assert np.asarray(values).tolist() == [[127, -64, 32, 0], [0] * 4, [-127, 64, 1, 1]]
    np.testing.assert_allclose(scales, [1 / 127, 0, 2], rtol=1e-6)


@pytest.mark.parametrize("cache_dtype", fast_are([None], [None, "int8"]))
@pytest.mark.parametrize(
    ("dtype", "prefill", "decode", "uncached"),
    fast_are([("float32", 1e-5, 1e-5, 1e-4)], [("float32", 1e-5, 1e-5, 1e-4), ("bfloat16", 1e-5, 0.02, 0.1)]),
)
def test_answers_depend_on_neither_batch_nor_prefix_cache(
    tiny, monkeypatch, dtype, cache_dtype, prefill, decode, uncached
):
    """The same tokens as each alone, and log-probabilities within bounds: of the first token, which prefill gives, of
    the others, and of both to float32 logits without a cache."""
    monkeypatch.setattr("phi4mm_jax.kernels.cached.KEYS_PER_BLOCK", 128)  # several blocks
    model = phi4mm_jax.load(TINY, dtype=dtype, scan=True)
    words = texts(60, seed=2)
    short = [prompt for prompt in words if 12 < prompt.count(" ") < 22][:3]
    whole = "".join(prompt for prompt in words if prompt.count(" ") > 30)[:800]
    requests = [Request(p, max_new_tokens=6) for p in (whole, whole + short[0], *short)]
    config = dataclasses.replace(SMALL, slots=1, chunk=128, cache_dtype=cache_dtype)
    alone = [answer for request in requests for _, answer in model.engine(config).run([request])]
    engine = model.engine(dataclasses.replace(config, slots=4, chunk=64))
    for _ in range(2):  # the second time with the pages of the first
        found = dict(engine.run(requests))
        for place, expected in enumerate(alone):
            assert found[place].tokens == expected.tokens
            ours, theirs = (np.asarray(x.log_probabilities) for x in (found[place], expected))
            np.testing.assert_allclose(ours[:1], theirs[:1], atol=prefill)
            np.testing.assert_allclose(ours, theirs, atol=decode)
    rows = [
        tiny.processor.tokenizer.encode(r.prompt, special=True) + a.tokens for r, a in zip(requests, alone, strict=True)
    ]
    lengths = np.asarray([*map(len, rows)], np.int32)
    assert not ((lengths - 6 <= 96) & (lengths > 96)).any()  # the boundary of LongRoPE, which changes whole rows
    tokens = np.asarray([row + [0] * (lengths.max() - len(row)) for row in rows], np.int32)
    logits = tiny.logits(Batch(tokens, lengths, 0 * lengths, np.full_like(tokens, NO_MEDIA), None, None))
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    for i, answer in enumerate(alone):
        at = np.arange(answer.prompt_tokens, lengths[i])
        expected = log_probabilities[i, at - 1, answer.tokens]
        atol = uncached + (0.1 if cache_dtype else 0)
        np.testing.assert_allclose(answer.log_probabilities, expected, atol=atol)


def test_reused_pages_leak_nothing(tiny):
    """Requests of five and four of six pages, in turn: each takes what the one before has given back."""
    engine = tiny.engine(dataclasses.replace(SMALL, slots=4, cache_tokens=64 * 6))
    prompts = [begin + prompt_of(tiny.processor.tokenizer, n) for n, begin in ((300, "a"), (250, "b"))]
    taken = []
    for prompt in (*prompts, prompts[0]):
        engine.submit(Request(prompt, max_new_tokens=5))
        updates = engine.step()
        taken += [set(sequence.pages) for sequence in engine.scheduler.resident]
        while not engine.idle:
            updates += engine.step()
        (answer,) = (update.completion for update in updates if update.completion)
        check_greedy(tiny, prompt, answer)
    assert len(taken[0] & taken[1]) >= 2
    assert len(taken[1] & taken[2]) >= 2


def test_streaming_splits_no_character(tiny):
    request = Request("<|user|>Tell me<|end|><|assistant|>", max_new_tokens=40)
    pieces = list(tiny.engine(SMALL).stream(request))
    (whole,) = tiny.generate([request.prompt], max_new_tokens=40)
    assert "".join(pieces) == whole.text
    assert len(pieces) > 2


def test_text_holds_back_what_may_be_a_stop_string(tiny):
    tokenizer = tiny.processor.tokenizer
    text = IncrementalDetokenizer(tokenizer, ["END", "日本"])
    shown = []
    for token in tokenizer.encode("a EN b 日本 c"):
        shown.append(text.add(token))
        if text.stopped:
            break
    assert text.stopped
    assert "".join(shown) + text.finish() == "a EN b " == text.text
    assert not any("E" in piece and "EN" not in piece for piece in shown)
    half = IncrementalDetokenizer(tokenizer, [])
    tokens = tokenizer.encode("日")
    pieces = [half.add(token) for token in tokens]
    assert "\ufffd" not in "".join(pieces)
    one_token: Any = SimpleNamespace(decode_bytes=lambda _: b"xabc")  # with both strings, of which the first counts
    assert IncrementalDetokenizer(one_token, ["bc", "ab"]).add(0) == "x"


def test_cancelling_frees_the_slot(tiny):
    engine = tiny.engine(dataclasses.replace(SMALL, slots=1))
    first = engine.submit(Request("<|user|>Tell me<|end|><|assistant|>", max_new_tokens=500))
    second = engine.submit(Request("<|user|>More<|end|><|assistant|>", max_new_tokens=4))
    third = engine.submit(Request("<|user|>Less<|end|><|assistant|>", max_new_tokens=4))
    for _ in range(3):
        engine.step()
    engine.cancel(first)
    engine.cancel(third)
    completions = {}
    while not engine.idle:
        completions |= {u.id: u.completion for u in engine.step() if u.completion}
    assert completions[first].finish_reason == "cancelled"
    assert len(completions[first].tokens) > 2
    assert completions[second].finish_reason == "length"
    assert completions[third].finish_reason == "cancelled"
    assert engine.scheduler.allocator.num_unreserved == engine.config.pages


def test_streams_and_runs_get_their_own_answers(tiny):
    """Two streams, a run and requests of their own, one between the other; closing one takes nothing from the rest."""
    prompts = texts(5, seed=11)
    alone = [c.text for c in tiny.generate(prompts, max_new_tokens=12)]
    engine = tiny.engine(SMALL)
    own = engine.submit(Request(prompts[0], max_new_tokens=12))
    first, second = (engine.stream(Request(p, max_new_tokens=12)) for p in prompts[1:3])
    pieces = next(first), next(second)
    run = engine.run([Request(p, max_new_tokens=12) for p in prompts[3:]])
    place, completion = next(run)
    assert completion.text == alone[3 + place]
    run.close()
    assert pieces[1] + "".join(second) == alone[2]
    assert pieces[0] + "".join(first) == alone[1]
    updates = []
    while not engine.idle:
        updates += engine.step()
    assert {u.id for u in updates} == {own}
    assert "".join(u.text for u in updates) == alone[0]
    assert engine.scheduler.allocator.num_unreserved == engine.config.pages


def test_an_exception_ends_one_request_alone(tiny, monkeypatch):
    engine = tiny.engine(SMALL)
    row = tiny.processor.row
    monkeypatch.setattr(tiny.processor, "row", lambda prompt, *rest: row(prompt, *rest) if prompt != "bad" else 1 // 0)
    answers = dict(engine.run([Request("bad"), Request("fine", max_new_tokens=2)]))
    assert "ZeroDivisionError" in answers[0].error
    assert len(answers[1].tokens) == 2


def test_bad_requests_end_with_errors(tiny):
    requests = [Request("fine", max_new_tokens=2), Request("<|image_1|>", max_new_tokens=2), Request("x" * 200_000)]
    answers = dict(tiny.engine(SMALL).run(requests))
    assert [answers[i].finish_reason for i in range(3)] == ["length", "error", "error"]
    assert "image" in answers[1].error


@pytest.fixture
def poisoned(tiny):
    """Answers by an engine in which the first request's cached values become NaN after a round."""
    engine = tiny.engine(EngineConfig(slots=2, cache_tokens=2048, page_size=64, chunk=64, steps=2, beams=2))

    def run(*requests):
        numbers = [engine.submit(request) for request in requests]
        updates = engine.step()
        first, cache = engine.scheduler.slots[0], engine.runner.kv_cache
        pages = [*first.pages, *(page for beam in (first.beams.pages if first.beams else []) for page in beam)]
        engine.runner.kv_cache = cache._replace(v=cache.v.at[:, pages].set(np.nan))
        while not engine.idle:
            updates += engine.step()
        assert engine.scheduler.allocator.num_unreserved == engine.config.pages
        answers = {u.id: u.completion for u in updates if u.completion}
        return [answers[n] for n in numbers], engine.scheduler.allocator.match_prefix(first.page_hashes)

    return run


@pytest.mark.parametrize("beams", fast_are([1], [1, 2]))
def test_a_row_whose_logits_are_not_finite_ends_alone(tiny, poisoned, beams):
    """While it decodes; what it drew before the fault stays its answer. The row beside it is as without it."""
    prompts = texts(2, seed=21)
    (bad, good), _ = poisoned(*(Request(p, max_new_tokens=9, beams=beams) for p in prompts))
    expected = dict(tiny.engine(EngineConfig(cache_tokens=2048, beams=2)).run(
        [Request(p, max_new_tokens=9, beams=beams) for p in prompts]
    ))  # fmt: skip
    assert bad.finish_reason == "error"
    assert "not finite" in bad.error
    assert 0 < len(bad.tokens) < 9
    assert np.isfinite(bad.log_probabilities).all()
    if beams == 1:
        assert bad.tokens == expected[0].tokens[: len(bad.tokens)]
    assert (good.tokens, good.error) == (expected[1].tokens, None)


def test_pages_of_a_prompt_that_is_not_finite_are_not_shared(poisoned):
    """The second of three chunks attends to NaN."""
    (bad, good), shared = poisoned(Request("<|tag|>" * 150, max_new_tokens=2), Request("a b", max_new_tokens=2))
    assert (bad.finish_reason, bad.tokens) == ("error", [])
    assert good.error is None
    assert shared == 1  # of the first chunk


def test_stop_tokens_and_repetition_penalty(tiny):
    prompt = "<|user|>Tell me<|end|><|assistant|>"
    engine = tiny.engine(SMALL)
    (plain,) = (a for _, a in engine.run([Request(prompt, max_new_tokens=12)]))
    (stopped,) = (a for _, a in engine.run([Request(prompt, max_new_tokens=12, stop_tokens=[plain.tokens[3]])]))
    assert stopped.tokens == plain.tokens[: plain.tokens.index(plain.tokens[3]) + 1]
    penalty = Sampling(repetition_penalty=1000.0)
    (varied,) = (a for _, a in engine.run([Request(prompt, max_new_tokens=40, sampling=penalty)]))
    seen = tiny.processor.tokenizer.encode(prompt, special=True) + varied.tokens
    assert len(set(varied.tokens)) == len(varied.tokens)
    assert not set(varied.tokens) & set(seen[: -len(varied.tokens)])


def test_log_probabilities_are_those_without_a_cache(tiny):
    prompt = "<|user|>Tell me<|end|><|assistant|>"
    ((_, answer),) = tiny.engine(SMALL).run([Request(prompt, max_new_tokens=6)])
    assert len(answer.log_probabilities) == 6
    check_greedy(tiny, prompt, answer)


@pytest.mark.parametrize("dtype", ["int4", "float16", "bfloat16", 8])
def test_a_cache_dtype_that_does_not_fit_is_named(tiny, dtype):
    with pytest.raises(InputError, match=rf"cache_dtype is {dtype!r}.*; expected None.*int8"):
        tiny.engine(EngineConfig(cache_dtype=dtype))


@pytest.mark.parametrize("size", ["slots", "cache_tokens", "page_size", "chunk", "steps", "feature_blocks"])
def test_bad_sizes_are_named(size):
    with pytest.raises(InputError, match=size):
        EngineConfig(**{size: 0})


def test_a_configuration_starts_no_backend():
    """It is made where no device may be touched; the size of its pages is known once there is an engine."""
    code = """
    from phi4mm_jax.engine import EngineConfig
    config = EngineConfig()
    assert config.page_size is None
    try:
        config.page_tokens
    except RuntimeError as error:
        print(error)
    """
    environment = os.environ | {"JAX_PLATFORMS": "absent", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "absent" in done.stdout  # such a backend can only fail


def test_pages_are_sized_by_the_device(tiny):
    assert tiny.engine(EngineConfig(slots=1, cache_tokens=256)).config.page_size == 64
    with pytest.raises(InputError, match="chunk is 96; expected a multiple of the page size of 64"):
        tiny.engine(EngineConfig(chunk=96))
    with pytest.raises(InputError, match="draft_tokens is 127; expected at most 126, with pages of 128 tokens"):
        EngineConfig(draft_tokens=127)
    with pytest.raises(InputError, match="draft_tokens is 64; expected at most 62, with pages of 64 tokens"):
        tiny.engine(EngineConfig(draft_tokens=64))


def test_unreferenced_pages_stay_in_the_prefix_cache():
    pool = PageAllocator(3)
    pool.reserve(2)
    pages = [pool.allocate(), pool.allocate()]
    pool.cache_page(pages[0], b"a")
    pool.cache_page(pages[1], b"b")
    assert pool.num_unreserved == 1
    pool.decref(pages)
    assert pool.num_unreserved == 3
    assert pool.match_prefix([b"a", b"b", b"c"]) == 2
    assert pool.acquire_cached([b"a"]) == pages[:1]
    assert pool.num_unreserved == 2
    pool.reserve(2)
    assert {pool.allocate(), pool.allocate()} == {0, 1, 2} - set(pages[:1])
    assert pool.match_prefix([b"a", b"b"]) == 1


def test_prefix_cache_evicts_lru_and_ends_first():
    pool = PageAllocator(4)
    pool.reserve(4)
    pages = [pool.allocate() for _ in range(4)]
    for page, key in zip(pages, (b"a", b"ab", b"abc", b"x"), strict=True):
        pool.cache_page(page, key)
    pool.decref(pages[:3])  # a prompt of three pages, and after it one of one
    pool.decref(pages[3:])
    pool.reserve(2)
    assert [pool.allocate(), pool.allocate()] == [pages[2], pages[1]]
    assert pool.match_prefix([b"a", b"ab", b"abc"]) == 1
    assert pool.match_prefix([b"x"]) == 1


# Programs of other kernels, for which all others are forgotten: hence at the end.


@pytest.mark.slow
def test_cached_keys_in_several_blocks(tiny, monkeypatch):
    """Chunks attend to three blocks of 128 earlier keys, short rows beside long ones."""
    monkeypatch.setattr("phi4mm_jax.kernels.cached.KEYS_PER_BLOCK", 128)
    jax.clear_caches()  # programs of the larger block
    prompts = [prompt_of(tiny.processor.tokenizer, n) for n in (510, 300, 65)]
    answers = dict(
        tiny.engine(dataclasses.replace(SMALL, chunk=128)).run([Request(p, max_new_tokens=3) for p in prompts])
    )
    jax.clear_caches()
    for place, prompt in enumerate(prompts):
        check_greedy(tiny, prompt, answers[place])


def test_a_gpus_engine_answers_alike(tiny, monkeypatch):
    """A first chunk attends to itself alone, a later one to blocks of 128 keys as well; nothing compiles while it runs.

    Also where no page table is longer than a chunk. What cuDNN would compute, XLA does; the kernel that decodes is
    interpreted.
    """
    monkeypatch.setattr("phi4mm_jax.kernels.cached.KEYS_PER_BLOCK_ON_GPU", 128)
    prompts = [prompt_of(tiny.processor.tokenizer, n) for n in (510, 300, 65, 200)]
    longer = prompts[0] + "<|tag|>"  # begins with 7 cached pages
    config = dataclasses.replace(SMALL, slots=4, chunk=64, compile_workers=1)
    jax.clear_caches()  # programs for this machine
    with gpu.assumed(gpu.Target(cores=2, interpret=True)):
        engine, start = tiny.engine(config), count_compilations()
        engine.warm_up()
        found = Counter(compilation.function for compilation in compilations_since(start))
        assert found["jit(_prefill)"] == 3 * 2 * 2  # adapters, numbers of rows, with and without cached keys
        before = count_compilations()
        answers = dict(engine.run([Request(p, max_new_tokens=3) for p in prompts]))
        computed = engine.runner.num_prefilled_tokens
        answers |= dict(enumerate(dict(engine.run([Request(longer, max_new_tokens=3)])).values(), len(prompts)))
        assert count_compilations() == before
        assert engine.runner.num_prefilled_tokens - computed == 511 - 7 * 64
        tight = tiny.engine(dataclasses.replace(SMALL, slots=1, cache_tokens=256))
        begun = [prompt_of(tiny.processor.tokenizer, 120), prompt_of(tiny.processor.tokenizer, 120) + "<|tag|>" * 130]
        for prompt in begun:
            answers |= dict(enumerate(dict(tight.run([Request(prompt, max_new_tokens=3)])).values(), len(answers)))
        assert tight.runner.num_prefilled_tokens == 120 + 250 - 64
    jax.clear_caches()
    for place, prompt in enumerate([*prompts, longer, *begun]):
        check_greedy(tiny, prompt, answers[place])
