"""What POST /v1/responses takes, as the chat that it asks for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from hybrid.server.agent_tools import AGENT_TOOLS, arguments_of, shell_output
from hybrid.server.bodies import checked
from hybrid.server.chat_tools import ALLOWED
from hybrid.server.custom_tools import custom_arguments
from hybrid.server.fields import MAX_MESSAGES, MAX_TOOLS, MAX_TOP_LOGPROBS, ChatBody, Stops
from hybrid.server.numbers import WHOLE, CountOrAll, Finite, Limit, No, Seed
from hybrid.server.refusals import Refusal
from hybrid.server.response_tools import Offered, ResponseTool, full_name
from hybrid.server.shapes import CALLS_NEED, ITEM_CHOICE, ITEM_TEXTS, ITEMS, NOTHING, ONE_AT_CLIENT
from hybrid.server.strict import Strict
from hybrid.server.thinking import Reasoning
from hybrid.server.turns import one_system

Item = dict[str, Any]
LOGPROBS = "message.output_text.logprobs"
Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.results",
    "web_search_call.action.sources",
    "file_search_call.results",
    "code_interpreter_call.outputs",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
]  # of all but the first there is nothing here to be told
_UNREAD = ("web_search_call", "additional_tools")  # the one says what another server has searched, and not found
_TOOL_ITEMS = ("tool_search_output", "additional_tools")
_OUTPUTS = (
    "function_call_output",
    "custom_tool_call_output",
    "local_shell_call_output",
    "tool_search_output",
    "shell_call_output",
    "apply_patch_call_output",
)
_CALLS = ("function_call", "custom_tool_call", *(f"{kind}_call" for kind in AGENT_TOOLS))
_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop",
    "parallel_tool_calls",
    "chat_template_kwargs",
    "enable_thinking",
)  # as in a chat


class TextFormat(Strict):
    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(Strict):
    include_obfuscation: bool = False


class ResponsesBody(Strict):
    """POST /v1/responses."""

    model_config = ConfigDict(json_schema_extra=CALLS_NEED)

    model: str | None = Field(None, max_length=1000)
    input: str | list[dict[str, Any]] = Field(min_length=1, json_schema_extra=ITEMS)
    instructions: str | None = None
    max_output_tokens: Limit | None = None
    temperature: Finite | None = Field(None, ge=0, le=2)
    top_p: Finite | None = Field(None, gt=0, le=1)
    top_k: CountOrAll | None = None
    min_p: Finite | None = Field(None, ge=0, le=1)
    seed: Seed | None = None
    presence_penalty: Finite | None = Field(None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(None, ge=-2, le=2)
    repetition_penalty: Finite | None = Field(None, ge=0.01, le=100)
    stop: Stops | None = None
    tools: list[ResponseTool] | None = Field(None, max_length=MAX_TOOLS, json_schema_extra=ONE_AT_CLIENT)
    tool_choice: str | dict[str, Any] | None = Field(None, json_schema_extra=ITEM_CHOICE)
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextFormat | None = None
    chat_template_kwargs: dict[str, bool | int | str | None] | None = None
    enable_thinking: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    include: list[Include] | None = Field(None, max_length=8)
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = None
    background: No | None = None
    previous_response_id: Any = Field(None, json_schema_extra=NOTHING)
    conversation: Any = Field(None, json_schema_extra=NOTHING)
    prompt: Any = Field(None, json_schema_extra=NOTHING)
    # Of no effect on the answer, but sent by clients.
    store: Any = None
    truncation: Literal["auto", "disabled"] | None = None
    max_tool_calls: Any = None
    metadata: dict[str, Any] | None = None
    client_metadata: Any = None
    user: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    context_management: Any = None

    def chat_body(self) -> ChatBody:
        """Raises Refusal."""
        for name in ("previous_response_id", "conversation", "prompt"):
            if getattr(self, name) is not None:
                raise Refusal(400, f"{name}: this server keeps nothing; send the whole input again", name)
        chat: dict[str, Any] = {name: getattr(self, name) for name in _SAME}
        chat |= {"messages": self._messages(), "max_tokens": self.max_output_tokens}
        if self.tells_logprobs:
            chat |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        offered = self.offered()
        chat["tools"] = offered.functions() or None
        chat["tool_choice"] = _choice(self.tool_choice)
        if self.reasoning:
            chat["reasoning_effort"] = self.reasoning.effort
        if self.text:
            chat["verbosity"] = self.text.verbosity
        if self.text and (format := self.text.format) is not None:
            if format.get("type") == "json_schema":
                inner = {key: value for key, value in format.items() if key != "type"}
                format = {"type": "json_schema", "json_schema": inner}
            chat["response_format"] = format
        return checked(ChatBody, chat)

    @property
    def tells_logprobs(self) -> bool:
        """Whether the reply has the probabilities of the tokens of its text."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    def offered(self) -> Offered:
        """Raises Refusal."""
        items = self.input if isinstance(self.input, list) else []
        found = [tool for index, item in enumerate(items) for tool in _found_tools(item, f"input.{index}")]
        return Offered(self.tools or (), found)

    def _messages(self) -> list[dict[str, Any]]:
        made = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        if isinstance(self.input, str):
            return [*made, {"role": "user", "content": self.input}]
        if len(self.input) > MAX_MESSAGES:
            raise Refusal(400, f"input has more than {MAX_MESSAGES} items", "input")
        for index, item in enumerate(self.input):
            _add(made, item, f"input.{index}")
        return one_system(made)


