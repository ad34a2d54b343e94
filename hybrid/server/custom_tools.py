"""Custom tools, whose input is a text, as functions of one text: models are told of nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FREE = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


def custom_function(name: str, description: str | None, grammar: Mapping[str, Any] | None) -> dict[str, Any]:
    """A function of a chat. grammar: what the model is told of it, as `syntax` and `definition`; the client checks."""
    rules = None
    if grammar is not None:
        rules = f"The input must follow this {grammar.get('syntax')} grammar:\n{grammar.get('definition')}"
    said = "\n\n".join(filter(None, [description, rules]))
    return {"type": "function", "function": {"name": name, "description": said, "parameters": FREE}}


def custom_arguments(text: str) -> str:
    """The input of a custom tool as the arguments of a function."""
    return json.dumps({"input": text}, ensure_ascii=False)


def custom_input(arguments: str) -> str:
    """The text of a custom tool; what else the model has written is for the client to judge."""
    text = object_of(arguments).get("input")
    return text if isinstance(text, str) else arguments


def object_of(arguments: str) -> dict[str, Any]:
    """The object that arguments are; an empty one, where they are something else."""
    try:
        given = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return given if isinstance(given, dict) else {}
