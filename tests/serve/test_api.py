"""The OpenAI API over a real socket, asked by the official client, of the small model."""

import base64
import io
import json
import math
from pathlib import Path

import httpx
import jax
import jsonschema
import numpy as np
import openai
import pytest
import soundfile
from helpers.recordings import RATE, held_clips, recording
from helpers.serving import serving, wait_for

import phi4mm_jax
from phi4mm_jax.engine import EngineConfig, Request
from phi4mm_jax.serve.app import ServerSettings, create_app, invalid
from phi4mm_jax.serve.engine_process import EngineThread
from phi4mm_jax.serve.limits import Limits
from phi4mm_jax.serve.models import ChatRequest

MODEL = Path(__file__).parents[2] / "assets" / "tiny"
EXAMPLES = MODEL / "examples"
CONFIG = EngineConfig(slots=2, cache_tokens=4096, page_size=64, chunk=64, steps=4, top_logprobs=3, beams=3)
DIGITS = [{"role": "user", "content": "number five two four three"}]
CLIP = EXAMPLES / "clips" / "speech_119.ogg"
PICTURE = EXAMPLES / "images" / "asked_111.jpg"
SAID = "rabbit three king lemon"  # as examples.jsonl has it
SECONDS = 3.285
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def data_url(kind: str, name: str) -> str:
    return f"data:{kind};base64,{base64.b64encode((EXAMPLES / name).read_bytes()).decode()}"


def data_of(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


PLAYLIST = f"#EXTM3U\n#EXTINF:1,\nfile://{CLIP}\n#EXT-X-ENDLIST\n".encode()
IMAGE = {"type": "image_url", "image_url": {"url": data_url("image/jpeg", "images/asked_111.jpg")}}
SPOKEN = data_url("audio/ogg", "clips/asked_111.ogg")


@pytest.fixture(scope="module")
def model():
    return phi4mm_jax.load(MODEL, dtype="float32")


@pytest.fixture(scope="module")
def engines():
    """Those that the server has made."""
    return []


@pytest.fixture(scope="module")
def app(model, engines, tmp_path_factory):
    settings = ServerSettings(
        "tiny", tmp_path_factory.mktemp("files"),
        Limits(max_body_bytes=2**20, max_audio_seconds=60, top_logprobs=3, beams=3, clip_seconds=8, pause=1),
        instructions={"transcribe": "hear"}, warm_up=False,
    )  # fmt: skip

    def make_engine():
        engines.append(model.engine(CONFIG))
        return engines[-1]

    return create_app(EngineThread(make_engine), model.processor.tokenizer, CONFIG.slots, settings)


@pytest.fixture(scope="module")
def url(app):
    with serving(app) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def chat(client, messages=DIGITS, **options):
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def test_a_chat_is_answered(client):
    answer = chat(client, max_tokens=20)
    assert answer.choices[0].message.content == "5243"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (5, answer.usage.prompt_tokens + 5)
    assert [found.id for found in client.models.list()] == ["tiny"]


def test_a_stream_has_the_engines_tokens(client, model):
    """Sampled at a high temperature, so that the tokens are many and hardly any are likely."""
    options = {"max_tokens": 12, "temperature": 5.0, "seed": 7, "logprobs": True, "top_logprobs": 2}
    chunks = list(
        chat(client, stream=True, stream_options={"include_usage": True}, extra_body={"top_k": 50}, **options)
    )
    sampling = phi4mm_jax.engine.Sampling(temperature=5.0, seed=7, top_k=50)
    ((_, own),) = model.engine(CONFIG).run([Request(DIGITS, max_new_tokens=12, sampling=sampling)])
    assert len(own.tokens) == 12
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == own.text
    named = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert [bytes(token.bytes) for token in named] == [model.processor.tokenizer.decode_bytes([t]) for t in own.tokens]
    np.testing.assert_allclose([token.logprob for token in named], own.log_probabilities, atol=1e-4)
    assert choices[-1].finish_reason == own.finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 12
    assert {chunk.usage is None for chunk in chunks[:-1]} == {True}


def test_top_logprobs_are_those_of_the_models_logits(client, model):
    answer = chat(client, max_tokens=4, logprobs=True, top_logprobs=3)
    tokenizer = model.processor.tokenizer
    prompt = "<|user|>number five two four three<|end|><|assistant|>" + answer.choices[0].message.content
    batch = model.process([prompt])
    values = np.asarray(jax.nn.log_softmax(model.logits(batch)[0], -1))
    length = int(batch.lengths[0])
    named = answer.choices[0].logprobs.content
    for token, row in zip(named, values[length - len(named) - 1 : length - 1], strict=True):
        expected = np.argsort(-row)[:3]
        assert [top.token for top in token.top_logprobs] == [tokenizer.decode([i]) for i in expected]
        np.testing.assert_allclose([top.logprob for top in token.top_logprobs], row[expected], atol=1e-4)


def test_answers_obey_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"heard": {"type": "string", "pattern": "^[0-9]{2,5}$"}, "sure": {"enum": ["yes", "no"]}},
        "required": ["heard", "sure"],
        "additionalProperties": False,
    }
    options = {"response_format": schema_format(schema, strict=True), "max_tokens": 200, "temperature": 2.0, "seed": 3}
    answers = chat(client, n=2, **options).choices
    assert [answer.finish_reason for answer in answers] == ["stop", "stop"]
    for answer in answers:
        jsonschema.validate(json.loads(answer.message.content), schema)
    pieces = [c.choices[0].delta.content or "" for c in chat(client, stream=True, **options)]
    assert "".join(pieces) == answers[0].message.content
    anything = chat(client, response_format={"type": "json_object"}, max_tokens=200).choices[0]
    assert anything.finish_reason != "stop" or isinstance(json.loads(anything.message.content), dict)
    prompt = "<|user|>number five two<|end|><|assistant|>"
    chosen = client.completions.create(
        model="tiny", prompt=prompt, extra_body={"structured_outputs": {"choice": ["none", "some"]}}
    )
    assert chosen.choices[0].text in ("none", "some")


