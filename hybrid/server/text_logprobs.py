"""Which tokens of an answer its parts were made of: what is thought and called has no probabilities in some APIs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid.core import TokenLogprob
from hybrid.server.parts import Part
from hybrid.server.replies import token_logprobs
from hybrid.text.token_texts import TokenTexts


class TextLogprobs:
    """Finds the tokens of each part among those that have come, in order. What is between parts is of none: marks, and
    the end. whole: whether all tokens come before the first part, not each part's before it.
    """

    def __init__(self, texts: TokenTexts, whole: bool = False) -> None:
        self._texts, self._whole = texts, whole
        self._bytes = b""  # of tokens that no part has had yet
        self._ends: list[int] = []  # where each of them ends in these bytes
        self._tokens: list[TokenLogprob] = []  # what is known of each
        self._kind: str | None = None  # of the last part

    def push(self, tokens: Sequence[TokenLogprob]) -> None:
        """Tokens that have come before the parts that they make."""
        for token in tokens:
            self._bytes += self._texts.bytes_of(token.token_id)
            self._ends.append(len(self._bytes))
            self._tokens.append(token)

    def take(self, part: Part) -> list[dict[str, Any]]:
        """The probabilities of the tokens that make a part. A token that makes the end of one and the beginning of the
        next is the first one's.
        """
        first, last = self._found(part)
        count = sum(start < last for start in (0, *self._ends[:-1])) if self._ends else 0
        taken = self._tokens[sum(end <= first for end in self._ends) : count]
        self._bytes, self._tokens = self._bytes[last:], self._tokens[count:]
        self._ends = [end - last for end in self._ends[count:]]
        return token_logprobs(self._texts, taken)

    def _found(self, part: Part) -> tuple[int, int]:
        """Where its bytes are. All of them, where it is written otherwise than its tokens are, as broken characters."""
        goes_on, self._kind = part.kind == self._kind, part.kind
        for text in (part.text.encode(), part.text.strip().encode()):
            if (place := self._place(text, goes_on)) >= 0:
                return place, place + len(text)
        return 0, len(self._bytes)

    def _place(self, text: bytes, goes_on: bool) -> int:
        """Where a text begins, -1 if it is nowhere. What begins behind marks may be a piece of them, and what goes on
        may come again in what is held back; a whole part may come again in those behind it.
        """
        if goes_on or not self._whole:
            return self._bytes.find(text) if goes_on else self._bytes.rfind(text)
        places = [place for place in (0, *self._ends) if self._bytes.startswith(text, place)]
        return places[0] if places else self._bytes.find(text)
