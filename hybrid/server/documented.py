"""What the description of the API (/openapi.json) says of bodies, which endpoints read themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

EVENTS, LINES = "text/event-stream", "application/x-ndjson"


def takes(kind: type[BaseModel], stream: str | None = None, names: Sequence[str] | None = None) -> dict[str, Any]:
    """For `openapi_extra` of a route. stream: the type of what it answers if it is asked for a stream. names: those
    that `model` may be; None: any.
    """
    schema = _with_nulls(_inlined(kind.model_json_schema()))
    for field in ("model", "name"):
        if names is not None and field in schema["properties"]:
            needed = field in schema.get("required", ())
            schema["properties"][field] = {"enum": [*names] if needed else [*names, None]}
    said = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    return said if stream is None else {**said, "responses": {"200": {"content": {stream: {}}}}}


def _with_nulls(value: Any) -> Any:
    """The same with what `Strict` takes: a field may be null unless it is required, and so may those that it does not
    know.
    """
    if isinstance(value, list):
        return [_with_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    made = {key: _with_nulls(item) for key, item in value.items()}
    if made.get("additionalProperties") is False and isinstance(made.get("properties"), dict):
        required = made.get("required", ())
        for name, field in made["properties"].items():
            if name not in required and "type" in field and field["type"] != "null":
                made["properties"][name] = {"anyOf": [field, {"type": "null"}]}
        made["additionalProperties"] = {"type": "null"}
    return made


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """With what it refers to in the places of the references; no model refers to itself."""
    parts = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, list):
            return [inline(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return inline(parts[value["$ref"].rsplit("/", 1)[-1]])
        return {key: inline(item) for key, item in value.items()}

    made: dict[str, Any] = inline(schema)
    return made
