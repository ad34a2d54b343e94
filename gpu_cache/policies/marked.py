"""Base of policies that remember of each slot whether it was called since they last looked."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy


class MarkedPolicy(Policy):
    """A call marks its slot; who fills a slot or passes over it clears the mark."""

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._called = bytearray(geometry.slots)

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        called = self._called
        for slot in slots:
            called[slot] = 1
