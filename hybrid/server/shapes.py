"""What endpoints take where their bodies have free objects, as the description of the API says it. Whoever reads those
objects refuses what is not so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hybrid.text.messages import MEDIA, ROLES, SAYS

Schema = dict[str, Any]
_SAID = {"not": {"type": "null"}}
_TEXT: Schema = {"type": "string"}
_TEXT_OR_NULL: Schema = {"type": ["string", "null"]}


def _kinds(names: tuple[str, ...]) -> list[str]:
    return [kind for name in names for kind in (name, f"{name}_url")]


def names_alone(names: Iterable[str]) -> Schema:
    """Of an object that may have these fields; others may be null."""
    known = {"properties": {name: {} for name in names}, "additionalProperties": {"type": "null"}}
    return {"if": {"type": "object"}, "then": known}


_PART = {
    "type": "object",
    "properties": {"type": {"type": "string", "not": {"enum": _kinds(MEDIA)}}, "text": {"type": "string"}},
    "required": ["type"],
}
OLLAMA_FIELDS = ("role", "content", "thinking", "tool_calls", "tool_name", "tool_call_id", "name", "images")
MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]},
    },
    "required": ["role"],
    "anyOf": [{"properties": {name: _SAID}, "required": [name]} for name in SAYS],
}
MESSAGES: Schema = {"items": MESSAGE}
_OLLAMA_CALL: Schema = {
    "type": "object",
    "properties": {
        "function": {
            "type": "object",
            "properties": {"name": _TEXT, "arguments": {"type": ["object", "null"]}},
            "required": ["name"],
        }
    },
    "required": ["function"],
}
CALLED_IN_ORDER: Schema = {
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": {"anyOf": [_TEXT_OR_NULL, {"type": "array", "items": _PART}]},
            "tool_calls": {"anyOf": [{"type": "null"}, {"type": "array", "items": _OLLAMA_CALL}]},
            "images": {"anyOf": [{"type": "null"}, {"type": "array", "maxItems": 0}]},
        },
        "required": ["role"],
        **names_alone(OLLAMA_FIELDS),
    }
}

ITEM_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
ITEM_KINDS = (
    "message",
    "reasoning",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "local_shell_call",
    "local_shell_call_output",
    "shell_call",
    "shell_call_output",
    "apply_patch_call",
    "apply_patch_call_output",
    "tool_search_call",
    "tool_search_output",
    "additional_tools",
    "web_search_call",
)
_JSON_SCHEMA: Schema = {"type": ["object", "string", "boolean"]}
_READ_BLOCKS = ("text", "tool_reference", "search_result", "document")


def _if_kind(kind: str, **fields: Schema) -> Schema:
    """Of an object of that type: the fields that it must have."""
    return {
        "if": {"properties": {"type": {"const": kind}}, "required": ["type"]},
        "then": {"properties": fields, "required": list(fields)},
    }


def _blocks_of(role: str, *kinds: str) -> Schema:
    """Of a message in that role: the types of its blocks."""
    return {
        "if": {"properties": {"role": {"const": role}}, "required": ["role"]},
        "then": {"properties": {"content": {"items": {"properties": {"type": {"enum": list(kinds)}}}}}},
    }


def _of_kind(kind: str, **fields: Schema) -> Schema:
    """An object of that type, with the fields that it must have."""
    return {"type": "object", "properties": {"type": {"const": kind}, **fields}, "required": ["type", *fields]}


_HELD: Schema = {"anyOf": [_TEXT, {"type": "array", "items": _of_kind("text", text=_TEXT)}]}
_SOURCE: Schema = {"anyOf": [_of_kind("text", data=_TEXT), _of_kind("content", content=_HELD)]}
_READ_FIELDS: list[Schema] = [
    _if_kind("text", text=_TEXT),
    _if_kind("tool_reference", tool_name=_TEXT),
    _if_kind("search_result", title=_TEXT, source=_TEXT, content=_HELD),
    _if_kind("document", source=_SOURCE),
    {
        "if": {"properties": {"type": {"const": "document"}}, "required": ["type"]},
        "then": {"properties": {"title": _TEXT_OR_NULL}},
    },
]
_READ: Schema = {
    "type": "object",
    "properties": {"type": {"enum": list(_READ_BLOCKS)}},
    "required": ["type"],
    "allOf": _READ_FIELDS,
}
SYSTEM: Schema = {"if": {"type": "array"}, "then": {"items": _READ}}
_BLOCK: Schema = {
    "type": "object",
    "properties": {"type": _TEXT},
    "required": ["type"],
    "allOf": [
        *_READ_FIELDS,
        _if_kind("thinking", thinking=_TEXT),
        _if_kind("tool_use", id=_TEXT, name=_TEXT, input={"type": "object"}),
        _if_kind("tool_result", tool_use_id=_TEXT),
        {
            "if": {"properties": {"type": {"const": "tool_result"}}, "required": ["type"]},
            "then": {"properties": {"content": {"anyOf": [_TEXT_OR_NULL, {"type": "array", "items": _READ}]}}},
        },
    ],
}
BLOCKS: Schema = {
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": ["user", "assistant", "system"]},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _BLOCK}]},
        },
        "required": ["role", "content"],
        "additionalProperties": {"type": "null"},
        "allOf": [
            _blocks_of("user", "tool_result", *_READ_BLOCKS),
            _blocks_of("assistant", "thinking", "redacted_thinking", "tool_use", *_READ_BLOCKS),
            _blocks_of("system", *_READ_BLOCKS),
        ],
    }
}
_FORM: Schema = {"type": "object", "properties": {"schema": _JSON_SCHEMA}, "required": ["schema"]}
FORMAT: Schema = {
    "anyOf": [
        {"type": "null"},
        {"type": "object", "properties": {"type": {"enum": ["text", "json_object"]}}, "required": ["type"]},
        {
            "type": "object",
            "properties": {"type": {"const": "json_schema"}, "json_schema": _FORM},
            "required": ["type", "json_schema"],
        },
        {
            "type": "object",
            "properties": {"type": {"const": "json_schema"}, "schema": _JSON_SCHEMA},
            "required": ["type", "schema"],
        },
    ]
}

_NAME: Schema = {"name": {"type": "string"}}
_NAMED: Schema = {"type": "object", "properties": _NAME, "required": ["name"]}
_CHOSEN: list[Schema] = [
    {"type": "object", "properties": {"type": {"const": kind}, kind: _NAMED}, "required": ["type", kind]}
    for kind in ("function", "custom")
]
_ALLOWED: Schema = {
    "type": "object",
    "properties": {"mode": {"enum": ["auto", "required"]}, "tools": {"type": "array", "items": {"anyOf": _CHOSEN}}},
    "required": ["mode", "tools"],
}
CHOICE: Schema = {
    "anyOf": [
        {"enum": ["auto", "none", "required", "any", None]},
        *_CHOSEN,
        {
            "type": "object",
            "properties": {"type": {"const": "allowed_tools"}, "allowed_tools": _ALLOWED},
            "required": ["type", "allowed_tools"],
        },
        {
            "type": "object",
            "properties": {"type": {"enum": ["function", None]}, **_NAME},
            "required": ["name"],
        },
    ]
}
ITEM_CHOICE: Schema = {"if": {"type": "string"}, "then": {"enum": ["auto", "none", "required", "any"]}}
# Of whole bodies: a call that is demanded needs tools.
CALLS_NEED: Schema = {
    "if": {"properties": {"tool_choice": {"enum": ["required", "any"]}}, "required": ["tool_choice"]},
    "then": {"properties": {"tools": {"type": "array", "minItems": 1}}, "required": ["tools"]},
}
NAMED_TOOL: Schema = {
    "if": {"properties": {"type": {"enum": ["function", "custom"]}}, "required": ["type"]},
    "then": {"properties": {"name": _TEXT}, "required": ["name"]},
}
_AT_CLIENT: list[Schema] = [
    {"properties": {"type": {"enum": ["function", "custom", "local_shell", "apply_patch"]}}, "required": ["type"]},
    {
        "properties": {"type": {"const": "tool_search"}, "execution": {"const": "client"}},
        "required": ["type", "execution"],
    },
    {
        "properties": {
            "type": {"const": "shell"},
            "environment": {
                "anyOf": [{"type": "null"}, {"properties": {"type": {"const": "local"}}, "required": ["type"]}]
            },
        },
        "required": ["type"],
    },
]
_NAMESPACE: Schema = {
    "properties": {"type": {"const": "namespace"}, "tools": {"type": "array", "contains": {"anyOf": _AT_CLIENT}}},
    "required": ["type", "tools"],
}
ONE_AT_CLIENT: Schema = {  # unless there are none
    "if": {"type": "array", "minItems": 1},
    "then": {"contains": {"anyOf": [*_AT_CLIENT, _NAMESPACE]}},
}
TOKEN_IDS: Schema = {"propertyNames": {"pattern": "^[0-9]{1,9}$"}}


PROMPTS: Schema = {"if": {"type": "array"}, "then": {"minItems": 1}}
# Of whole bodies: fields that may not be so together.
SCORED_WHOLE: Schema = {
    "not": {
        "properties": {"stream": {"const": True}, "prompt_logprobs": {"type": "integer"}},
        "required": ["stream", "prompt_logprobs"],
    }
}
TOP_NEEDS: Schema = {
    "if": {"properties": {"top_logprobs": {"type": "integer", "minimum": 1}}, "required": ["top_logprobs"]},
    "then": {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
}
ONE_TEXT: Schema = {
    "oneOf": [{"properties": {name: {"type": "string"}}, "required": [name]} for name in ("content", "prompt")]
}
_ITEM_PART: Schema = {
    "type": "object",
    "properties": {"type": {"enum": [*ITEM_TEXTS, "refusal"]}},
    "required": ["type"],
    "if": {"properties": {"type": {"const": "refusal"}}},
    "then": {"properties": {"refusal": {"type": "string"}}, "required": ["refusal"]},
    "else": {"properties": {"text": {"type": "string"}}, "required": ["text"]},
}
_SPOKEN: Schema = {
    "properties": {
        "role": {"enum": ["user", "assistant", "system", "developer"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _ITEM_PART}]},
    },
    "required": ["role", "content"],
}
ITEMS: Schema = {
    "minItems": 1,
    "maxItems": 10_000,
    "items": {
        "type": "object",
        "properties": {"type": {"enum": [None, *ITEM_KINDS]}},
        "if": {"properties": {"type": {"enum": [None, "message"]}}},
        "then": _SPOKEN,
    },
}
NOTHING: Schema = {"type": "null"}  # of fields that are refused with what to send instead
