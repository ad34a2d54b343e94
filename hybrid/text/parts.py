"""The parts of an answer, and how marks are found in a text that grows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from hybrid.core import ToolCall


@dataclass(frozen=True)
class Parts:
    """What a piece of an answer adds: to what is said, to what was thought, to the calls of tools."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    def __add__(self, other: Parts) -> Parts:
        return Parts(self.text + other.text, self.reasoning + other.reasoning, (*self.tool_calls, *other.tool_calls))

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.tool_calls)


class AnswerParser(Protocol):
    """Takes an answer apart while it comes. The parts do not depend on how it was split into pieces."""

    def push(self, piece: str) -> Parts: ...

    def finish(self, whole: bool = True) -> Parts:
        """The parts that were held back. whole: the model ended the answer, which was not cut."""
        ...


class MarkedParser(ABC):
    """An `AnswerParser` for answers with marks in them."""

    def __init__(self) -> None:
        self._scanner = Scanner()

    def push(self, piece: str) -> Parts:
        self._scanner.push(piece)
        parts = Parts()
        while True:
            text, mark = self._scanner.read(self._marks())
            parts += self._take(text)
            if not mark:
                return parts
            parts += self._turn(mark)

    @abstractmethod
    def finish(self, whole: bool = True) -> Parts: ...

    @abstractmethod
    def _marks(self) -> Collection[str]:
        """Those that mean something here."""

    @abstractmethod
    def _take(self, text: str) -> Parts:
        """Text without marks."""

    @abstractmethod
    def _turn(self, mark: str) -> Parts:
        """What a mark changes."""


class Scanner:
    """Finds marks in a text that grows, and holds back what may become one."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, piece: str) -> None:
        self._held += piece

    def read(self, marks: Collection[str]) -> tuple[str, str]:
        """The text up to the first mark, and that mark; or as much text as is certain, and ""."""
        found = [(place, -len(mark), mark) for mark in marks if (place := self._held.find(mark)) >= 0]
        if found:
            place, _, mark = min(found)
            text, self._held = self._held[:place], self._held[place + len(mark) :]
            return text, mark
        certain = len(self._held) - max((overlap(self._held, mark) for mark in marks), default=0)
        text, self._held = self._held[:certain], self._held[certain:]
        return text, ""

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held


class Voice:
    """One of the two texts of an answer, what is said or what was thought, without the white space around it.

    What the format itself puts there, line ends behind a mark and space before the next, is no part of a text.
    """

    def __init__(self, leading: str = "\n", begins: bool = False) -> None:
        self._leading = leading  # characters that are dropped at a beginning
        self._begins = begins  # at the beginning of a piece behind a mark
        self._space = ""  # white space that counts if something follows
        self._spoken = False

    def say(self, text: str) -> str:
        if self._begins:
            text = text.lstrip(self._leading)
            if not text:
                return ""
            self._begins = False
            if self._spoken:
                self._space = "\n\n"
        text = self._space + text
        certain = text.rstrip()
        self._space = text[len(certain) :]
        self._spoken = self._spoken or bool(certain)
        return certain

    def mark(self) -> None:
        """A mark came: the next text is another piece."""
        self._begins, self._space = True, ""

    def finish(self) -> str:
        """White space at the end of an answer."""
        space, self._space = self._space, ""
        return space


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark` without being all of it."""
    longest = min(len(mark) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
