"""Kimi K2: a section of calls, each with an id that holds the name: functions.name:0."""

from __future__ import annotations

import re

from hybrid.core import ToolCall
from hybrid.text.tool_parsers.dialect import Dialect, Tools, new_call

BLOCKS = {"<|tool_calls_section_begin|>": "<|tool_calls_section_end|>"}
_TOKENS = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
_CALL = re.compile(
    r"<\|tool_call_begin\|>(.*?)<\|tool_call_argument_begin\|>(.*?)"
    r"(?:<\|tool_call_end\|>|<\|tool_calls_section_end\|>|\Z)",
    re.DOTALL,
)
_ID = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?\Z", re.DOTALL)


def parse(block: str, tools: Tools) -> list[ToolCall]:
    calls = [_call(id.strip(), arguments) for id, arguments in _CALL.findall(block)]
    if not calls:
        raise ValueError("no call")
    return calls


def _call(id: str, arguments: str) -> ToolCall:
    name = _ID.match(id)
    return new_call(name[1] if name else "", arguments, id)


DIALECT = Dialect("kimi", ("<|tool_calls_section_begin|>",), BLOCKS, parse, _TOKENS)
