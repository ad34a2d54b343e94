"""SIEVE: a queue that never moves, a hand that passes over what was used."""

from __future__ import annotations

from collections.abc import Collection

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy


class Sieve(Policy):
    """Zhang et al., SIEVE is simpler than LRU, NSDI 2024.

    The hand goes from the oldest fill to the newest, clears the mark of what was called since, and evicts the first
    without one. What is blocked it passes over and leaves as it is.
    """

    name = "SIEVE"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._called = bytearray(geometry.slots)
        # The queue of an index is a ring of its slots and of its end, numbered slots + index: the end's newer neighbour
        # is the oldest slot.
        ends = range(geometry.slots, geometry.slots + geometry.nblocks)
        self._newer = [*range(geometry.slots), *ends]
        self._older = [*range(geometry.slots), *ends]
        self._hand = list(ends)

    def on_hit(self, slot: int, key: int) -> None:
        self._called[slot] = 1

    def on_fill(self, slot: int, key: int) -> None:
        end = self.geometry.slots + slot // self.nways
        newest = self._older[end]
        self._newer[newest] = self._older[end] = slot
        self._newer[slot], self._older[slot] = end, newest
        self._called[slot] = 0

    def on_evict(self, slot: int, key: int) -> None:
        newer, older, index = self._newer[slot], self._older[slot], slot // self.nways
        self._newer[older], self._older[newer] = newer, older
        if self._hand[index] == slot:
            self._hand[index] = newer

    def victim(self, index: int, blocked: Collection[int]) -> int | None:
        slot, end, newer, called = self._hand[index], self.geometry.slots + index, self._newer, self._called
        for _ in range(2 * self.nways + 3):  # once around clears every mark
            if slot != end and slot not in blocked:
                if not called[slot]:
                    self._hand[index] = slot
                    return slot
                called[slot] = 0
            slot = newer[slot]
        return None
