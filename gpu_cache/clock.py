"""When copies end, in lookups instead of seconds: the same in a simulator, in a test and on every machine."""

from __future__ import annotations

from collections import deque


class CopyClock:
    """A tick is the lookup of one (step, layer). A copy issued in tick t ends before the lookup of t + 1 + delay."""

    def __init__(self, delay: int) -> None:
        """delay: ticks that a copy takes beyond the next one, 0 or more."""
        self._delay = delay
        self._tick = 0
        self._copies: deque[tuple[int, int]] = deque()  # (tick, slot), in order

    def issue(self, slot: int) -> None:
        """A copy into a slot begins."""
        self._copies.append((self._tick + 1 + self._delay, slot))

    def due(self) -> list[int]:
        """Begin a tick: the slots whose copies end now, in the order in which they were issued."""
        self._tick += 1
        copies, slots = self._copies, []
        while copies and copies[0][0] <= self._tick:
            slots.append(copies.popleft()[1])
        return slots
