"""<function=name> with <parameter=name> tags: Qwen3-Coder, Qwen3.5, Nemotron 3, Step 3.5, Seed-OSS."""

from __future__ import annotations

import re

from hybrid.core import ToolCall
from hybrid.text.tool_parsers.dialect import CallForm, Dialect, Tools, new_call, schema_of, typed

BLOCKS = {
    "<tool_call>": "</tool_call>",
    "<seed:tool_call>": "</seed:tool_call>",
    "<function=": "</function>",  # models forget the tag around it
}
_FUNCTION = re.compile(r"<function=([^<>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>(.*?)(?:</parameter>|\Z)", re.DOTALL)


def parse(block: str, tools: Tools) -> list[ToolCall]:
    calls = [_call(name.strip(), body, tools) for name, body in _FUNCTION.findall(block)]
    if not calls:
        raise ValueError("no function")
    return calls


def _call(name: str, body: str, tools: Tools) -> ToolCall:
    found = _PARAMETER.findall(body)
    if not found:
        return new_call(name, body)  # nothing, or JSON as Llama 3.1 writes it
    arguments = {key.strip(): typed(_line(value), schema_of(name, key.strip(), tools)) for key, value in found}
    return new_call(name, arguments)


def _line(value: str) -> str:
    """Without the line ends that the format itself puts around a value."""
    return value.removeprefix("\n").removesuffix("\n")


_FORMS = tuple(
    CallForm(
        f"<{tag}>\n<function={{name}}>\n", f"</function>\n</{tag}>", "\n",
        before="<parameter={key}>\n", after="\n</parameter>\n", sign=sign,
    )
    for tag, sign in (("seed:tool_call", "<seed:tool_call>"), ("tool_call", ""))
)  # fmt: skip
DIALECT = Dialect("qwen3_coder", ("<function=", "<seed:tool_call>"), BLOCKS, parse, forms=_FORMS)
