"""Benchmarks: metrics against values by hand and against others' code, intervals, manifests, and the whole program."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import sys
from pathlib import Path

import jax
import jiwer
import numpy as np
import pytest
import sacrebleu
from helpers.paths import TINY

import phi4mm_jax
from infer import evaluate
from phi4mm_jax import CheckpointError, InputError
from phi4mm_jax.engine import Engine, EngineConfig, Request
from phi4mm_jax.evaluation import intervals, metrics
from phi4mm_jax.evaluation.answers import Answer, answer_file, ask, settings_of
from phi4mm_jax.evaluation.items import Item, read_items
from phi4mm_jax.evaluation.metrics import corpus_score, counts_of, make_metric, make_normalizer
from phi4mm_jax.evaluation.published import PUBLISHED, published_mean
from phi4mm_jax.evaluation.report import TASKS, Measure, notes, table

CLIP = TINY / "inputs" / "audio_0.flac"
SMALL = EngineConfig(slots=1, cache_tokens=2048)
SIZES = ["--slots", "1", "--cache-tokens", "2048"]


def score(name: str, *pairs) -> float:
    """The metric of (accepted answers, answer) pairs."""
    accepted, answers = zip(*pairs, strict=True)
    return corpus_score(make_metric(name), [[a] if isinstance(a, str) else a for a in accepted], answers)


# ---------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    ("reference", "answer", "wer", "cer"),
    [
        ("the cat sat", "the cat sat", 0, 0),
        ("the cat sat", "the bat sat", 1 / 3, 1 / 11),  # substituted
        ("the cat sat", "the sat", 1 / 3, 4 / 11),  # left out
        ("the cat", "the big cat", 1 / 2, 4 / 7),  # put in
        ("a b c d", "b c d a", 2 / 4, 4 / 7),  # moved: one out, one in
        ("a b", "", 1, 1),
        ("a", "a b c d", 3, 6),  # above 100%
        ("a  b\n c ", "a b c", 0, 0),  # white space is white space
    ],
)
def test_error_rates_by_hand(reference, answer, wer, cer):
    assert score("wer", (reference, answer)) == pytest.approx(wer, abs=1e-12)
    assert score("cer", (reference, answer)) == pytest.approx(cer, abs=1e-12)


def test_error_rates_are_those_of_all_words():
    """One word wrong of ten, not the mean of 1/1 and 0/9."""
    assert score("wer", ("a", "b"), ("c d e f g h i j k", "c d e f g h i j k")) == pytest.approx(1 / 10)


def test_error_rates_are_jiwers():
    draw = random.Random(0)

    def text():
        return " ".join(draw.choices(["a", "be", "sea", "deep", "ewe"], k=draw.randint(1, 12)))

    references, answers = [text() for _ in range(200)], [text() for _ in range(200)]
    pairs = list(zip(references, answers, strict=True))
    assert score("wer", *pairs) == pytest.approx(jiwer.wer(references, answers), abs=1e-12)
    assert score("cer", *pairs) == pytest.approx(jiwer.cer(references, answers), abs=1e-12)


def test_of_several_accepted_answers_the_one_that_fits_best_counts():
    assert score("wer", (["two words here", "one two"], "one two")) == 0
    assert score("wer", (["a b c d", "a x"], "a b")) == 0.5  # a tie of rates: the first, 2 of 4
    counts = counts_of(make_metric("wer"), [["a b c d", "a x"]], ["a b"])
    assert counts.tolist() == [[2, 4]]
    assert score("exact", (["yes", "Yes."], " Yes.\n")) == 1
    assert score("exact", (["yes"], "Yes")) == 0
    assert score("anls", (["colour", "color"], "color")) == 1


@pytest.mark.parametrize(
    ("accepted", "answer", "expected"),
    [
        (["hello"], "Hello", 1),  # whatever the case
        (["hello"], "hallo", 1 - 1 / 5),
        (["abc"], "abcd", 1 - 1 / 4),  # by the longer one
        (["ab"], "ax", 0),  # half of it: not less than the threshold
        (["abc"], "abx", 1 - 1 / 3),
        (["abcde"], "abxyz", 0),  # 3 of 5
        (["3 may"], "May 3", 0),  # 4 of 5
        (["3 may", "may 3"], "May 3", 1),
        (["a  b"], "a b", 1),
        (["one"], "", 0),
    ],
)
def test_anls_by_hand(accepted, answer, expected):
    assert score("anls", (accepted, answer)) == pytest.approx(expected, abs=1e-12)


def test_anls_is_a_mean():
    assert score("anls", ("hello", "hallo"), ("ab", "ax"), ("x", "x")) == pytest.approx((0.8 + 0 + 1) / 3)


def test_bleu_is_sacrebleus():
    references = ["The cat sat on the mat today.", "Hello there, my old friend!", "It was late in the evening, I said."]
    answers = ["The cat sat on a mat today.", "Hello, my old friend!", "It was late this evening, I said."]
    expected = sacrebleu.corpus_bleu(answers, [references]).score
    assert 20 < expected < 80
    assert score("bleu", *zip(references, answers, strict=True)) == pytest.approx(expected, abs=1e-9)
    assert score("bleu", *zip(references, references, strict=True)) == pytest.approx(100)
    short = "a cat", "a cat"  # no 3 words in a row: nothing, as a corpus
    assert score("bleu", short) == sacrebleu.corpus_bleu([short[1]], [[short[0]]]).score == 0
    several = [[r, a] for r, a in zip(references, answers, strict=True)]
    assert score("bleu", *zip(several, answers, strict=True)) == pytest.approx(100)
    signature = make_metric("bleu", "zh").signature
    assert signature is not None
    assert signature(several).startswith("nrefs:2|case:mixed|eff:no|tok:zh|smooth:exp|")


SPLIT = {  # by hand
    "今日はとても良い天気ですね。": "今日 は とても 良い 天気 です ね 。",
    "今日はとても悪い天気ですね。": "今日 は とても 悪い 天気 です ね 。",
    "駅まで歩いて行きます。": "駅 まで 歩い て 行き ます 。",
    "駅まで歩いて行きました。": "駅 まで 歩い て 行き まし た 。",
    "오늘은 날씨가 아주 좋습니다.": "오늘 은 날씨 가 아주 좋 습니다 .",
    "오늘은 날씨가 아주 나쁩니다.": "오늘 은 날씨 가 아주 나쁩니다 .",
    "学校很大。": "学 校 很 大 。",
    "学校很大吗？": "学 校 很 大 吗 ？",
}


@pytest.mark.parametrize(
    ("tokenize", "pairs"),
    [
        ("ja-mecab", [("今日はとても良い天気ですね。", "今日はとても悪い天気ですね。"),
                      ("駅まで歩いて行きます。", "駅まで歩いて行きました。")]),
        ("ko-mecab", [("오늘은 날씨가 아주 좋습니다.", "오늘은 날씨가 아주 나쁩니다.")]),
        ("zh", [("学校很大。", "学校很大吗？")]),
    ],
)  # fmt: skip
def test_bleu_by_the_tokeniser_of_a_language(tokenize, pairs):
    """BLEU of the words which it finds; 13a would take a sentence for one or a few."""
    references, answers = ([SPLIT[text] for text in texts] for texts in zip(*pairs, strict=True))
    expected = sacrebleu.corpus_bleu(answers, [references], tokenize="none").score
    metric = make_metric("bleu", tokenize)
    accepted, given = [[reference] for reference, _ in pairs], [answer for _, answer in pairs]
    assert corpus_score(metric, accepted, given) == pytest.approx(expected, abs=1e-9)
    assert 20 < expected < 95
    assert abs(corpus_score(make_metric("bleu"), accepted, given) - expected) > 5
    assert metric.signature is not None
    assert f"|tok:{tokenize}" in metric.signature(accepted)


def test_a_tokeniser_whose_package_is_missing_is_told(monkeypatch):
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_ja_mecab.MeCab", None)
    with pytest.raises(InputError, match=r"tokeniser 'ja-mecab' cannot be used .*pip install sacrebleu\[ja\]"):
        make_metric("bleu", "ja-mecab")


def test_an_item_that_failed_is_wrong_whatever_is_accepted():
    assert score("exact", ("", None), ("a", "a")) == 0.5
    assert score("anls", ("", None), ("a", "a")) == 0.5
    assert score("wer", ("a b c", None), ("d", "d")) == 3 / 4
    assert score("cer", ("abc", None), ("d", "d")) == 3 / 4
    whole = "a text of several words", "a text of several words"
    assert 0 < score("bleu", whole, ("another one that is there", None)) < score("bleu", whole)


# ---------------------------------------------------------------------------------------------- normalisation

ENGLISH = [
    ("Hello, World!", "hello world"),
    ("I'm sure it's Mr. Smith's", "i am sure it is mister smith is"),
    ("um, we won't go", "we will not go"),
    ("the colour of twenty-one tyres", "the color of 21 tires"),
    ("Ten thousand dollars", "$10000"),
    ("about 10,000 people", "about 10000 people"),
    ("fifty percent [laughter] (inaudible) off", "50% off"),
    ("café naïve", "cafe naive"),
]


@pytest.mark.parametrize(("text", "expected"), ENGLISH)
def test_english_normalisation(text, expected):
    assert make_normalizer("english")(text) == expected


@pytest.mark.torch
def test_english_is_that_of_transformers():
    """Its copy of Whisper's rules takes the list of spellings from a checkpoint's file; here from the package."""
    from importlib.resources import files

    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    spellings = json.loads(files("whisper_normalizer").joinpath("normalizers/english.json").read_text())
    assert len(spellings) > 1000
    theirs, ours = EnglishTextNormalizer(spellings), make_normalizer("english")
    draw = random.Random(0)
    words = (
        "one two oh and point twenty thousand million $ % 1 2.5 1,000 dollars per cent first don't it's Colour , - . um"
    )
    for _ in range(500):
        text = " ".join(draw.choices(words.split(), k=8))
        assert ours(text) == theirs(text).strip(), text


def test_other_languages():
    assert make_normalizer("basic")("Größe: „Straße“, 10!") == "größe straße 10"
    assert make_normalizer("letters")("今日は、いい 天気ですね。") == "今日はいい天気ですね"
    assert make_normalizer("none")(" As it is. ") == " As it is. "


def test_a_number_without_end_is_no_error():
    """Python refuses to convert it, and Whisper's rules would raise."""
    assert make_normalizer("english")(f"It is {'1' * 5000}.") == f"it is {'1' * 5000}"


