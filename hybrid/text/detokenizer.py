"""Tokens to streamed text: never half a character, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
_CHAR_TOKENS = 4  # a UTF-8 character has four bytes at most, so four tokens
_KEEP = 16  # tokens that surely hold every byte of three undecided characters
_WINDOW = 64


class Decoder(Protocol):
    special_ids: frozenset[int]

    def decode(self, token_ids: Sequence[int]) -> str: ...


class StreamDecoder:
    """Decodes a growing list of tokens piece by piece; the pieces join to the text of the whole list.

    It decodes a window of the last tokens: those already given out, which the tokenizer needs to place
    spaces, and those whose text may still change because it ends within a character.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._window: list[int] = []
        self._settled = 0  # leading tokens of the window whose text was given out
        self._given = 0  # leading characters of the window's text that were given out

    def push(self, token: int) -> str:
        """The text that is certain now and was not given out yet; often empty."""
        if token in self._decoder.special_ids:  # they have no text, and would only widen the window
            return ""
        self._window.append(token)
        text = self._decoder.decode(self._window)
        certain = len(text) - self._undecided(text)
        piece = text[self._given : certain]
        self._given += len(piece)
        if piece and certain == len(text):
            self._restart(self._settled, settled=len(self._window) - self._settled)
        elif len(self._window) > _WINDOW:
            self._restart(len(self._window) - _KEEP, settled=0)
        return piece

    def finish(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD."""
        piece = self._decoder.decode(self._window)[self._given :]
        self._window, self._settled, self._given = [], 0, 0
        return piece

    def _undecided(self, text: str) -> int:
        """How many last characters may change. Bytes that are no UTF-8 must not hold text for ever."""
        run = len(text) - len(text.rstrip(_REPLACEMENT))
        pending = len(self._window) - self._settled
        return run if pending <= _CHAR_TOKENS else min(run, _CHAR_TOKENS - 1)

    def _restart(self, start: int, settled: int) -> None:
        self._window, self._settled = self._window[start:], settled
        text = self._decoder.decode(self._window)
        self._given = len(text) - self._undecided(text)


class StopMatcher:
    """Passes text on up to the first stop string that completes; holds back what may still become one.

    Of two stop strings the one whose last character comes first counts, then the longer one: so the cut does
    not depend on how the text was split into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that can be passed on. Nothing after the stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        ends = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in text]
        if ends:
            self.stopped, self._held = True, ""
            end, negative_length = min(ends)
            return text[: end + negative_length]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """The text that was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Tokens in, text out: a StreamDecoder followed by a StopMatcher."""

    def __init__(self, decoder: Decoder, stop: Sequence[str]) -> None:
        self._decoder = StreamDecoder(decoder)
        self._matcher = StopMatcher(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has completed."""
        return self._matcher.stopped

    def push(self, token: int) -> str:
        return self._matcher.push(self._decoder.push(token))

    def finish(self) -> str:
        return self._matcher.push(self._decoder.finish()) + self._matcher.finish()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
