"""First in, first out."""

from __future__ import annotations

from collections.abc import Collection

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy


class Fifo(Policy):
    """Evicts what was filled longest ago."""

    name = "FIFO"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._order: list[list[int]] = [[] for _ in range(geometry.nblocks)]  # oldest first

    def on_fill(self, slot: int, key: int) -> None:
        self._order[slot // self.nways].append(slot)

    def on_evict(self, slot: int, key: int) -> None:
        self._order[slot // self.nways].remove(slot)

    def victim(self, index: int, blocked: Collection[int]) -> int | None:
        for slot in self._order[index]:
            if slot not in blocked:
                return slot
        return None