def test_normalisation_is_an_option():
    wer = make_metric("wer")
    texts = [["It's two dollars."]], ["it is $2"]
    assert corpus_score(wer, *texts, make_normalizer("english")) == 0
    assert corpus_score(wer, *texts) == 1


# ---------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("right", "number", "low", "high"),
    [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (5, 10, 0.2366, 0.7634), (90, 100, 0.8256, 0.9448)],  # Wilson's formula
)
def test_a_share_has_wilsons_interval(right, number, low, high):
    counts = counts_of(make_metric("exact"), [["a"]] * number, ["a"] * right + ["b"] * (number - right))
    assert intervals.interval(make_metric("exact"), counts) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "wrong", "known"), [(1, 1, False), (5, 4, False), (5, 5, True), (50, 0, False)])
def test_few_items_or_such_that_are_alike_have_no_interval(right, wrong, known):
    wer = make_metric("wer")
    counts = counts_of(wer, [["a b c d"]] * (right + wrong), ["a b c d"] * right + ["a b c x"] * wrong)
    assert (intervals.interval(wer, counts) is not None) == known
    sets = [counts, counts_of(wer, [["a b"]] * 20, ["a b"] * 10 + ["a c"] * 10)]
    assert (intervals.mean_interval(wer, sets) is not None) == (right + wrong >= 10)


