"""Grammars: what a request's answer obeys, and nobody else's."""

import json
import re
import sys
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from helpers.reference import uncached_logits
from scipy.special import log_softmax

from infer import generate
from phi4mm_jax import InputError
from phi4mm_jax.engine import Engine, EngineConfig, Grammar, Request, Sampling
from phi4mm_jax.engine.grammar import start_matcher
from phi4mm_jax.engine.jsonl import read_requests
from phi4mm_jax.engine.openai_batch import keys_of_body
from phi4mm_jax.engine.tool_calls import tool_call_grammar

CONFIG = EngineConfig(slots=3, cache_tokens=4096, page_size=64, chunk=64, steps=4)
DIGITS = "<|user|>number five two four three<|end|><|assistant|>"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 18, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tiny) -> Engine:
    return tiny.engine(CONFIG)


def answers_of(engine, requests):
    found = dict(engine.run(requests))
    return [found[place] for place in range(len(requests))]


def test_greedy_answers_are_those_of_logits_masked_by_hand(tiny, engine):
    """Tokens that a prefix of the language ends with are allowed, stop tokens where all of it is there.

    Beyond token 96 the rotary set changes: the sequence is preempted, prefilled again and goes on.
    """
    prompt = "<|user|>" + "light of seven stones " * 5 + "time?<|end|><|assistant|>"
    language, prefix = "[a-z]{4}-[0-9]{30,36}", "[a-z]{0,4}|[a-z]{4}-[0-9]{0,36}"
    (found,) = answers_of(engine, [Request(prompt, grammar=Grammar.regex(language), max_new_tokens=64)])
    assert found.prompt_tokens < 90 < 100 < found.prompt_tokens + len(found.tokens)
    assert re.fullmatch(language, found.text)
    assert found.finish_reason == "stop"
    (logits,) = uncached_logits(tiny, tiny.process([prompt]), [found.tokens])
    tokenizer = tiny.processor.tokenizer
    pieces = [tokenizer.decode([token]) for token in range(logits.shape[-1])]
    specials, stops, text = set(tokenizer.special_tokens.values()), tiny.config.stop_token_ids, ""
    for row, token in zip(logits, found.tokens, strict=True):
        allowed = [t for t, p in enumerate(pieces) if p and t not in specials and re.fullmatch(prefix, text + p)]
        allowed += stops if re.fullmatch(language, text) else []
        assert token == max(allowed, key=row.__getitem__)
        text += "" if token in stops else pieces[token]
    own = log_softmax(logits, -1)[np.arange(len(found.tokens)), found.tokens]
    np.testing.assert_allclose(found.log_probabilities, own, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_answers_obey_a_schema(engine, temperature):
    grammar = Grammar.json_schema(SCHEMA)
    requests = [
        Request(DIGITS, grammar=grammar, max_new_tokens=200, sampling=Sampling(temperature, seed=seed))
        for seed in range(1 if temperature == 0 else 6)
    ]
    for found in answers_of(engine, requests):
        assert (found.finish_reason, found.error) == ("stop", None)
        jsonschema.validate(json.loads(found.text), SCHEMA)
        assert not re.search(r"\s\s|[^:,]\s", re.sub(r'"(\\.|[^"\\])*"', '""', found.text)), found.text


@pytest.mark.parametrize(
    ("guidance", "written", "refused"),
    [
        ({}, ['{"a":1,"b":[1,2]}', '{"a": 1, "b": [1, 2]}'],
         ['{\n  "a": 1, "b": []}', '{ "a": 1, "b": []}', '{"a" : 1, "b": []}', '{"a":  1, "b": []}',
          '{"a":\n1, "b": []}', '{"a": 1, "b": [ ]}', '{"a": 1, "b": [] }', ' {"a": 1, "b": []}',
          '{"a": 1, "b": []} ']),
        ({"whitespace_flexible": True}, ['{"a":1,"b":[]}', '{\n\n  "a" :   1,\t"b": [ ] }'], []),
        ({"whitespace_pattern": "\\n {0,4}|[ ]"}, ['{"a": 1, "b": []}', '{\n  "a": 1,\n  "b": [\n    1\n  ]\n}'],
         ['{\n\n"a": 1, "b": []}', '{"a":  1, "b": []}']),
        ({"item_separator": ",", "key_separator": ":"}, ['{"a":1,"b":[1,2]}'], ['{"a": 1,"b":[]}', '{"a":1, "b":[]}']),
    ],
    ids=["default", "any", "pattern", "compact"],
)  # fmt: skip
def test_whitespace_of_json_is_what_the_schema_says(tiny, guidance, written, refused):
    """By default on one line, with a space or none behind commas and colons; also in the arguments of a call."""
    fields = {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "integer"}}}
    schema = {"type": "object", "properties": fields, "required": ["a", "b"], "additionalProperties": False}
    schema |= {"x-guidance": guidance} if guidance else {}
    call = '<|tool_call|>[{"name": "f", "arguments": %s}]<|/tool_call|>'
    for grammar, form in [(Grammar.json_schema(schema), "%s"), (tool_call_grammar([("f", schema)]), call)]:
        for text, is_refused in [*((text, False) for text in written), *((text, True) for text in refused)]:
            matcher = start_matcher(grammar, tiny.processor.tokenizer, tiny.config.decoder.vocab_size, (0,))
            assert can_write(matcher, tiny.processor.tokenizer.encode(form % text, special=True)) != is_refused, text


