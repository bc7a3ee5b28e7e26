"""Samples: the tokens are those of inference, and the answers alone are marked."""

import base64
import json

import numpy as np
import pytest
from helpers.paths import TINY
from PIL import Image

from phi4mm_jax.config import Phi4MMConfig
from phi4mm_jax.data import conversation
from phi4mm_jax.data.augment import Augment, SpeechAugmentation, augment_clip, jitter, mask_features, noise
from phi4mm_jax.data.examples import BadSample, Sample, load_examples, measure, parse_sample
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.media_urls import with_paths
from phi4mm_jax.processing.processor import Processor

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
    np.testing.assert_array_equal(example.loss_mask, marked)
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
    return processor.tokenizer.decode(example.row.tokens[example.loss_mask])


PNG = (TINY / "inputs" / "image_0.png").read_bytes()
TOOL = {"type": "function", "function": {"name": "f"}}
TOOL_TEXT = '[{"type": "function", "function": {"name": "f"}}]'
END = "<|end|><|endoftext|>"
ONE = "<|user|><|image_1|>what<|end|><|assistant|>x"
CLIP_LINE = "<|user|><|audio_1|>hear<|end|><|assistant|>x"
QX = [user("q"), says("x")]
PLAIN = "<|user|>q<|end|><|assistant|>x"
ASKED = [user("<image>what"), says("x")]
FROM = [{"from": "human", "value": "<image>what"}, {"from": "gpt", "value": "x"}]
TYPED = [user({"type": "image", "text": None}, {"type": "text", "text": "what", "image": None}), says("x")]
# A line as others write it; the same as a raw prompt, with its images and clips; and what carries loss.
OTHERS = {
    "places in texts": ({"messages": ASKED, "images": ["image_0.png"]}, ONE, [0], 0, "x"),
    "one image": ({"messages": ASKED, "image": "image_0.png", "audios": None, "videos": []}, ONE, [0], 0, "x"),
    "an image as datasets store it": (
        {"messages": ASKED, "images": [{"bytes": None, "path": "image_0.png"}]}, ONE, [0], 0, "x"),
    "its bytes": ({"messages": ASKED, "images": [{"bytes": PNG, "path": "gone.png"}]}, ONE, [0], 0, "x"),
    "its bytes in JSON": (
        {"messages": ASKED, "image": {"bytes": base64.b64encode(PNG).decode(), "path": None}}, ONE, [0], 0, "x"),
    "bare base64": ({"messages": ASKED, "images": [base64.b64encode(PNG).decode()]}, ONE, [0], 0, "x"),
    "a data URL": (
        {"messages": ASKED, "images": ["data:image/png;base64," + base64.b64encode(PNG).decode()]}, ONE, [0], 0, "x"),
    "places as parts": ({"messages": TYPED, "images": ["image_0.png"]}, ONE, [0], 0, "x"),
    "parts make texts plain": (
        {"messages": [user({"type": "image"}, text("<image>")), says("<video>")], "images": ["image_0.png"]},
        None, [0], 0, "<video>"),
    "places in text parts": (
        {"messages": [user(text("<image>wh"), text("at")), says("x")], "images": ["image_0.png"]}, ONE, [0], 0, "x"),
    "two images and a clip": (
        {"messages": [user("a <image> b<audio>"), says("1"), user("<image>\n<image>c"), says("x")],
         "images": ["image_0.png", "image_1.png", "image_0.png"], "audio": "audio_0.flac"},
        "<|user|>a <|image_1|> b<|audio_1|><|end|><|assistant|>1<|end|><|user|><|image_2|>\n<|image_3|>c<|end|>"
        "<|assistant|>x", [0, 1, 0], 1, "1<|end|>x"),
    "a clip": ({"messages": [user("<audio>hear"), says("x")], "audios": ["audio_0.flac"]}, CLIP_LINE, [], 1, "x"),
    "a video": (
        {"messages": [user("<video>what"), says("x")], "videos": [["image_0.png", "image_1.png"]]},
        "<|user|><|image_1|><|image_2|>what<|end|><|assistant|>x", [0, 1], 0, "x"),
    "from and value": ({"conversations": FROM, "images": ["image_0.png"]}, ONE, [0], 0, "x"),
    "as JSON": ({"conversations": json.dumps(FROM), "messages": None, "images": ["image_0.png"]}, ONE, [0], 0, "x"),
    "no media, and a word in brackets": ({"messages": [user("<image>"), says("x")]}, None, [], 0, "x"),
    "system beside": ({"conversations": QX, "system": "s"}, f"<|system|>s<|end|>{PLAIN}", [], 0, "x"),
    "no system": ({"messages": QX, "system": None, "tools": ""}, PLAIN, [], 0, "x"),
    "tools": ({"messages": QX, "tools": [TOOL], "parallel_tool_calls": False},
              f"<|system|><|tool|>{TOOL_TEXT}<|/tool|><|end|>{PLAIN}", [], 0, "x"),
    "tools as JSON": (
        {"messages": [{"role": "developer", "content": "s"}, user("q"), says("x")], "tools": TOOL_TEXT},
        f"<|system|>s<|tool|>{TOOL_TEXT}<|/tool|><|end|>{PLAIN}", [], 0, "x"),
    "no tools": ({"messages": QX, "tools": "[]"}, PLAIN, [], 0, "x"),
    "calls as messages": (
        {"conversations": [
            {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "4"}, {"from": "gpt", "value": "x"}]},
        '<|user|>q<|end|><|assistant|><|tool_call|>[{"name": "f", "arguments": {"a": 1}}]<|/tool_call|><|end|><|tool|>4'
        "<|end|><|assistant|>x", [], 0, '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]<|/tool_call|><|end|>x'),
    "calls after an answer": (
        {"messages": [user("q"), says("I ask"), {"role": "tool_call", "content": '{"name": "f", "arguments": ""}'},
                      {"role": "tool_call", "content": '{"name": "g", "arguments": {}}'},
                      {"role": "tool_response", "content": "4"}, says("x")]},
        '<|user|>q<|end|><|assistant|>I ask<|tool_call|>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": '
        "{}}]<|/tool_call|><|end|><|tool|>4<|end|><|assistant|>x", [], 0,
        'I ask<|tool_call|>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]<|/tool_call|><|end|>x'),
    "weight": ({"messages": [user("q"), says("y", weight=0), user("q"), says("x", weight=1)]},
               f"<|user|>q<|end|><|assistant|>y<|end|>{PLAIN}", [], 0, "x"),
    "train": ({"messages": [user("q"), says("y", train=False), {**user("q"), "train": 0}, says("x", training=True)]},
              f"<|user|>q<|end|><|assistant|>y<|end|>{PLAIN}", [], 0, "x"),
    "nulls": ({"messages": [{**user("q"), "tool_calls": None, "loss": None, "name": None}, says("x", weight=None)],
               "images": None, "image_path": None, "weight": None, "functions": []}, PLAIN, [], 0, "x"),
    "about media": ({"messages": QX, "image_id": "a.png", "num_images": 2, "audio_duration": 1.5,
                     "image_size": [640, 480], "has_image": False, "id": "train/5"}, PLAIN, [], 0, "x"),
    "prompt and completion": ({"prompt": [user("q"), says("y"), user("q")], "completion": [says("x")]},
                              f"<|user|>q<|end|><|assistant|>y<|end|>{PLAIN}", [], 0, "x"),
    "a system message": ({"messages": QX, "system_message": "s"}, f"<|system|>s<|end|>{PLAIN}", [], 0, "x"),
    "roles in capitals": ({"conversations": [{"from": "User", "value": "q"}, {"from": "Assistant", "value": "x"}]},
                          PLAIN, [], 0, "x"),
    "places with their index": (
        {"messages": [user({"type": "image", "index": 0, "text": None}, {**text("what"), "index": None}), says("x")],
         "images": ["image_0.png"]}, ONE, [0], 0, "x"),
    "a file of a text": ({"messages": QX, "id": "train/5.jpg", "source": "a.mp3", "prompt": "a.png"}, PLAIN, [], 0,
                         "x"),
    "a file beside its image": ({"messages": ASKED, "image": "image_0.png", "file_name": "0.png"}, ONE, [0], 0, "x"),
}  # fmt: skip