def test_a_table_without_an_interval_says_so():
    measure, report = Measure("asr"), measured("asr", ("a b", "a b"), ("a b", "a c"))
    figure = report.sets[0].figures["wer"]
    assert (figure.value, figure.low, figure.high) == (25, None, None)
    assert list(table(report, measure).columns[4].cells) == ["-"]
    assert list(notes(report, [], 5)) == [
        "-: no interval, of fewer than 10 items in a set, or of items that are all alike"
    ]


def bounds(found: tuple[float, float] | None) -> tuple[float, float]:
    assert found is not None
    return found


def test_a_mean_has_the_interval_of_the_normal_distribution():
    anls = make_metric("anls")
    counts = np.stack([np.random.default_rng(3).uniform(size=400), np.ones(400)], 1)
    low, high = bounds(intervals.interval(anls, counts))
    mean, error = counts[:, 0].mean(), counts[:, 0].std() / 20
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert intervals.interval(anls, counts) == (low, high)  # the same draws every time


def test_a_corpus_is_drawn_as_a_corpus():
    """One long item with all the errors: how often it is drawn decides, as both errors and words."""
    wer = make_metric("wer")
    counts = np.asarray([[90.0, 90.0], *([[0.0, 1.0]] * 10)])
    low, high = bounds(intervals.interval(wer, counts))
    assert low == 0  # in a third of the draws it is not there
    assert high == pytest.approx(3 * 90 / (3 * 90 + 8), abs=0.01)  # three times or less in 98% of them
    assert np.isfinite(intervals.bootstrap(wer, counts)).all()


