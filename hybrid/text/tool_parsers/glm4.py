"""Tags of keys and values behind the name: GLM 4.5 to 5.2, Laguna, Ling 3, Hunyuan 3 (whose tags have a suffix)."""

from __future__ import annotations

import re

from hybrid.core import ToolCall
from hybrid.text.tool_parsers.dialect import CallForm, Dialect, Tools, new_call, schema_of, typed

BLOCKS = {"<tool_call>": "</tool_call>"}
_SUFFIX = r"(?::\w+)?"
_CALL = re.compile(rf"<tool_call{_SUFFIX}>(.*?)(?:</tool_call{_SUFFIX}>|\Z)", re.DOTALL)
_NAME = re.compile(rf"\s*([\w.:/-]+)\s*(?:<tool_sep{_SUFFIX}>)?")
_PAIR = re.compile(
    rf"<arg_key{_SUFFIX}>([^<]*)</arg_key{_SUFFIX}>\s*<arg_value{_SUFFIX}>(.*?)(?:</arg_value{_SUFFIX}>|\Z)", re.DOTALL
)


def parse(block: str, tools: Tools) -> list[ToolCall]:
    calls = [_call(body, tools) for body in _CALL.findall(block)]
    if not calls:
        raise ValueError("no call")
    return calls


def _call(body: str, tools: Tools) -> ToolCall:
    name = _NAME.match(body)
    if not name or _PAIR.sub("", body[name.end() :]).strip():
        raise ValueError("neither a name nor pairs of keys and values")
    pairs = [(key.strip(), value) for key, value in _PAIR.findall(body)]
    return new_call(name[1], {key: typed(value, schema_of(name[1], key, tools)) for key, value in pairs})


_FORM = CallForm(
    "<tool_call>{name}\n", "</tool_call>", "\n",
    before="<arg_key>{key}</arg_key>\n<arg_value>", after="</arg_value>\n",
)  # fmt: skip
DIALECT = Dialect("glm4", ("<arg_key>",), BLOCKS, parse, forms=(_FORM,))
HUNYUAN = Dialect(
    "hy_v3",
    ("<tool_sep{}>", "<tool_sep:opensource>"),
    {"<tool_calls:opensource>": "</tool_calls:opensource>"},
    parse,
    tuple(
        f"<{end}{name}:opensource>" for name in ("tool_call", "tool_sep", "arg_key", "arg_value") for end in ("", "/")
    ),
)
