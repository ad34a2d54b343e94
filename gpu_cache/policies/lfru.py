"""Least frequently and recently used: recency, weighted by frequency."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy

CLASSES = 8
_WEIGHTS = [0.5**number for number in range(CLASSES)]
_MOST = 1 << (CLASSES - 1)  # calls that make a difference


class Lfru(Policy):
    """Evicts the smallest calls / age: calls since the fill, which counts as one, and lookups since the last of them.

    The frequency-weighted LRU that was proposed for the expert caches of vLLM (pull request 37190, 2026) and llama.cpp
    (21609, withdrawn). Ours alone: calls are rounded down to a power of two, of which there are `CLASSES`, so that a
    victim is the oldest of a class, whatever the number of ways.
    """

    name = "LFRU"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._now = 0  # lookups
        self._calls = [0] * geometry.slots
        self._last = [0] * geometry.slots
        # of each index: the weight of a class, and slots with 2**class calls or more, oldest first
        self._classes = [[(weight, OrderedDict[int, None]()) for weight in _WEIGHTS] for _ in range(geometry.nblocks)]
        self._class = [OrderedDict[int, None]()] * geometry.slots  # of each slot

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        now = self._now = self._now + 1
        counts, last = self._calls, self._last
        for slot in slots:
            calls = counts[slot] = counts[slot] + 1
            last[slot] = now
            if calls & (calls - 1) or calls > _MOST:
                self._class[slot].move_to_end(slot)
            else:
                del self._class[slot][slot]
                self._enter(slot, slot // self.nways, calls.bit_length() - 1)

    def on_fill(self, slot: int, key: int) -> None:
        self._calls[slot], self._last[slot] = 1, self._now
        self._enter(slot, slot // self.nways, 0)

    def on_evict(self, slot: int, key: int) -> None:
        del self._class[slot][slot]

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        best, found, last, now = -1.0, None, self._last, self._now
        for weight, slots in self._classes[index]:
            for slot in slots:
                if slot not in blocked:
                    age = (now - last[slot]) * weight
                    if age > best:
                        best, found = age, slot
                    break
        if found is not None:
            del self._class[found][found]
            self._calls[found], last[found] = 1, now
            slots = self._class[found] = self._classes[index][0][1]
            slots[found] = None
        return found

    def _enter(self, slot: int, index: int, number: int) -> None:
        slots = self._class[slot] = self._classes[index][number][1]
        slots[slot] = None
