"""JSON between <tool_call> tags: Qwen2.5 and Qwen3, Hermes, Ernie 4.5, Granite 4, Ling."""

from __future__ import annotations

from hybrid.core import ToolCall
from hybrid.text.tool_parsers.dialect import CallForm, Dialect, Tools, inner, json_calls

BLOCKS = {"<tool_call>": "</tool_call>"}


def parse(block: str, tools: Tools) -> list[ToolCall]:
    return json_calls(inner(block, BLOCKS))


_FORM = CallForm('<tool_call>\n{"name": "{name}", "arguments": ', "}\n</tool_call>", "\n")
DIALECT = Dialect("hermes", ("<tool_call>",), BLOCKS, parse, forms=(_FORM,))
