"""What a dialect is, and what several of them share: JSON, and texts that a schema gives types."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from hybrid.core import ToolCall

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class CallForm:
    """How a block of calls is written, where a grammar is to demand one: opening, calls, closing.

    begin: before the arguments of a call, with {name}; end: behind them. between: what divides calls; None: an answer
    has one alone. before, after: around the value of each parameter, with {key}; without them the arguments are one
    JSON object. sign: what a chat template holds that means this form, of several that a dialect has.
    """

    begin: str
    end: str
    between: str | None = None
    opening: str = ""
    closing: str = ""
    before: str = ""
    after: str = ""
    sign: str = ""


@dataclass(frozen=True)
class Dialect:
    """A way to write calls.

    signs: a chat template that holds one of them, or a tokenizer that has one as a token, means this dialect.
    blocks: what opens a block of calls and what closes it; an empty text is the end of the answer. parse: makes calls
    of a block, its opening and its end included, or raises ValueError. tokens: other special tokens that a block holds.
    bare: an answer that begins with this character may be a call, if there are tools. forms: how a grammar writes its
    calls; none: it cannot.
    """

    name: str
    signs: tuple[str, ...]
    blocks: Mapping[str, str]
    parse: Callable[[str, Tools], list[ToolCall]]
    tokens: tuple[str, ...] = ()
    bare: str = ""
    forms: tuple[CallForm, ...] = ()

    @property
    def marks(self) -> tuple[str, ...]:
        """Every text of a block that may be a special token."""
        return (*self.blocks, *filter(None, self.blocks.values()), *self.tokens)


def inner(block: str, blocks: Mapping[str, str]) -> str:
    """A block without what opens and closes it."""
    opening = next((mark for mark in blocks if block.startswith(mark)), "")
    return block.removeprefix(opening).removesuffix(blocks.get(opening, ""))


def marked_calls(
    block: str, blocks: Mapping[str, str], begin: str, end: str, call: Callable[[str], ToolCall]
) -> list[ToolCall]:
    """Calls of which each stands between two marks of its own. Raises ValueError if there is none."""
    calls = [call(text.partition(end)[0]) for text in inner(block, blocks).split(begin)[1:]]
    if not calls:
        raise ValueError("no call")
    return calls


def new_call(name: Any, arguments: Any, id: str | None = None) -> ToolCall:
    """A call whose arguments are an object, or JSON text of one. An id has nine characters, as Mistral wants it.

    Raises ValueError.
    """
    if isinstance(arguments, str):
        arguments = json.loads(arguments, strict=False) if arguments.strip() else {}
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, Mapping | None):
        raise ValueError(f"no call: {name!r:.80}")
    name.encode()
    return ToolCall(name.strip(), _dumped(arguments or {}), id or new_id())


def _dumped(arguments: Mapping[str, Any]) -> str:
    """As JSON; a lone surrogate, which no UTF-8 text holds, stays an escape."""
    text = json.dumps(arguments, ensure_ascii=False)
    return text if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text) else json.dumps(arguments)


def new_id() -> str:
    return uuid4().hex[:9]


def json_calls(text: str) -> list[ToolCall]:
    """Calls as JSON objects: one, a list, or several behind each other. Raises ValueError."""
    calls = [_json_call(value) for values in _json_values(text) for value in _listed(values)]
    if not calls:
        raise ValueError("no call")
    return calls


def _json_values(text: str) -> Iterator[Any]:
    decoder, at = json.JSONDecoder(strict=False), 0  # models write line ends into strings
    while (at := _skip(text, at)) < len(text):
        value, at = decoder.raw_decode(text, at)
        yield value


def _skip(text: str, at: int) -> int:
    while at < len(text) and (text[at].isspace() or text[at] in ",;"):
        at += 1
    return at


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _json_call(value: Any) -> ToolCall:
    """{"name": ..., "arguments": ...}; some say parameters, and some nest both in "function"."""
    if not isinstance(value, dict):
        raise ValueError("no object")
    function = value["function"] if isinstance(value.get("function"), dict) else value
    name = next((function[key] for key in ("name", "tool_name", "function") if key in function), None)
    arguments = next((function[key] for key in ("arguments", "parameters", "args") if key in function), None)
    id = value.get("id")
    return new_call(name, arguments, id if isinstance(id, str) and id else None)


def typed(text: str, schema: Any) -> Any:
    """The value that a text without quotes means, by a schema; without one it is JSON if it can be."""
    types = types_of(schema)
    if text.strip() == "null" and (not types or "null" in types):
        return None
    if "string" in types:
        return text
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)
    return text if isinstance(value, str) and not types else value


def schema_of(name: str, parameter: str, tools: Tools) -> Any:
    """The schema of a parameter of a tool, None where there is none."""
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            return property_of(function.get("parameters") or function.get("input_schema"), parameter)
    return None


def property_of(schema: Any, key: str) -> Any:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties.get(key) if isinstance(properties, Mapping) else None


def types_of(schema: Any) -> set[str]:
    """The names of types that a schema allows, empty if it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    if isinstance(schema.get("enum"), list):
        return {"string" if isinstance(value, str) else "value" for value in schema["enum"]}
    found = schema.get("type")
    types = {found} if isinstance(found, str) else {t for t in _listed(found) if isinstance(t, str)}
    for branch in ("anyOf", "oneOf", "allOf"):
        types |= {t for part in _listed(schema.get(branch)) for t in types_of(part)}
    return types
