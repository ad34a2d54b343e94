"""JSON behind marks of a model's own: Hunyuan A13B, MiniMax M1, Nemotron 2, Granite 3, Phi 4, Command, GigaChat 3."""

from __future__ import annotations

from functools import partial

from hybrid.core import ToolCall
from hybrid.text.tool_parsers.dialect import CallForm, Dialect, Tools, inner, json_calls


def _parse(blocks: dict[str, str], block: str, tools: Tools) -> list[ToolCall]:
    return json_calls(inner(block, blocks))


def _dialect(name: str, opening: str, closing: str) -> Dialect:
    blocks = {opening: closing}
    form = CallForm('{"name": "{name}", "arguments": ', "}", ", ", f"{opening}[", f"]{closing}")
    return Dialect(name, (opening,), blocks, partial(_parse, blocks), forms=(form,))


TOOL_CALLS = _dialect("tool_calls", "<tool_calls>", "</tool_calls>")
NEMOTRON = _dialect("nemotron", "<TOOLCALL>", "</TOOLCALL>")
GIGACHAT = _dialect("gigachat", "<|function_call|>", "<|message_sep|>")
COMMAND = _dialect("command", "<|START_ACTION|>", "<|END_ACTION|>")


def _parse_list(block: str, tools: Tools) -> list[ToolCall]:
    return json_calls(block.removeprefix("<|tool_call|>").removesuffix("<|/tool_call|>"))


_LIST = CallForm('{"name": "{name}", "arguments": ', "}", ", ", "<|tool_call|>[", "]")
TOOL_LIST = Dialect(
    "granite", ("<|tool_call|>",), {"<|tool_call|>": ""}, _parse_list, ("<|/tool_call|>",), forms=(_LIST,)
)
