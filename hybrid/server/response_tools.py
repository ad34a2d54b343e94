"""The tools of POST /v1/responses as functions of a chat, and calls of them as the items that they are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hybrid.core import ToolCall
from hybrid.server.agent_tools import AGENT_TOOLS, SHELL, TOOL_SEARCH, why_left_out
from hybrid.server.custom_tools import custom_function, custom_input, object_of
from hybrid.server.refusals import Refusal
from hybrid.server.shapes import NAMED_TOOL

_NAMED = ("function", "custom")


class NamedTool(BaseModel):
    """A function, a custom tool, whose input is a text, or one of `AGENT_TOOLS`. What else clients send of it does not
    change the prompt.
    """

    model_config = ConfigDict(extra="ignore", json_schema_extra=NAMED_TOOL)

    type: str
    name: str | None = Field(None, min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: dict[str, Any] | None = None
    execution: Literal["server", "client"] | None = None
    environment: dict[str, Any] | None = None

    @property
    def known_as(self) -> str | None:
        """By which the model calls it, in its namespace."""
        return self.name if self.type in _NAMED else self.type

    @property
    def runs_at_client(self) -> bool:
        if self.type == TOOL_SEARCH:
            return self.execution == "client"
        if self.type == SHELL:  # others are containers of the server
            return self.environment is None or self.environment.get("type") == "local"
        return self.type in _NAMED or self.type in AGENT_TOOLS

    def told(self) -> dict[str, Any]:
        """As a reply has it."""
        if self.type == "custom":
            return self.model_dump(include={"type", "name", "description", "format"})
        if self.type in AGENT_TOOLS:
            said = {"type", "description", "parameters", "execution", "environment"}
            return self.model_dump(include=said, exclude_none=True)
        function = self.model_dump(include={"type", "name", "description", "parameters"})
        return {**function, "strict": bool(self.strict)}

    def function(self, name: str) -> dict[str, Any]:
        """Of a chat, by the name that the model is told."""
        if self.type == "custom":
            grammar = self.format if self.format and self.format.get("type") == "grammar" else None
            return custom_function(name, self.description, grammar)
        said = self.model_dump(include={"description", "parameters", "strict"}, exclude_none=True)
        if (known := AGENT_TOOLS.get(self.type)) is not None:
            said = {"description": known.description, "parameters": dict(known.parameters), **said}
        return {"type": "function", "function": {"name": name, **said}}


class ResponseTool(NamedTool):
    """The same, a namespace of such tools, or what would run on the server."""

    tools: list[NamedTool] | None = None

    @property
    def inner(self) -> list[NamedTool]:
        """The tools of a namespace, or the tool itself, that the client runs."""
        listed: list[NamedTool] = list(self.tools or ()) if self.type == "namespace" else [self]
        return [tool for tool in listed if tool.runs_at_client]

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

    @property
    def name(self) -> str | None:
        """By which the model knows it."""
        return None if self.tool.known_as is None else full_name(self.tool.known_as, self.namespace)


class Offered:
    """What a response offers to the model. Tools that would run on the server are left out, for it runs none; a reply
    has those that were offered.
    """

    def __init__(self, tools: Sequence[ResponseTool], found: Sequence[ResponseTool] = ()) -> None:
        """found: by a search; those that there are already count once. Raises Refusal for tools of which none can be
        offered, without a name, or with one name.
        """
        self._tools: dict[str, _Tool] = {}
        self.told = [tool.told() for tool in tools if tool.inner]
        for one in _flat(tools):
            if one.name is None or one.name in self._tools:
                missing = "a tool has no name" if one.name is None else f"a second tool has the name {one.name!r:.80}"
                raise Refusal(400, f"tools: {missing}; give each a name of its own", "tools")
            self._tools[one.name] = one
        if tools and not self._tools:
            raise Refusal(400, f"tools: {why_left_out(tools[0].type)}", "tools")
        for one in _flat(found):
            if one.name is not None:
                self._tools.setdefault(one.name, one)
        self.left_out = sorted({tool.type for tool in (*tools, *found) if not tool.inner})

    @property
    def names(self) -> list[str]:
        """By which the model knows them."""
        return list(self._tools)

    def functions(self) -> list[dict[str, Any]]:
        return [one.tool.function(name) for name, one in self._tools.items()]

    def item(self, call: ToolCall) -> dict[str, Any]:
        """A call that the model has made, with its input or arguments."""
        one = self._tools.get(call.name)
        if one is not None and (known := AGENT_TOOLS.get(one.tool.type)) is not None:
            return {"type": f"{one.tool.type}_call", "call_id": call.id, **known.made(object_of(call.arguments))}
        name = call.name if one is None else one.tool.name
        item: dict[str, Any] = {"call_id": call.id, "name": name}
        if one is not None and one.namespace is not None:
            item["namespace"] = one.namespace
        if one is not None and one.tool.type == "custom":
            return {"type": "custom_tool_call", **item, "input": custom_input(call.arguments)}
        return {"type": "function_call", **item, "arguments": call.arguments}


def full_name(name: str, namespace: str | None) -> str:
    """By which the model knows a tool."""
    if not namespace:
        return name
    return namespace + ("" if namespace.endswith("__") else "__") + name


def _flat(tools: Sequence[ResponseTool]) -> Iterator[_Tool]:
    for tool in tools:
        for inner in tool.inner:
            yield _Tool(inner, tool.name if tool.type == "namespace" else None)
