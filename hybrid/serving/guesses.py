"""Guessed tokens of one request: where they come from, and how many of them come true."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]

NGRAM = 3  # tokens that must have come before for what followed them to be a guess
_SEEN, _TRUE = 2.0, 1.5  # guesses seen and come true, as if, before the first of a request
_MEMORY = 0.8  # what older steps weigh beside the newest
_SHORTEST_REST, _LONGEST_REST = 4, 256  # tokens between two tries of a request whose guesses do not come true


class Drafter(Protocol):
    """Makes guesses: of the text itself, as here, of a smaller model, or of layers trained for it."""

    def draft(self, tokens: Tokens, count: int) -> list[int]:
        """At most `count` tokens that may follow tokens int32 [n], which have grown since the last call."""


class PromptLookup:
    """Guesses that after the newest tokens comes what followed when they came the last time."""

    def __init__(self) -> None:
        self._followed: dict[tuple[int, ...], int] = {}  # by n-gram, the place behind its latest occurrence
        self._read = NGRAM  # places up to which they are noted

    def draft(self, tokens: Tokens, count: int) -> list[int]:
        self._note(tokens)
        place = self._followed.get(tuple(tokens[-NGRAM:].tolist()))
        if place is None:
            return []
        repeated = len(tokens) - place  # what is guessed beyond the end of the text repeats itself
        return [int(tokens[place + i % repeated]) for i in range(count)]

    def _note(self, tokens: Tokens) -> None:
        """All n-grams that something follows."""
        if len(tokens) <= self._read:
            return
        fresh = tokens[self._read - NGRAM : -1].tolist()
        ngrams = zip(*(fresh[i:] for i in range(NGRAM)), strict=False)
        self._followed.update(zip(ngrams, range(self._read, len(tokens)), strict=True))
        self._read = len(tokens)


class Guesses:
    """Those of one request, and how many of them come true."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self._seen, self._true = _SEEN, _TRUE
        self._rest = self._pause = 0  # tokens until the next try, and how many the last rest had

    @property
    def chance(self) -> float:
        """That a guess comes true whose predecessors have."""
        return self._true / self._seen

    def draft(self, tokens: Tokens, count: int) -> list[int]:
        """At most `count` guesses; none while it rests."""
        if self._rest:
            self._rest -= 1
            return []
        return self.drafter.draft(tokens, count)

    def tell(self, guessed: int, true: int) -> None:
        """So many of the guesses of a step came true, which all come before those that did not."""
        self._seen = self._seen * _MEMORY + min(true + 1, guessed)
        self._true = self._true * _MEMORY + true
        self._pause = 0 if true else self._longer_pause()
        self._rest = self._pause

    def give_up(self) -> None:
        """They promise nothing: rest, and then begin as if nothing was known."""
        self._pause = self._longer_pause()
        self._rest, self._seen, self._true = self._pause, _SEEN, _TRUE

    def expected(self, count: int) -> float:
        """Tokens that a step with so many guesses is expected to give."""
        chance = min(self.chance, 0.99)
        return (1 - chance ** (count + 1)) / (1 - chance)

    def _longer_pause(self) -> int:
        return min(max(_SHORTEST_REST, 2 * self._pause), _LONGEST_REST)
