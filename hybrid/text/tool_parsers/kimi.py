"""Kimi K2: a section of calls, each with an id that holds the name: functions.name:0."""

from __future__ import annotations

import re

from hybrid.core import ToolCall
from hybrid.text.tool_parsers.dialect import CallForm, Dialect, Tools, marked_calls, new_call

BLOCKS = {"<|tool_calls_section_begin|>": "<|tool_calls_section_end|>"}
BEGIN, ARGUMENTS, END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_ID = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?\Z", re.DOTALL)


def parse(block: str, tools: Tools) -> list[ToolCall]:
    return marked_calls(block, BLOCKS, BEGIN, END, _call)


def _call(text: str) -> ToolCall:
    id, begun, arguments = text.partition(ARGUMENTS)
    name = _ID.match(id.strip())
    return new_call(name[1] if name and begun else "", arguments, id.strip())


_FORM = CallForm(
    f"{BEGIN}functions.{{name}}:0{ARGUMENTS}",
    END,
    opening="<|tool_calls_section_begin|>",
    closing="<|tool_calls_section_end|>",
)
DIALECT = Dialect("kimi", ("<|tool_calls_section_begin|>",), BLOCKS, parse, (BEGIN, ARGUMENTS, END), forms=(_FORM,))
