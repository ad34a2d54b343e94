"""SIEVE: a queue that never moves, a hand that passes over what was used."""

from __future__ import annotations

from collections.abc import Collection

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy


class Sieve(Policy):
    """Zhang et al., SIEVE is simpler than LRU, NSDI 2024.

    The hand goes from the oldest fill to the newest, clears the mark of what was called since, and evicts the first without one.
    What is blocked it passes over and leaves as it is.
    """

    name = "SIEVE"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._order: list[list[int]] = [[] for _ in range(geometry.nblocks)]  # oldest first
        self._hand = [0] * geometry.nblocks  # place in the order
        self._called = bytearray(geometry.slots)

    def on_hit(self, slot: int, key: int) -> None:
        self._called[slot] = 1

    def on_fill(self, slot: int, key: int) -> None:
        self._order[slot // self.nways].append(slot)
        self._called[slot] = 0

    def on_evict(self, slot: int, key: int) -> None:
        index = slot // self.nways
        order, hand = self._order[index], self._hand[index]
        place = order.index(slot)
        del order[place]
        hand -= place < hand
        self._hand[index] = hand if hand < len(order) else 0

    def victim(self, index: int, blocked: Collection[int]) -> int | None:
        order, hand, called = self._order[index], self._hand[index], self._called
        for _ in range(2 * len(order)):  # once around clears every mark
            slot = order[hand]
            if slot not in blocked:
                if not called[slot]:
                    self._hand[index] = hand
                    return slot
                called[slot] = 0
            hand = hand + 1 if hand + 1 < len(order) else 0
        return None
