"""LRU-K with K = 2: by the last call but one."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.least import LeastPolicy

_BEFORE = 1 << 60  # more calls than there ever are


class Lru2(LeastPolicy):
    """O'Neil, O'Neil and Weikum, The LRU-K page replacement algorithm for database disk buffering, SIGMOD 1993.

    Evicts what was called for the last time but one longest ago; first what was called only once, the one called
    longest ago. Calls before the fill count, however long ago: a model has few experts, so all are remembered.
    """

    name = "LRU-2"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._experts, self._now = geometry.experts, 0  # calls
        keys = geometry.layers * geometry.experts
        # of each key the last call but one; where there was none the last one, and so before all others
        self._value = [-_BEFORE] * keys
        self._last = [0] * keys  # call, from 1

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        value, last, base, now = self._value, self._last, layer * self._experts, self._now
        for expert in experts:
            now += 1
            key = base + expert
            value[key] = last[key] or now - _BEFORE
            last[key] = now
        self._now = now
