"""Forms of recordings and files: each field has an effect or is refused by name, as the OpenAPI document says."""

import io
import json

import httpx
import numpy as np
import openai
import pytest
import soundfile
from helpers.paths import TINY
from helpers.played import answer, make_app
from helpers.serving import serving
from jsonschema import Draft202012Validator

from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.serve.limits import Limits

PATHS = ["/v1/audio/transcriptions", "/v1/audio/translations"]
NEVER = {"foo": 1, "to_language": "de", "hotwords": "a", "use_beam_search": True, "n": 3, "max_tokens": 2,
         "include": "logprobs", "timestamp_granularities": "segment", "known_speaker_names[]": "a",
         "chunking_strategy[type]": "server_vad"}  # fmt: skip


def speech(clips):
    """Different tones with silence between them, as many clips."""
    tones = [np.concatenate([np.sin(np.arange(16000) / (5 + i)) / 5, np.zeros(24000)]) for i in range(clips)]
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(tones), 16000, format="WAV")
    return {"file": ("a.wav", file.getvalue())}


ONE = speech(1)


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    limits = Limits(clip_seconds=3, pause=1)
    return make_app(answer, Tokenizer.from_folder(TINY), tmp_path_factory.mktemp("files"), limits)


@pytest.fixture(scope="module")
def url(app):
    with serving(app) as url:
        yield url


def form_schema(app, path):
    found = app.openapi()
    content = found["paths"][path]["post"]["requestBody"]["content"]
    assert content.keys() == {"multipart/form-data"}
    return content["multipart/form-data"]["schema"] | {"components": found["components"]}


def text_of(value):
    return value if isinstance(value, str) else json.dumps(value)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("key", "value"), [
    *NEVER.items(),
    *((key, value) for key, values in {
        "temperature": [-1, 0, 4.5], "seed": [-1, 0, 2**31], "top_p": [0, 0.5, 1.1], "top_k": [-2, -1, 0, 1, 2**31],
        "min_p": [-0.1, 0.1, 2], "repetition_penalty": [0, 1.5, 1001], "max_completion_tokens": [0, 1],
        "frequency_penalty": [0, 1], "presence_penalty": [0, 1], "adapter": ["none", "speech", "other"],
        "stream": [True, False, "maybe"], "prompt": ["a"], "timeout": [0, 60], "language": ["en", "xx"],
        "response_format": ["text", "srt", "pdf"], "include[]": [["logprobs"], ["words"]],
        "timestamp_granularities[]": [["segment"], ["word"]], "chunking_strategy": ["auto", "server_vad"],
    }.items() for value in values),
])  # fmt: skip
def test_fields_of_the_document_are_taken_and_no_others(app, url, path, key, value):
    data = {key: [text_of(v) for v in value] if isinstance(value, list) else text_of(value)}
    told = httpx.post(url + path, files=ONE, data=data)
    assert told.status_code in (200, 400)
    valid = Draft202012Validator(form_schema(app, path)).is_valid({"file": "a", key: value})
    assert valid is (told.status_code == 200), told.text
    assert not (key in NEVER and valid)
    if not valid:
        assert told.json()["error"]["param"].startswith(key)


@pytest.mark.parametrize(("key", "near"), [
    ("include", "include[]"), ("max_tokens", "max_completion_tokens"), ("top_pp", "top_p"),
])  # fmt: skip
def test_a_field_that_is_not_known_is_told_with_the_nearest(url, key, near):
    told = httpx.post(url + PATHS[0], files=ONE, data={key: "1"}).json()["error"]["message"]
    assert told == f"{key}: is not known, and not ignored; did you mean {near}? Else leave it out"


@pytest.mark.parametrize("path", PATHS)
def test_a_field_that_is_there_twice_is_refused(url, path):
    for data, files in (({"seed": ["1", "2"]}, ONE), ({}, [*ONE.items(), *ONE.items()])):
        told = httpx.post(url + path, files=files, data=data)
        assert told.status_code == 400
        assert told.json()["error"]["param"] == ("seed" if data else "file")


@pytest.mark.parametrize("path", PATHS)
def test_settings_reach_every_clip(app, url, path):
    """With a seed the clips share it, but not their draws, and the same request has the same ones."""
    asked = app.state.service.host.asked
    settings = {"temperature": 4, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5, "seed": 7}
    found = []
    for _ in range(2):
        asked.clear()
        data = {key: text_of(value) for key, value in settings.items()}
        data |= {"top_k": "1", "max_completion_tokens": "2", "adapter": "none"}
        assert httpx.post(url + path, files=speech(3), data=data).status_code == 200
        assert [(request.max_new_tokens, request.adapter) for request in asked] == [(2, "none")] * 3
        for request in asked:
            assert {key: getattr(request.sampling, key) for key in settings} == settings
            assert request.sampling.top_k == 1
        samples = {request.prompt[0]["content"][0]["audio"][0].tobytes(): request.sampling.stream for request in asked}
        found.append(sorted(samples.items()))
        assert sorted(samples.values()) == [0, 1, 2]
    assert found[0] == found[1]


def test_lists_come_in_pages(url):
    names = [f"{n}.jsonl" for n in range(5)]
    for name in names:
        data = {"purpose": "batch"}
        assert httpx.post(f"{url}/v1/files", files={"file": (name, b"{}")}, data=data).status_code == 200
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        listed = [file.filename for file in client.files.list(limit=2, order="asc", purpose="batch")]
        assert listed[-5:] == names
        first = client.files.list(limit=2)
        assert ([file.filename for file in first.data], first.has_more) == (["4.jsonl", "3.jsonl"], True)
        assert next(iter(client.files.list(after=first.data[-1].id))).filename == "2.jsonl"
        assert client.files.list(purpose="batch_output").data == []
        assert client.batches.list(limit=1).data == []
    for query, named in (("limit=0", "limit"), ("after=file-0", "after"), ("page=2", "page")):
        refused = httpx.get(f"{url}/v1/files?{query}")
        assert refused.status_code in (400, 404)
        assert refused.json()["error"]["param"] == named


def test_a_file_for_batches_takes_no_other_fields(url):
    files = {"file": ("a.jsonl", b"{}")}
    refused = httpx.post(f"{url}/v1/files", files=files, data={"purpose": "batch", "expires_after[seconds]": "3600"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "expires_after[seconds]")
    assert httpx.post(f"{url}/v1/files", files=files, data={"purpose": "batch"}).status_code == 200
