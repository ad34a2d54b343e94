"""What POST /v1/messages takes, as the chat that it asks for."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hybrid.server.agent_tools import why_left_out
from hybrid.server.bodies import checked
from hybrid.server.fields import MAX_MESSAGES, MAX_STOPS, MAX_TOOLS, ChatBody, StopText
from hybrid.server.known_tools import known_tool
from hybrid.server.numbers import CountOrAll, Finite, Positive
from hybrid.server.refusals import Refusal
from hybrid.server.shapes import BLOCKS, NOTHING, SYSTEM
from hybrid.server.strict import Strict
from hybrid.server.thinking import Thinking
from hybrid.server.turns import one_system

Block = dict[str, Any]


class MessageTool(BaseModel):
    """Of a function of the client; what else clients send of it does not change the prompt."""

    model_config = ConfigDict(extra="ignore")

    type: str | None = None
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    input_schema: dict[str, Any] | None = None

    @property
    def runs_at_client(self) -> bool:
        return self.type in (None, "custom") or known_tool(self.type) is not None

    def function(self) -> dict[str, Any]:
        """Raises Refusal for a tool of which no model is told."""
        if not self.runs_at_client:
            raise Refusal(400, f"tools: {why_left_out(str(self.type))}", "tools")
        known = known_tool(self.type) if self.type else None
        said = {"description": self.description, "parameters": self.input_schema}
        if known is not None:
            said = {"description": self.description or known.description, "parameters": dict(known.parameters)}
        return {"type": "function", "function": {"name": self.name, **_without_nulls(said)}}


class MessageToolChoice(Strict):
    type: Literal["auto", "none", "any", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputConfig(Strict):
    effort: str | None = Field(None, max_length=32)
    format: dict[str, Any] | None = None


class CountBody(Strict):
    """POST /v1/messages/count_tokens: what makes the prompt."""

    model: str | None = Field(None, max_length=1000)
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_MESSAGES, json_schema_extra=BLOCKS)
    system: str | list[dict[str, Any]] | None = Field(None, json_schema_extra=SYSTEM)
    tools: list[MessageTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None
    # Of no effect on the answer, but sent by clients.
    betas: Any = None
    cache_control: Any = None
    context_management: Any = None
    diagnostics: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None
    fallbacks: Any = None
    fallback_credit_token: Any = None
    billing_policy: Any = None

    def chat(self) -> dict[str, Any]:
        """The fields of a chat. Raises Refusal."""
        messages = [] if self.system is None else [{"role": "system", "content": _text(self.system, "system")}]
        for index, message in enumerate(self.messages):
            messages += _messages(message, f"messages.{index}")
        if messages[-1]["role"] == "assistant":
            raise Refusal(400, "messages: the last is the assistant's; this server does not continue one", "messages")
        chat: dict[str, Any] = {"messages": one_system(messages), **self._choice()}
        if self.tools:
            here = [tool for tool in self.tools if tool.runs_at_client]
            chat["tools"] = [tool.function() for tool in here or self.tools]
        if self.thinking:
            chat["enable_thinking"] = self.thinking.on
        return chat | self._output()

    def left_out(self) -> set[str]:
        """Types of tools that would run here; the model is told of the others."""
        return {tool.type for tool in self.tools or () if tool.type is not None and not tool.runs_at_client}

    def _choice(self) -> dict[str, Any]:
        choice = self.tool_choice
        if choice is None:
            return {}
        if choice.type == "tool":
            made: Any = {"type": "function", "function": {"name": choice.name or ""}}
        else:
            made = "required" if choice.type == "any" else choice.type
        return {"tool_choice": made, "parallel_tool_calls": not choice.disable_parallel_tool_use}

    def _output(self) -> dict[str, Any]:
        given = self.output_config
        made: dict[str, Any] = {"reasoning_effort": given.effort if given else None}
        form = given.format if given and given.format is not None else self.output_format
        if form is not None:
            schema = form.get("schema")
            made["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        return made


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: Positive
    temperature: Finite | None = Field(None, ge=0, le=1)
    top_p: Finite | None = Field(None, gt=0, le=1)
    top_k: CountOrAll | None = None
    stop_sequences: list[StopText] | None = Field(None, max_length=MAX_STOPS)
    stream: bool | None = None
    mcp_servers: list[Any] | None = Field(None, max_length=0)
    thread: Any = Field(None, json_schema_extra=NOTHING)
    # Of no effect on the answer, but sent by clients.
    metadata: Any = None
    service_tier: Any = None
    inference_geo: Any = None
    speed: Any = None

    def chat_body(self) -> ChatBody:
        """Raises Refusal."""
        if self.thread is not None:  # by this code clients know to go on without one
            message = "thread: this server keeps nothing; send the whole conversation again"
            raise Refusal(400, message, "thread", "thread_unsupported_request")
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        more = {"max_tokens": self.max_tokens, "stop": self.stop_sequences or None}
        return checked(ChatBody, {**self.chat(), **sampling, **more})


def _messages(message: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """A message as messages of a chat: results of tools become messages of their own."""
    if strange := sorted(name for name in message.keys() - {"role", "content"} if message[name] is not None):
        raise Refusal(400, f"{place}: {strange[0][:50]!r} is unknown here", "messages")
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise Refusal(400, f"{place}: the role is {role!r:.50}; allowed: user, assistant", "messages")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise Refusal(400, f"{place}: the content must be a text or a list of blocks", "messages")
    if role == "assistant":
        return [_assistant(blocks, place)]
    made, texts = [], []
    for block in blocks:
        if block.get("type") == "tool_result" and role == "user":
            result = "" if block.get("content") is None else _text(block["content"], place)
            made.append({"role": "tool", "tool_call_id": _name(block, "tool_use_id", place), "content": result})
        else:
            texts.append(_text([block], place))
    if texts or not made:
        made.append({"role": role, "content": "\n".join(texts)})
    return made


def _assistant(blocks: list[Block], place: str) -> dict[str, Any]:
    said: dict[str, Any] = {"role": "assistant", "content": ""}
    texts, reasons, calls = [], [], []
    for block in blocks:
        kind = block.get("type")
        if kind == "thinking":
            reasons.append(_name(block, "thinking", place))
        elif kind == "tool_use":
            arguments = block.get("input")
            if not isinstance(arguments, dict):
                raise Refusal(400, f"{place}: the input of a tool_use must be an object", "messages")
            function = {"name": _name(block, "name", place), "arguments": json.dumps(arguments, ensure_ascii=False)}
            calls.append({"type": "function", "id": _name(block, "id", place), "function": function})
        elif kind != "redacted_thinking":  # which nobody can read
            texts.append(_text([block], place))
    said["content"] = "".join(texts)
    if reasons:
        said["reasoning_content"] = "".join(reasons)
    if calls:
        said["tool_calls"] = calls
    return said


def _text(content: Any, place: str) -> str:
    """A text, or the lines of blocks that are texts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refusal(400, f"{place}: the content must be a text or a list of blocks", "messages")
    return "\n".join(_said(block, place) for block in content)