def test_draws_without_a_word_do_not_count():
    wer = make_metric("wer")
    assert intervals.percentiles(intervals.bootstrap(wer, np.asarray([[1.0, 2.0], [0.0, 0.0]]))) == (0.5, 0.5)


def test_the_mean_of_sets_is_surer_than_a_set():
    anls = make_metric("anls")
    draw = np.random.default_rng(0)
    sets = [np.stack([draw.uniform(size=100), np.ones(100)], 1) for _ in range(4)]
    low, high = bounds(intervals.mean_interval(anls, sets))
    widths = [np.diff(bounds(intervals.interval(anls, s))).item() for s in sets]
    assert high - low < 0.75 * min(widths)
    low, high = bounds(intervals.mean_interval(anls, [sets[0], np.stack([1 - sets[0][:, 0], np.ones(100)], 1)]))
    assert high - low > 0.5 * min(widths)  # draws of their own: the same ones would take each other away


# ---------------------------------------------------------------------------------------------- published figures

AVERAGES = {  # as the report prints them
    "open-asr": 6.14, "common-voice-15": 6.80, "fleurs": 4.00, "covost2-x-en": 39.33, "covost2-x-en-cot": 40.76,
    "covost2-en-x": 37.82, "covost2-en-x-cot": 38.73, "fleurs-x-en": 29.86, "fleurs-x-en-cot": 32.35,
    "fleurs-en-x": 32.15, "fleurs-en-x-cot": 33.56,
}  # fmt: skip


@pytest.mark.parametrize("name", AVERAGES)
def test_figures_have_the_averages_that_are_printed_beside_them(name):
    assert published_mean(list(PUBLISHED[name].figures.values())) == AVERAGES[name]


def test_figures_of_letters_are_character_error_rates():
    fleurs = PUBLISHED["fleurs"]
    assert fleurs.figure("de", "wer") == 3.96
    assert fleurs.figure("ja", "wer") is None
    assert fleurs.figure("ja", "cer") == 4.50
    with pytest.raises(InputError, match=r"ja: the reference has its cer, which is not measured here \(bleu\)"):
        fleurs.check("ja", ["bleu"])
    with pytest.raises(InputError, match=r"held: is not a set of the reference; .* en, de, es"):
        fleurs.check("held", ["wer", "cer"])


# ---------------------------------------------------------------------------------------------- manifests


def write(path: Path, lines) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def user(*content) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def assistant(text) -> dict:
    return {"role": "assistant", "content": text}


def test_items_of_a_manifest(tmp_path):
    image = {"type": "image", "image": "a.png"}
    lines = [
        {"messages": [user("A?"), assistant("a")], "id": "first"},
        "",
        {"messages": [user("A?"), assistant("a"), user(image, "B?"), assistant("b")], "answers": ["c", "b"]},
        {"messages": [user("A?")], "answers": ["a", ""]},
        {"messages": json.dumps([user("A?"), assistant("a")])},
    ]
    first, second, third, fourth = read_items(write(tmp_path / "m.jsonl", lines))
    assert (first.where, first.id, first.references) == (f"{tmp_path}/m.jsonl: line 1", "first", ("a",))
    assert (second.where, second.references) == (f"{tmp_path}/m.jsonl: line 3", ("b", "c"))
    assert [m["role"] for m in second.prompt] == ["user", "assistant", "user"]
    assert second.prompt[-1]["content"][0] == {"type": "image", "image": str(tmp_path / "a.png")}
    assert third.references == ("a", "")
    assert fourth.prompt == first.prompt
    assert len(read_items(tmp_path / "m.jsonl", 2)) == 2


def test_some_items_are_from_all_over_the_manifest(tmp_path):
    path = write(tmp_path / "m.jsonl", [{"messages": [user("A?"), assistant(str(i))]} for i in range(9)])
    assert [item.references for item in read_items(path, 3)] == [("0",), ("3",), ("6",)]
    assert [item.references for item in read_items(path, 20)] == [(str(i),) for i in range(9)]


