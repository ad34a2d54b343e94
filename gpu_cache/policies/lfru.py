"""Least frequently and recently used: recency, weighted by frequency."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.classed import CLASSES, ClassedPolicy

_MOST = 1 << (CLASSES - 1)  # calls that make a difference


class Lfru(ClassedPolicy):
    """Evicts the smallest calls / age: calls since the fill, which counts as one, and lookups since the last of them.

    The frequency-weighted LRU that was proposed for the expert caches of vLLM (pull request 37190, 2026) and llama.cpp
    (21609, withdrawn). Ours alone: calls are rounded down to a power of two, of which there are `CLASSES`.
    """

    name = "LFRU"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._calls = [0] * geometry.slots

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
