"""Random replacement: what a policy must beat."""

from __future__ import annotations

from collections.abc import Collection
from random import Random as Generator

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy


class Random(Policy):
    """Evicts any slot, each with the same chance."""

    name = "random"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._random = Generator(seed).random

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        first = index * self.nways
        slot = first + int(self._random() * self.nways)
        if slot not in blocked:
            return slot
        others = [slot for slot in range(first, first + self.nways) if slot not in blocked]
        return others[int(self._random() * len(others))] if others else None
