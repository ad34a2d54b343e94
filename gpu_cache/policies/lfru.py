"""Least frequently and recently used: recency, weighted by frequency."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy

CLASSES = 8
_MOST = 1 << (CLASSES - 1)  # calls that make a difference


class Lfru(Policy):
    """Evicts the smallest calls / age: calls since the fill, which counts as one, and lookups since the last of them.

    The frequency-weighted LRU that is proposed for the expert caches of vLLM and llama.cpp. Calls are rounded down to a
    power of two, of which there are `CLASSES`: a victim is the oldest of a class, whatever the number of ways.
    """

    name = "LFRU"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._now = 0  # lookups
        self._calls = [0] * geometry.slots
        self._last = [0] * geometry.slots
        # of each index, slots with 2**class calls or more, oldest first
        self._classes: list[list[OrderedDict[int, None]]] = [
            [OrderedDict() for _ in range(CLASSES)] for _ in range(geometry.nblocks)
        ]
        self._class = [OrderedDict[int, None]()] * geometry.slots  # of each slot

    def on_call(self, layer: int, keys: Sequence[int], scores: Sequence[float] | None) -> None:
        self._now += 1

    def on_hit(self, slot: int, key: int) -> None:
        calls = self._calls[slot]
        self._calls[slot] = calls + 1
        self._last[slot] = self._now
        slots = self._class[slot]
        if calls & (calls + 1) or calls >= _MOST:
            slots.move_to_end(slot)
        else:
            del slots[slot]
            self._enter(slot, calls.bit_length())

    def on_fill(self, slot: int, key: int) -> None:
        self._calls[slot] = 1
        self._last[slot] = self._now
        self._enter(slot, 0)

    def on_evict(self, slot: int, key: int) -> None:
        del self._class[slot][slot]

    def victim(self, index: int, blocked: Collection[int]) -> int | None:
        best, found, last, now = -1.0, None, self._last, self._now
        weight = 1.0
        for slots in self._classes[index]:
            for slot in slots:
                if slot not in blocked:
                    age = (now - last[slot]) * weight
                    if age > best:
                        best, found = age, slot
                    break
            weight *= 0.5
        return found

    def _enter(self, slot: int, number: int) -> None:
        slots = self._class[slot] = self._classes[slot // self.nways][number]
        slots[slot] = None