def test_calls_that_are_asked_for_obey_their_tools(client):
    parameters = {
        "type": "object",
        "properties": {"digits": {"$ref": "#/$defs/digits"}, "base": {"enum": [2, 10]}},
        "required": ["digits", "base"],
        "additionalProperties": False,
        "$defs": {"digits": {"type": "string", "pattern": "^[0-9]{1,4}$"}},
    }
    number = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    schemas = {"count": parameters, "add": number}
    tools = [{"type": "function", "function": {"name": n, "parameters": p}} for n, p in schemas.items()]
    named = chat(client, tools=tools, tool_choice=named_tool("count"), max_tokens=200).choices[0]
    assert (named.finish_reason, named.message.content) == ("tool_calls", "")
    (call,) = named.message.tool_calls
    assert call.function.name == "count"
    jsonschema.validate(json.loads(call.function.arguments), parameters)
    options = {"tools": tools, "tool_choice": "required", "temperature": 2.0, "max_tokens": 400}
    for seed in range(3):
        answer = chat(client, seed=seed, parallel_tool_calls=False, **options).choices[0]
        assert answer.finish_reason == "tool_calls"
        (call,) = answer.message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
    streamed = chat(client, seed=0, parallel_tool_calls=False, stream=True, **options)
    calls = [c for chunk in streamed for c in chunk.choices[0].delta.tool_calls or []]
    assert [c.function.name for c in calls] in (["count"], ["add"])


def test_an_image_with_a_spoken_question(client):
    audio = {"type": "input_audio", "input_audio": {"data": SPOKEN.partition(",")[2], "format": "ogg"}}
    for heard in (audio, {"type": "audio_url", "audio_url": {"url": SPOKEN}}):
        messages = [{"role": "user", "content": [IMAGE, heard, {"type": "text", "text": "find"}]}]
        assert chat(client, messages, max_tokens=20).choices[0].message.content == "key 7048"


def test_choices_stop_strings_and_prompts(client):
    answer = chat(client, n=2, stop=["4"], max_tokens=20)
    assert [choice.message.content for choice in answer.choices] == ["52", "52"]
    assert [choice.index for choice in answer.choices] == [0, 1]
    prompts = [f"<|user|>number {digits}<|end|><|assistant|>" for digits in ("five two", "one")]
    texts = client.completions.create(model="tiny", prompt=prompts, max_tokens=8, logprobs=1)
    assert [choice.text for choice in texts.choices] == ["52", "1"]
    assert texts.choices[0].logprobs.tokens == ["5", "2", "<|end|>"]
    assert texts.choices[0].logprobs.text_offset == [0, 1, 2]
    assert list(texts.choices[1].logprobs.top_logprobs[0]) == ["1"]
    echoed = client.completions.create(model="tiny", prompt=prompts[0], max_tokens=8, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in echoed) == prompts[0] + "52"


