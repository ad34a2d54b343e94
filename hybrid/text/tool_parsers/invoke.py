"""<invoke name=...> with named parameters: MiniMax M2 and M3 (nested tags), DeepSeek V3.2 and V4 (DSML)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hybrid.core import ToolCall
from hybrid.text.tool_parsers.dialect import CallForm, Dialect, Tools, new_call, property_of, schema_of, typed

_MINIMAX = "]<]minimax[>["  # before every tag of M3
_INVOKE = re.compile(r"<(?:｜DSML｜)?invoke name=\"([^\"]+)\">(.*?)(?:</(?:｜DSML｜)?invoke>|\Z)", re.DOTALL)
_PARAMETER = re.compile(
    r"<(?:｜DSML｜)?parameter name=\"([^\"]+)\"(?: string=\"(true|false)\")?>(.*?)(?:</(?:｜DSML｜)?parameter>|\Z)",
    re.DOTALL,
)
_TAG = re.compile(re.escape(_MINIMAX) + r"<(/?)([^<>\s/]+)>")


def parse(block: str, tools: Tools) -> list[ToolCall]:
    calls = [_call(name, body, tools) for name, body in _INVOKE.findall(block)]
    if not calls:
        raise ValueError("no invoke")
    return calls


def _call(name: str, body: str, tools: Tools) -> ToolCall:
    if _MINIMAX in body:
        nested = _nested(body)
        if not isinstance(nested, Mapping):
            raise ValueError("no parameters")
        return new_call(name, {key: _typed(value, schema_of(name, key, tools)) for key, value in nested.items()})
    arguments = {
        key: value if text == "true" else typed(value, schema_of(name, key, tools))
        for key, text, value in _PARAMETER.findall(body)
    }
    return new_call(name, arguments)


def _typed(value: Any, schema: Any) -> Any:
    if isinstance(value, dict):
        return {key: _typed(part, property_of(schema, key)) for key, part in value.items()}
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, Mapping) else None
        return [_typed(part, items) for part in value]
    return typed(value, schema)


def _nested(body: str) -> Any:
    """An object of tags, a list of <item> tags, or the text where there are none. Raises ValueError."""
    stack: list[tuple[str, list[tuple[str, Any]], list[str]]] = [("", [], [])]
    at = 0
    for tag in _TAG.finditer(body):
        stack[-1][2].append(body[at : tag.start()])
        at = tag.end()
        if not tag[1]:
            stack.append((tag[2], [], []))
        elif tag[2] == stack[-1][0]:
            key, children, texts = stack.pop()
            stack[-1][1].append((key, _value(children, texts)))
        elif tag[2] != "invoke":
            raise ValueError(f"</{tag[2]}> closes no tag")
    if len(stack) > 1:
        raise ValueError(f"<{stack[-1][0]}> is not closed")
    return _value(stack[0][1], [])


def _value(children: list[tuple[str, Any]], texts: list[str]) -> Any:
    if not children:
        return "".join(texts)
    if all(key == "item" for key, _ in children):
        return [value for _, value in children]
    return dict(children)


_FORM = CallForm(
    '<invoke name="{name}">\n', "</invoke>", "\n", "<minimax:tool_call>\n", "\n</minimax:tool_call>",
    before='<parameter name="{key}">', after="</parameter>\n",
)  # fmt: skip
MINIMAX = Dialect(
    "minimax", ("<minimax:tool_call>",), {"<minimax:tool_call>": "</minimax:tool_call>"}, parse, forms=(_FORM,)
)
MINIMAX_M3 = Dialect(
    "minimax_m3", (_MINIMAX,), {f"{_MINIMAX}<tool_call>": f"{_MINIMAX}</tool_call>"}, parse, (_MINIMAX,)
)
DSML = Dialect(
    "dsml",
    ("｜DSML｜",),
    {f"<｜DSML｜{name}>": f"</｜DSML｜{name}>" for name in ("function_calls", "tool_calls")},
    parse,
    ("｜DSML｜",),
)