def test_a_state_stays_as_it_is_when_another_follows(tiny):
    tokenizer = tiny.processor.tokenizer
    matcher = start_matcher(Grammar.choice(["ab", "cd"]), tokenizer, tiny.config.decoder.vocab_size, (0,))
    before = matcher.allowed().copy()
    after = matcher.after(tokenizer.encode("a")[0])
    assert not can_write(after, tokenizer.encode("c"))
    np.testing.assert_array_equal(matcher.allowed(), before)


def can_write(matcher, tokens) -> bool:
    for token in tokens:
        if not matcher.allowed()[token // 32] >> (token % 32) & 1:
            return False
        matcher.accept(token)
    return matcher.over


def test_other_requests_are_answered_as_alone(tiny, engine):
    """A request with a grammar comes and goes beside two without, of which one samples."""
    plain = [
        Request(DIGITS, max_new_tokens=12),
        Request("<|user|>a green stone<|end|><|assistant|>", max_new_tokens=12, sampling=Sampling(2.0, seed=3)),
    ]
    alone = [answers_of(engine, [request])[0] for request in plain]
    with_grammar = Request(DIGITS, grammar=Grammar.choice(["seven stones", "a house"]), max_new_tokens=40)
    *together, chosen = answers_of(engine, [*plain, with_grammar])
    assert chosen.text in ("seven stones", "a house")
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-5)


def test_an_answer_ends_where_its_grammar_may(tiny, engine):
    """By a stop token of the model's or the request's own, which are likely at this temperature; or by the limit."""
    grammar, stops = Grammar.regex("[0-9]{2,}"), (tiny.processor.tokenizer.special_tokens["<|tag|>"],)
    requests = [
        Request(DIGITS, grammar=grammar, stop_tokens=stops, max_new_tokens=24, sampling=Sampling(50.0, seed=seed))
        for seed in range(12)
    ]
    found = answers_of(engine, requests)
    assert all(re.fullmatch("[0-9]{2,}", answer.text) for answer in found)
    ends = {answer.tokens[-1] for answer in found if answer.finish_reason == "stop"}
    assert ends == {*tiny.config.stop_token_ids, *stops}
    (cut,) = answers_of(engine, [Request(DIGITS, grammar=Grammar.regex("[0-9]{9}"), max_new_tokens=4)])
    assert (cut.finish_reason, len(cut.text)) == ("length", 4)