def _choice(given: str | dict[str, Any] | None) -> Any:
    """As a chat has it. Raises Refusal."""
    if not isinstance(given, dict):
        return given
    if given.get("type") == ALLOWED:
        tools = given.get("tools")
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise Refusal(400, f"tool_choice: {ALLOWED} must have a list of tools", "tool_choice")
        named = [chosen for chosen in map(_chosen, tools) if chosen is not None]  # no others can be called
        return {"type": ALLOWED, ALLOWED: {"mode": given.get("mode"), "tools": named}}
    return _chosen(given) or given


def _chosen(given: Item) -> Item | None:
    """A tool by the name that the model knows it by; None for one that would run on the server."""
    kind = given.get("type")
    if isinstance(kind, str) and kind in AGENT_TOOLS:
        name = kind
    elif kind in ("function", "custom"):
        namespace = None if given.get("namespace") is None else _string(given, "namespace", "tool_choice")
        name = full_name(_string(given, "name", "tool_choice"), namespace)
    else:
        return None
    return {"type": "function", "function": {"name": name}}


def _found_tools(item: Item, place: str) -> list[ResponseTool]:
    """Tools that a search of the client has found, or that it has added. Raises Refusal."""
    if item.get("type") not in _TOOL_ITEMS:
        return []
    tools = item.get("tools")
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS or not all(isinstance(tool, dict) for tool in tools):
        raise Refusal(400, f"{place}: tools must be a list of up to {MAX_TOOLS} objects", "input")
    return [checked(ResponseTool, tool) for tool in tools]


def _add(made: list[dict[str, Any]], item: Item, place: str) -> None:
    """One item more. What the assistant reasons, says and calls, one after the other, is one message."""
    kind = "message" if item.get("type") is None else item["type"]
    if kind in _UNREAD or (kind in ("tool_search_call", "tool_search_output") and item.get("execution") == "server"):
        return
    if kind in _OUTPUTS:
        output = _output(kind, item, place)
        field = "call_id" if kind != "local_shell_call_output" or item.get("call_id") is not None else "id"
        made.append({"role": "tool", "tool_call_id": _string(item, field, place), "content": output})
    elif kind == "message" and item.get("role") != "assistant":
        role, content = item.get("role"), _text(item.get("content"), place)
        if role not in ("user", "system", "developer"):
            message = f"{place}: the role is {role!r:.50}; allowed: user, assistant, system, developer"
            raise Refusal(400, message, "input")
        made.append({"role": "system" if role == "developer" else role, "content": content})
    elif kind in ("message", "reasoning", *_CALLS):
        if not made or made[-1]["role"] != "assistant":
            made.append({"role": "assistant", "content": ""})
        _say(made[-1], kind, item, place)
    else:
        raise Refusal(400, f"{place}: an item of the type {kind!r:.60} cannot be read here", "input")


def _say(message: dict[str, Any], kind: str, item: Item, place: str) -> None:
    if kind == "message":
        message["content"] += _text(item.get("content"), place)
    elif kind == "reasoning":
        text = _text(item.get("content") or item.get("summary") or "", place)
        if text:
            message["reasoning_content"] = message.get("reasoning_content", "") + text
    elif (tool := kind.removesuffix("_call")) in AGENT_TOOLS:
        _call(message, tool, arguments_of(tool, item), item, place)
    else:
        namespace = None if item.get("namespace") is None else _string(item, "namespace", place)
        name = full_name(_string(item, "name", place), namespace)
        custom = kind == "custom_tool_call"
        arguments = custom_arguments(_string(item, "input", place)) if custom else _string(item, "arguments", place)
        _call(message, name, arguments, item, place)


def _call(message: dict[str, Any], name: str, arguments: str, item: Item, place: str) -> None:
    function = {"name": name, "arguments": arguments}
    call = {"type": "function", "id": _string(item, "call_id", place), "function": function}
    message.setdefault("tool_calls", []).append(call)


def _output(kind: str, item: Item, place: str) -> str:
    """What a tool has returned, as the model is told of it."""
    given = item.get("output")
    if kind == "tool_search_output":
        return _names_of(item, place)
    if kind == "shell_call_output":
        if (text := shell_output(given)) is None:
            raise Refusal(400, f"{place}: output must be a list of objects with stdout, stderr and outcome", "input")
        return text
    if kind == "apply_patch_call_output" and not given:
        return "The patch failed." if item.get("status") == "failed" else "Done."
    return _text(given, place)


def _names_of(item: Item, place: str) -> str:
    """What the model is told of a search: the names of what it has found, which it is offered from then on."""
    names = [name for tool in _found_tools(item, place) for name in Offered([], [tool]).names]
    return f"Found: {', '.join(names)}" if names else "Nothing was found."


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refusal(400, f"{place}: the content must be a text or a list of parts", "input")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "refusal":
            texts.append(_string(part, "refusal", place))
        elif kind in ITEM_TEXTS:
            texts.append(_string(part, "text", place))
        else:
            raise Refusal(400, f"{place}: a part of the type {kind!r:.60} cannot be read here; text can", "input")
    return "\n".join(texts)


def _string(item: Item, field: str, place: str) -> str:
    value = item.get(field)
    if not isinstance(value, str):
        raise Refusal(400, f"{place}: {field} must be a text", "input")
    return value
