"""The messages of a conversation, as every API's body makes them for the chat template."""

from __future__ import annotations

from typing import Any


def one_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with all that begins as the system's in one message: many templates refuse a second one."""
    count = next((index for index, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if count < 2:
        return messages
    text = "\n\n".join(message["content"] for message in messages[:count])
    return [{"role": "system", "content": text}, *messages[count:]]
