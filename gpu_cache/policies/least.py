"""Base of policies that evict the expert with the least value, where values never fall."""

from __future__ import annotations

from collections.abc import Collection
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy


class LeastPolicy(Policy):
    """Of each index a heap of its experts by a value of some time before, which is brought up to date only where it is
    the least: as values never fall, the first that is up to date is the least of all. Of equal ones the lowest slot
    goes.
    """

    _value: Any  # a list: of every key, resident or not

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._key_of = [0] * geometry.slots
        self._heaps: list[list[tuple[Any, int]]] = [[] for _ in range(geometry.nblocks)]  # (value, slot)

    def on_fill(self, slot: int, key: int) -> None:
        self._key_of[slot] = key
        heappush(self._heaps[slot // self.nways], (self._value[key], slot))

    def on_evict(self, slot: int, key: int) -> None:
        heap = self._heaps[slot // self.nways]
        heap[:] = [entry for entry in heap if entry[1] != slot]
        heapify(heap)

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        heap, value, key_of, passed, found = self._heaps[index], self._value, self._key_of, [], None
        while heap:
            held, slot = heap[0]
            now = value[key_of[slot]]
            if held != now:
                heapreplace(heap, (now, slot))
            elif slot in blocked:
                passed.append(heappop(heap))
            else:
                key_of[slot], found = key, slot
                heapreplace(heap, (value[key], slot))
                break
        for entry in passed:
            heappush(heap, entry)
        return found