SEARCH = {"use_beam_search": True, "length_penalty": 0.5}


def test_beams_are_the_engines(client, model):
    """In order, with their log-probabilities and tokens; of a chat, and of several raw prompts."""
    prompts = [f"<|user|>number {digits}<|end|><|assistant|>" for digits in ("five two", "nine one")]
    settings = {"max_new_tokens": 3, "beams": 3, "length_penalty": 0.5}
    own = dict(model.engine(CONFIG).run(Request(prompt, **settings) for prompt in (DIGITS, *prompts)))
    expected = [[(a.text, a.finish_reason) for a in own[i].alternatives] for i in range(3)]
    assert {reason for answers in expected for _, reason in answers} == {"stop", "length"}

    answer = chat(client, n=3, max_tokens=3, logprobs=True, extra_body=SEARCH)
    assert [(c.message.content, c.finish_reason) for c in answer.choices] == expected[0]
    found = [[token.logprob for token in choice.logprobs.content] for choice in answer.choices]
    for each, alternative in zip(found, own[0].alternatives, strict=True):
        assert each == pytest.approx(alternative.log_probabilities, abs=1e-4)
    assert answer.usage.completion_tokens == sum(map(len, found))

    texts = client.completions.create(model="tiny", prompt=prompts, n=3, max_tokens=3, echo=True, extra_body=SEARCH)
    assert [choice.index for choice in texts.choices] == list(range(6))
    continued = zip(prompts, expected[1:], strict=True)
    echoed = [(prompt + text, reason) for prompt, answers in continued for text, reason in answers]
    assert [(choice.text, choice.finish_reason) for choice in texts.choices] == echoed
    assert texts.usage.prompt_tokens == own[1].prompt_tokens + own[2].prompt_tokens


@pytest.mark.parametrize(("options", "param"), [
    ({"n": 1}, "n"), ({"n": 4}, "n"), ({"stream": True}, "stream"), ({"temperature": 0.5}, "temperature"),
    ({"stop": "a"}, "stop"), ({"logprobs": True, "top_logprobs": 1}, "top_logprobs"),
    ({"use_beam_search": False}, "length_penalty"),
])  # fmt: skip
def test_what_goes_with_no_beams(url, options, param):
    found = httpx.post(f"{url}/v1/chat/completions", json={"messages": DIGITS, "n": 3} | SEARCH | options)
    assert (found.status_code, found.json()["error"]["param"]) == (400, param)


def test_tools_are_told_to_the_model(client, model):
    told = chat(client, tools=TOOLS, max_tokens=1).usage.prompt_tokens
    system = {"role": "system", "content": "", "tools": TOOLS}
    assert told == len(model.processor.row([system, *DIGITS], [], []).tokens)
    assert chat(client, tools=TOOLS, tool_choice="none", max_tokens=1).usage.prompt_tokens < told


def test_transcription_in_all_formats(client):
    def heard(**options):
        return client.audio.transcriptions.create(model="tiny", file=CLIP, **options)

    assert heard().text == SAID
    assert heard(response_format="text") == SAID + "\n"
    assert heard(response_format="srt") == f"1\n00:00:00,000 --> 00:00:03,285\n{SAID}\n"
    assert heard(response_format="vtt") == f"WEBVTT\n\n00:00:00.000 --> 00:00:03.285\n{SAID}\n"
    found = heard(response_format="verbose_json", language="en")
    assert (found.text, found.duration, found.language) == (SAID, SECONDS, "english")
    (segment,) = found.segments
    assert (segment.start, segment.end, segment.text) == (0.0, SECONDS, SAID)
    events = list(heard(stream=True, include=["logprobs"]))
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == SAID
    values = [token.logprob for token in events[-1].logprobs]
    assert math.isclose(segment.avg_logprob, sum(values) / len(values), abs_tol=1e-5)


