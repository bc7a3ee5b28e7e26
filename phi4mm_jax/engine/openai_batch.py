"""Requests of OpenAI's batch files, as the keys of our own lines."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from phi4mm_jax.adapters import adapter_choices
from phi4mm_jax.engine.grammar import Grammar
from phi4mm_jax.engine.tool_calls import tool_call_grammar
from phi4mm_jax.errors import InputError
from phi4mm_jax.processing.chat import with_tools

_URL = "/v1/chat/completions"
_LINE = {"custom_id", "method", "url", "body"}  # of OpenAI's batch files
_SCHEMA_KEYS = {"name", "description", "schema", "strict"}  # of a response format; answers obey, strict or not
_SAME = ("temperature", "top_p", "seed", "logprobs", "top_k", "min_p", "repetition_penalty",
         "continue_final_message", "draft", "skip_special_tokens")  # same keys as ours  # fmt: skip
_NOTHING = {  # keys that change no answer, whatever their value
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options",
}  # fmt: skip
_USUAL = {  # keys that change none with these values
    "n": (1,), "stream": (False,), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "top_logprobs": (0,), "modalities": (["text"],), "echo": (False,), "best_of": (1,), "use_beam_search": (False,),
    "early_stopping": (False,), "ignore_eos": (False,), "min_tokens": (0,), "bad_words": ([],),
    "chat_template_kwargs": ({},), "add_special_tokens": (False,), "include_stop_str_in_output": (False,),
}  # fmt: skip


def from_openai(values: Mapping[str, Any], adapters: Collection[str] = ()) -> dict[str, Any]:
    """Return the keys of a line of ours, from one of OpenAI's batch files; null is as good as absent.

    Args:
        adapters: names of the users' adapters that are loaded: a line may ask for one as its model.

    Raises:
        InputError: a key that would change the answer is not known here, or its model and its adapter are two.
    """
    if unknown := sorted(values.keys() - _LINE):
        raise InputError(f"{unknown[0]!r} is not known beside custom_id and body; expected {', '.join(sorted(_LINE))}")
    if values.get("method", "POST") != "POST" or values.get("url", _URL) != _URL:
        given = f"{values.get('method', 'POST')} {values.get('url', _URL)}"
        raise InputError(f"asks for {given:.80}; only POST {_URL} is answered")
    body = values.get("body")
    if not isinstance(body, dict):
        raise InputError(f"body is a {type(body).__name__}; expected an object with messages")
    rest = {key: value for key, value in body.items() if key not in ("model", "adapter")}
    return keys_of_body(rest, "messages") | _asked_adapter(body.get("model"), body.get("adapter"), adapters)


def _asked_adapter(model: Any, adapter: Any, adapters: Collection[str]) -> dict[str, Any]:
    """Return the key of the adapter that a body asks for, as a server with these adapters reads it.

    Other models change nothing: OpenAI's files name OpenAI's.

    Raises:
        InputError: the model is one adapter, and `adapter` another.
    """
    if not isinstance(model, str) or model not in adapters:
        return {"adapter": adapter}
    if adapter in adapter_choices():
        return {"adapter": f"{adapter}+{model}"}
    if adapter is not None and str(adapter).rpartition("+")[2] != model:
        raise InputError(f"body.model is {model!r:.60} and body.adapter is {adapter!r:.60}; leave one out")
    return {"adapter": adapter or model}


def keys_of_body(body: Mapping[str, Any], prompt: Literal["messages", "prompt"]) -> dict[str, Any]:
    """Return the keys of a line of ours, from the body of a request to OpenAI's API; null is as good as absent.

    Args:
        prompt: the key that holds it: "messages" of a chat, "prompt" of a text to complete.

    Raises:
        InputError: a key that would change the answer is not known here.
    """
    body = {key: value for key, value in body.items() if value is not None and key not in _NOTHING}
    found = {key: body.pop(key) for key in (prompt, *_SAME) if key in body}
    if prompt not in found:
        raise InputError(f"body has no {prompt}")
    for key in ("max_tokens", "max_completion_tokens"):
        if key in body:
            found["max_new_tokens"] = body.pop(key)
    if "stop" in body:
        stop = body.pop("stop")
        found["stop"] = [stop] if isinstance(stop, str) else stop
    if "stop_token_ids" in body:
        found["stop_tokens"] = body.pop("stop_token_ids")
    tools, choice = body.pop("tools", None), body.pop("tool_choice", "auto")
    answer = _answer_grammar(body.pop("response_format", None), body.pop("structured_outputs", None))
    parallel = body.pop("parallel_tool_calls", True)
    if not isinstance(parallel, bool):
        raise InputError(f"body.parallel_tool_calls is {parallel!r:.60}; expected true or false")
    grammar = _with_calls(answer, tools, choice, None if parallel else 1)
    if grammar is not None:
        found["grammar"] = {grammar.kind: grammar.text}
    tools = None if choice == "none" else tools
    messages = found[prompt] if isinstance(found[prompt], list) else []  # another kind is an error of its own
    if tools and messages:
        messages = found[prompt] = with_tools(messages, tools)
    if not parallel and grammar is None and any(isinstance(m, Mapping) and m.get("tools") for m in messages):
        raise InputError(
            f"body.parallel_tool_calls is False, which the free answers of tool_choice {choice!r} need not obey; leave "
            "it out, set tool_choice to required or a function, or give a response_format"
        )
    continued = bool(found.get("continue_final_message", False))
    if body.pop("add_generation_prompt", not continued) is continued:
        raise InputError(f"body.add_generation_prompt is {continued}, which goes with no answer; leave it out")
    for key, value in body.items():
        if value not in _USUAL.get(key, ()):
            usual = f"; expected {_USUAL[key][0]!r}" if key in _USUAL else ""
            raise InputError(f"body.{key} is {value!r:.60}, which is not supported{usual}; leave it out")
    return found


def _usable(where: str, kind: str, value: Any) -> Grammar:
    try:
        return Grammar.of({kind: value})
    except InputError as error:
        raise InputError(f"{where} is not usable: {error}") from error


def _answer_grammar(response_format: Any, structured_outputs: Any) -> Grammar | None:
    """Return the grammar of an answer's text that OpenAI's key asks for, or vLLM's.

    Raises:
        InputError: one of another form, or both.
    """
    if structured_outputs is None:
        return None if response_format is None else _format_grammar(response_format)
    if response_format not in (None, {"type": "text"}):
        raise InputError("body.structured_outputs is given beside response_format; leave one out")
    where = "body.structured_outputs"
    kinds = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "lark", "json_object": ""}
    given = structured_outputs if isinstance(structured_outputs, Mapping) else {}
    given = {key: value for key, value in given.items() if value is not None}
    if len(given) != 1 or next(iter(given)) not in kinds:
        raise InputError(f"{where} is {structured_outputs!r:.60}; expected an object with one of {', '.join(kinds)}")
    ((key, value),) = given.items()
    if key != "json_object":
        return _usable(f"{where}.{key}", kinds[key], value)
    if value is not True:
        raise InputError(f"{where}.json_object is {value!r:.60}; expected true")
    return _usable(where, "json_schema", {"type": "object"})


def _format_grammar(given: Any) -> Grammar | None:
    where, kind = "body.response_format", given.get("type") if isinstance(given, Mapping) else None
    if given == {"type": "text"}:
        return None
    if given == {"type": "json_object"}:
        return _usable(where, "json_schema", {"type": "object"})
    if kind != "json_schema" or set(given) != {"type", "json_schema"}:
        kinds = "text, json_object or json_schema, the latter with its json_schema"
        raise InputError(f"{where} is {given!r:.60}; expected an object whose type is {kinds}")
    named = given["json_schema"]
    if not isinstance(named, Mapping) or named.get("schema") is None or named.keys() - _SCHEMA_KEYS:
        raise InputError(f"{where}.json_schema is {named!r:.60}; expected an object with name and schema")
    if not isinstance(named.get("strict"), bool | None):
        raise InputError(f"{where}.json_schema.strict is {named['strict']!r:.60}; expected true or false")
    return _usable(f"{where}.json_schema.schema", "json_schema", named["schema"])


def _with_calls(answer: Grammar | None, tools: Any, choice: Any, max_calls: int | None) -> Grammar | None:
    """Return the grammar of an answer that may or has to call functions.

    Raises:
        InputError: a choice of another form, or of a function that is not there.
    """
    where = "body.tool_choice"
    if choice == "none" or (choice == "auto" and (not tools or answer is None)):
        return answer
    name = None
    if isinstance(choice, Mapping) and choice.get("type") == "function" and isinstance(choice.get("function"), Mapping):
        name = choice["function"].get("name")
    if choice not in ("auto", "required") and not isinstance(name, str):
        forms = '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
        raise InputError(f"{where} is {choice!r:.80}; expected {forms}")
    if not isinstance(tools, Sequence) or isinstance(tools, str) or not tools:
        raise InputError(f"{where} is {choice!r:.80}, but there are no tools; give some")
    each = [_function(f"body.tools[{i}]", tool) for i, tool in enumerate(tools)]
    if name is not None:
        each, max_calls = [(found, schema) for found, schema in each if found == name], 1
        if not each:
            raise InputError(f"{where} is {name!r:.80}, which is not among the tools; give one of their names")
    if choice != "auto":
        answer = None
    elif answer is not None and answer.kind != "json_schema":
        raise InputError("body.structured_outputs is given with tools that may be called; set tool_choice to none")
    try:
        return tool_call_grammar(each, max_calls=max_calls, answer=answer)
    except InputError as error:
        raise InputError(f"body.tools is not usable: {error}") from error


def _function(where: str, tool: Any) -> tuple[str, dict[str, Any]]:
    """Return a function's name and the schema of its arguments, an object."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise InputError(f'{where} is {tool!r:.60}; expected {{"type": "function", "function": {{"name": ...}}}}')
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"properties": {}, "additionalProperties": False}
    where = f"{where}.function.parameters"
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise InputError(f"{where} is {parameters!r:.60}; expected the JSON schema of an object")
    schema = {**parameters, "type": "object"}
    _usable(where, "json_schema", schema)
    return name, schema
