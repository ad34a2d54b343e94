"""LFM2: a list of calls as Python writes them, [name(key="value")], or JSON."""

from __future__ import annotations

import ast

from hybrid.core import ToolCall
from hybrid.text.tool_parsers.dialect import Dialect, Tools, inner, json_calls, new_call

BLOCKS = {"<|tool_call_start|>": "<|tool_call_end|>"}
_JSON_NAMES = {"true": True, "false": False, "null": None}


def parse(block: str, tools: Tools) -> list[ToolCall]:
    text = inner(block, BLOCKS).strip()
    if text.startswith(("{", "[{")):
        return json_calls(text)
    tree = _parsed(text)
    return [_call(node) for node in (tree.elts if isinstance(tree, ast.List) else [tree])]


def _parsed(text: str) -> ast.expr:
    """Of Python's form, but for line ends that stand in texts as they are. Raises ValueError."""
    for form in (text, text.replace("\n", "\\n")):
        try:
            return ast.parse(form, mode="eval").body
        except (SyntaxError, MemoryError):
            continue
    raise ValueError("no calls")


def _call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with named arguments")
    return new_call(
        ast.unparse(node.func),
        {str(word.arg): ast.literal_eval(_JsonNames().visit(word.value)) for word in node.keywords},
    )


class _JsonNames(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:  # noqa: N802  its name is that of the class of nodes
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node


DIALECT = Dialect("lfm2", ("<|tool_call_start|>", "<|tool_list_start|>"), BLOCKS, parse)