def test_a_long_recording_is_cut_at_silence(client):
    """Longer than a clip: its clips are answered side by side, and told in their order; silence alone is not asked."""
    samples, said = recording(held_clips(4))
    file, silent = io.BytesIO(), io.BytesIO()
    soundfile.write(file, samples, RATE, format="FLAC")
    soundfile.write(silent, np.zeros(9 * RATE), RATE, format="FLAC")

    def heard(content=file, **options):
        named = ("talk.flac", content.getvalue())
        return client.audio.transcriptions.create(model="tiny", file=named, **options)

    found = heard(response_format="verbose_json")
    assert found.duration == len(samples) / RATE
    times = [(segment.start, segment.end) for segment in found.segments]
    np.testing.assert_allclose(times, [(clip.start, clip.end) for clip in said], atol=0.3)
    texts = [segment.text for segment in found.segments]
    assert [text for text, clip in zip(texts, said, strict=True) if text != clip.text] in ([], [texts[2]])  # "orange"
    assert found.text == heard().text == " ".join(texts)
    *deltas, done = heard(stream=True, include=["logprobs"])
    assert [event.delta.strip() for event in deltas] == texts
    assert "".join(event.delta for event in deltas) == done.text == found.text
    assert sum(len(event.logprobs) for event in deltas) == len(done.logprobs) == done.usage.output_tokens
    assert len(done.logprobs) == sum(len(segment.tokens) for segment in found.segments)
    nothing = heard(silent, response_format="verbose_json")
    assert (nothing.text, nothing.segments, nothing.duration) == ("", [], 9)
    assert [event.type for event in heard(silent, stream=True)] == ["transcript.text.done"]


def test_a_batch_is_answered_as_its_endpoint_answers(client):
    bodies = [
        {"messages": DIGITS, "max_tokens": 20},
        {"messages": DIGITS, "n": 0},
        {"messages": DIGITS, "max_tokens": 2},
    ]
    lines = [
        {"custom_id": f"a{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i, body in enumerate(bodies)
    ]
    content = "\n".join([*map(json.dumps, lines), "{broken"]).encode()
    file = client.files.create(file=("chats.jsonl", content), purpose="batch")
    assert client.files.content(file.id).content == content
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
    )
    done = wait_for(lambda: (found := client.batches.retrieve(batch.id)).status == "completed" and found)
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (4, 2, 2)
    answers = {x["custom_id"]: x for x in map(json.loads, client.files.content(done.output_file_id).iter_lines())}
    texts = {name: x["response"]["body"]["choices"][0]["message"]["content"] for name, x in answers.items()}
    assert texts == {"a0": "5243", "a2": "52"}
    errors = {x["custom_id"]: x for x in map(json.loads, client.files.content(done.error_file_id).iter_lines())}
    assert errors.keys() == {"a1", "line 4"}
    assert errors["a1"]["response"]["status_code"] == 400
    assert errors["a1"]["response"]["body"]["error"]["param"] == "n"
    assert [found.id for found in client.batches.list()] == [batch.id]
    client.files.delete(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def schema_format(schema, **rest):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **rest}}


def named_tool(name):
    return {"type": "function", "function": {"name": name}}


def part(value):
    return {"messages": [{"role": "user", "content": [value]}]}


def url_part(kind, url):
    return part({"type": kind, kind: {"url": url}})