@pytest.mark.parametrize(("values", "raw", "images", "clips", "in_loss"), OTHERS.values(), ids=OTHERS)
def test_lines_of_other_tools_have_the_tokens_of_their_prompt(processor, values, raw, images, clips, in_loss):
    """ms-swift's, LLaMA-Factory's, TRL's and OpenAI's forms have the tokens of the raw prompt that they stand for."""
    (example,) = examples(processor, values)
    assert marked_text(processor, example) == in_loss + END
    files = [TINY / "inputs" / f"image_{i}.png" for i in images], [TINY / "inputs" / "audio_0.flac"] * clips
    assert (len(example.row.images), len(example.row.clips)) == (len(images), clips)
    spelled = raw + END if raw else None
    if spelled is None:  # where a text holds what would be a place
        assert "<image>" in processor.tokenizer.decode(example.row.tokens)
        return
    expected = processor.row(spelled, *files)
    np.testing.assert_array_equal(example.row.tokens, expected.tokens)
    for ours, theirs in zip(example.row.images, expected.images, strict=True):
        np.testing.assert_array_equal(ours.crops, theirs.crops)


NOT_TAKEN = {
    "more places": ({"messages": [user("<image><image>"), says("x")], "images": ["a.png"]},
                    "2 place.s. <image>, and 1 image.s. stand beside"),
    "fewer places": ({"messages": QX, "images": ["a.png"]}, "0 place.s. <image>, and 1 image.s."),
    "no clip": ({"messages": [user("<audio>"), says("x")], "audios": []}, "1 place.s. <audio>, and 0 audio"),
    "another kind": ({"messages": [user("<image><video>"), says("x")], "images": ["a.png"]},
                     "1 place.s. <video>, and 0 video.s. stand"),
    "parts and images": ({"messages": [user({"type": "image"}, text("<image>")), says("x")], "images": ["a", "b"]},
                         '1 place.s. ."type": "image"., and 2 image'),
    "image and images": ({"messages": ASKED, "images": ["a.png"], "image": "b.png"}, "both images and image"),
    "a null image": ({"messages": ASKED, "images": [None]}, "images.0. is null"),
    "an empty object": ({"messages": ASKED, "images": [{"bytes": None, "path": None}]}, "object with bytes, path"),
    "videos or frames": ({"messages": [user("<video>"), says("x")], "video": ["a", "b"]}, "video is a list"),
    "image_path": ({"messages": ASKED, "image_path": "a.png"}, "'image_path' looks like media and is not taken"),
    "imgs": ({"messages": ASKED, "imgs": ["a.png"]}, "'imgs' looks like media"),
    "audioFile": ({"messages": QX, "audioFile": "a.wav"}, "'audioFile' looks like media"),
    "video_url": ({"messages": QX, "video_url": {"url": "a"}}, "'video_url' looks like media"),
    "pixel_values": ({"messages": QX, "pixel_values": [[0.5]]}, "'pixel_values' looks like media"),
    "bytes": ({"messages": QX, "jpg": {"bytes": b"x", "path": None}}, "'jpg' looks like media"),
    "functions": ({"messages": QX, "functions": [{"name": "f"}]}, "'functions' looks like tools"),
    "tools of another name": ({"messages": QX, "tool_list": "[{}]"}, "'tool_list' looks like tools"),
    "tools twice": ({"messages": [{"role": "system", "content": "", "tools": "[]"}, user("q"), says("x")],
                     "tools": [TOOL]}, "tools are given beside the messages and in the system message"),
    "tool_choice": ({"messages": QX, "tools": [TOOL], "tool_choice": "none"}, "tool_choice is 'none'"),
    "loss_mask": ({"messages": QX, "loss_mask": [0, 1]}, "'loss_mask' looks like a loss mask"),
    "weight of a line": ({"messages": QX, "weight": 0.5}, "'weight' looks like a loss mask"),
    "loss_scale": ({"messages": [user("q"), says("x", loss_scale=1.0)]}, r"messages\[1\].loss_scale looks like a loss"),
    "train_detail": ({"messages": [user("q"), says("x", train_detail=[{"end": 0}])]}, "train_detail looks like"),
    "half a weight": ({"messages": [user("q"), says("x", weight=0.5)]}, r"messages\[1\].weight is 0.5"),
    "weights that differ": ({"messages": [user("q"), says("x", weight=0, loss=True)]}, "loss and weight contradict"),
    "loss of a question": ({"messages": [{**user("q"), "train": True}, says("x")]}, "role 'user' and asks for loss"),
    "images of a message": ({"messages": [{**user("q"), "images": ["a.png"]}, says("x")]}, "images looks like media"),
    "an image in a text part": ({"messages": [user({**text("q"), "image": "a.png"}), says("x")]}, "image is not taken"),
    "two systems": ({"messages": [{"role": "system", "content": "a"}, user("q"), says("x")], "system": "b"},
                    "there is another system message"),
    "two conversations": ({"messages": ASKED, "conversations": FROM}, "both messages and conversations"),
    "a bad answer": ({"messages": QX, "label": False}, "only KTO"),
    "a part of a clip by the line": ({"messages": [user("<audio>"), says("x")], "audio": "a.wav", "offset": 3.5},
                                     "the line.offset is 3.5: the audio would be taken whole; cut it"),
    "boxes": ({"messages": [user("<bbox>"), says("x")], "objects": {"bbox": [[1, 2]]}}, "objects are not"),
    "calls that differ": ({"messages": [user("q"), says("I ask", loss=False),
                                        {"role": "tool_call", "content": '{"name": "f"}'}]}, "make them alike"),
    "no call": ({"messages": [user("q"), {"role": "function_call", "content": "f()"}]}, "tool call is not JSON"),
    "a file of another name": ({"messages": ASKED, "file_name": "a.png"}, "'file_name' is 'a.png', and the messages"),
    "files without a place": ({"messages": QX, "paths": ["a.WAV", "b.flac"]}, "'paths' is .*no medium"),
    "a file within a text": ({"messages": [user("1: <img>a.png</img>"), says("x")]}, "names a medium within a text"),
    "a URL within a text": ({"messages": [user(text("<audio>http://a/b</audio>")), says("x")], "audio": "a.wav"},
                            "<audio>http://a/b</audio>' names a medium"),
    "another order": ({"messages": [user(*({"type": "image", "index": i} for i in (1, 0)), text("q")), says("x")],
                       "images": ["a.png", "b.png"]}, "index of the image in place 0 is 1"),
    "a part of a clip": ({"messages": [user("<audio>"), says("x")], "audio": {"path": "a.wav", "start": 0, "end": 2}},
                         "audio.end is 2: the audio would be taken whole"),
    "a part of a clip by URL": (
        {"messages": [user({"type": "audio_url", "audio_url": {"url": "a.wav", "offset": 1}}), says("x")]},
        r"audio_url\.offset is 1: the audio would be taken whole"),
    "frames per second": ({"messages": [user("<video>"), says("x")], "videos": [{"path": "a.mp4", "fps": 2}]},
                          r"video\.fps is a setting that is not taken"),
    "an adapter": ({"messages": QX, "adapter": "none"}, r"'adapter' is not taken of a line; .*data\.adapter"),
    "crops": ({"messages": ASKED, "image": "a.png", "max_crops": 1}, r"for all of them .data\.max_crops in a recipe"),
    "a bad answer in words": ({"messages": QX, "kto_tag": "False"}, "only KTO"),
    "a message that is a clip": ({"conversations": [{"from": "User", "type": "audio", "value": "a.wav"}, says("x")]},
                                 r"conversations\[0\].type is 'audio'"),
    "reasoning": ({"messages": [user("q"), says("x", reasoning_content="r")]},
                  "reasoning_content would not be trained on"),
    "thinking": ({"messages": [user("q"), says("x", thinking="r")]}, "thinking would not be trained on"),
    "earlier turns": ({"messages": QX, "history": [["a", "b"]]}, "'history' looks like earlier turns"),
    "two contents": ({"messages": [{**user("q"), "value": "r"}, says("x")]}, "content and value are both given"),
    "a role of others": ({"conversations": [*FROM[:1], {"from": "chatgpt", "value": "x"}], "image": "a.png"},
                         r"conversations\[1\].role is 'chatgpt'; expected one of"),
    "no role": ({"conversation": [{"human": "q", "assistant": "x"}]}, "role is missing; the message has 'human', 'ass"),
    "no message": ({"messages": [QX]}, r"messages\[0\] is a list"),
    "Alpaca": ({"instruction": "q", "output": "x"}, "messages is missing or empty; the line has 'instruction', 'outp"),
}  # fmt: skip


