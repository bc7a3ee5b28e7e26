"""Bodies of requests: each key is obeyed or refused by name, as the OpenAPI document says."""

from dataclasses import replace

import httpx
import pytest
from helpers.paths import TINY
from helpers.played import answer, make_app
from helpers.serving import serving
from jsonschema import Draft202012Validator

from phi4mm_jax.engine import Sampling
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.chat import render_chat
from phi4mm_jax.processing.tokenizer import Tokenizer

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
OFF = {  # of vLLM's requests, which change nothing here
    "skip_special_tokens": False, "ignore_eos": False, "min_tokens": 0, "best_of": 1, "bad_words": [],
    "add_special_tokens": False, "include_stop_str_in_output": False, "early_stopping": False, "top_k": -1,
    "use_beam_search": False, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "unknown": None,
    "echo": False,
}  # fmt: skip
OFF_OF = {"chat/completions": OFF | {"chat_template_kwargs": {}}, "completions": OFF | {"suffix": None}}
BODIES = {"chat/completions": CHAT, "completions": {"prompt": "a"}}
SCHEMAS = {"chat/completions": "ChatRequest", "completions": "CompletionRequest"}
ON = {
    "skip_special_tokens": [0, "true"], "ignore_eos": [True], "min_tokens": [1, False], "best_of": [2, True],
    "bad_words": [["a"]], "add_special_tokens": [True], "include_stop_str_in_output": [True], "early_stopping": [True],
    "chat_template_kwargs": [{"a": 1}], "suffix": ["a"], "prompt_logprobs": [1], "top_k": [-2],
    "frequency_penalty": [1, False], "logit_bias": [{"1": 1}], "stream": ["no"], "use_beam_search": [0],
    "stream_options": [{"include_usage": "yes"}, {"include_obfuscation": 0}], "echo": ["no"],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(TINY)


@pytest.fixture(scope="module")
def app(tokenizer, tmp_path_factory):
    """Application whose engine answers at once."""
    return make_app(answer, tokenizer, tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def played(app):
    """URL and OpenAPI document of the application's server."""
    with serving(app) as url:
        yield url, app.openapi()


def agreed(played, path, body):
    """Answer to a body, which is taken exactly where the document has it."""
    told = httpx.post(f"{played[0]}/v1/{path}", json=body)
    assert told.status_code in (200, 400)
    schema = {"$ref": f"#/components/schemas/{SCHEMAS[path]}", "components": played[1]["components"]}
    assert Draft202012Validator(schema).is_valid(body) is (told.status_code == 200), told.text
    return told


@pytest.mark.parametrize("path", OFF_OF)
def test_what_changes_nothing_is_taken(app, played, path):
    asked = app.state.service.host.asked
    for key in OFF_OF[path]:
        asked.clear()
        body = BODIES[path] | {key: OFF_OF[path][key]}
        told = httpx.post(f"{played[0]}/v1/{path}", json=body)
        assert told.status_code == 200, told.text
        assert httpx.post(f"{played[0]}/v1/{path}", json=BODIES[path]).status_code == 200
        given, plain = asked
        assert replace(given, sampling=Sampling()) == replace(plain, sampling=Sampling())
        assert replace(given.sampling, seed=0) == replace(plain.sampling, seed=0)
        if key != "use_beam_search":  # which the document has only where there are beams
            agreed(played, path, body)


@pytest.mark.parametrize("path", OFF_OF)
def test_special_tokens_are_skipped_where_a_body_says_so(app, played, path):
    for value in (True, False, None):
        app.state.service.host.asked.clear()
        assert agreed(played, path, BODIES[path] | {"skip_special_tokens": value}).status_code == 200
        assert app.state.service.host.asked[0].skip_special_tokens is bool(value)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ON.items() for value in values])
@pytest.mark.parametrize("path", OFF_OF)
def test_what_is_not_supported_is_refused(played, path, key, value):
    told = agreed(played, path, BODIES[path] | {key: value})
    assert told.status_code == 400
    assert told.json()["error"]["param"].startswith(key)


