"""Gemma 4: call:name{key:value}, with texts between <|"|> marks and keys bare."""

from __future__ import annotations

import json
import re
from typing import Any

from hybrid.core import ToolCall
from hybrid.text.tool_parsers.dialect import Dialect, Tools, inner, new_call

BLOCKS = {"<|tool_call>": "<tool_call|>"}
_QUOTE = '<|"|>'
_CALL = re.compile(r"\s*call:([^\s{]+)\s*(\{.*\})\s*\Z", re.DOTALL)
_BARE = re.compile(r"([{,]\s*)([^\s{}\[\],:\"]+)\s*:")


def parse(block: str, tools: Tools) -> list[ToolCall]:
    call = _CALL.match(inner(block, BLOCKS))
    if not call:
        raise ValueError("no call")
    return [new_call(call[1], _arguments(call[2]))]


def _arguments(text: str) -> Any:
    """Outside of texts it is JSON whose keys have no quotes."""
    parts = text.split(_QUOTE)
    outside = [_BARE.sub(r'\1"\2":', part) for part in parts[::2]]
    texts = [json.dumps(part) for part in parts[1::2]] + [""]
    return json.loads("".join(part for pair in zip(outside, texts, strict=True) for part in pair))


DIALECT = Dialect("gemma4", ("<|tool_call>",), BLOCKS, parse, (_QUOTE,))
