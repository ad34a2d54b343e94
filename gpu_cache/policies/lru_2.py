"""LRU-K with K = 2: by the last call but one."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.least import LeastPolicy


class Lru2(LeastPolicy):
    """O'Neil, O'Neil and Weikum, The LRU-K page replacement algorithm for database disk buffering, SIGMOD 1993.

    Evicts what was called for the last time but one longest ago; first what was called only once, the one called
    longest ago. Calls before the fill count, however long ago: a model has few experts, so all are remembered.
    """

    name = "LRU-2"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._experts, self._now = geometry.experts, 0  # calls
        # of each key the last call but one and the last, 0 where there was none
        self._value: list[tuple[int, int]] = [(0, 0)] * (geometry.layers * geometry.experts)

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        times, base, now = self._value, layer * self._experts, self._now
        for expert in experts:
            now += 1
            times[base + expert] = (times[base + expert][1], now)
        self._now = now
