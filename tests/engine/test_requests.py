"""Sampling, stopping, and the arguments of `generate`."""

import asyncio
import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compilations import count_compilations
from helpers.paths import TINY

from phi4mm_jax import InputError, MediaError
from phi4mm_jax.engine import AsyncEngine, EngineConfig, Grammar, Request
from phi4mm_jax.engine.sampling import Sampling, SamplingRows, restrict, sample

PROMPT = "<|user|>How to explain Internet for a medieval knight?<|end|><|assistant|>"


def restricted(logits, top_k=0, top_p=1.0, min_p=0.0):
    rows = len(logits)
    return restrict(logits, jnp.full(rows, top_k), jnp.full(rows, top_p), jnp.full(rows, min_p))


def test_top_k_of_minus_one_is_off_as_in_vllm():
    assert Sampling(temperature=0.7, top_k=-1) == Sampling(temperature=0.7, top_k=0)


def test_top_k_keeps_the_k_likeliest():
    logits = jnp.asarray([[0.0, 3.0, 1.0, 2.0], [5.0, 5.0, 5.0, 1.0]])
    kept = np.isfinite(restricted(logits, top_k=2))
    np.testing.assert_array_equal(kept, [[False, True, False, True], [True, True, True, False]])  # ties stay


def test_top_p_keeps_the_fewest_that_reach_p():
    probabilities = np.array([[0.05, 0.5, 0.15, 0.3]])
    for p, expected in ((0.4, [1]), (0.5, [1]), (0.51, [1, 3]), (0.8, [1, 3]), (0.81, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        kept = np.isfinite(restricted(jnp.log(probabilities), top_p=p))
        assert np.flatnonzero(kept[0]).tolist() == expected, p


def test_top_p_is_of_what_top_k_leaves():
    probabilities = np.array([[0.4, 0.3, 0.2, 0.1]])
    for k, expected in ((0, [0, 1]), (2, [0])):  # 0.4 of 1, and of 0.7
        kept = np.isfinite(restricted(jnp.log(probabilities), top_k=k, top_p=0.5))
        assert np.flatnonzero(kept[0]).tolist() == expected


def test_min_p_keeps_what_is_not_far_less_likely():
    probabilities = np.array([[0.05, 0.5, 0.15, 0.3]])
    for p, expected in ((0.0, [0, 1, 2, 3]), (0.2, [1, 2, 3]), (0.5, [1, 3]), (1.0, [1])):
        kept = np.isfinite(restricted(jnp.log(probabilities), min_p=p))
        assert np.flatnonzero(kept[0]).tolist() == expected, p


def test_repetition_penalty_divides_seen_logits():
    logits = jnp.asarray([[2.0, 1.5, -1.0], [2.0, 1.5, -1.0]])
    seen = jnp.asarray([[True, False, True], [False, False, False]])
    settings = SamplingRows.of([Sampling(repetition_penalty=2.0)] * 2)
    assert sample(logits, jnp.zeros(2, jnp.int32), settings, seen).tolist() == [1, 0]
    below = jnp.asarray([[-1.0, -1.5, -9.0]] * 2)  # negative ones are multiplied
    assert sample(below, jnp.zeros(2, jnp.int32), settings, seen).tolist() == [1, 0]


def test_rows_have_their_own_settings():
    logits = jnp.log(jnp.asarray([[0.1, 0.2, 0.3, 0.4]] * 4))
    greedy, hot = Sampling(), Sampling(temperature=1.0, seed=3)
    alone = [sample(logits[:1], jnp.zeros(1, jnp.int32), SamplingRows.of([s]))[0] for s in (greedy, hot)]
    both = sample(logits, jnp.zeros(4, jnp.int32), SamplingRows.of([greedy, hot, greedy, hot]))
    assert both.tolist() == [int(alone[i % 2]) for i in range(4)]
    few = SamplingRows.of([Sampling(temperature=1.0, top_k=1, stream=i) for i in range(4)])
    assert sample(logits, jnp.zeros(4, jnp.int32), few).tolist() == [3] * 4


def test_settings_do_not_compile_again(tiny):
    def run(temperature, top_k):
        prompt = "<|tag|>" * 70  # a length that no other test has compiled for
        tiny.generate([prompt], max_new_tokens=25, temperature=temperature, top_k=top_k, top_p=0.9)

    before = count_compilations()
    run(0.5, 3)
    run(0.5, 3)  # shares the first one's page, and prefills the rest
    once = count_compilations()
    assert once > before
    for temperature in (0.0, 0.1, 1.0, 2.0):
        run(temperature, int(temperature * 10))
    assert count_compilations() == once


def test_samples_follow_the_distribution():
    probabilities = np.array([0.1, 0.2, 0.7])
    rows = 20_000
    logits = jnp.tile(jnp.log(probabilities) * 2, (rows, 1))  # temperature 2 undoes the factor
    settings = SamplingRows.of([Sampling(temperature=2.0, seed=1, stream=i) for i in range(rows)])
    tokens = sample(logits, jnp.zeros(rows, jnp.int32), settings)
    np.testing.assert_allclose(np.bincount(tokens, minlength=3) / rows, probabilities, atol=0.015)


def test_extreme_settings_are_greedy(tiny):
    (greedy,) = tiny.generate([PROMPT], max_new_tokens=6)
    for extreme in ({"temperature": 1e-38}, {"temperature": 1.0, "top_p": 1e-46}, {"temperature": 1.0, "min_p": 1.0}):
        settings = SamplingRows.of([Sampling(**extreme)])
        logits = jnp.asarray([[0.0, 3.0, 1.0, 2.0]])
        assert sample(logits, jnp.zeros(1, jnp.int32), settings).tolist() == [1]
    assert tiny.generate([PROMPT], max_new_tokens=6, temperature=1e-38) == [greedy]


def test_a_row_draws_as_if_alone(tiny):
    other = "<|user|>x<|end|><|assistant|>"
    arguments = {"max_new_tokens": 6, "temperature": 1.0, "seed": 5}
    assert tiny.generate([other, PROMPT], **arguments)[1] == tiny.generate([PROMPT], **arguments)[0]


def test_sampling_is_repeatable_and_seeded(tiny):
    arguments = {"max_new_tokens": 16, "temperature": 1.0}
    once, again = (tiny.generate([PROMPT] * 3, **arguments, seed=5) for _ in range(2))
    assert once == again
    assert len({tuple(c.tokens) for c in once}) == 3  # rows draw for themselves
    assert once != tiny.generate([PROMPT] * 3, **arguments, seed=6)
    assert once[0] == tiny.generate([PROMPT], **arguments, seed=5)[0]


@pytest.mark.slow
def test_equal_prompts_about_other_images_draw_as_alone(tiny):
    prompt, settings = "<|user|><|image_1|>What?<|end|><|assistant|>", {"temperature": 1.0, "seed": 3}
    images = [[TINY / "inputs" / f"image_{i}.png"] for i in (0, 1)]
    together = tiny.generate([prompt] * 2, images=images, max_new_tokens=6, **settings)
    alone = tiny.generate([prompt], images=images[1:], max_new_tokens=6, **settings)
    assert together[1].tokens == alone[0].tokens


def test_top_k_one_is_greedy(tiny):
    greedy = tiny.generate([PROMPT], max_new_tokens=8)
    assert tiny.generate([PROMPT], max_new_tokens=8, temperature=3.0, top_k=1) == greedy
    assert tiny.generate([PROMPT], max_new_tokens=8, temperature=3.0, top_p=1e-6) == greedy


def test_stop_strings_cut_the_text(tiny):
    (whole,) = tiny.generate([PROMPT], max_new_tokens=12)
    stop = whole.text[5:8]
    at = whole.text.find(stop)
    (cut,) = tiny.generate([PROMPT], max_new_tokens=12, stop=["never there", stop])
    assert cut.text == whole.text[:at]
    assert cut.finish_reason == "stop"
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert stop in tiny.processor.tokenizer.decode(cut.tokens)
    assert stop not in tiny.processor.tokenizer.decode(cut.tokens[:-1])


def test_stop_tokens_end_a_row_and_not_the_others(tiny):
    """A row that ends early is given its stop token; its neighbour goes on."""
    other = "<|user|>Tell me more<|end|><|assistant|>"
    whole = tiny.generate([PROMPT, other], max_new_tokens=10)
    early = next(t for t in whole[0].tokens[1:] if t not in whole[1].tokens)
    config = dataclasses.replace(tiny.config, stop_token_ids=(early,))
    model = type(tiny)(tiny.module.clone(config=config), tiny.variables, tiny.processor)
    stopped = model.generate([PROMPT, other], max_new_tokens=10)
    first = whole[0].tokens.index(early)
    assert stopped[0].tokens == whole[0].tokens[: first + 1]
    assert stopped[0].text == tiny.processor.tokenizer.decode(whole[0].tokens[:first])
    assert stopped[0].finish_reason == "stop"
    assert stopped[1] == whole[1]


def test_generation_ends_with_the_context(tiny):
    limit = 160
    processor = copy.copy(tiny.processor)
    processor.context = limit
    model = type(tiny)(tiny.module, tiny.variables, processor)
    (completion,) = model.generate(["<|tag|>" * (limit - 3)], max_new_tokens=10)
    assert len(completion.tokens) == 3
    assert completion.finish_reason == "length"
    with pytest.raises(InputError, match="no room"):
        model.generate(["<|tag|>" * limit], max_new_tokens=1)
    with pytest.raises(InputError, match=f"{limit + 1} tokens"):
        model.generate(["<|tag|>" * (limit + 1)], max_new_tokens=1)


def test_the_context_length_is_that_of_the_files(tiny):
    assert tiny.processor.context == 131072  # tokenizer_config.json; the goldens go beyond config.json's 2048


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"stop": "word"}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["\ud800"]}, "stop"),
        ({"temperature": 10**400}, "temperature"),
        ({"images": [[]] * 2}, "images"),
        ({"audios": ["clip.wav"]}, "audios"),
    ],
)
def test_bad_arguments_are_named(tiny, arguments, named):
    with pytest.raises(InputError, match=named):
        tiny.generate([PROMPT], **({"max_new_tokens": 1} | arguments))


