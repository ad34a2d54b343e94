"""Tools that Anthropic's models know without a description and that run at the client: to others they are functions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TEXT, _NUMBER = {"type": "string"}, {"type": "integer"}
_RANGE = {
    "type": "array",
    "items": _NUMBER,
    "minItems": 2,
    "maxItems": 2,
    "description": "Of view: the first and the last line, from 1 on; -1 is the end",
}
_VERSION = re.compile("[0-9]{1,16}")
_LAST_WITH_UNDO = 20250124  # the last version of text editors that take an edit back


@dataclass(frozen=True)
class KnownTool:
    """parameters: the JSON schema of its arguments."""

    description: str
    parameters: Mapping[str, Any]


def known_tool(kind: str) -> KnownTool | None:
    """By its type, which is a name and the date of a version; None for one that runs elsewhere, or is answered with
    pictures.
    """
    name, _, version = kind.rpartition("_")
    if not _VERSION.fullmatch(version):
        return None
    if name == "text_editor" and int(version) <= _LAST_WITH_UNDO:
        return _EDITOR_WITH_UNDO
    return _KNOWN.get(name)


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


def _editor(inserts: str, *more: str) -> KnownTool:
    """inserts: the argument whose text insert puts behind a line."""
    arguments = dict.fromkeys(("path", "file_text", "old_str", "new_str", inserts), _TEXT)
    commands = ["view", "create", "str_replace", "insert", *more]
    return KnownTool(
        "Shows and edits text files of the user: view shows a file, or what a folder holds; create writes file_text; "
        "str_replace puts new_str in the place of old_str, which must be there once; "
        f"insert puts {inserts} behind a line.",
        _object(["command", "path"], command={"enum": commands}, **arguments, insert_line=_NUMBER, view_range=_RANGE),
    )


_EDITOR_WITH_UNDO = _editor("new_str", "undo_edit")
_KNOWN: Mapping[str, KnownTool] = {
    "bash": KnownTool(
        "Runs a command in a shell of the user that stays open, and returns what it prints.",
        _object([], command=_TEXT, restart={"type": "boolean", "description": "Begins a new shell; without a command"}),
    ),
    "text_editor": _editor("insert_text"),
    "memory": KnownTool(
        "Keeps files between conversations, under /memories: view shows a file, or what a folder holds; create writes "
        "file_text; str_replace puts new_str in the place of old_str; insert puts insert_text behind a line; delete; "
        "rename, from old_path to new_path. View /memories first.",
        _object(
            ["command"],
            command={"enum": ["view", "create", "str_replace", "insert", "delete", "rename"]},
            path=_TEXT,
            file_text=_TEXT,
            old_str=_TEXT,
            new_str=_TEXT,
            insert_line=_NUMBER,
            insert_text=_TEXT,
            old_path=_TEXT,
            new_path=_TEXT,
            view_range=_RANGE,
        ),
    ),
}
