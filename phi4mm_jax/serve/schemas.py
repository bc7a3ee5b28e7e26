"""Forms of values that the parser of batch files checks, with errors of its own, as the OpenAPI document has them."""

from typing import Any

from phi4mm_jax.serve.limits import Limits

TEXT = {"type": "string", "minLength": 1}
FLAG = {"type": ["boolean", "null"]}


def an_object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """Return the schema of an object with these keys and no others."""
    keys = {"properties": required | optional, "additionalProperties": False}
    return {"type": "object", **keys} | ({"required": list(required)} if required else {})


def one_of(**forms: Any) -> dict[str, Any]:
    """Return the schema of an object that has one of these keys."""
    return {"anyOf": [an_object({key: form}) for key, form in forms.items()]}


_SCHEMA = {"type": "object", "description": "a JSON schema; a keyword that llguidance lacks is an error"}
_FUNCTION = an_object({"name": TEXT}, description={"type": "string"}, parameters=_SCHEMA, strict=FLAG)

RESPONSE_FORMAT = {
    "anyOf": [
        an_object({"type": {"enum": ["text", "json_object"]}}),
        an_object({
            "type": {"const": "json_schema"},
            "json_schema": an_object(
                {"schema": _SCHEMA}, name={"type": "string"}, description={"type": "string"}, strict=FLAG
            ),
        }),
    ]
}  # fmt: skip
STRUCTURED_OUTPUTS = one_of(
    json=_SCHEMA,
    regex={"type": "string", "format": "regex", "description": "without look-around"},
    choice={"type": "array", "items": TEXT, "minItems": 1},
    grammar={"type": "string", "description": "llguidance's dialect of Lark"},
    json_object={"const": True},
)
TOOL = an_object({"type": {"const": "function"}, "function": _FUNCTION})
TOOL_CHOICE = {
    "anyOf": [
        {"enum": ["auto", "none", "required"]},
        an_object({"type": {"const": "function"}, "function": an_object({"name": TEXT})}),
    ]
}
TOOL_CALL = {
    "type": "object",
    "properties": {
        "function": {
            "type": "object",
            "properties": {
                "name": TEXT,
                "arguments": {
                    "anyOf": [{"type": "object"}, {"type": "string", "contentMediaType": "application/json"}],
                    "description": "an object, or one as JSON",
                },
            },
            "required": ["name", "arguments"],
        }
    },
    "required": ["function"],
}


def describe_limits(schemas: dict[str, Any], limits: Limits) -> None:
    """Add a server's limits to the schemas of its requests, and leave out what it does not offer."""
    for name in ("ChatRequest", "CompletionRequest"):
        keys, related = schemas[name]["properties"], schemas[name]["dependentSchemas"]
        max_values = {"n": limits.choices, "top_logprobs": limits.top_logprobs, "logprobs": limits.top_logprobs}
        for key, limit in max_values.items():
            if (form := keys.get(key, {}).get("anyOf", [{}])[0]).get("type") == "integer":
                form["maximum"] = limit
        if limits.beams == 1:
            del keys["use_beam_search"], keys["length_penalty"], related["length_penalty"]
        if not limits.draft_tokens:
            del keys["draft"]
    schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"][1]["maxItems"] = limits.prompts


# ---------------------------------------------------------------------------------------------- keys beside others

TRUE = {"const": True}


def goes_with(**needed: str) -> dict[str, Any]:
    """Return the schema in which keys are given only beside others that are true."""
    return {"dependentSchemas": {key: having(**{other: TRUE}) for key, other in needed.items()}}


def having(**forms: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object that has all of these keys, maybe with others."""
    return {"properties": forms, "required": list(forms)}


def never(**forms: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object that has not all of these keys."""
    return {"not": having(**forms)}


MESSAGE: dict[str, Any] = {  # only an answer calls tools, and only one that does may have no content
    "anyOf": [
        {
            "properties": {
                "content": {"type": ["string", "array"]},
                "tool_calls": {"type": ["array", "null"], "maxItems": 0},
            },
            "required": ["content"],
        },
        having(role={"const": "assistant"}, tool_calls={"type": "array", "minItems": 1}),
    ]
}
CHAT = goes_with(stream_options="stream", length_penalty="use_beam_search", top_logprobs="logprobs") | never(
    structured_outputs={"type": "object"},
    response_format=having(type={"enum": ["json_object", "json_schema"]}) | {"type": "object"},
)
COMPLETION = goes_with(stream_options="stream", length_penalty="use_beam_search") | never(
    echo=TRUE, logprobs={"type": "integer"}
)