def test_prompts_must_be_a_list(tiny):
    with pytest.raises(InputError, match="list"):
        tiny.generate(PROMPT, max_new_tokens=1)
    with pytest.raises(InputError, match="list"):
        tiny.generate([], max_new_tokens=1)
    with pytest.raises(InputError, match="list"):
        tiny.generate([{"role": "user", "content": "Hello"}], max_new_tokens=1)


def noise_of(identities):
    """Draws of 64 equally likely tokens at 6 positions, one row of them for each request."""
    rows = SamplingRows.of([Sampling(1.0).for_identity(identity) for identity in identities])
    count = len(identities)
    return np.stack([sample(jnp.zeros((count, 64)), jnp.full(count, at, jnp.int32), rows) for at in range(6)], 1)


def test_draws_of_different_requests_are_independent():
    """As those of numpy's generator: of 3000 requests, two neighbours agree as often, and whole sequences never."""
    found = noise_of([b"%d" % i for i in range(3000)])
    plain = np.random.default_rng(0).integers(0, 64, found.shape)
    agreements = [int((tokens[1:] == tokens[:-1]).sum()) for tokens in (found, plain)]
    expected = 2999 * 6 / 64
    assert all(abs(n - expected) < 4.5 * expected**0.5 for n in agreements), agreements
    assert len({tuple(row) for row in found.tolist()}) == 3000
    np.testing.assert_allclose(np.bincount(found.ravel(), minlength=64) / found.size, 1 / 64, atol=0.005)
    assert (noise_of([b"7"]) == found[7]).all()


