"""The answers of gpt-oss: messages in channels, each with a header.

<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>, and calls of tools
as messages to them: <|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}<|call|>. The prompt has
written the first <|start|>assistant already.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from hybrid.core import ToolCall
from hybrid.text.parts import MarkedParser, Parts, Voice
from hybrid.text.tool_parsers.dialect import new_id

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_ENDS = (END, CALL, RETURN)


class HarmonyParser(MarkedParser):
    """Analysis is reasoning, what goes to a tool is a call, and the rest is said."""

    def __init__(self) -> None:
        super().__init__()
        self._said, self._thought = Voice(), Voice(begins=True)
        self._header: str | None = ""  # None within a message
        self._channel = "final"
        self._tool = ""  # to which the message goes
        self._body = ""  # of a call

    def finish(self, whole: bool = True) -> Parts:
        parts = self._take(self._scanner.finish())
        if self._header is not None:
            # A model that knows no channels; or a header that was cut, which is nobody's text.
            return parts if "<|" in self._header else parts + Parts(self._header)
        if self._tool:
            return parts + self._call(whole)
        return parts + Parts(self._said.finish())

    def _marks(self) -> Collection[str]:
        return MARKS

    def _take(self, text: str) -> Parts:
        if self._header is not None:
            self._header += text
        elif self._tool:
            self._body += text
        elif self._channel == "analysis":
            return Parts(reasoning=self._thought.say(text))
        else:
            return Parts(self._said.say(text))
        return Parts()

    def _turn(self, mark: str) -> Parts:
        if self._header is not None:
            return self._in_header(mark)
        if mark in (MESSAGE, CONSTRAIN):  # out of place
            return Parts()
        parts = self._call(whole=True) if self._tool else Parts()
        self._header, self._tool = "" if mark in _ENDS else mark, ""
        return parts

    def _in_header(self, mark: str) -> Parts:
        assert self._header is not None
        if mark == MESSAGE:
            channel, recipient = _CHANNEL.search(self._header), _RECIPIENT.search(self._header)
            self._channel = channel[1] if channel else "final"
            self._tool = recipient[1] if recipient and recipient[1] not in ("assistant", "user") else ""
            self._header, self._body = None, ""
            self._said.mark()
            self._thought.mark()
        elif mark in (START, *_ENDS):
            self._header = mark
        else:
            self._header += mark
        return Parts()

    def _call(self, whole: bool) -> Parts:
        """The call of a message to a tool; its text if it was cut."""
        body = self._body.strip()
        try:
            json.loads(body)
        except (ValueError, RecursionError):
            if not whole:
                return Parts(self._said.say(body) + self._said.finish())
        return Parts(tool_calls=(ToolCall(self._tool.removeprefix("functions."), body or "{}", new_id()),))
