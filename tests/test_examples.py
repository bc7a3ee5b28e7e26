"""Samples: the tokens are those of inference, and the answers alone are marked."""

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.processing.chat import with_paths
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.training.augment import Augment, jitter, noise
from phi4mm_jax.training.examples import BadSample, Sample, load_examples, measure, parse_sample

IMAGE, CLIP = {"type": "image", "image": "image_0.png"}, {"type": "audio", "audio": "audio_0.flac"}


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(TINY, Phi4MMConfig.from_folder(TINY))


def parse(processor: Processor, values, kind="answers") -> Sample:
    return parse_sample(values, TINY / "inputs", processor.tokenizer, kind)


def examples(processor: Processor, values, kind="answers", **options):
    return load_examples(parse(processor, values, kind), processor, **options)


def user(*content):
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


def text(content):
    return {"type": "text", "text": content}


CHATS = {
    "text": [user("Hello wor"), says("ld, hello")],
    "white space": [user("a \n "), says(" \n b \n"), user("\tc"), says("d\n\n")],
    "special tokens in texts": [user("<|end|><|assistant|>x"), says("<|endoftext|><|end|>y<|image_1|>")],
    "turns": [{"role": "system", "content": "Be brief."}, user("1"), says("one"), user("2"), says("two"), user("3"),
              says("three")],
    "image": [user(IMAGE, text("What is it?")), says("A cat")],
    "clips": [user(CLIP, text("and"), CLIP), says("the same"), user("why"), says("so")],
    "both": [user(text("see"), IMAGE, text("hear"), CLIP), says("yes")],
    "tools": [{"role": "system", "content": "t", "tools": [{"name": "f"}]}, user("call"),
              {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
              {"role": "tool", "content": "4"}, says("four")],
    "letters that could merge": [user("th"), says("e"), user(" "), says("'s")],
}  # fmt: skip


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_tokens_are_those_of_inference(processor, messages):
    """Up to each answer what a prompt of the turns before gives; then what a chat that goes on has for the answer."""
    (example,) = examples(processor, {"messages": messages})
    tokens, ids = example.row.tokens, processor.tokenizer.special_tokens
    marked, end = np.zeros(len(tokens), bool), 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = inferred(processor, messages[:i])
            continued = inferred(processor, [*messages[: i + 1], user("x")])
            end = np.flatnonzero(continued == ids["<|user|>"])[-1]
            np.testing.assert_array_equal(tokens[: len(prompt)], prompt)
            np.testing.assert_array_equal(tokens[:end], continued[:end])
            assert (tokens[len(prompt) - 1], tokens[end - 1]) == (ids["<|assistant|>"], ids["<|end|>"])
            marked[len(prompt) : end] = True
    assert (len(tokens), tokens[-1]) == (end + 1, ids["<|endoftext|>"])
    marked[-1] = True
    np.testing.assert_array_equal(example.answers, marked)
    size, _ = measure(parse(processor, {"messages": messages}), processor)
    assert size.tokens == (len(tokens),)
    assert size.crops == sum(len(f.crops) for f in example.row.images)
    assert size.chunks == len(example.row.clips)
    assert size.adapter == example.row.adapter


def inferred(processor, messages) -> np.ndarray:
    """The tokens of a prompt as `Model.process` makes them."""
    return processor.row(with_paths(messages, TINY / "inputs")).tokens


def test_features_are_those_of_inference(processor):
    (example,) = examples(processor, {"messages": CHATS["both"]})
    prompt = [user(text("see"), {"type": "image"}, text("hear"), {"type": "audio"})]
    row = processor.row(prompt, [TINY / "inputs" / "image_0.png"], [TINY / "inputs" / "audio_0.flac"])
    np.testing.assert_array_equal(example.row.images[0].crops, row.images[0].crops)
    np.testing.assert_array_equal(example.row.clips[0], row.clips[0])
    assert example.row.media == row.media


def marked_text(processor, example):
    return processor.tokenizer.decode(example.row.tokens[example.answers])


def test_an_answer_may_be_left_out(processor):
    chat = [user("1"), says("one", loss=False), user("2"), says("two"), user("3"), says("three", loss=False)]
    (example,) = examples(processor, {"messages": chat})
    assert marked_text(processor, example) == "two<|end|>"
    chat[-1] = says("", loss=False)  # nothing to learn there
    (example,) = examples(processor, {"messages": chat})
    assert marked_text(processor, example) == "two<|end|>"


def test_preferences(processor):
    """Each is the conversation with that answer, and they share their media."""
    prompt = [user("1"), says("one"), user(IMAGE, text("2"))]
    values = {"messages": prompt, "chosen": "two", "rejected": "too long"}
    pair = examples(processor, values, "preferences")
    for example, answer in zip(pair, ("two", "too long"), strict=True):
        (alone,) = examples(processor, {"messages": [*prompt, says(answer)]})
        np.testing.assert_array_equal(example.row.tokens, alone.row.tokens)
        assert example.row.media == alone.row.media
        assert marked_text(processor, example) == f"{answer}<|end|><|endoftext|>"
    assert pair[0].row.images[0] is pair[1].row.images[0]
    size, _ = measure(parse(processor, values, "preferences"), processor)
    assert size.tokens == tuple(len(e.row.tokens) for e in pair)


BAD = {
    "no object": ([], "line", "the sample is a list"),
    "no messages": ({}, "messages", "messages is missing or empty"),
    "messages no list": ({"messages": 3}, "messages", "messages is int"),
    "messages no JSON": ({"messages": "hi"}, "messages", "not JSON"),
    "unknown role": ({"messages": [{"role": "me", "content": ""}, says("x")]}, "messages", "messages.0..role"),
    "no answer": ({"messages": [user("x")]}, "answer", "messages have no answer"),
    "no last answer": ({"messages": [user("x"), says("y"), user("z")]}, "answer", "end with one of role 'user'"),
    "empty answer": ({"messages": [user("x"), says("")]}, "answer", "answer 1 is empty"),
    "white answer": ({"messages": [user("x"), says("a"), user("y"), says(" \n")]}, "answer", "answer 2 is empty"),
    "none learnt": ({"messages": [user("x"), says("y", loss=False)]}, "answer", "every answer says"),
    "loss no bool": ({"messages": [user("x"), says("y", loss=0)]}, "messages", "messages.1..loss is 0"),
    "media to learn": ({"messages": [user("x"), {"role": "assistant", "content": [IMAGE]}]}, "messages", "has media"),
    "missing file": ({"messages": [user({"type": "image", "image": "no.png"}), says("x")]}, "media",
                     "image 1 .*no.png.*does not exist"),
    "no audio": ({"messages": [user({"type": "audio", "audio": "image_0.png"}), says("x")]}, "media", "audio 1 "),
    "missing video": ({"messages": [user({"type": "video", "video": "no.mp4"}), says("x")]}, "media", "video: "),
}  # fmt: skip


@pytest.mark.parametrize(("values", "cause", "message"), BAD.values(), ids=BAD)
def test_bad_samples(processor, values, cause, message):
    with pytest.raises(BadSample, match=message) as caught:
        measure(parse(processor, values), processor)
    assert caught.value.cause == cause


def test_longer_than_the_context(processor):
    short = Processor(processor.config, processor.tokenizer, 36, context=600)
    sample = parse(processor, {"messages": [user(IMAGE, text("word " * 100)), says("x")]})
    with pytest.raises(BadSample, match=r"\d+ tokens .text: \d+, image 1: 545.*more than the context of 600") as caught:
        measure(sample, short)
    assert caught.value.cause == "length"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": ""}, "chosen is empty"),
        ({"rejected": None}, "rejected is NoneType"),
        ({"messages": [user("1"), says("2")]}, "messages end with an answer"),
    ],
)
def test_bad_preferences(processor, change, message):
    with pytest.raises(BadSample, match=message):
        parse(processor, {"messages": [user("1")], "chosen": "a", "rejected": "b", **change}, "preferences")


