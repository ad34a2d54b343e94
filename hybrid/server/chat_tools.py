"""The tools of a chat as clients send them, which of them may be called, and calls as clients read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from hybrid.core import ToolCall
from hybrid.server.custom_tools import custom_arguments, custom_function, custom_input
from hybrid.server.refusals import Refusal
from hybrid.server.strict import Strict

Name = Annotated[str, Field(min_length=1, max_length=256)]
ALLOWED = "allowed_tools"
_CHOICES = (None, "function", "custom", ALLOWED)


class ToolFunction(BaseModel):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function."""

    type: Literal["function"]
    function: ToolFunction
    cache_control: Any = Field(None, exclude=True)  # of no effect

    def plain(self) -> dict[str, Any]:
        """As chat templates read it."""
        return self.model_dump(exclude_none=True)


class Lark(BaseModel):
    syntax: Literal["lark", "regex"]
    definition: str


class CustomFormat(BaseModel):
    type: Literal["text", "grammar"]
    grammar: Lark | None = None


class Custom(BaseModel):
    name: Name
    description: str | None = None
    format: CustomFormat | None = None


class CustomTool(Strict):
    """A tool whose input is a text."""

    type: Literal["custom"]
    custom: Custom
    cache_control: Any = Field(None, exclude=True)  # of no effect

    def plain(self) -> dict[str, Any]:
        """The function that it is to the model."""
        form = self.custom.format
        grammar = form.grammar.model_dump() if form and form.grammar else None
        return custom_function(self.custom.name, self.custom.description, grammar)


def _kind(given: Any) -> str | None:
    kind = given.get("type") if isinstance(given, Mapping) else getattr(given, "type", None)
    return f"[{kind}]" if kind in ("function", "custom") else None  # bodies leave such a part out of a field's name


AnyTool = Annotated[
    Annotated[Tool, Tag("[function]")] | Annotated[CustomTool, Tag("[custom]")],
    Discriminator(
        _kind,
        custom_error_type="tool",
        custom_error_message="a tool must be an object whose type is 'function' or 'custom'",
    ),
]


def check_choice(choice: Any) -> None:
    """Raise Refusal for what is no `tool_choice`, whatever tools there are."""
    if choice is not None and not isinstance(choice, (str, dict)):
        raise Refusal(400, "tool_choice must be a text or an object", param="tool_choice")
    if isinstance(choice, dict) and choice.get("type") not in _CHOICES:
        raise Refusal(400, f"tool_choice: the type {choice['type']!r:.50} is not known here", param="tool_choice")
    if isinstance(choice, dict) and choice.get("type") == ALLOWED:
        plain_choice(choice)
        _allowed_names(choice)


def plain_choice(choice: Any) -> Any:
    """A choice as the model's side knows it: one of the words, or a function. Raises Refusal."""
    if choice == "any":  # Mistral's word
        return "required"
    if _kind_of(choice) == ALLOWED:
        mode = _allowed(choice).get("mode")
        if mode not in ("auto", "required"):
            raise Refusal(400, f"tool_choice: the mode {mode!r:.50} must be 'auto' or 'required'", "tool_choice")
        return mode
    if _kind_of(choice) == "custom":
        return {"type": "function", "function": choice.get("custom")}
    return choice


def may_be_called(tools: Sequence[dict[str, Any]] | None, choice: Any) -> list[dict[str, Any]] | None:
    """Those of a chat's functions that a choice lets the model call; it is told of no others. Raises Refusal."""
    if choice == "none":
        return None
    tools = list(tools or ())
    if _kind_of(choice) != ALLOWED:
        return tools or None
    there = {tool["function"]["name"] for tool in tools}
    names = _allowed_names(choice)
    if strange := [name for name in names if name not in there]:
        raise Refusal(400, f"tool_choice allows {strange[0]!r:.80}, which is none of the tools", "tool_choice")
    return [tool for tool in tools if tool["function"]["name"] in names] or None


def call_for_client(call: ToolCall, tools: Iterable[Tool | CustomTool]) -> dict[str, Any]:
    """A call that the model has made, as messages hold it."""
    if not any(isinstance(tool, CustomTool) and tool.custom.name == call.name for tool in tools):
        return call.to_dict()
    return {"id": call.id, "type": "custom", "custom": {"name": call.name, "input": custom_input(call.arguments)}}


def with_functions(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with calls of custom tools as those of functions. Raises Refusal."""
    return [_with_functions(message, f"messages.{index}") for index, message in enumerate(messages)]


def _with_functions(message: dict[str, Any], place: str) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not any(_kind_of(call) == "custom" for call in calls):
        return message
    return {**message, "tool_calls": [_function_call(call, place) for call in calls]}


def _function_call(call: Any, place: str) -> Any:
    if _kind_of(call) != "custom":
        return call
    custom = call.get("custom")
    name, text = (custom.get("name"), custom.get("input")) if isinstance(custom, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(text, str):
        raise Refusal(400, f"{place}: a custom call needs a name and an input that are texts", "messages")
    return {"id": call.get("id"), "type": "function", "function": {"name": name, "arguments": custom_arguments(text)}}


def _kind_of(given: Any) -> Any:
    return given.get("type") if isinstance(given, dict) else None


def _allowed(choice: dict[str, Any]) -> dict[str, Any]:
    given = choice.get(ALLOWED)
    if not isinstance(given, dict) or not isinstance(given.get("tools"), list):
        raise Refusal(400, f"tool_choice: {ALLOWED} must be an object with a mode and a list of tools", "tool_choice")
    return given


def _allowed_names(choice: dict[str, Any]) -> list[str]:
    names = []
    for tool in _allowed(choice)["tools"]:
        inner = tool.get(_kind_of(tool)) if _kind_of(tool) in ("function", "custom") else None
        name = inner.get("name") if isinstance(inner, dict) else None
        if not isinstance(name, str):
            raise Refusal(
                400,
                f"tool_choice: {ALLOWED} has {tool!r:.80}, which is no function or custom tool with a name",
                "tool_choice",
            )
        names.append(name)
    return names
