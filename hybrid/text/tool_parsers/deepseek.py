"""DeepSeek V3, R1 (the arguments fenced as code) and V3.1 (bare)."""

from __future__ import annotations

import re

from hybrid.core import ToolCall
from hybrid.text.tool_parsers.dialect import CallForm, Dialect, Tools, marked_calls, new_call

BLOCKS = {"<｜tool▁calls▁begin｜>": "<｜tool▁calls▁end｜>"}
BEGIN, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_FENCED = re.compile(r"\s*([^\n]+)\n```(?:json)?\n(.*?)\n?```\s*\Z", re.DOTALL)


def parse(block: str, tools: Tools) -> list[ToolCall]:
    return marked_calls(block, BLOCKS, BEGIN, END, _call)


def _call(text: str) -> ToolCall:
    head, begun, body = text.partition(SEPARATOR)
    fenced = _FENCED.match(body)  # then the head says "function"
    return new_call(fenced[1], fenced[2]) if fenced else new_call(head if begun else "", body)


_OPENING, _CLOSING = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_FORMS = (
    CallForm(f"{BEGIN}function{SEPARATOR}{{name}}\n```json\n", f"\n```{END}", "\n", _OPENING, _CLOSING, sign="```json"),
    CallForm(f"{BEGIN}{{name}}{SEPARATOR}", END, "", _OPENING, _CLOSING),
)
DIALECT = Dialect("deepseek", ("<｜tool▁calls▁begin｜>", BEGIN), BLOCKS, parse, (BEGIN, SEPARATOR, END), forms=_FORMS)