def test_items_in_the_forms_of_other_tools(tmp_path):
    tool = {"type": "function", "function": {"name": "f"}}
    shown = [{"type": "image"}, {"type": "text", "text": "A?", "image": None}]
    lines = [
        {"messages": [{"role": "user", "content": "<image>A?"}, assistant("a")], "images": ["a.png"], "answers": None},
        {"conversations": [{"from": "human", "value": "<image>A?"}, {"from": "gpt", "value": "a"}], "image": "a.png"},
        {"messages": [{"role": "user", "content": shown}, assistant([{"type": "text", "text": "a"}])],
         "images": [{"bytes": None, "path": "a.png"}]},
        {"messages": [user("A?"), assistant("a")], "tools": [tool], "system": "s"},
    ]  # fmt: skip
    items = read_items(write(tmp_path / "m.jsonl", lines))
    assert all(item.references == ("a",) for item in items)
    image = {"type": "image", "image": str(tmp_path / "a.png")}
    plain = [{"role": "user", "content": [image, {"type": "text", "text": "A?"}]}]
    assert items[0].prompt == items[1].prompt == plain
    (asked,) = items[2].prompt
    stored = {"type": "image", "image": {"bytes": None, "path": str(tmp_path / "a.png")}}
    assert asked["content"] == [stored, {"type": "text", "text": "A?", "image": None}]
    assert items[3].prompt == [{"role": "system", "content": "s", "tools": [tool]}, user("A?")]
    broken = [{**lines[0], "images": []}, {**lines[0], "images": None, "image_path": "a.png"}]
    with pytest.raises(InputError, match=r"line 1: .*1 place.*0 image.*line 2: 'image_path' looks like media"):
        read_items(write(tmp_path / "broken.jsonl", broken))


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("oops", "the line is not JSON"),
        ([], "the item is a list"),
        ({}, "messages is missing or empty"),
        ({"messages": [user("A?")]}, 'no reference; end the messages with one of role assistant, or give "answers"'),
        ({"messages": [user("A?")], "answers": []}, "no reference"),
        ({"messages": [user("A?")], "answers": "a"}, "answers is 'a'; expected a list of strings"),
        ({"messages": [user("A?")], "answers": [1]}, "expected a list of strings"),
        ({"messages": [user("A?"), assistant([])]}, "the answer is not plain text"),
        ({"messages": [assistant("a")]}, "nothing before the answer"),
    ],
)
def test_what_cannot_be_measured_is_an_error(tmp_path, line, cause):
    path = write(tmp_path / "m.jsonl", [{"messages": [user("A?"), assistant("a")]}, line])
    with pytest.raises(InputError) as raised:
        read_items(path)
    assert str(raised.value).startswith(f"{path}: line 2: ")
    assert cause in str(raised.value)


def test_all_lines_without_a_reference_are_told_at_once(tmp_path):
    path = write(tmp_path / "m.jsonl", [{"messages": [user("A?")]}] * 9)
    with pytest.raises(InputError, match=r"line 1: no reference.*line 5: no reference.*; and 4 more lines\. Repair"):
        read_items(path)


# ---------------------------------------------------------------------------------------------- tasks


def measured(task: str, *pairs, **options):
    """The report of (reference, answer) pairs, in one set."""
    items = [Item(f"m: line {i}", None, [], (reference,)) for i, (reference, _) in enumerate(pairs)]
    answers = [Answer(answer, None if answer is not None else "failed") for _, answer in pairs]
    return Measure(task, **options)({"m": (items, answers)})


def test_tasks_have_their_metrics_and_normalisation():
    found = {task: list(measured(task, ("a", "a")).sets[0].figures) for task in TASKS}
    assert found == {
        "asr": ["wer", "cer"], "ast": ["bleu"], "ocr": ["exact", "anls"], "vqa": ["exact", "anls"], "exact": ["exact"],
    }  # fmt: skip
    assert measured("asr", ("It's 2.", "it is two")).sets[0].figures["wer"].value == 0
    assert measured("exact", ("It's 2.", "it's 2")).sets[0].figures["exact"].value == 0
    assert measured("exact", ("It's 2.", "it's 2"), normalizer="basic").sets[0].figures["exact"].value == 100


def test_letters_have_no_words():
    (only,) = measured("asr", ("今日は、晴れ。", "今日は晴 れ"), normalizer="letters").sets
    assert list(only.figures) == ["cer"]
    assert only.figures["cer"].value == 0


def test_a_translation_comes_after_the_transcript():
    text = "it was very late in the evening"
    assert measured("ast", (text, f"es war spät <sep> {text}")).sets[0].figures["bleu"].value == pytest.approx(100)
    assert measured("asr", ("a b", "x <sep> a b")).sets[0].figures["wer"].value > 0


def test_figures_are_percentages_with_intervals():
    (only,) = measured("exact", *[("a", "a")] * 8, ("a", "b"), ("a", None)).sets
    figure = only.figures["exact"]
    assert (only.items, only.errors) == (10, 1)
    assert figure.value == pytest.approx(80)
    assert (figure.low, figure.high) == pytest.approx((49.02, 94.33), abs=0.005)