@pytest.mark.parametrize(("values", "message"), NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_what_is_not_taken_is_an_error(processor, values, message):
    with pytest.raises(BadSample, match=message) as caught:
        parse(processor, values)
    assert caught.value.cause == "messages"


ASKS = [user("q")]
OTHER_PREFERENCES = {
    "messages": {"messages": ASKS, "chosen": says("a"), "rejected": {"from": "gpt", "value": "b"}},
    "lists": {"prompt": ASKS, "chosen": [says("a")], "rejected": [says([text("b")])]},
    "whole chats": {"chosen": [*ASKS, says("a")], "rejected": [*ASKS, says("b")]},
    "ms-swift": {"messages": [*ASKS, says("a")], "rejected_response": "b"},
    "OpenAI": {"input": {"messages": ASKS}, "preferred_output": [says("a")], "non_preferred_output": [says("b")]},
}


@pytest.mark.parametrize("values", OTHER_PREFERENCES.values(), ids=OTHER_PREFERENCES)
def test_preferences_of_other_tools_have_the_tokens_of_their_prompt(processor, values):
    pair = examples(processor, values, "preferences")
    for example, answer in zip(pair, "ab", strict=True):
        expected = processor.row(f"<|user|>q<|end|><|assistant|>{answer}{END}").tokens
        np.testing.assert_array_equal(example.row.tokens, expected)


def test_a_place_without_media_is_logged_once(processor, caplog):
    """It is text there; its medium may be under a key that is not known."""
    conversation._logged.clear()
    for _ in range(2):
        parse(processor, {"messages": [user("<image>what"), says("x")]})
        parse(processor, {"messages": [user(IMAGE, text("<audio>")), says("x")]})
    assert [record.getMessage() for record in caplog.records] == [
        "<image> is text where no images stand beside the messages (said once)"
    ]


def test_answers_with_loss_false_have_no_loss(processor):
    chat = [user("1"), says("one", loss=False), user("2"), says("two"), user("3"), says("three", loss=False)]
    (example,) = examples(processor, {"messages": chat})
    assert marked_text(processor, example) == "two<|end|>"
    chat[-1] = says("", loss=False)  # nothing to learn there
    (example,) = examples(processor, {"messages": chat})
    assert marked_text(processor, example) == "two<|end|>"


def test_preferences_are_two_conversations_that_share_media(processor):
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
    "none in the loss mask": ({"messages": [user("x"), says("y", loss=False)]}, "answer", "every answer is masked"),
    "loss no bool": ({"messages": [user("x"), says("y", loss=2)]}, "messages", "messages.1..loss is 2"),
    "media to learn": ({"messages": [user("x"), {"role": "assistant", "content": [IMAGE]}]}, "messages", "has media"),
    "missing file": ({"messages": [user({"type": "image", "image": "no.png"}), says("x")]}, "media",
                     "image 1 .*no.png.*does not exist"),
    "no audio": ({"messages": [user({"type": "audio", "audio": "image_0.png"}), says("x")]}, "media", "audio 1 "),
    "missing video": ({"messages": [user({"type": "video", "video": "no.mp4"}), says("x")]}, "media", "video: "),
}  # fmt: skip


