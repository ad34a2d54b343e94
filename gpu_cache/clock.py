"""When copies end, in lookups instead of seconds: the same in a simulator, in a test and on every machine."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class CopyClock:
    """A tick is the lookup of one (step, layer). A copy issued in tick t ends before the lookup of t + 1 + delay."""

    def __init__(self, delay: int) -> None:
        """delay: ticks that a copy takes beyond the next one, 0 or more."""
        self._delay = delay
        self._tick = 0
        self._copies: deque[tuple[int, tuple[int, ...]]] = deque()  # (tick, slots), in order

    def issue(self, *slots: int) -> None:
        """Copies into slots begin, in this order."""
        self._copies.append((self._tick + 1 + self._delay, slots))

    def due(self) -> Sequence[int]:
        """Begin a tick: the slots whose copies end now, in the order in which they were issued."""
        tick = self._tick = self._tick + 1
        copies = self._copies
        if not copies or copies[0][0] > tick:
            return ()
        slots = copies.popleft()[1]
        while copies and copies[0][0] <= tick:
            slots += copies.popleft()[1]
        return slots
