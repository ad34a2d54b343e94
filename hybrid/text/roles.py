"""Whose messages a chat template reads, and messages that suit it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybrid.errors import RequestError
from hybrid.text.chat_template import ChatTemplate
from hybrid.text.messages import Message

_MARK = "zqxjkv"  # in no template
_FIRST: list[Message] = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]


@dataclass(frozen=True)
class Roles:
    """What of a conversation reaches the prompt. Templates refuse the rest, or leave it out without a word.

    developer: what a developer says at the beginning. late_system: what the system says behind the first message.
    """

    developer: bool
    late_system: bool

    @classmethod
    def of(cls, template: ChatTemplate) -> Roles:
        """Found by trying."""
        user = _FIRST[1]
        developer = _reads(template, [{"role": "developer", "content": _MARK}, user])
        return cls(developer, _reads(template, [*_FIRST, {"role": "system", "content": _MARK}, user]))

    def fit(self, messages: Sequence[Message]) -> list[Message]:
        """The same with what no developer may say said by the system, and what the system may not say there by the
        user, in one message with what the user has said just before.
        """
        fitted: list[Message] = []
        for message in messages:
            role = message.get("role")
            if role == "developer" and not self.developer:
                role = "system"
            if role == "system" and fitted and not self.late_system:
                _add(fitted, {**message, "role": "user"})
            else:
                fitted.append(message if role == message.get("role") else {**message, "role": role})
        return fitted


def odd_roles(messages: Sequence[Message]) -> bool:
    """Whether a developer speaks, or the system behind the first message."""
    roles = [message.get("role") for message in messages]
    return "developer" in roles or "system" in roles[1:]


def _add(messages: list[Message], said: dict[str, Any]) -> None:
    last = messages[-1]
    texts = (last.get("content"), said.get("content"))
    if last.get("role") == "user" and all(isinstance(text, str) for text in texts):
        messages[-1] = {**last, "content": "\n\n".join(map(str, texts))}
    else:
        messages.append(said)


def _reads(template: ChatTemplate, messages: list[Message]) -> bool:
    try:
        return _MARK in template.render(messages)
    except RequestError:
        return False
