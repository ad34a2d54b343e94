"""Bodies that take what they declare."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

WHAT_INSTEAD = {
    "functions": "send tools",
    "function_call": "send tool_choice",
    "suffix": "text is not filled in here, only continued",
    "web_search_options": "this server searches nothing; offer a search of your own as a tool",
    "audio": "this server reads and writes text alone",
    "cache_salt": "keep apart by servers what must not share prefixes",
}  # of fields that clients know and this server cannot do


class Strict(BaseModel):
    """A field that is not declared is refused by its name, and one that is null is as if it were left out, wherever it
    may be: it asks for nothing, and clients write so what they know and do not use.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        needed = {name for name, field in cls.model_fields.items() if field.is_required()}
        return {name: value for name, value in given.items() if value is not None or name in needed}
