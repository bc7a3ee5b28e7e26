"""Beam search in the engine: what transformers finds, whatever else the engine does meanwhile."""

import dataclasses
import json
import random
import re

import numpy as np
import pytest
from helpers.cases import golden_cases, media_of
from helpers.compilations import count_compilations
from helpers.marks import fast_are
from helpers.paths import TINY
from helpers.reference import uncached_logits
from PIL import Image
from scipy.special import log_softmax

from phi4mm_jax import InputError
from phi4mm_jax.engine import EngineConfig, Grammar, Request, Sampling
from phi4mm_jax.engine.answer_file import AnswerFile
from phi4mm_jax.engine.beam_search import Beam, BeamGroup, Search, advance
from phi4mm_jax.engine.jsonl import read_requests
from phi4mm_jax.processing.images import preprocess_image

CASES = {case["name"]: case for case in golden_cases()}
CONFIG = EngineConfig(slots=3, cache_tokens=64 * 64, page_size=64, chunk=256, steps=4, beams=4)
SMALL = EngineConfig(slots=4, cache_tokens=32 * 32, page_size=32, chunk=64, steps=4, beams=4)  # pages just enough
PROMPT = "<|user|>Tell me about the light of seven stones<|end|><|assistant|>"
ADAPTERS = {0: None, 1: "vision", 2: "speech"}


@pytest.fixture(scope="module")
def oracle():
    from helpers import torch_native

    return torch_native.load_native(TINY)


def request_of(case, tokens, beams, **settings):
    media = {kind: of_row[0] for kind, of_row in media_of(case).items()}
    return Request(case["prompt"], **media, max_new_tokens=tokens, beams=beams, **settings)


def assert_found(answer, expected, penalty=1.0):
    sequences, scores = expected
    assert [h.tokens for h in answer.alternatives] == sequences
    lengths = np.asarray([len(h.tokens) for h in answer.alternatives], float) ** penalty
    np.testing.assert_allclose([h.score for h in answer.alternatives] * lengths, scores * lengths, atol=1e-4, rtol=0)
    assert answer.tokens == sequences[0]
    assert answer.text == answer.alternatives[0].text
    assert answer.log_probabilities == answer.alternatives[0].log_probabilities


# ---------------------------------------------------------------------------------------------- as transformers


@pytest.mark.torch
@pytest.mark.parametrize("beams", fast_are([3], [2, 3, 4]))
@pytest.mark.parametrize("penalty", fast_are([0.0], [0.0, 1.0, -1.0, 2.0]))
def test_beams_of_text_are_those_of_transformers(tiny, goldens, oracle, beams, penalty):
    """With and without stop tokens that are met on the way: searches that end early, and at the most tokens."""
    engine = tiny.engine(CONFIG)
    met: list[int] = []  # tokens on the beams' way
    lengths = set()
    for new_tokens, extra in ((1, 0), (12, 0), (14, 1), (30, 5)):
        request = request_of(
            CASES["text"], new_tokens, beams, length_penalty=penalty, stop_tokens=met[:extra]
        )  # fmt: skip
        stops = {*tiny.config.stop_token_ids, *request.stop_tokens}
        ((_, answer),) = engine.run([request])
        expected = oracle.beam_search(
            goldens["text.input_ids"], beams=beams, new_tokens=new_tokens, penalty=penalty, stops=stops
        )
        assert_found(answer, expected, penalty)
        assert answer.finish_reason == ("stop" if answer.tokens[-1] in stops else "length")
        assert engine.scheduler.allocator.num_unreserved == engine.config.pages
        lengths |= {len(h.tokens) < new_tokens for h in answer.alternatives}
        met = list(dict.fromkeys(t for h in answer.alternatives for t in h.tokens[4:9]))
    assert lengths == ({False} if penalty == 2.0 else {False, True})  # a power of 2 favours the longest


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("config", [CONFIG, SMALL], ids=["64", "32"])
def test_longrope_crossing_is_that_of_transformers(tiny, goldens, oracle, config):
    """From 61 tokens over the boundary of 96: keys and values of all beams are made anew with the long rotary set."""
    engine = tiny.engine(config)
    case, stops = CASES["text_cross"], tiny.config.stop_token_ids
    ((_, answer),) = engine.run([request_of(case, 48, 3)])
    expected = oracle.beam_search(goldens["text_cross.input_ids"], beams=3, new_tokens=48, penalty=1.0, stops=stops)
    assert max(len(h.tokens) for h in answer.alternatives) > 96 - 61 + 2
    assert_found(answer, expected)
    assert engine.scheduler.allocator.num_unreserved == engine.config.pages