def test_draws_follow_from_seed_stream_and_position():
    """Its draws follow from the seed, the stream (0 if there is none) and the position alone."""
    given = [Sampling(1.0, seed=5), Sampling(1.0, seed=5, stream=0), Sampling(1.0, seed=5, stream=3)]
    logits = jnp.asarray(np.random.default_rng(0).normal(size=64), jnp.float32)
    for settings, stream in zip(given, (0, 0, 3), strict=True):
        settings = settings.for_identity(b"whatever")
        for position in range(3):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), stream), position)
            gumbel = np.asarray(jax.random.gumbel(key, (64,)))
            token = sample(logits[None], jnp.asarray([position]), SamplingRows.of([settings]))
            assert int(token[0]) == int(np.argmax(np.asarray(logits) + gumbel))


def test_rows_draw_for_themselves(tiny):
    """Different prompts, and equal ones: at this temperature all tokens are about as likely."""
    prompts = [f"<|user|>Question {i}: name any letter.<|end|><|assistant|>" for i in range(5)] + [PROMPT] * 3
    together = tiny.generate(prompts, max_new_tokens=4, temperature=30.0)
    at = [[c.tokens[i] for c in together if len(c.tokens) > i] for i in range(3)]
    assert all(len(set(tokens)) >= len(tokens) - 1 for tokens in at)  # 8 of 648 agree once in 4 %, twice in 0.1 %
    for i in (1, 4, 5):  # as in other company, whichever the slot
        assert tiny.generate([prompts[i]], max_new_tokens=4, temperature=30.0) == [together[i]]
    engine = tiny.engine(EngineConfig(slots=3, cache_tokens=1024))
    requests = [Request(p, max_new_tokens=4, sampling=Sampling(30.0)) for p in reversed(prompts)]
    found = dict(engine.run(requests))
    assert [found[7 - i].tokens for i in range(5)] == [c.tokens for c in together[:5]]
    assert [found[i].tokens for i in range(3)] == [c.tokens for c in together[5:]]


