"""Tools that OpenAI's models know without a description and that run at the client: to the model they are functions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Response

from hybrid.server.custom_tools import object_of

LOCAL_SHELL, TOOL_SEARCH = "local_shell", "tool_search"
LEFT_OUT = "x-hybrid-tools-left-out"
_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST_NAMES = 16


@dataclass(frozen=True)
class AgentTool:
    """Its name is its type. made: the fields of the item that a call of it is, by the arguments of the call. said: the
    arguments, by such an item that comes back.
    """

    description: str
    parameters: Mapping[str, Any]
    made: Callable[[Mapping[str, Any]], dict[str, Any]]
    said: Callable[[Mapping[str, Any]], Any]


def _shell_action(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is no command of the right form is left to the client to refuse."""
    command = arguments.get("command")
    words = ["sh", "-c", command] if isinstance(command, str) else command if isinstance(command, list) else []
    folder, timeout = arguments.get("working_directory"), arguments.get("timeout_ms")
    action: dict[str, Any] = {"type": "exec", "command": [word for word in words if isinstance(word, str)], "env": {}}
    action["working_directory"] = folder if isinstance(folder, str) else None
    action["timeout_ms"] = timeout if type(timeout) is int else None
    return {"action": action}


def _shell_arguments(item: Mapping[str, Any]) -> Any:
    action = item.get("action")
    kept = ("command", "working_directory", "timeout_ms")
    return {name: action[name] for name in kept if action.get(name) is not None} if isinstance(action, dict) else {}


def _search_arguments(item: Mapping[str, Any]) -> Any:
    given = item.get("arguments")
    return object_of(given) if isinstance(given, str) else given


AGENT_TOOLS: Mapping[str, AgentTool] = {
    LOCAL_SHELL: AgentTool(
        "Runs a command on the machine of the user and returns what it prints.",
        {
            "type": "object",
            "properties": {
                "command": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": "The program and its arguments",
                },
                "working_directory": {"type": "string"},
                "timeout_ms": {"type": "integer"},
            },
            "required": ["command"],
        },
        _shell_action,
        _shell_arguments,
    ),
    TOOL_SEARCH: AgentTool(
        "Finds more tools, which can be called afterwards.",
        {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
        lambda arguments: {"arguments": dict(arguments), "execution": "client"},
        _search_arguments,
    ),
}


def with_left_out(reply: Response, kinds: Iterable[str]) -> Response:
    """The reply with a header that names the types of tools of which the model was not told: nobody could run them."""
    names = sorted({kind if _PLAIN.fullmatch(kind) else "other" for kind in kinds})
    if names:
        reply.headers[LEFT_OUT] = ", ".join(names[:_MOST_NAMES])
    return reply


def arguments_of(kind: str, item: Mapping[str, Any]) -> str:
    """The arguments of the function that a call of such a tool was to the model."""
    return json.dumps(AGENT_TOOLS[kind].said(item), ensure_ascii=False)
