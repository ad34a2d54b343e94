"""What the description of the API (/openapi.json) says of bodies, which endpoints read themselves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

EVENTS, LINES = "text/event-stream", "application/x-ndjson"


def takes(kind: type[BaseModel], stream: str | None = None) -> dict[str, Any]:
    """For `openapi_extra` of a route. stream: the type of what it answers if it is asked for a stream."""
    schema = _inlined(kind.model_json_schema())
    said = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    return said if stream is None else {**said, "responses": {"200": {"content": {stream: {}}}}}


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
