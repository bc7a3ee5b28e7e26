"""Metrics against values by hand and against others' code."""

import json
import random

import jiwer
import pytest
import sacrebleu

from phi4mm_jax import InputError
from phi4mm_jax.evaluation.metrics import corpus_score, counts_of, make_metric, make_normalizer


def score(name: str, *pairs) -> float:
    """The metric of (accepted answers, answer) pairs."""
    accepted, answers = zip(*pairs, strict=True)
    return corpus_score(make_metric(name), [[a] if isinstance(a, str) else a for a in accepted], answers)


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