@pytest.mark.parametrize(("values", "cause", "message"), BAD.values(), ids=BAD)
def test_bad_samples_are_named_by_cause(processor, values, cause, message):
    with pytest.raises(BadSample, match=message) as caught:
        measure(parse(processor, values), processor)
    assert caught.value.cause == cause


def test_samples_longer_than_the_context_are_refused(processor):
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
        ({"chosen": [says("a", thinking="r")]}, "chosen.thinking would not be trained on"),
        ({"rejected": user("b")}, "rejected is of role 'user'"),
        ({"chosen": None, "chosen_response": "a", "rejected_response": "b"}, "chosen is NoneType"),
    ],
)
def test_bad_preferences_are_named(processor, change, message):
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("speed", "semitones", "length", "hertz"),
    [(0.9, None, 35556, 440), (1.1, None, 29091, 440), (None, 2, 32000, 493.883), (1.25, -12, 25600, 220)],
)
def test_speed_and_pitch_of_a_tone(speed, semitones, length, hertz):
    """Speed changes the length alone, pitch the frequency alone, by 2 ** (1 / 12) a semitone."""
    tone = np.sin(2 * np.pi * 440 * np.arange(32000) / 16000).astype(np.float32) / 2
    ranges = {name: (x, x) for name, x in (("speed", speed), ("pitch", semitones)) if x is not None}
    changed, rate = augment_clip((tone, 16000), SpeechAugmentation(**ranges), np.random.default_rng(0))
    assert (len(changed), changed.dtype, rate) == (length, np.float32, 16000)
    spectrum = np.abs(np.fft.rfft(changed * np.hanning(length), 1 << 18))
    assert spectrum.argmax() * 16000 / (1 << 18) == pytest.approx(hertz, abs=0.2)
    assert np.sqrt(np.mean(changed[2000:-2000] ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.1)


@pytest.mark.parametrize(("masks", "widest"), [({"time_masks": 1, "time_width": 9}, (9, 0)),
    ({"time_masks": 1, "time_width": 70}, (20, 0)), ({"frequency_masks": 1, "frequency_width": 5}, (0, 5)),
    ({"time_masks": 1, "frequency_masks": 1}, (20, 27))])  # fmt: skip
def test_masks_are_spans_of_frames_and_bands(masks, widest):
    """At most as wide as they may be, and as a fifth of the clip; each band has its mean there, all else stays."""
    features = np.random.default_rng(0).normal(5, 2, (100, 80)).astype(np.float32)
    means = features.astype(np.float64).mean(0)
    widths = []
    for seed in range(60):
        masked = mask_features(features, SpeechAugmentation(**masks), np.random.default_rng(seed))
        changed = masked != features
        frames, bands = (np.flatnonzero(changed.all(axis)) for axis in (1, 0))
        expected = np.zeros(changed.shape, bool)
        expected[frames] = expected[:, bands] = True
        np.testing.assert_array_equal(changed, expected)
        np.testing.assert_allclose(masked[changed], np.broadcast_to(means, changed.shape)[changed], rtol=1e-5)
        for span in (frames, bands):
            np.testing.assert_array_equal(np.diff(span), 1)
        widths.append((len(frames), len(bands)))
    assert tuple(np.max(widths, axis=0)) == widest
    assert tuple(np.min(widths, axis=0)) == (0, 0)


def test_augmented_speech_is_as_long_as_was_measured(processor):
    """Draws depend on the generator alone: the same gives the same, another another length and other features."""
    sample = parse(
        processor, {"messages": [user({"type": "audio", "audio": str(TINY / "inputs" / "audio_1.flac")}), says("a")]}
    )
    speech = SpeechAugmentation((0.8, 1.2), (-2, 2), time_masks=1, frequency_masks=1)

    def drawn(seed):
        rng = np.random.default_rng((7, seed))
        return load_examples(sample, processor, None, Augment(speech=speech), rng)[0].row

    rows = [drawn(seed) for seed in (0, 0, 1, 2, 3)]
    plain, _ = measure(sample, processor)
    slowest, _ = measure(sample, processor, None, speech)
    lengths = [len(row.tokens) for row in rows]
    measured = [measure(sample, processor, None, speech, np.random.default_rng((7, s)))[0] for s in (0, 0, 1, 2, 3)]
    assert lengths == [size.tokens[0] for size in measured]
    assert len(set(lengths)) > 1
    frames = len(load_examples(sample, processor)[0].row.clips[0])
    assert slowest.longest == pytest.approx(frames / 8 / 0.8, abs=1.5)
    assert max(lengths) <= slowest.tokens[0] == plain.tokens[0] + slowest.longest - plain.longest
    np.testing.assert_array_equal(rows[0].clips[0], rows[1].clips[0])
    assert not np.array_equal(rows[0].clips[0], rows[2].clips[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speed": (1.1, 0.9)}, r"augment_speech.speed is \(1.1, 0.9\); expected a range within 0.5 and 2"),
        ({"speed": (0.1, 1.0)}, "augment_speech.speed"),
        ({"pitch": (0, 13)}, "augment_speech.pitch"),
        ({"time_masks": -1}, "augment_speech.time_masks is -1"),
        ({"frequency_width": 0}, "augment_speech.frequency_width is 0"),
    ],
)
def test_wrong_settings_of_speech_augmentation_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        SpeechAugmentation(**settings)


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
