"""Sequences whose keys and values outlive their request, for a prompt that begins with the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Kept:
    """A sequence that holds the state after these tokens, of which `prompt` many were a prompt.

    held: tokens that it has memory for, more than these where guesses behind them did not come true.
    phase: of the length that they were computed for, see `ModelSpec.length_phase`.
    """

    sequence: int
    tokens: Tokens
    prompt: int
    phase: int = 0
    held: int = 0

    @property
    def size(self) -> int:
        """Tokens that it takes memory for."""
        return max(self.held, len(self.tokens))


def shared_tokens(known: Tokens, prompt: Tokens) -> int:
    """How many tokens a prompt shares with the beginning of others; the last one is always computed, for its logits."""
    return common_tokens(known, prompt[:-1])


def common_tokens(first: Tokens, second: Tokens) -> int:
    """How many tokens two lists of them begin with alike."""
    most = min(len(first), len(second))
    differing = np.flatnonzero(first[:most] != second[:most])
    return int(differing[0]) if len(differing) else most


class KeptSequences:
    """The kept sequences, least recently used first.

    rewindable: whether the state of a sequence after some of its tokens is part of the state after all of them. Keys
    and values are that; a recurrent state is not, and can only be continued where it is.
    """

    def __init__(self, rewindable: bool) -> None:
        self.rewindable = rewindable
        self._kept: list[Kept] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def sequences(self) -> set[int]:
        return {kept.sequence for kept in self._kept}

    @property
    def tokens(self) -> int:
        return sum(kept.size for kept in self._kept)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [len(kept.tokens) for kept in self._kept]

    def __iter__(self) -> Iterator[Kept]:
        return iter(self._kept)

    def put(self, kept: Kept) -> None:
        self._kept.append(kept)

    def use(self, kept: Kept) -> None:
        """It was used just now."""
        self._kept.remove(kept)
        self._kept.append(kept)

    def find(self, prompt: Tokens, phase: int = 0) -> tuple[Kept, int] | None:
        """The one that saves most of a prompt of this phase, and how many of its tokens need not be computed.

        It must share half of its own prompt at least: otherwise it belongs to another conversation, which would lose
        more than this one gains.
        """
        found = [(self._shared(kept, prompt), place) for place, kept in enumerate(self._kept) if kept.phase == phase]
        shared, place = max(found, default=(0, 0))
        return (self._kept[place], shared) if shared else None

    def take(self, kept: Kept) -> None:
        """Give a sequence up, because a request goes on with it."""
        self._kept.remove(kept)

    def pop_oldest(self, besides: Kept | None = None) -> Kept | None:
        """Give up the one that was used longest ago; None if there is no other than `besides`."""
        oldest = next((kept for kept in self._kept if kept is not besides), None)
        if oldest:
            self._kept.remove(oldest)
        return oldest

    def _shared(self, kept: Kept, prompt: Tokens) -> int:
        shared = shared_tokens(kept.tokens, prompt)
        if not self.rewindable:
            return shared if shared == len(kept.tokens) else 0
        return shared if 2 * shared >= kept.prompt else 0
