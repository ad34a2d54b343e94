"""Least frequently used, with ageing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from heapq import heapify, heappop, heappush, heapreplace

from gpu_cache.geometry import Geometry
from gpu_cache.policies.decayed import DecayedPolicy

HALF_LIFE = 64  # steps


class Lfu(DecayedPolicy):
    """Evicts the fewest calls, each of which counts half after `HALF_LIFE` steps, those before the fill included.

    The frequency of LRFU (Lee et al., IEEE Transactions on Computers, 2001), with time in steps. Of equal ones the
    lowest slot goes.
    """

    name = "LFU"
    decay = 0.5 ** (1 / HALF_LIFE)

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._key_of = [0] * geometry.slots
        # of each index: (value, slot) of its experts; the value is of some time before, hence never above the true one
        self._heaps: list[list[tuple[float, int]]] = [[] for _ in range(geometry.nblocks)]

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        value, unit, base = self._value, self._unit, layer * self._experts
        for expert in experts:
            value[base + expert] += unit

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

    def _rescale(self, unit: float) -> None:
        for heap in self._heaps:
            heap[:] = [(value / unit, slot) for value, slot in heap]
            heapify(heap)
