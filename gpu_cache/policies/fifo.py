"""First in, first out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy


class Fifo(Policy):
    """Evicts what was filled longest ago."""

    name = "FIFO"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        # slots of each index, the next victim first
        self._order: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(geometry.nblocks)]

    def on_fill(self, slot: int, key: int) -> None:
        self._order[slot // self.nways][slot] = None

    def on_evict(self, slot: int, key: int) -> None:
        del self._order[slot // self.nways][slot]

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        order = self._order[index]
        for slot in order:
            if slot not in blocked:
                order.move_to_end(slot)
                return slot
        return None
