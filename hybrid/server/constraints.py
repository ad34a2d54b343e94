"""The fields by which clients say what an answer must be, as OpenAI's API and vLLM's name them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field

from hybrid.core import Grammar
from hybrid.server.refusals import Refusal
from hybrid.server.shapes import FORMAT
from hybrid.server.strict import Strict

_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


class Constrained(Strict):
    """What endpoints share that take such fields. An answer has one of them."""

    response_format: dict[str, Any] | None = Field(None, json_schema_extra=FORMAT)
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[Annotated[str, Field(json_schema_extra={"minLength": 1})]] | None = Field(
        None, json_schema_extra={"minItems": 1}
    )
    guided_grammar: str | None = None
    guided_decoding_backend: Any = None  # of no effect
    guided_whitespace_pattern: None = None  # white space is bounded

    def grammar(self) -> Grammar | None:
        """Raises Refusal."""
        given: dict[str, Grammar] = {}
        if self.response_format is not None and (grammar := response_grammar(self.response_format)):
            given["response_format"] = grammar
        for name, kind in _GUIDED.items():
            if (value := getattr(self, name)) is not None:
                given[name] = _made(name, kind, value)
        if self.structured_outputs is not None:
            given["structured_outputs"] = _structured(self.structured_outputs)
        if len(given) > 1:
            raise Refusal(400, f"{' and '.join(given)} are given; give one of them", param=list(given)[1])
        return next(iter(given.values()), None)


def response_grammar(given: Mapping[str, Any], field: str = "response_format") -> Grammar | None:
    """Of a response_format, None for a plain text; the schema of one may lie in it, as in /v1/responses. Raises
    Refusal.
    """
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = given.get("schema")  # as llama.cpp takes it
        return Grammar.json() if schema is None else _made(field, "json", schema)
    if kind == "json_schema":
        inner = given if given.get("json_schema") is None else given["json_schema"]
        schema = inner.get("schema", inner.get("json_schema")) if isinstance(inner, Mapping) else None
        if schema is None:
            raise Refusal(400, f'{field}: "json_schema" must be an object with a "schema"', param=field)
        return _made(field, "json", schema)
    message = f"{field}: the type {kind!r:.50} is not known here; allowed: text, json_object, json_schema"
    raise Refusal(400, message, param=field)


def _structured(given: Mapping[str, Any]) -> Grammar:
    """Of vLLM's structured_outputs."""
    name = "structured_outputs"
    kinds = {key: value for key, value in given.items() if value not in (None, False)}
    kinds = {key: value for key, value in kinds.items() if not key.startswith(("disable_", "_"))}
    if len(kinds) != 1 or not set(kinds) <= {*_MAKERS, "json_object"}:
        allowed = "json, json_object, regex, choice or grammar"
        raise Refusal(400, f"{name} has {sorted(kinds)!r:.80}; it must have one of {allowed}", param=name)
    ((kind, value),) = kinds.items()
    return Grammar.json() if kind == "json_object" else _made(name, kind, value)


def _made(field: str, kind: str, value: Any) -> Grammar:
    wanted: tuple[type, ...] = {"json": (dict, str, bool), "choice": (list,)}.get(kind, (str,))
    if not isinstance(value, wanted) or (isinstance(value, list) and not all(isinstance(text, str) for text in value)):
        raise Refusal(400, f"{field}: {json.dumps(value)[:80]} is no {_NAMES[kind]}", param=field)
    return _MAKERS[kind](value)


_MAKERS: dict[str, Callable[[Any], Grammar]] = {
    "json": Grammar.json,
    "regex": Grammar.regex,
    "choice": Grammar.choice,
    "grammar": Grammar.rules,
}
_NAMES = {"json": "JSON schema", "regex": "regular expression", "choice": "list of texts", "grammar": "grammar"}