def test_special_tokens_are_named_and_are_no_text(tiny, engine):
    tag = tiny.processor.tokenizer.special_tokens["<|tag|>"]
    request = Request(DIGITS, grammar=Grammar.lark("start: <|tag|> /[ab]{2}/"))
    named, skipped = answers_of(engine, [request, replace(request, skip_special_tokens=True)])
    assert skipped.tokens == named.tokens
    assert skipped.text == skipped.content == named.text.removeprefix("<|tag|>")
    assert named.tokens[0] == tag
    assert re.fullmatch(r"<\|tag\|>[ab]{2}", named.text)
    (spelled,) = answers_of(engine, [Request(DIGITS, grammar=Grammar.choice(["<|tag|>"]))])
    assert spelled.text == "<|tag|>"
    assert tag not in spelled.tokens


BAD = {
    "regex": (lambda: Grammar.regex("(ab"), "grammar is not a valid regex: .*unclosed group"),
    "look-around": (lambda: Grammar.regex("(?=a)b"), "look-around"),
    "schema": (lambda: Grammar.json_schema({"type": "foo"}), "not a valid json_schema: Invalid type: foo"),
    "keyword": (lambda: Grammar.json_schema({"not": {"type": "string"}}), 'Unimplemented keys: ."not"'),
    "unsatisfiable": (lambda: Grammar.json_schema({"type": "integer", "minimum": 3, "maximum": 1}), "nsatisfiable"),
    "JSON": (lambda: Grammar.json_schema('{"type":'), "not a valid json_schema: .*char 8"),
    "choice": (lambda: Grammar.choice([]), "not a valid choice: expected a list of answers"),
    "lark": (lambda: Grammar.lark("start: foo"), 'not a valid lark: .*unknown name: "foo"'),
    "kind": (lambda: Grammar("gbnf", "a"), "grammar is of kind 'gbnf'; expected one of json_schema"),
    "no grammar": (lambda: Request(DIGITS, grammar="[0-9]"), "grammar is a str; expected a Grammar"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_grammars_are_named(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_grammars_that_no_answer_obeys(engine):
    """At once, and after a token; the tokens before are kept."""
    nothing = r"[^\x00-\U0010FFFF]"
    lacking, empty, ended = answers_of(
        engine, [Request(DIGITS, grammar=g) for g in (Grammar.lark("start: <|nope|>"), Grammar.regex(nothing),
                                                      Grammar.lark(f'start: "a" X\nX: /{nothing}/'))]
    )  # fmt: skip
    assert [answer.error_type for answer in (lacking, empty, ended)] == ["InputError"] * 3
    assert 'unknown special token: "<|nope|>"' in lacking.error
    assert empty.error == "grammar is not a regex that an answer can obey: no token obeys it"
    assert ended.finish_reason == "error"
    assert ended.error.startswith("grammar is at a dead end after 1 tokens") or "can obey" in ended.error


def test_lines_ask_for_grammars_in_our_form_and_openais(tmp_path):
    messages = [{"role": "user", "content": "Hello"}]
    schema = Grammar.json_schema(SCHEMA)
    tools = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    named = {"type": "function", "function": {"name": "f"}}
    formats = [
        ({"json_schema": SCHEMA}, schema), ({"choice": ["a", "b"]}, Grammar.choice(["a", "b"])),
        ({"gbnf": "a"}, "grammar is {'gbnf': 'a'}; expected an object with one of json_schema, regex"),
    ]  # fmt: skip
    bodies = [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar.json_object()),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}, schema),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar.lark('start: "a"')),
        ({"structured_outputs": {"json": SCHEMA}, "tools": tools, "tool_choice": "none"}, schema),
        ({"tools": tools}, None),
        ({"tools": tools, "parallel_tool_calls": True}, None),
        ({"parallel_tool_calls": False}, None),  # there are no tools to call
        ({"tools": tools, "parallel_tool_calls": False, "tool_choice": "none"}, None),
        ({"tools": tools, "parallel_tool_calls": False}, "body.parallel_tool_calls is False, .* tool_choice 'auto'"),
        ({"messages": [{"role": "system", "content": "s", "tools": tools}, *messages], "parallel_tool_calls": False},
         "body.parallel_tool_calls is False, .* tool_choice 'auto'"),
        ({"parallel_tool_calls": "no"}, "body.parallel_tool_calls is 'no'; expected true or false"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}},
         "body.response_format.json_schema.schema is not usable: .*Unimplemented keys"),
        ({"response_format": {"type": "yaml"}}, "body.response_format is {'type': 'yaml'}; expected"),
        ({"tools": tools, "tool_choice": "sometimes"}, "body.tool_choice is 'sometimes'; expected"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "foo"}}}],
          "tool_choice": named}, r"body.tools\[0\].function.parameters is .*; expected the JSON schema of an object"),
    ]  # fmt: skip
    lines = [{"messages": messages, "grammar": given} for given, _ in formats]
    lines += [{"custom_id": str(i), "body": {"messages": messages, **body}} for i, (body, _) in enumerate(bodies)]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    for line, (_, expected) in zip(read_requests(path, max_new_tokens=3), [*formats, *bodies], strict=True):
        found = line.error or line.request.grammar
        assert re.search(expected, str(found)) if isinstance(expected, str) else found == expected