@pytest.mark.slow
@pytest.mark.torch
def test_beams_of_media_are_those_of_transformers(tiny, goldens, oracle):
    """Clips, an image and a long text, side by side."""
    import torch

    names = ["speech", "vision", "speech_8k", "text_long", "text_tools"]
    engine = tiny.engine(CONFIG)
    answers = dict(engine.run([request_of(CASES[name], 10, 4) for name in names]))
    for place, name in enumerate(names):
        case, media = CASES[name], {}
        if case["images"]:
            (index,) = case["images"]
            processed = preprocess_image(Image.open(TINY / "inputs" / f"image_{index}.png"))
            media["image_pixel_values"] = torch.tensor(processed.crops.transpose(0, 3, 1, 2))[None]
            media["image_attention_mask"] = torch.tensor(processed.patch_mask)[None]
            media["image_sizes"] = torch.tensor(goldens[f"image_{index}.size"])[None].long()
        if case["audios"]:
            (index,) = case["audios"]
            media["audio_input_features"] = torch.tensor(goldens[f"audio_{index}.features"])[None]
            media["audio_embed_sizes"] = torch.tensor([-(-media["audio_input_features"].shape[1] // 8)])
        expected = oracle.beam_search(
            goldens[f"{name}.input_ids"], beams=4, new_tokens=10, penalty=1.0,
            stops=tiny.config.stop_token_ids, adapter=ADAPTERS[case["mode"]], **media,
        )  # fmt: skip
        assert_found(answers[place], expected)
        assert answers[place].prompt_tokens == case["tokens"]


def test_alternatives_in_files_have_the_scores_of_logits_without_a_cache(tiny, tmp_path):
    """Best first, each with its text: its log-probability by whole rows, by its length to the penalty's power."""
    lines = [
        {"id": "plain", "prompt": PROMPT, "beams": 3},
        {"id": "long", "prompt": f"{PROMPT}{' light' * 20}", "beams": 4, "length_penalty": 2.0},  # over the boundary
        {"id": "one", "prompt": PROMPT, "beams": 1},
    ]
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with AnswerFile(output, read_requests(source, max_new_tokens=24), ordered=True) as answers:
        list(answers.run(tiny.engine(CONFIG)))
    plain, long, one = map(json.loads, output.read_text().splitlines())
    assert "alternatives" not in one
    for found, beams, penalty, line in ((plain, 3, 1.0, lines[0]), (long, 4, 2.0, lines[1])):
        alternatives = found["alternatives"]
        sequences = [a["tokens"] for a in alternatives]
        assert len({tuple(s) for s in sequences}) == beams
        assert (found["text"], found["tokens"]) == (alternatives[0]["text"], sequences[0])
        logits = uncached_logits(tiny, tiny.process([line["prompt"]] * beams), sequences)
        totals = [log_softmax(x, -1)[np.arange(len(s)), s].sum() for x, s in zip(logits, sequences, strict=True)]
        expected = [t / len(s) ** penalty for t, s in zip(totals, sequences, strict=True)]
        np.testing.assert_allclose([a["score"] for a in alternatives], expected, rtol=1e-4)
        assert expected == sorted(expected, reverse=True)
        for alternative in alternatives:
            said = [t for t in alternative["tokens"] if t not in tiny.config.stop_token_ids]
            assert alternative["text"] == tiny.processor.tokenizer.decode(said)
    assert long["prompt_tokens"] < 96 < long["prompt_tokens"] + 24


# ------------------------------------------------------------------------------------------------ with a grammar


class Language:
    """Tokens that a regular expression allows after others, by Python's own: those with which a prefix of it ends."""

    def __init__(self, tiny, whole: str, prefix: str):
        tokenizer = tiny.processor.tokenizer
        special = set(tokenizer.special_tokens.values())
        self.pieces = [tokenizer.decode([token]) for token in range(tiny.config.decoder.vocab_size)]
        self._text = [(t, p) for t, p in enumerate(self.pieces) if p and t not in special]
        self._whole, self._prefix, self._stops = whole, prefix, list(tiny.config.stop_token_ids)

    def text(self, tokens) -> str:
        return "".join(self.pieces[token] for token in tokens)

    def after(self, tokens) -> list[int]:
        text = self.text(tokens)
        allowed = [t for t, piece in self._text if re.fullmatch(self._prefix, text + piece)]
        return allowed + (self._stops if re.fullmatch(self._whole, text) else [])

    def ends(self, tokens) -> bool:
        """Whether nothing but a stop token may follow."""
        return set(self.after(tokens)) == set(self._stops)


def plain_search(tiny, prompt, language, beams, limit, penalty) -> list[tuple[list[int], float]]:
    """Beam search over logits without a cache, among all tokens that the language allows."""
    batch, stops = tiny.process([prompt] * beams), set(tiny.config.stop_token_ids)
    growing, ended = [((), 0.0)], []

    def score(answer):
        return answer[1] / len(answer[0]) ** penalty

    for length in range(1, limit + 1):
        rows = [[*tokens, *[0] * (limit - length + 1)] for tokens, _ in growing]
        logits = uncached_logits(tiny, batch, rows + rows[:1] * (beams - len(rows)))
        found = []
        for (tokens, total), row in zip(growing, logits, strict=False):
            own = log_softmax(row[length - 1].astype(np.float64))
            found += [((*tokens, token), total + own[token]) for token in language.after(tokens)]
        found.sort(key=lambda answer: -answer[1])
        ended += [answer for answer in found[:beams] if answer[0][-1] in stops or length == limit]
        going = [] if length == limit else [answer for answer in found if answer[0][-1] not in stops][:beams]
        ended += [answer for answer in going if language.ends(answer[0])]
        growing = [answer for answer in going if not language.ends(answer[0])]
        ended = sorted(ended, key=score, reverse=True)[:beams]
        if not growing or (len(ended) == beams and score(growing[0]) <= score(ended[-1])):
            break
    return [(list(tokens), total) for tokens, total in ended]


LANGUAGES = {  # a prefix of it, and the limit of tokens
    "bounded": ("[a-z]{3}-[0-9]{2,3}", "[a-z]{0,3}|[a-z]{3}-[0-9]{0,3}", 12),
    "unbounded": ("[a-z]{2,}", "[a-z]*", 9),
    "few": ("[ab]", "[ab]?", 12),
    "cut": ("[a-z]{3}-[0-9]{9}", "[a-z]{0,3}|[a-z]{3}-[0-9]{0,9}", 5),
}  # fmt: skip


@pytest.mark.parametrize("penalty", fast_are([1.0], [0.0, 1.0, 2.0]))
@pytest.mark.parametrize("name", LANGUAGES)
def test_beams_obey_a_grammar(tiny, name, penalty):
    """Each its own state of it; beside a group without one and a row. "few" has fewer answers than beams."""
    whole, prefix, limit = LANGUAGES[name]
    asked = Request(
        PROMPT, beams=3, length_penalty=penalty, max_new_tokens=limit, grammar=Grammar.regex(whole)
    )  # fmt: skip
    engine = tiny.engine(CONFIG)
    plain = [Request(PROMPT, beams=2, max_new_tokens=6), Request(PROMPT, max_new_tokens=6, grammar=Grammar.regex("a+"))]
    found = dict(engine.run([plain[0], asked, plain[1]]))
    language = Language(tiny, whole, prefix)
    expected = plain_search(tiny, PROMPT, language, 3, limit, penalty)
    assert [h.tokens for h in found[1].alternatives] == [tokens for tokens, _ in expected]
    totals = [sum(h.log_probabilities) for h in found[1].alternatives]
    np.testing.assert_allclose(totals, [total for _, total in expected], atol=1e-3)
    best = expected[0][0]
    stopped = best[-1] in tiny.config.stop_token_ids or language.ends(best)
    assert found[1].finish_reason == ("stop" if stopped else "length")
    assert [bool(re.fullmatch(whole, h.text)) for h in found[1].alternatives] == [name != "cut"] * len(expected)
    assert found[0].tokens == dict(engine.run(plain))[0].tokens
    assert re.fullmatch("a+", found[2].text)
    assert engine.scheduler.allocator.num_unreserved == engine.config.pages


@pytest.mark.torch
def test_beams_with_a_grammar_are_those_of_transformers(tiny, goldens, oracle):
    """Of a language whose answers end by a stop token only; over the boundary, where all keys are made anew."""
    whole = "[a-z ]+"
    language = Language(tiny, whole, "[a-z ]*")
    for name, limit in (("text", 14), ("text_cross", 40)):
        asked = request_of(CASES[name], limit, 3, grammar=Grammar.regex(whole))
        ((_, answer),) = tiny.engine(SMALL).run([asked])
        expected = oracle.beam_search(
            goldens[f"{name}.input_ids"], beams=3, new_tokens=limit, penalty=1.0, stops=tiny.config.stop_token_ids,
            allowed=language.after,
        )  # fmt: skip
        assert_found(answer, expected)


def test_beams_at_a_dead_end(tiny):
    """After the first token nothing may follow: all beams end with an error, and pages are given back."""
    grammar = Grammar.lark(r"""
start: "a" X
X: /[^\x00-\U0010FFFF]/
""")
    engine = tiny.engine(CONFIG)
    ((_, answer),) = engine.run([Request(PROMPT, beams=2, max_new_tokens=8, grammar=grammar)])
    assert (answer.finish_reason, answer.error_type) == ("error", "InputError")
    assert answer.error.startswith("grammar is ")
    assert engine.scheduler.allocator.num_unreserved == engine.config.pages


# ------------------------------------------------------------------------------------------------ in the engine


def mixed(count, seed=0):
    """Requests of all kinds, a third of them with beams; some prompts begin alike, some answers cross the boundary."""
    draw = random.Random(seed)
    words = ["time", "light", "house", "water", "green", "small", "never", "write", "seven", "stone"]
    long = "<|user|>" + " ".join(words * 4)
    requests = []
    for i in range(count):
        prompt = draw.choice(["<|user|>", long]) + " ".join(draw.choices(words, k=draw.randint(1, 20)))
        settings = {}
        if i % 3 == 0:
            settings = {"beams": draw.randint(2, 4), "length_penalty": draw.choice([0.5, 1.0, 1.5])}
        elif i % 3 == 1:
            settings = {"sampling": Sampling(0.8, seed=i)}
        requests.append(Request(f"{prompt}<|end|><|assistant|>", max_new_tokens=draw.randint(1, 70), **settings))
    return requests


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_beams_do_not_depend_on_the_batch(tiny, cache_dtype):
    """Several groups and single rows in slots that are refilled, over pages that are just enough."""
    requests = mixed(15)
    if cache_dtype == "int8":  # rounding at 1e-7 can make a value the next integer, and over 70 tokens another beam
        requests = [dataclasses.replace(r, max_new_tokens=min(r.max_new_tokens, 12)) for r in requests]
    engine, alone = (tiny.engine(dataclasses.replace(SMALL, cache_dtype=cache_dtype)) for _ in range(2))
    together = dict(engine.run(requests))
    assert engine.scheduler.allocator.num_unreserved == engine.config.pages
    assert engine.scheduler.allocator.in_use == 0
    for place, request in enumerate(requests):
        ((_, expected),) = alone.run([request])
        assert together[place].tokens == expected.tokens, request
        assert [h.tokens for h in together[place].alternatives] == [h.tokens for h in expected.alternatives]
        assert len(expected.alternatives) == (request.beams if request.beams > 1 else 0)
        np.testing.assert_allclose(together[place].log_probabilities, expected.log_probabilities, atol=1e-3)


def test_beams_share_pages_and_give_them_back(tiny):
    """Of a prompt of 333 tokens there is one copy, and every page that a beam writes to is its own."""
    engine, size = tiny.engine(SMALL), SMALL.page_tokens
    number = engine.submit(request_of(CASES["text_long"], 70, 4))
    most, done = 0, None
    while done is None:
        done = next((u.completion for u in engine.step() if u.id == number), None)
        sequence, in_use = engine.scheduler.slots[0], engine.scheduler.allocator.in_use
        if sequence is not None and sequence.beams is not None and sequence.beams.pages:
            most = max(most, in_use)
            assert in_use == len(sequence.pages) + sequence.beams.num_pages
            assert sequence.num_reserved_pages + in_use == sequence.max_pages
            assert len(sequence.pages) == 333 // size
            if sequence.num_computed_tokens % size:
                written = [pages[-1] for pages in sequence.beams.pages]
                assert len(set(written)) == 4
                assert not set(written) & set(sequence.pages)
    assert 333 // size + 4 <= most <= 333 // size + 4 * 3
    assert (engine.scheduler.allocator.num_unreserved, engine.scheduler.allocator.in_use) == (SMALL.pages, 0)


@pytest.mark.slow
def test_nothing_compiles_after_warm_up(tiny):
    engine = tiny.engine(dataclasses.replace(SMALL, slots=2, beams=3))
    seen = []
    engine.warm_up(lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    before = count_compilations()
    requests = [dataclasses.replace(r, beams=min(r.beams, 3)) for r in mixed(9, seed=1)]
    requests += [request_of(CASES[name], 4, beams) for name in ("speech", "vision") for beams in (1, 3)]
    answers = dict(engine.run(requests))
    assert {a.finish_reason for a in answers.values()} <= {"stop", "length"}
    assert count_compilations() == before


def test_without_beams_there_is_no_program_for_them(tiny):
    engine = tiny.engine(dataclasses.replace(CONFIG, beams=1))
    assert engine.config.beam_batch_sizes == []
    ((_, answer),) = engine.run([Request(PROMPT, max_new_tokens=4, beams=2)])
    assert answer.finish_reason == "error"
    assert "beams is 2" in answer.error
    assert "EngineConfig" in answer.error


@pytest.mark.parametrize("rounds", [0, 1, 5, 20])
def test_cancelling_gives_all_pages_back(tiny, rounds):
    """Before it begins, in the middle, and after its keys were made anew (rounds of 4 tokens)."""
    engine = tiny.engine(SMALL)
    number = engine.submit(Request(PROMPT, max_new_tokens=200, beams=3))
    other = engine.submit(Request("<|user|>More<|end|><|assistant|>", max_new_tokens=12))
    updates = [u for _ in range(rounds) for u in engine.step()]
    engine.cancel(number)
    while not engine.idle:
        updates += engine.step()
    answers = {u.id: u.completion for u in updates if u.completion is not None}
    assert answers[number].finish_reason == "cancelled"
    assert len(answers[number].alternatives) == (3 if rounds else 0)
    assert bool(answers[number].tokens) == bool(rounds)
    assert len(answers[other].tokens) == 12
    assert (engine.scheduler.allocator.num_unreserved, engine.scheduler.allocator.in_use) == (engine.config.pages, 0)


def test_streaming_gives_the_text_at_the_end(tiny):
    engine = tiny.engine(CONFIG)
    request = Request(PROMPT, max_new_tokens=10, beams=2)
    (piece,) = engine.stream(request)
    ((_, answer),) = engine.run([request])
    assert piece == answer.text == answer.alternatives[0].text
    assert answer.alternatives[0].score >= answer.alternatives[1].score


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"beams": 0}, "beams"),
        ({"beams": 2.0}, "beams"),
        ({"beams": 2, "length_penalty": float("nan")}, "length_penalty"),
        ({"beams": 2, "length_penalty": 1e9}, "length_penalty"),
        ({"beams": 2, "sampling": Sampling(0.5)}, "temperature"),
        ({"beams": 2, "sampling": Sampling(top_k=4)}, "top_k"),
        ({"beams": 2, "sampling": Sampling(repetition_penalty=1.1)}, "repetition_penalty"),
        ({"beams": 2, "stop": ["a"]}, "stop"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(InputError, match=named):
        Request(PROMPT, **settings)


@pytest.mark.slow
def test_requests_beyond_the_engine_end_with_errors(tiny):
    config = dataclasses.replace(SMALL, cache_tokens=32 * 8)
    requests = [
        Request(PROMPT, max_new_tokens=2, beams=5),
        Request(PROMPT, max_new_tokens=2, beams=2, stop_tokens=list(range(20))),
        Request(PROMPT, max_new_tokens=100, beams=4),
        Request(PROMPT, max_new_tokens=100),
        Request(PROMPT, max_new_tokens=10, beams=4),
    ]
    answers = dict(tiny.engine(config).run(requests))
    assert [answers[i].finish_reason for i in range(5)] == ["error", "error", "error", "length", "length"]
    for i, named in enumerate(["beams is 5", "stop_tokens", "each of 4 beams"]):
        assert named in answers[i].error


# ------------------------------------------------------------------------------------------------- the selection


def search_of(**settings):
    return Search(**({"width": 2, "limit": 9, "length_penalty": 1.0, "stops": frozenset([0])} | settings))


def test_beams_extend_the_likeliest():
    search, parents = advance(search_of(), np.array([[3, 4, 5]]), np.log([[0.5, 0.3, 0.2]], dtype=np.float32))
    assert parents == [0, 0]
    assert [beam.tokens for beam in search.beams] == [(3,), (4,)]
    likely = np.log([[0.4, 0.35, 0.25], [0.9, 0.06, 0.04]], dtype=np.float32)
    search, parents = advance(search, np.array([[6, 7, 8], [9, 6, 7]]), likely)
    assert parents == [1, 0]
    assert [beam.tokens for beam in search.beams] == [(4, 9), (3, 6)]
    np.testing.assert_allclose([np.exp(beam.total) for beam in search.beams], [0.27, 0.2], rtol=1e-5)


def test_an_answer_that_ends_below_the_best_is_left_out():
    """The stop token is third: two beams go on, and nothing has ended."""
    search, _ = advance(search_of(), np.array([[3, 4, 0]]), np.log([[0.5, 0.3, 0.2]], dtype=np.float32))
    assert search.ended == ()
    search, _ = advance(search_of(), np.array([[3, 0, 4]]), np.log([[0.5, 0.3, 0.2]], dtype=np.float32))
    assert [beam.tokens for beam in search.ended] == [(0,)]
    assert [beam.tokens for beam in search.beams] == [(3,), (4,)]
    assert [beam.tokens for beam in search.best] == [(3,), (0,)]
    assert not search.over


def test_a_search_is_over_once_no_beam_beats_the_worst_answer():
    """By scores of -1 and -3: a total of -3 over two tokens is between them, and -11 below both."""
    ended = Beam((0,), total=-1.0, stopped=True), Beam((5, 0), total=-6.0, stopped=True)
    search = search_of(beams=(Beam((3,), total=-2.0),), ended=ended)
    assert [search.score(beam) for beam in ended] == [-1.0, -3.0]
    assert search_of(length_penalty=2.0).score(ended[1]) == -1.5
    for log_probability, over in ((-1.0, False), (-9.0, True)):
        found, _ = advance(search, np.array([[3, 4, 6]]), np.full((1, 3), log_probability, np.float32))
        assert found.over == over


@pytest.mark.parametrize(("skip", "text"), [(False, "a<|tag|>b"), (True, "ab")])
def test_texts_of_beams_without_special_tokens(tiny, skip, text):
    tokenizer = tiny.processor.tokenizer
    end = tokenizer.special_tokens["<|end|>"]
    tokens = (*tokenizer.encode("a<|tag|>b", special=True), end)
    search = search_of(width=1, stops=frozenset([end]), ended=(Beam(tokens, total=-1.0, stopped=True),))
    found = BeamGroup(search).completion(tokenizer, 3, skip_special=skip)
    assert (found.text, found.alternatives[0].text, found.tokens) == (text, text, list(tokens))
    assert [answer.text for answer in found.answers(tokenizer)] == [text]