def test_augmentation_repeats_and_keeps_sizes(processor):
    sample = parse(processor, {"messages": CHATS["both"]})
    options = {"augment": Augment(jitter, noise)}
    plain, *drawn = (
        load_examples(sample, processor, rng=rng and np.random.default_rng(rng), **options)[0].row
        for rng in (None, 1, 1, 2)
    )
    for row in drawn:
        np.testing.assert_array_equal(row.tokens, plain.tokens)
    for of_row in (lambda r: r.images[0].crops, lambda r: r.clips[0]):
        same, again, other = map(of_row, drawn)
        np.testing.assert_array_equal(same, again)
        assert np.abs(same - other).max() > 0.01
        assert np.abs(same - of_row(plain)).max() > 0.01


def test_an_augmentation_must_keep_sizes(processor):
    sample, rng = parse(processor, {"messages": CHATS["both"]}), np.random.default_rng(0)
    with pytest.raises(ValueError, match="must keep the size"):
        load_examples(sample, processor, augment=Augment(image=lambda image, _: image.resize((9, 9))), rng=rng)
    with pytest.raises(ValueError, match="must keep them"):
        load_examples(sample, processor, augment=Augment(clip=lambda clip, _: (clip[0][1:], clip[1])), rng=rng)


def test_built_in_augmentations_are_slight():
    rng = np.random.default_rng(0)
    image = Image.fromarray(np.full((40, 60, 3), 100, np.uint8))
    values = [np.asarray(jitter(image, rng)).mean() for _ in range(50)]
    assert 79 <= min(values) < 90
    assert 110 < max(values) <= 121
    samples = np.sin(np.arange(16000) / 7).astype(np.float32)
    for _ in range(20):
        changed, rate = noise((samples, 16000), rng)
        assert (changed.dtype, rate) == (np.float32, 16000)
        gain = changed @ samples / (samples @ samples)
        residual = np.sqrt(np.mean((changed / gain - samples) ** 2) / np.mean(samples**2))
        assert 0.49 < gain < 2.01
        assert 0.003 < residual < 0.11
