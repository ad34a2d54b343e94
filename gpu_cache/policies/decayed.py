"""What policies share that value an expert by its calls, the older the less."""

from __future__ import annotations

from collections.abc import Collection
from heapq import heappop, heappush, heapreplace

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy

Entry = tuple[float, int, int]  # value, slot, key
_RESCALE_AT = 2.0**512


class DecayedPolicy(Policy):
    """Keeps a value of every expert, resident or not, that `age` multiplies by `decay`; evicts the least.

    Instead of all values shrinking, what is added to one grows: `_worth` is what 1 is worth now. Stored values only
    grow then, so the heap of the resident experts of an index need not be told of hits: what rose since it was pushed
    is pushed again when it comes to the top. Values that age layer by layer have a heap for each layer.
    """

    decay = 1.0
    by_layer = False  # whether each lookup ages the values of its layer; else each step ages all

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        keys = geometry.layers * geometry.experts
        self._value = [0.0] * keys
        self._group = geometry.experts if self.by_layer else keys  # keys that age together
        self._worth = [1.0] * (keys // self._group)
        self._growth = 1.0 / self.decay
        self._key_of = [-1] * geometry.slots
        self._heaps: list[dict[int, list[Entry]]] = [{} for _ in range(geometry.nblocks)]  # by group

    def age(self, group: int) -> float:
        """Let the values of a layer (0: of all, if they age together) decay once; returns what 1 is worth now."""
        worth = self._worth[group] * self._growth
        if worth > _RESCALE_AT:
            self._rescale(group, worth)
            worth = 1.0
        self._worth[group] = worth
        return worth

    def on_fill(self, slot: int, key: int) -> None:
        self._key_of[slot] = key
        heap = self._heaps[slot // self.nways].setdefault(key // self._group, [])
        heappush(heap, (self._value[key], slot, key))

    def on_evict(self, slot: int, key: int) -> None:
        self._key_of[slot] = -1

    def victim(self, index: int, blocked: Collection[int]) -> int | None:
        least, found = 0.0, None
        for group, heap in self._heaps[index].items():
            entry = self._top(heap, blocked)
            if entry is not None and (found is None or entry[0] / self._worth[group] < least):
                least, found = entry[0] / self._worth[group], entry[1]
        return found

    def _top(self, heap: list[Entry], blocked: Collection[int]) -> Entry | None:
        """The entry of the least valuable expert that is not blocked, once the top of the heap is up to date."""
        key_of, values, aside, found = self._key_of, self._value, [], None
        while heap:
            value, slot, key = entry = heap[0]
            if key_of[slot] != key:
                heappop(heap)
            elif value != values[key]:
                heapreplace(heap, (values[key], slot, key))
            elif slot in blocked:
                aside.append(heappop(heap))
            else:
                found = entry
                break
        for entry in aside:
            heappush(heap, entry)
        return found

    def _rescale(self, group: int, worth: float) -> None:
        for key in range(group * self._group, (group + 1) * self._group):
            self._value[key] /= worth
        for heaps in self._heaps:
            if group in heaps:
                heaps[group] = sorted(
                    (self._value[key], slot, key) for _, slot, key in heaps[group] if self._key_of[slot] == key
                )
