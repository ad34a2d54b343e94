"""Messages, tools and documents as a caller gives them, checked and turned into plain data for a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypedDict

import numpy as np

from hybrid.errors import RequestError

Message = Mapping[str, Any]
Tool = Mapping[str, Any]
Document = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
RARE_ROLES = ("function", "ipython", "document", "documents", "control", "observation", "model", "thinking")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # names for the same; the first is the usual one
SAYS = ("content", "tool_calls", *REASONING_FIELDS)
MEDIA = ("image", "video", "audio", "file", "input_image", "input_audio", "input_file")


class ChatOptions(TypedDict, total=False):
    """What a chat template takes besides messages; `ChatTemplate.render` says what each of it means."""

    tools: Sequence[Tool] | None
    documents: Sequence[Document] | None
    template_kwargs: Mapping[str, Any] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool


@dataclass(frozen=True)
class ChatInput:
    """What the caller of a chat gives; `ChatTemplate.render` says what most of it means.

    tool_choice: "auto" (or None) lets the model call tools, "none" takes its answer for a text, "required" has it call
    one or more, and {"name": ...} this one. parallel_tool_calls False: of these, one alone.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] | None = None
    documents: Sequence[Document] | None = None
    template_kwargs: Mapping[str, Any] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = True


def plain_messages(messages: Sequence[Message], roles: Sequence[str] = ROLES) -> list[dict[str, Any]]:
    """The messages as a template gets them: fields that are None are left out, but for the content beside calls of
    tools, and reasoning has all of its names.

    Raises RequestError for what is no message.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError('messages must be a list like [{"role": "user", "content": "..."}] with one or more entries')
    return [_plain_message(message, index, roles) for index, message in enumerate(messages)]


def plain_objects(name: str, given: Sequence[Mapping[str, Any]] | None, example: str) -> list[dict[str, Any]] | None:
    """Tools or documents: a list of objects, or None. Raises RequestError."""
    if given is None:
        return None
    if not isinstance(given, (list, tuple)) or not all(isinstance(item, Mapping) for item in given):
        raise RequestError(f"{name} must be a list of objects like {example}, not {given!r:.80}")
    return [plain_data(item) for item in given]


def plain_data(value: Any) -> Any:
    """The same made of the types of JSON alone, so that a template finds no methods of other objects.

    What is no data at all becomes its type's name in angle brackets.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # a subclass may bring methods
        return str.__str__(value)
    if isinstance(value, (int, float)):
        return int.__int__(value) if isinstance(value, int) else float.__float__(value)
    if isinstance(value, Mapping):
        return {str(plain_data(key)): plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item) for item in value]
    if isinstance(value, np.generic):
        return plain_data(value.item())
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_data(getattr(value, field.name)) for field in fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic, so the messages of OpenAI's client
        return plain_data(value.model_dump())
    return f"<{type(value).__name__}>"


def join_text_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for a template that knows only texts: the parts of a content become its lines."""
    return [
        {**message, "content": "\n".join(part.get("text", "") for part in message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _plain_message(message: Any, index: int, roles: Sequence[str]) -> dict[str, Any]:
    plain = plain_data(message)
    if not isinstance(plain, dict):
        raise RequestError(f"message {index} must be an object with a role and a content, not {message!r:.80}")
    kept = ("content",) if plain.get("tool_calls") else ()
    plain = {name: value for name, value in plain.items() if value is not None or name in kept}
    if plain.get("role") not in roles:
        raise RequestError(f"message {index} has the role {plain.get('role')!r:.80}; allowed: {', '.join(roles)}")
    if all(plain.get(name) is None for name in SAYS):
        raise RequestError(f"message {index} says nothing: it needs a content, or tool_calls, not {message!r:.80}")
    _check_content(plain.get("content"), index)
    if isinstance(plain.get("tool_calls"), list):
        plain["tool_calls"] = [_call_with_object(call) for call in plain["tool_calls"]]
    reasoning = next((plain[name] for name in REASONING_FIELDS if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _call_with_object(call: Any) -> Any:
    """A call whose arguments are an object, which templates want, where they are JSON text of one, as clients have."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call_with_object(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _check_content(content: Any, index: int) -> None:
    """Nothing, a text, or a list of parts, none of which is a picture or a sound."""
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise RequestError(f"message {index}: its content must be a text or a list of parts, not {content!r:.80}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or not isinstance(part.get("text", ""), str):
            raise RequestError(
                f'message {index}: a part of a content must be like {{"type": "text", "text": "..."}}, not {part!r:.80}'
            )
        if kind.removesuffix("_url") in MEDIA:
            raise RequestError(f"message {index} has a part of the type {kind!r}; this program reads text alone")
