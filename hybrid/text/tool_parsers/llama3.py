"""Llama 3.1 to 3.3: the whole answer is {"name": ..., "parameters": ...}, behind <|python_tag|> or bare."""

from __future__ import annotations

from hybrid.core import ToolCall
from hybrid.text.tool_parsers.dialect import CallForm, Dialect, Tools, json_calls

_TAG = "<|python_tag|>"


def parse(block: str, tools: Tools) -> list[ToolCall]:
    return json_calls(block.replace(_TAG, ""))


_FORM = CallForm('{"name": "{name}", "parameters": ', "}")
DIALECT = Dialect("llama3", (_TAG, '"parameters": dictionary of'), {_TAG: ""}, parse, bare="{", forms=(_FORM,))
