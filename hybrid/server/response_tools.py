"""The tools of POST /v1/responses as functions of a chat, and calls of them as the items that they are there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from hybrid.core import ToolCall
from hybrid.server.refusals import Refusal

_FREE = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
_HERE = ("function", "custom")


class NamedTool(BaseModel):
    """A function, or a custom tool, whose input is a text. What else clients send of it does not change the prompt."""

    model_config = ConfigDict(extra="ignore")

    type: str
    name: str | None = Field(None, min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: dict[str, Any] | None = None

    def told(self) -> dict[str, Any]:
        """As a reply has it."""
        if self.type == "custom":
            return self.model_dump(include={"type", "name", "description", "format"})
        said = self.model_dump(include={"type", "name", "description", "parameters"})
        return {**said, "strict": bool(self.strict)}

    def function(self, name: str) -> dict[str, Any]:
        """Of a chat, by the name that the model is told."""
        if self.type == "custom":
            texts = [self.description, _rules(self.format or {})]
            said: dict[str, Any] = {"description": "\n\n".join(filter(None, texts)), "parameters": _FREE}
        else:
            said = self.model_dump(include={"description", "parameters", "strict"}, exclude_none=True)
        return {"type": "function", "function": {"name": name, **said}}


class ResponseTool(NamedTool):
    """The same, a namespace of such tools, or what would run on the server."""

    tools: list[NamedTool] | None = None

    @property
    def inner(self) -> list[NamedTool]:
        """The tools of a namespace, or the tool itself, that the client runs."""
        listed: list[NamedTool] = list(self.tools or ()) if self.type == "namespace" else [self]
        return [tool for tool in listed if tool.type in _HERE]

    def told(self) -> dict[str, Any]:
        if self.type != "namespace":
            return super().told()
        said = self.model_dump(include={"type", "name", "description"})
        return {**said, "tools": [tool.told() for tool in self.inner]}


@dataclass(frozen=True)
class _Tool:
    """A tool that the client runs, in its namespace, None outside of any."""

    tool: NamedTool
    namespace: str | None


class Offered:
    """What a response offers to the model. Tools that would run on the server are left out, for it runs none; a reply
    has those that were offered.
    """

    def __init__(self, tools: Sequence[ResponseTool]) -> None:
        """Raises Refusal for tools of which none can be offered, without a name, or with one name."""
        self._tools: dict[str, _Tool] = {}
        self.told = [tool.told() for tool in tools if tool.inner]
        for one in _flat(tools):
            name = full_name(one.tool.name or "", one.namespace)
            if not one.tool.name or name in self._tools:
                missing = f"a second tool has the name {name!r:.80}" if one.tool.name else "a tool has no name"
                raise Refusal(400, f"tools: {missing}; give each a name of its own", "tools")
            self._tools[name] = one
        if tools and not self._tools:
            kind = f"{tools[0].type!r:.60}"
            message = f"tools: the type {kind} would run on the server, and this one runs none; offer functions"
            raise Refusal(400, message, "tools")

    def functions(self) -> list[dict[str, Any]]:
        return [one.tool.function(name) for name, one in self._tools.items()]

    def item(self, call: ToolCall) -> dict[str, Any]:
        """A call that the model has made, with its input or arguments."""
        one = self._tools.get(call.name)
        name = call.name if one is None else one.tool.name
        item: dict[str, Any] = {"call_id": call.id, "name": name}
        if one is not None and one.namespace is not None:
            item["namespace"] = one.namespace
        if one is not None and one.tool.type == "custom":
            return {"type": "custom_tool_call", **item, "input": _input(call.arguments)}
        return {"type": "function_call", **item, "arguments": call.arguments}


def full_name(name: str, namespace: str | None) -> str:
    """By which the model knows a tool."""
    if not namespace:
        return name
    return namespace + ("" if namespace.endswith("__") else "__") + name


def custom_arguments(text: str) -> str:
    """The input of a custom tool as the arguments of a function."""
    return json.dumps({"input": text}, ensure_ascii=False)


def _flat(tools: Sequence[ResponseTool]) -> Iterator[_Tool]:
    for tool in tools:
        for inner in tool.inner:
            yield _Tool(inner, tool.name if tool.type == "namespace" else None)


def _rules(form: dict[str, Any]) -> str | None:
    """What the model is told of a grammar; the client checks the input by it."""
    if form.get("type") != "grammar":
        return None
    return f"The input must follow this {form.get('syntax')} grammar:\n{form.get('definition')}"


def _input(arguments: str) -> str:
    """The text of a custom tool; what else the model has written is for the client to judge."""
    try:
        given = json.loads(arguments)
    except ValueError:
        return arguments
    text = given.get("input") if isinstance(given, dict) else None
    return text if isinstance(text, str) else arguments
