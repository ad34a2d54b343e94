"""Base of policies that weigh age against frequency, of which there are a few classes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy

CLASSES = 8
_WEIGHTS = [0.5**number for number in range(CLASSES)]


class ClassedPolicy(Policy):
    """Evicts the largest age / 2**class. Age is since the last call; within a class a queue has the oldest first, so
    that a victim is the first of a class, whatever the number of ways. Of equal ones the lowest class's goes.
    """

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._now = 0
        self._last = [0] * geometry.slots  # call of each slot
        # of each index: the weight of a class, and its slots
        self._classes = [[(weight, OrderedDict[int, None]()) for weight in _WEIGHTS] for _ in range(geometry.nblocks)]
        self._class = [OrderedDict[int, None]()] * geometry.slots  # of each slot
        self._number = [0] * geometry.slots  # of the class of each slot

    def on_evict(self, slot: int, key: int) -> None:
        del self._class[slot][slot]

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        best, found, last, now = -1.0, None, self._last, self._now
        for weight, slots in self._classes[index]:
            if not slots:
                continue
            for slot in slots:
                if slot not in blocked:
                    age = (now - last[slot]) * weight
                    if age > best:
                        best, found = age, slot
                    break
        if found is not None:
            del self._class[found][found]
            self.on_fill(found, key)
        return found

    def _enter(self, slot: int, index: int, number: int) -> None:
        """Make a slot the newest of a class."""
        self._number[slot] = number
        slots = self._class[slot] = self._classes[index][number][1]
        slots[slot] = None
