"""SIEVE: a queue that never moves, a hand that passes over what was used."""

from __future__ import annotations

from collections.abc import Collection

from gpu_cache.geometry import Geometry
from gpu_cache.policies.marked import MarkedPolicy


class Sieve(MarkedPolicy):
    """Zhang et al., SIEVE is simpler than LRU, NSDI 2024.

    The hand goes from the oldest fill to the newest, clears the mark of what was called since, and evicts the first
    without one. What is blocked it passes over and leaves as it is.
    """

    name = "SIEVE"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        # The queue of an index is a ring of its slots and of its end, numbered slots + index: the end's newer neighbour
        # is the oldest slot.
        ends = range(geometry.slots, geometry.slots + geometry.nblocks)
        self._called.extend(bytes(geometry.nblocks))  # of the ends, never set
        self._newer: list[int] = [*range(geometry.slots), *ends]
        self._older: list[int] = [*range(geometry.slots), *ends]
        self._hand = list(ends)

    def on_fill(self, slot: int, key: int) -> None:
        self._enter(slot, self.geometry.slots + slot // self.nways)

    def on_evict(self, slot: int, key: int) -> None:
        newer, index = self._leave(slot), slot // self.nways
        if self._hand[index] == slot:
            self._hand[index] = newer

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        slot, end, newer, called = self._hand[index], self.geometry.slots + index, self._newer, self._called
        for _ in range(2 * self.nways + 3):  # once around clears every mark
            if called[slot]:
                if slot not in blocked:
                    called[slot] = 0
            elif slot not in blocked and slot != end:
                self._hand[index] = self._leave(slot)
                self._enter(slot, end)
                return slot
            slot = newer[slot]
        return None

    def _enter(self, slot: int, end: int) -> None:
        """Put a slot into the queue, as the newest."""
        newest = self._older[end]
        self._newer[newest] = self._older[end] = slot
        self._newer[slot], self._older[slot] = end, newest
        self._called[slot] = 0

    def _leave(self, slot: int) -> int:
        """Take a slot out of the queue; returns its newer neighbour."""
        newer, older = self._newer[slot], self._older[slot]
        self._newer[older], self._older[newer] = newer, older
        return newer
