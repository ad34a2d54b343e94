"""Tokens of an answer to the parts of it."""

from __future__ import annotations

from hybrid.text.detokenizer import TextStream
from hybrid.text.parts import AnswerParser, Parts


class AnswerStream:
    """Text as a TextStream makes it, taken apart by a parser; without one all of it is said."""

    def __init__(self, text: TextStream, parser: AnswerParser | None = None) -> None:
        self._text, self._parser = text, parser

    @property
    def stopped(self) -> bool:
        """Whether a stop string has completed."""
        return self._text.stopped

    def push(self, token: int) -> Parts:
        return self._parts(self._text.push(token))

    def finish(self, whole: bool) -> Parts:
        """What was held back. whole: the model ended the answer, which was not cut."""
        parts = self._parts(self._text.finish())
        return parts + self._parser.finish(whole or self.stopped) if self._parser else parts

    def _parts(self, piece: str) -> Parts:
        return self._parser.push(piece) if self._parser else Parts(piece)
