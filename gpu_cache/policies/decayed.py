"""What policies share that value an expert by its calls, the older the less."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from heapq import heappop, heappush, heapreplace

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy

_RESCALE_AT = 2.0**512


class DecayedPolicy(Policy):
    """Keeps a value of every expert, resident or not, that each lookup of its layer multiplies by `decay`; evicts the least.

    Instead of all values shrinking, what is added to one grows: `_worth` of a layer is what 1 is worth now. Stored values then
    only grow, so a heap of the resident experts of a (index, layer) need not be told of hits: what rose since it was pushed is
    pushed again when it comes to the top.
    """

    decay = 1.0

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._value = [0.0] * (geometry.layers * geometry.experts)
        self._worth = [1.0] * geometry.layers
        self._growth = 1.0 / self.decay
        self._key_of = [-1] * geometry.slots
        self._heaps: list[dict[int, list[tuple[float, int, int]]]] = [{} for _ in range(geometry.nblocks)]

    def age(self, layer: int) -> float:
        """Let the values of a layer decay once; returns what 1 is worth now, to be added to them."""
        worth = self._worth[layer] * self._growth
        if worth > _RESCALE_AT:
            self._rescale(layer, worth)
            worth = 1.0
        self._worth[layer] = worth
        return worth

    def on_fill(self, slot: int, key: int) -> None:
        self._key_of[slot] = key
        heap = self._heaps[slot // self.nways].setdefault(key // self.geometry.experts, [])
        heappush(heap, (self._value[key], slot, key))

    def on_evict(self, slot: int, key: int) -> None:
        self._key_of[slot] = -1

    def victim(self, index: int, blocked: Collection[int]) -> int | None:
        best, found = 0.0, None
        for layer, heap in self._heaps[index].items():
            least = self._least(heap, blocked)
            if least is not None:
                value = least[0] / self._worth[layer]
                if found is None or value < best:
                    best, found = value, least[1]
        return found

    def _least(self, heap: list[tuple[float, int, int]], blocked: Collection[int]) -> tuple[float, int, int] | None:
        """The entry of the least valuable expert that is not blocked. Brings the top of the heap up to date."""
        aside, found = [], None
        while heap:
            value, slot, key = heap[0]
            if self._key_of[slot] != key:
                heappop(heap)
            elif value != self._value[key]:
                heapreplace(heap, (self._value[key], slot, key))
            elif slot in blocked:
                aside.append(heappop(heap))
            else:
                found = heap[0]
                break
        for entry in aside:
            heappush(heap, entry)
        return found

    def _rescale(self, layer: int, worth: float) -> None:
        experts = self.geometry.experts
        for key in range(layer * experts, (layer + 1) * experts):
            self._value[key] /= worth
        for heaps in self._heaps:
            if layer in heaps:
                heaps[layer] = sorted(self._entries(heaps[layer]))

    def _entries(self, heap: list[tuple[float, int, int]]) -> Iterator[tuple[float, int, int]]:
        return ((self._value[key], slot, key) for _, slot, key in heap if self._key_of[slot] == key)
