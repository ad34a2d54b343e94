"""When copies end, in lookups instead of seconds: the same in a simulator, in a test and on every machine."""

from __future__ import annotations

from collections.abc import Sequence


class CopyClock:
    """A tick is the lookup of one (step, layer). A copy issued in tick t ends before the lookup of t + 1 + delay."""

    def __init__(self, delay: int) -> None:
        """delay: ticks that a copy takes beyond the next one, 0 or more."""
        self._duration = 1 + delay
        self._tick = 0
        self._copies: dict[int, tuple[int, ...]] = {}  # by the tick in which they end, slots in order

    def issue(self, *slots: int) -> None:
        """Copies into slots begin, in this order."""
        end = self._tick + self._duration
        self._copies[end] = self._copies.get(end, ()) + slots

    def due(self) -> Sequence[int]:
        """Begin a tick: the slots whose copies end now, in the order in which they were issued."""
        self._tick += 1
        return self._copies.pop(self._tick, ())