def test_an_answer_that_was_begun_is_continued(tiny):
    """As the raw prompt that ends there, by generate and by an engine."""
    raw = "<|user|>Say it.<|end|><|assistant|>It is"
    chat = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It is"}]
    (expected,) = tiny.generate([raw], max_new_tokens=4)
    (found,) = tiny.generate([chat], max_new_tokens=4, continue_final_message=True)
    assert (found.tokens, found.prompt_tokens) == (expected.tokens, expected.prompt_tokens)
    request = Request(chat, max_new_tokens=4, continue_final_message=True)
    ((_, answered),) = tiny.engine(EngineConfig(slots=1, cache_tokens=512)).run([request])
    assert answered.tokens == expected.tokens
    with pytest.raises(InputError, match="continue_final_message is for chat messages"):
        tiny.generate([raw], max_new_tokens=4, continue_final_message=True)


@pytest.mark.slow
def test_arguments_of_generate_are_those_of_a_request(tiny):
    """Each changes what a request with it is answered, and generate answers the same."""
    (plain,) = tiny.generate([PROMPT], max_new_tokens=6)
    engine = tiny.engine(EngineConfig(slots=1, cache_tokens=1024, beams=2))
    for arguments, request in (
        ({"temperature": 5.0, "min_p": 0.9, "seed": 3}, {"sampling": Sampling(5.0, min_p=0.9, seed=3)}),
        ({"repetition_penalty": 50.0}, {"sampling": Sampling(repetition_penalty=50.0)}),
        ({"stop_tokens": [plain.tokens[2]]}, {"stop_tokens": [plain.tokens[2]]}),
        ({"beams": 2, "length_penalty": 0.5}, {"beams": 2, "length_penalty": 0.5}),
        ({"adapter": "vision"}, {"adapter": "vision"}),
        ({"grammar": Grammar.regex("[a-z]+")}, {"grammar": Grammar.regex("[a-z]+")}),
    ):
        (found,) = tiny.generate([PROMPT], max_new_tokens=6, **arguments)
        ((_, expected),) = engine.run([Request(PROMPT, max_new_tokens=6, **request)])
        assert found.tokens == expected.tokens, arguments
        assert [a.tokens for a in found.alternatives] == [a.tokens for a in expected.alternatives]
        assert (found.tokens, len(found.alternatives)) != (plain.tokens, 0), arguments
    (bare,) = tiny.generate([PROMPT], max_new_tokens=6, logprobs=False)
    assert (bare.tokens, bare.log_probabilities) == (plain.tokens, ())


def test_n_answers_of_a_prompt(tiny):
    """Each draws for itself, by a seed as well; the first is what one alone would be."""
    for seed in (None, 5):
        settings = {"max_new_tokens": 4, "temperature": 30.0, "seed": seed}
        (found,) = tiny.generate([PROMPT], n=3, **settings)
        assert len({tuple(a.tokens) for a in found.alternatives}) == 3
        assert found.tokens == found.alternatives[0].tokens == tiny.generate([PROMPT], **settings)[0].tokens
    for wrong in ({"n": 0}, {"n": 2, "temperature": 0.0}, {"n": 2, "beams": 2, "temperature": 0.0}):
        with pytest.raises(InputError, match="n is"):
            tiny.generate([PROMPT], max_new_tokens=1, **wrong)


