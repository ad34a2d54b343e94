"""DeepSeek V3, R1 (the arguments fenced as code) and V3.1 (bare)."""

from __future__ import annotations

import re

from hybrid.core import ToolCall
from hybrid.text.tool_parsers.dialect import Dialect, Tools, new_call

BLOCKS = {"<｜tool▁calls▁begin｜>": "<｜tool▁calls▁end｜>"}
_TOKENS = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
_CALL = re.compile(
    r"<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)(?:<｜tool▁call▁end｜>|<｜tool▁calls▁end｜>|\Z)", re.DOTALL
)
_FENCED = re.compile(r"\s*([^\n]+)\n```(?:json)?\n(.*?)\n?```\s*\Z", re.DOTALL)


def parse(block: str, tools: Tools) -> list[ToolCall]:
    calls = [_call(head, body) for head, body in _CALL.findall(block)]
    if not calls:
        raise ValueError("no call")
    return calls


def _call(head: str, body: str) -> ToolCall:
    fenced = _FENCED.match(body)  # then the head says "function"
    return new_call(fenced[1], fenced[2]) if fenced else new_call(head, body)


DIALECT = Dialect("deepseek", ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"), BLOCKS, parse, _TOKENS)
