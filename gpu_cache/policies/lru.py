"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy


class Lru(Policy):
    """Evicts what was called longest ago. Calls of one lookup count in their order."""

    name = "LRU"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._order: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(geometry.nblocks)]  # oldest first

    def on_hit(self, slot: int, key: int) -> None:
        self._order[slot // self.nways].move_to_end(slot)

    def on_fill(self, slot: int, key: int) -> None:
        self._order[slot // self.nways][slot] = None

    def on_evict(self, slot: int, key: int) -> None:
        del self._order[slot // self.nways][slot]

    def victim(self, index: int, blocked: Collection[int]) -> int | None:
        for slot in self._order[index]:
            if slot not in blocked:
                return slot
        return None
