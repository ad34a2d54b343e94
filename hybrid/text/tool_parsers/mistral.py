"""[TOOL_CALLS] with a JSON list (Mistral 7B, Mixtral, Nemo) or with a name and [ARGS] (since Small 3.2)."""

from __future__ import annotations

import json
import re

from hybrid.core import ToolCall
from hybrid.text.tool_parsers.dialect import CallForm, Dialect, Tools, json_calls, new_call

_START = "[TOOL_CALLS]"
_NAMED = re.compile(r"\s*([^\s\[{]+)\s*(?:\[CALL_ID\]([^\[]*))?(?:\[ARGS\])?")


def parse(block: str, tools: Tools) -> list[ToolCall]:
    calls: list[ToolCall] = []
    for part in block.split(_START)[1:]:
        calls += _named(part) if _NAMED.match(part) else json_calls(part)
    return calls


def _named(text: str) -> list[ToolCall]:
    named = _NAMED.match(text)
    assert named
    arguments, end = json.JSONDecoder(strict=False).raw_decode(text[named.end() :].lstrip())
    if text[named.end() :].lstrip()[end:].strip():
        raise ValueError("more than a call")
    return [new_call(named[1], arguments, named[2])]


_FORMS = (
    CallForm("[TOOL_CALLS]{name}[ARGS]", "", "", sign="[ARGS]"),
    CallForm('{"name": "{name}", "arguments": ', "}", ", ", "[TOOL_CALLS][", "]"),
)
DIALECT = Dialect("mistral", (_START,), {_START: ""}, parse, ("[ARGS]", "[CALL_ID]"), forms=_FORMS)