def _held(content: Any, place: str) -> str:
    """What a document or a result of a search holds: texts alone."""
    if isinstance(content, list) and not all(isinstance(one, dict) and one.get("type") == "text" for one in content):
        raise Refusal(
            400, f"{place}: a document and a search_result may hold blocks of the type 'text' alone", "messages"
        )
    return _text(content, place)


def _said(block: Any, place: str) -> str:
    """What a block says that is a text, or holds texts."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text":
        return _name(block, "text", place)
    if kind == "tool_reference":
        return f"Tool: {_name(block, 'tool_name', place)}"
    if kind == "search_result":
        head = [_name(block, field, place) for field in ("title", "source")]
        return "\n".join([*head, _held(block.get("content"), place)])
    source = block.get("source") if kind == "document" else None
    if isinstance(source, dict) and source.get("type") in ("text", "content"):
        held = source.get("data") if source["type"] == "text" else source.get("content")
        return "\n".join([*filter(None, [_title(block, place)]), _held(held, place)])
    raise Refusal(400, f"{place}: a block of the type {kind!r:.50} cannot be read here; text can", "messages")


def _without_nulls(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}


def _title(block: Block, place: str) -> str | None:
    return None if block.get("title") is None else _name(block, "title", place)


def _name(block: Block, field: str, place: str) -> str:
    value = block.get(field)
    if not isinstance(value, str):
        raise Refusal(400, f"{place}: {field} of a block must be a text", "messages")
    return value
