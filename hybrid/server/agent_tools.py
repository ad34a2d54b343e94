"""Tools that OpenAI's models know without a description and that run at the client: to the model they are functions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Response

from hybrid.server.custom_tools import object_of

LOCAL_SHELL, TOOL_SEARCH, SHELL, APPLY_PATCH = "local_shell", "tool_search", "shell", "apply_patch"
_OPERATIONS = ("create_file", "update_file", "delete_file")
_PICTURES = ("computer",)  # how the types of tools begin whose results are pictures
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


def _local_action(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is no command of the right form is left to the client to refuse."""
    command = arguments.get("command")
    words = ["sh", "-c", command] if isinstance(command, str) else command if isinstance(command, list) else []
    folder, timeout = arguments.get("working_directory"), arguments.get("timeout_ms")
    action: dict[str, Any] = {"type": "exec", "command": [word for word in words if isinstance(word, str)], "env": {}}
    action["working_directory"] = folder if isinstance(folder, str) else None
    action["timeout_ms"] = timeout if type(timeout) is int else None
    return {"action": action}


def _local_arguments(item: Mapping[str, Any]) -> Any:
    return _given(item.get("action"), "command", "working_directory", "timeout_ms")


def _given(held: Any, *names: str) -> dict[str, Any]:
    """Of the fields of an object those that it has."""
    return {name: held[name] for name in names if held.get(name) is not None} if isinstance(held, dict) else {}


def _shell_action(arguments: Mapping[str, Any]) -> dict[str, Any]:
    commands, timeout = arguments.get("commands"), arguments.get("timeout_ms")
    commands = [commands] if isinstance(commands, str) else commands if isinstance(commands, list) else []
    action: dict[str, Any] = {"commands": [command for command in commands if isinstance(command, str)]}
    action["timeout_ms"] = timeout if type(timeout) is int else None
    action["max_output_length"] = None
    return {"action": action, "environment": {"type": "local"}}


def _shell_arguments(item: Mapping[str, Any]) -> Any:
    return _given(item.get("action"), "commands", "timeout_ms")


def _patch_operation(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is no operation of the right form is left to the client to refuse."""
    kind = arguments.get("type")
    operation = {"type": kind if kind in _OPERATIONS else "update_file", "path": arguments.get("path")}
    if operation["type"] != "delete_file":
        operation["diff"] = arguments.get("diff")
    return {"operation": {name: text if isinstance(text, str) else "" for name, text in operation.items()}}


def _patch_arguments(item: Mapping[str, Any]) -> Any:
    return _given(item.get("operation"), "type", "path", "diff")


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
        _local_action,
        _local_arguments,
    ),
    SHELL: AgentTool(
        "Runs commands in a shell on the machine of the user, one after the other, and returns what each prints.",
        {
            "type": "object",
            "properties": {
                "commands": {"type": "array", "items": {"type": "string"}, "description": "Lines for the shell"},
                "timeout_ms": {"type": "integer"},
            },
            "required": ["commands"],
        },
        _shell_action,
        _shell_arguments,
    ),
    APPLY_PATCH: AgentTool(
        "Creates, changes or deletes a file of the user. The diff of create_file has the lines of the new file, each "
        "behind a plus sign. The diff of update_file has a line @@ before each change, then the lines around it, each "
        "behind a space, those that go behind a minus sign, and those that come behind a plus sign.",
        {
            "type": "object",
            "properties": {
                "type": {"enum": [*_OPERATIONS]},
                "path": {"type": "string", "description": "Of the file, from the folder of the work on"},
                "diff": {"type": "string", "description": "Not of delete_file"},
            },
            "required": ["type", "path"],
        },
        _patch_operation,
        _patch_arguments,
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


def why_left_out(kind: str) -> str:
    """Why no model is told of a tool of that type, and what to do instead."""
    if kind.startswith(_PICTURES):
        return f"the type {kind!r:.60} is answered with pictures, and this server reads text alone; offer functions"
    return f"the type {kind!r:.60} would run on the server, and this one runs none; offer functions"


def shell_output(chunks: Any) -> str | None:
    """What a model is told of the commands that a shell has run; None for what is no list of outputs."""
    if not isinstance(chunks, list) or not all(isinstance(chunk, dict) for chunk in chunks):
        return None
    return "\n".join(filter(None, map(_chunk_text, chunks)))


def _chunk_text(chunk: dict[str, Any]) -> str:
    outcome = chunk.get("outcome")
    outcome = outcome if isinstance(outcome, dict) else {}
    end = "timed out" if outcome.get("type") == "timeout" else f"exit code {outcome.get('exit_code', 0)}"
    texts = [chunk.get("stdout"), chunk.get("stderr"), "" if end == "exit code 0" else f"({end})"]
    return "\n".join(text.rstrip("\n") for text in texts if isinstance(text, str) and text)


def arguments_of(kind: str, item: Mapping[str, Any]) -> str:
    """The arguments of the function that a call of such a tool was to the model."""
    return json.dumps(AGENT_TOOLS[kind].said(item), ensure_ascii=False)