BAD = {
    "no messages": ({}, 400, "messages"),
    "a model that is not there": ({"messages": DIGITS, "model": "gpt"}, 404, "model"),
    "an unknown key": ({"messages": DIGITS, "foo": 1}, 400, "foo"),
    "a key that is not honoured": ({"messages": DIGITS, "frequency_penalty": 0.5}, 400, "frequency_penalty"),
    "no schema": ({"messages": DIGITS, "response_format": {"type": "json_schema"}}, 400, "response_format"),
    "a schema that is none": ({"messages": DIGITS, "response_format": schema_format({"type": "foo"})}, 400,
                              "response_format.json_schema.schema"),
    "a broken pattern": ({"messages": DIGITS, "structured_outputs": {"regex": "(a"}}, 400, "structured_outputs.regex"),
    "an unknown special token": ({"messages": DIGITS, "structured_outputs": {"grammar": "start: <|nope|>"}}, 400,
                                 "grammar"),
    "a tool that is not there": ({"messages": DIGITS, "tools": TOOLS, "tool_choice": named_tool("sub")}, 400,
                                 "tool_choice"),
    "a choice without tools": ({"messages": DIGITS, "tool_choice": "required"}, 400, "tool_choice"),
    "a value out of range": ({"messages": DIGITS, "temperature": -1}, 400, "temperature"),
    "no tokens": ({"messages": DIGITS, "max_tokens": 0}, 400, "max_tokens"),
    "too many choices": ({"messages": DIGITS, "n": 17}, 400, "n"),
    "too many alternatives": ({"messages": DIGITS, "logprobs": True, "top_logprobs": 4}, 400, "top_logprobs"),
    "a wrong part": (part({"type": "image_url", "image_url": {}}), 400, "messages[0].content[0].image_url.url"),
    "a path": (url_part("image_url", str(MODEL / "config.json")), 400, "messages[0].content[0].image_url"),
    "a file URL": (url_part("image_url", f"file://{PICTURE}"), 400, "messages[0].content[0].image_url"),
    "a path of a video": (url_part("video_url", str(EXAMPLES)), 400, "messages[0].content[0].video_url"),
    "a part of ours": (part({"type": "image", "image": str(PICTURE)}), 400, "messages[0].content[0]"),
    "a remote URL": (url_part("audio_url", "http://example.org/a.wav"), 400, "messages[0].content[0].audio_url"),
    "no image": (url_part("image_url", "data:image/png;base64,QUJD"), 400, "messages[0].content[0].image_url"),
    "a bomb": (url_part("image_url", data_of("image/png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0\0\xea\x60" * 2
               + b"\x08\2\0\0\0\x8d\x34\x81\xc6")), 400, "messages[0].content[0].image_url"),
    "a sound of no rate": (url_part("audio_url", data_of("audio/wav", b"RIFF\x28\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0"
                           + b"\0" * 8 + b"\2\0\x10\0data\4\0\0\0\0\0\0\0")), 400,
                           "messages[0].content[0].audio_url"),
    "a list of files as a sound": (url_part("audio_url", data_of("audio/wav", PLAYLIST)), 400,
                                   "messages[0].content[0].audio_url"),
    "half a surrogate pair": ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "text"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_an_error_of_the_api(url, body, status, param, stream):
    content = json.dumps(body | {"stream": stream})
    found = httpx.post(f"{url}/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    error = found.json()["error"]
    assert (found.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert error["message"]


@pytest.mark.parametrize("value", [
    {"type": "image_url", "image_url": {"url": data_of("image/jpeg", PICTURE.read_bytes()[:2000])}},
    {"type": "video_url", "video_url": {"url": data_of("video/mp4", PLAYLIST)}},
], ids=["half an image", "a list of files as a video"])  # fmt: skip
def test_media_that_decoding_shows_to_be_bad_are_told(url, value):
    found = httpx.post(f"{url}/v1/chat/completions", json=part(value), timeout=60)
    assert (found.status_code, found.json()["error"]["type"]) == (400, "invalid_request_error")


def test_limits(url, client):
    assert httpx.post(f"{url}/v1/chat/completions", content=b" " * (2**20 + 1)).status_code == 413
    assert httpx.post(f"{url}/v1/chat/completions", content=iter([b" " * 2**19] * 3),
                      headers={"content-type": "application/json"}).status_code == 413  # fmt: skip
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, [{"role": "user", "content": "number " * 4096}])
    assert caught.value.code == "context_length_exceeded"
    silence = b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x40\x1f\0\0\1\0\x08\0data\xff\xff\xff\xff"
    with pytest.raises(openai.BadRequestError, match="longer than 60 seconds"):
        client.audio.transcriptions.create(model="tiny", file=silence + b"\x80" * 8000 * 61)


def test_an_engine_that_crashes_is_said_and_made_anew(engines, client, url):
    def crash():
        raise MemoryError("the device is gone")

    engines[-1].step = crash
    with pytest.raises(openai.InternalServerError, match="the device is gone") as caught:
        chat(client)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_stopped")
    wait_for(lambda: httpx.get(f"{url}/ready").status_code == 200)
    assert chat(client, max_tokens=20).choices[0].message.content == "5243"
    figures = httpx.get(f"{url}/metrics").text
    assert "phi4mm_engine_restarts 1.0" in figures
    assert 'phi4mm_requests_total{path="/v1/chat/completions",status="503"} 1.0' in figures


def test_a_mistyped_key_is_told_with_the_nearest():
    error = invalid([{"loc": ("body", "max_token"), "type": "extra_forbidden", "msg": ""}], ChatRequest)
    assert "max_token: is not known, and not ignored; did you mean max_tokens?" in error.detail
    other = invalid([{"loc": ("body", "zzz"), "type": "extra_forbidden", "msg": ""}], ChatRequest)
    assert other.detail == "zzz: is not known, and not ignored; leave it out"