# ---------------------------------------------------------------------------------------------- adapters


@pytest.mark.slow
def test_a_request_may_name_its_adapter(tiny):
    """With none it is that of a model without adapters; with another, the network's for a row that has that one."""
    prompt = "<|user|><|audio_1|>What?<|end|><|assistant|>"
    names = ["none", "vision", "speech", None]
    requests = [Request(prompt, audios=[CLIP], max_new_tokens=1, adapter=name) for name in names]
    answers = dict(tiny.engine(SMALL).run(requests))
    assert answers[2] == answers[3]
    assert answers[2].log_probabilities == answers[3].log_probabilities
    without = Engine(tiny.programs, {"params": tiny.variables["params"]}, tiny.processor, SMALL)
    ((_, bare),) = without.run([Request(prompt, audios=[CLIP], max_new_tokens=1)])
    assert (answers[0], answers[0].log_probabilities) == (bare, bare.log_probabilities)
    batch = tiny.process([prompt], audios=[[CLIP]])
    logits = tiny.logits(batch._replace(adapters=np.asarray([1], np.int32)))[0, batch.lengths[0] - 1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    assert answers[1].tokens == [int(expected.argmax())]
    assert answers[1].log_probabilities[0] == pytest.approx(expected.max(), abs=1e-4)
    for one, other in itertools.combinations(range(3), 2):
        assert abs(answers[one].log_probabilities[0] - answers[other].log_probabilities[0]) > 1e-2


def test_adapters_that_are_not_there(tiny):
    ((_, unknown),) = tiny.engine(SMALL).run([Request("a", adapter="voice")])
    assert unknown.error == "adapter is 'voice'; expected one of none, vision, speech"
    merged = phi4mm_jax.load(TINY, dtype="float32", merge="speech")
    prompt = [user({"type": "audio", "audio": str(CLIP)}, "What?")]
    for adapter in ("none", "speech"):
        ((_, answer),) = merged.engine(SMALL).run([Request(prompt, max_new_tokens=1, adapter=adapter)])
        assert answer.error.startswith(f"adapter is '{adapter}', but the speech adapter is merged")


def test_a_checkpoint_without_the_adapter(tmp_path):
    config = json.loads((TINY / "config.json").read_text())
    config["vision_lora"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    from phi4mm_jax.evaluation.answers import check_adapter

    check_adapter(tmp_path, "speech")
    check_adapter(tmp_path, "none")
    with pytest.raises(InputError, match=r"has no vision adapter \(it has speech\); choose another"):
        check_adapter(tmp_path, "vision")


# ---------------------------------------------------------------------------------------------- settings


def test_a_run_is_resumed_with_the_same_weights_alone(tmp_path):
    """Those of a copy, whatever its dates, are the same; one value among 786,432 makes others."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(3 << 20))
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "model.safetensors", (0, 0))
    items = [Item("m: line 1", None, [user("A?")], ("a",))]

    def claim(model, dtype="float32", adapter=None, max_new_tokens=3, of=items):
        with answer_file(tmp_path / "run", settings_of(tmp_path / model, dtype, adapter, max_new_tokens, of), of):
            pass

    claim("model")
    claim("copy")
    for changed, named in (
        ({"dtype": "bfloat16"}, "dtype"), ({"adapter": "none"}, "adapter"), ({"max_new_tokens": 4}, "max_new_tokens"),
        ({"of": [dataclasses.replace(items[0], prompt=[user("B?")])]}, "prompts"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=rf"run: holds answers of other {named} \(.*, now .*\); give another"):
            claim("model", **changed)
    with (tmp_path / "copy" / "model.safetensors").open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"\x01")
    with pytest.raises(InputError, match=r"run: holds answers of other weights \("):
        claim("copy")


# ---------------------------------------------------------------------------------------------- the program


class Program:
    """The program with the tiny checkpoint, and how often it loaded it."""

    def __init__(self, tiny, monkeypatch, capsys):
        self.loads, self._patch, self._capsys = 0, monkeypatch, capsys

        def load(*_, **__):
            self.loads += 1
            return tiny

        monkeypatch.setattr(evaluate.phi4mm_jax, "load", load)

    def __call__(self, *arguments) -> tuple[int, str, str]:
        """Its status, output and errors."""
        given = ["--model", TINY, "--compilation-cache", "", "--max-new-tokens", 1, *SIZES, *arguments]
        self._patch.setattr(sys, "argv", ["evaluate", *map(str, given)])
        return evaluate.main(), *self._capsys.readouterr()


@pytest.fixture
def program(tiny, monkeypatch, capsys) -> Program:
    return Program(tiny, monkeypatch, capsys)


PROMPTS = [
    [user("Who are you?")],
    [user({"type": "audio", "audio": str(CLIP)}, "What is said?")],
    [user("How are you?")],
]


@pytest.fixture(scope="module")
def said(tiny) -> dict[str, list]:
    """What the model says to each prompt, and to that with the clip by other adapters."""
    items = [Item(str(i), None, prompt, ("",)) for i, prompt in enumerate(PROMPTS)]
    engine = tiny.engine(SMALL)
    answers = {"auto": ask(engine, items, 1)}
    answers |= {name: ask(engine, items[1:2], 1, name) for name in ("none", "speech", "vision")}
    return {name: [answer.text for answer in of_all or []] for name, of_all in answers.items()}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_whole_run(program, said, tmp_path):
    """Two answers right, one wrong, one item that fails; it is resumed, and measured anew with other references."""
    lost = [user({"type": "image", "image": "lost.png"}, "What?")]
    references = [said["auto"][0], said["auto"][1], "surely not this", "nor this"]
    prompts = [*PROMPTS, lost]
    lines = [
        {"id": f"i{i}", "messages": [*p, assistant(r)]}
        for i, (p, r) in enumerate(zip(prompts, references, strict=True))
    ]
    manifest, folder = write(tmp_path / "held.jsonl", lines), tmp_path / "runs" / "held"
    run = ["--task", "ocr", manifest, "--output", folder]
    status, output, errors = program(*run)
    assert status == 0, errors
    report = json.loads((folder / "report.json").read_text())
    (only,) = report["sets"]
    assert (only["name"], only["items"], only["errors"], only["cut"]) == ("held", 4, 1, 3)
    exact = only["figures"]["exact"]
    assert exact["value"] == 50
    assert (exact["low"], exact["high"]) == pytest.approx((15.00, 85.00), abs=0.01)
    assert report["settings"]["adapter"] == "auto"
    items = lines_of(folder / "items.jsonl")
    assert [item["id"] for item in items] == ["i0", "i1", "i2", "i3"]
    assert [item["where"] for item in items] == [f"{manifest}: line {n}" for n in range(1, 5)]
    assert [item["answer"] for item in items] == [*said["auto"], None]
    assert [item["metrics"]["exact"] for item in items] == [100, 100, 0, 0]
    assert [item["references"] for item in items] == [[r] for r in references]
    assert items[0]["prompt"] == PROMPTS[0]
    assert items[3]["error"].startswith(f"{manifest}: line 4: image 1 ")
    assert "50.00" in output
    assert "15.00 to 85.00" in output
    assert "1 of 4 items failed and count as wrong:" in output
    assert f"{manifest}: line 4: image 1 " in output
    assert "lost.png" in output
    assert "3 answers were cut at 1 tokens" in output

    before = (folder / "answers.jsonl").read_bytes()
    (folder / "answers.jsonl").write_bytes(before[: before.index(b"\n") + 20])  # as a killed run leaves it
    status, again, errors = program(*run)
    assert (status, again) == (0, output)
    assert "1 of 4 items are answered already; resuming" in errors
    assert sorted((folder / "answers.jsonl").read_bytes().splitlines()) == sorted(before.splitlines())
    write(manifest, [*lines[:2], {**lines[2], "answers": [said["auto"][2]]}, lines[3]])
    assert program(*run)[0] == 0
    assert program.loads == 2  # all is answered: nothing is loaded
    assert json.loads((folder / "report.json").read_text())["sets"][0]["figures"]["exact"]["value"] == 75

    status, _, errors = program(*run, "--adapter", "none")
    assert status == 2
    assert f"{folder}: holds answers of other adapter (auto, now none); give another folder" in errors
    write(manifest, [*lines[:3], {"messages": [user("Another one?"), assistant("nor this")]}])
    assert "holds answers of other prompts" in program(*run)[2]


def test_adapters_carry_what_they_carry(program, said, tmp_path):
    """The answer of no adapter is right without one, and wrong with the clip's own or the other one."""
    assert said["speech"] == said["auto"][1:2]
    assert len({*said["none"], *said["vision"], *said["speech"]}) == 3
    manifest = write(tmp_path / "m.jsonl", [{"messages": [*PROMPTS[1], assistant(said["none"][0])]}])
    values = []
    for adapter in ("none", "vision", "speech", "auto"):
        folder = tmp_path / adapter
        assert program("--task", "exact", manifest, "--adapter", adapter, "--output", folder)[0] == 0
        values.append(json.loads((folder / "report.json").read_text())["sets"][0]["figures"]["exact"]["value"])
    assert values == [100, 0, 0, 0]


def test_sets_are_averaged_and_shown_beside_what_is_published(program, said, tmp_path):
    """Without an output nothing stays."""
    right, wrong = ({"messages": [*PROMPTS[2], assistant(text)]} for text in (said["auto"][2], "surely not this"))
    first, second = write(tmp_path / "docvqa.jsonl", [right]), write(tmp_path / "infovqa.jsonl", [wrong, wrong, wrong])
    status, output, errors = program("--task", "vqa", first, second, "--reference", "vision")
    assert status == 0, errors
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert [row[:4] for row in rows] == [
        ["docvqa", "1", "0", "100.00"], ["infovqa", "3", "0", "0.00"], ["mean of sets", "", "", "50.00"],
    ]  # fmt: skip
    assert [row[7] for row in rows] == ["93.20", "72.70", "82.95"]
    assert "published: the card of microsoft/Phi-4-multimodal-instruct" in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["docvqa.jsonl", "infovqa.jsonl"]


def test_translations_show_their_signature(program, tmp_path):
    manifest = write(tmp_path / "de.jsonl", [{"messages": [*PROMPTS[1], assistant("es war spät")]}])
    status, output, errors = program("--task", "ast", manifest, "--tokenize", "zh", "--output", tmp_path / "out")
    assert status == 0, errors
    assert "|tok:zh|" in output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["signatures"]["bleu"] in output


GOOD = {"messages": [user("A?"), assistant("a")]}


@pytest.mark.parametrize(
    ("lines", "arguments", "named"),
    [
        ([], [], "m.jsonl: has no samples; give a file with some"),
        ([{"messages": [user("A?")]}], [], "m.jsonl: line 1: no reference"),
        ([GOOD], ["nowhere.jsonl"], "nowhere.jsonl: cannot be read (No such file or directory); check the path"),
        ([GOOD], ["m.jsonl"], "m.jsonl and m.jsonl: two sets have the same name; rename one"),
        ([GOOD], ["--max-new-tokens", "0"], "--max-new-tokens is 0; expected a positive whole number"),
        ([GOOD], ["--slots", "0"], "--slots is 0"),
        ([GOOD], ["--tokenize", "zh"], "--tokenize is for the task ast; leave it out for asr"),
        ([GOOD], ["--task", "ast", "--tokenize", "words"], "--tokenize is 'words'; expected one of sacreBLEU's: 13a"),
        (
            [GOOD],
            ["--reference", "open-asr"],
            "m: is not a set of the reference; name the manifests after its sets: ami",
        ),
        ([{"messages": [user("A?"), assistant("[noise]")]}], [], "m.jsonl: nothing is left of any reference by the"),
        ([GOOD], ["--model", "nowhere"], "nowhere: no such folder. Give the folder of a Phi-4-multimodal checkpoint"),
        ([GOOD], ["--output", "m.jsonl"], "m.jsonl: cannot be written to (File exists); a file is where a folder"),
        ([GOOD], ["--output", "."], ".: holds something else; give another folder"),
    ],
)
def test_what_cannot_be_is_told_before_the_weights_are_read(program, tmp_path, monkeypatch, lines, arguments, named):
    monkeypatch.chdir(tmp_path)
    write(Path("m.jsonl"), lines)
    status, _, errors = program("--task", "asr", "m.jsonl", *arguments)
    assert status == 2
    assert errors.startswith(f"error: {named}"), errors
    assert errors.count("\n") == 1
    assert not program.loads
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_an_unknown_task(program, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        program("--task", "tts", write(tmp_path / "m.jsonl", [GOOD]))
    error = capsys.readouterr().err
    assert "invalid choice: 'tts'" in error
    assert all(task in error for task in TASKS)


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "whisper_normalizer.english", None)
    with pytest.raises(InputError, match=r"evaluation needs whisper_normalizer; pip install '\.\[evaluate\]'"):
        metrics.make_normalizer("english")


def test_a_folder_that_is_no_checkpoint(program, tmp_path):
    (tmp_path / "model").mkdir()
    manifest = write(tmp_path / "m.jsonl", [GOOD])
    status, _, errors = program("--task", "asr", manifest, "--model", tmp_path / "model", "--output", tmp_path / "out")
    assert status == 2
    assert "config.json" in errors
    assert not (tmp_path / "out").exists()
    assert issubclass(CheckpointError, ValueError)