@pytest.mark.parametrize(("path", "rest", "expected"), [
    ("chat/completions", {"ignore_eos": True}, "ignore_eos: true is not supported, only false; leave it out"),
    ("completions", {"max_completion_tokens": 1},
     "max_completion_tokens: is not known, and not ignored; did you mean max_tokens? Else leave it out"),
    *(("completions", {"prompt": prompt},
       "prompt: token ids are not taken; send text, in which special tokens are recognised")
      for prompt in ([1, 2, 3], [[1, 2], [3]], ["a", 1])),
])  # fmt: skip
def test_errors_name_what_is_taken(played, path, rest, expected):
    assert agreed(played, path, BODIES[path] | rest).json()["error"]["message"] == expected


def named(**values):
    return [{key: value} for key, given in values.items() for value in given]


CALL = {"type": "function", "function": {"name": "add", "arguments": {}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("asked", [
    *named(temperature=[-1, 0, 1e30, 1e31], top_p=[0, 1e-9, 1, 1.1], top_k=[-1, 0, 2**31 - 1, 2**31],
           min_p=[-0.1, 0, 1, 2], repetition_penalty=[0, 1e-3, 1e3, 1001], seed=[-1, 0, 2**31],
           n=[0, 1, 16, 17], max_tokens=[0, 1],
           max_completion_tokens=[0, 1], stop=["", "a", [], [""], ["a"]], timeout=[0, 60], presence_penalty=[0, 1],
           frequency_penalty=[0, -1], logit_bias=[{}, {"1": 1}], modalities=[[], ["text"], ["audio"], ["text", "text"]],
           adapter=["none", "speech", "other"], draft=["lookup"], use_beam_search=[True], length_penalty=[1],
           response_format=[{"type": "text"}, {"type": "json_object"}, SCHEMA, {}, {"type": "json_schema"}],
           structured_outputs=[{}, {"regex": "a"}, {"choice": []}, {"choice": ["a"]}, {"json_object": False}],
           tool_choice=["none", "auto", "any"], top_logprobs=[1], stream_options=[{"include_usage": True}],
           add_generation_prompt=[True, "true"], messages=[[]], unknown=[1], parallel_tool_calls=["no", 0, True],
           store=["a"], logprobs=["true", 1], continue_final_message=["no"]),
    *named(messages=[[{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": value}]}]
                     for value in (None, 1)]),
    {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": None}},
    {"stream": True, "stream_options": {"include_usage": True}},
    *({"logprobs": True, "top_logprobs": count} for count in (0, 20, 21)),
    *({"tools": [TOOL], "tool_choice": choice} for choice in ("required", {"type": "function", "function": {}})),
    {"structured_outputs": {"regex": "a"}, "response_format": SCHEMA},
    {"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}},
])  # fmt: skip
def test_chats_of_the_document_are_answered(played, asked):
    """And no others; by an independent reader of JSON Schema."""
    agreed(played, "chat/completions", CHAT | asked)


@pytest.mark.parametrize("calls", [None, [], [CALL], [{}]])
@pytest.mark.parametrize("content", [None, "a", [], [{"type": "text", "text": "a"}], [{"type": "text"}]])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_messages_of_the_document_are_rendered(played, tokenizer, role, content, calls):
    message = {"role": role, "content": content, "tool_calls": calls}
    schema = {"$ref": "#/components/schemas/Message", "components": played[1]["components"]}
    try:
        render_chat([message], tokenizer)
        taken = True
    except InputError:
        taken = False
    assert Draft202012Validator(schema).is_valid(message) is taken


@pytest.mark.parametrize("asked", [
    *named(prompt=["", [], [""], ["a"] * 64, ["a"] * 65], logprobs=[0, 20, 21], echo=[True], n=[17], temperature=[-1]),
    {"echo": True, "logprobs": 0},
    {"stream_options": {}},
])  # fmt: skip
def test_prompts_of_the_document_are_answered(played, asked):
    url, described = played
    schema = {"$ref": "#/components/schemas/CompletionRequest", "components": described["components"]}
    told = httpx.post(f"{url}/v1/completions", json={"prompt": "a"} | asked)
    assert told.status_code in (200, 400)
    assert Draft202012Validator(schema).is_valid({"prompt": "a"} | asked) is (told.status_code == 200), told.text