def test_answers_with_a_schema_may_call_tools_instead(tiny):
    keys = keys_of_body(
        {
            "messages": [{"role": "user", "content": "Hello"}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
        },
        "messages",
    )
    tokenizer, config = tiny.processor.tokenizer, tiny.config
    started = (tokenizer, config.decoder.vocab_size, config.stop_token_ids)
    call = '<|tool_call|>[{"name": "f", "arguments": {"name": "x", "age": 20, "tags": ["a"]}}]<|/tool_call|>'
    for answer in ('{"name": "x", "age": 20, "tags": ["a", "b"]}', call):
        matcher = start_matcher(Grammar.of(keys["grammar"]), *started)
        assert can_write(matcher, tokenizer.encode(answer, special=True)), answer


@pytest.mark.parametrize(
    "asked", [{"tool_choice": "required"}, {"response_format": {"type": "json_object"}}], ids=["required", "format"]
)
def test_answers_call_one_tool_where_parallel_calls_are_off(tiny, asked):
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = {"messages": [{"role": "user", "content": "Hello"}], "tools": tools, **asked}
    tokenizer, config = tiny.processor.tokenizer, tiny.config
    started = (tokenizer, config.decoder.vocab_size, config.stop_token_ids)
    call = '{"name": "f", "arguments": {}}'
    two = tokenizer.encode(f"<|tool_call|>[{call}, {call}]<|/tool_call|>", special=True)
    for parallel, is_allowed in ((True, True), (False, False)):
        keys = keys_of_body(body | {"parallel_tool_calls": parallel}, "messages")
        assert can_write(start_matcher(Grammar.of(keys["grammar"]), *started), two) is is_allowed


def test_options_of_generate(tmp_path, monkeypatch):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))

    def found(*options):
        monkeypatch.setattr(sys, "argv", ["generate", "--model", "m", *options, "TEXT"])
        return generate.grammar_of(generate.parse_arguments())

    assert found() is None
    assert found("--json-schema", str(path)) == Grammar("json_schema", json.dumps(SCHEMA))
    assert found("--regex", "[0-9]+") == Grammar.regex("[0-9]+")
    for options, message in [
        (("--regex", "(a"), "--regex: grammar is not a valid regex"),
        (("--regex", "a", "--json-schema", str(path)), "--json-schema and --regex are both given"),
        (("--json-schema", str(tmp_path / "none")), "--json-schema: .*none: cannot be read"),
    ]:
        with pytest.raises(InputError, match=message):
            found(*options)


def test_chains_of_definitions_do_not_end_the_process():
    """llguidance recurses along them: beyond the stack of a thread by default."""
    assert Grammar.lark("start: A0\n" + "\n".join(f"A{i}:A{i + 1}" for i in range(5000)) + '\nA5000: "a"')
    with pytest.raises(InputError, match="not a valid lark: it has 70001 characters; expected 65536 at most"):
        Grammar.lark("#" * 70001)


def test_without_llguidance(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"^grammar needs llguidance, .* pip install '\.\[grammar\]'$"):
        Grammar.regex("a never seen one")