def test_a_request_alone_is_streamed_token_by_token(tiny):
    """Others come in steps; the tokens are the same."""
    config = EngineConfig(slots=2, cache_tokens=1024, steps=4)
    request = Request(PROMPT, max_new_tokens=9)

    def drawn(count):
        """How many tokens the first has after each round."""
        engine, known = tiny.engine(config), []
        for _ in range(count):
            engine.submit(request)
        while not engine.idle:
            engine.step()
            known += [len(sequence.output_token_ids) for sequence in engine.scheduler.slots[:1] if sequence is not None]
        return known

    assert drawn(1) == [1, 2, 3, 4, 5, 6, 7, 8]  # the first comes with the prompt; the last one's slot is free before
    assert drawn(2) == [1, 5]


def test_an_engine_for_threads_and_coroutines(tiny):
    """Asked from four threads and a loop at once, everybody gets what the request gets alone."""
    prompts = [f"<|user|>Tell me {i}<|end|><|assistant|>" for i in range(8)]
    alone = [c.text for c in tiny.generate(prompts, max_new_tokens=6)]
    with AsyncEngine(tiny.engine(EngineConfig(slots=3, cache_tokens=2048))) as engine:
        assert engine.call(lambda inner: inner.config.slots).result(60) == 3
        requests = [Request(p, max_new_tokens=6) for p in prompts]

        async def ask():
            whole = [engine.generate(r) for r in requests[4:6]]
            texts = [c.text for c in await asyncio.gather(*whole)]
            streamed = [piece async for piece in engine.stream(requests[6])]
            async for _ in engine.stream(dataclasses.replace(requests[7], max_new_tokens=500)):
                break  # which cancels it
            with pytest.raises(InputError, match="image"):
                [piece async for piece in engine.stream(Request("<|image_1|>"))]
            return [*texts, "".join(streamed)], len(streamed)

        with ThreadPoolExecutor(4) as pool:
            threads = [pool.submit(lambda r: engine.submit(r).result(60).text, r) for r in requests[:4]]
            texts, pieces = asyncio.run(ask())
            assert [t.result(60) for t in threads] == alone[:4]
        assert texts == alone[4:7]
        assert pieces > 2
        long = engine.submit(Request(prompts[0], max_new_tokens=900))
        long.cancel()
        assert long.result(60).finish_reason == "cancelled"
        left = engine.submit(Request(prompts[1], max_new_tokens=900))
    assert left.result(1).finish_reason == "cancelled"
    with pytest.raises(InputError, match="this engine is closed; make another"):
        engine.submit(requests[0])


def test_an_engine_that_stops_tells_who_waits(tiny, monkeypatch):
    inner = tiny.engine(EngineConfig(slots=1, cache_tokens=1024))
    monkeypatch.setattr(inner.runner, "decode", lambda *_: 1 // 0)
    with AsyncEngine(inner) as engine:
        found = engine.submit(Request(PROMPT, max_new_tokens=5)).result(60)
        assert "stopped by ZeroDivisionError" in (found.error or "")
        with pytest.raises(InputError, match="was stopped by ZeroDivisionError"):
            engine.submit(Request(PROMPT))


def test_the_error_of_a_request_has_its_class_however_it_is_asked_for(tiny):
    request = Request("<|user|><|audio_1|><|end|><|assistant|>", audios=["/nowhere.wav"])
    engine = tiny.engine(EngineConfig(slots=1, cache_tokens=1024))
    ((_, completion),) = engine.run([request])
    with AsyncEngine(tiny.engine(EngineConfig(slots=1, cache_tokens=1024))) as served:

        async def stream():
            return [piece async for piece in served.stream(request)]

        for ask in (
            completion.raise_for_error,
            lambda: list(engine.stream(request)),
            lambda: served.submit(request).result(60).raise_for_error(),
            lambda: asyncio.run(stream()),
        ):
            with pytest.raises(MediaError, match=r"nowhere\.wav.*does not exist"):
                ask()
