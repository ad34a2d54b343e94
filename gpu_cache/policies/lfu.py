"""Least frequently used, with ageing."""

from __future__ import annotations

from heapq import heapify

from gpu_cache.policies.decayed import DecayedPolicy
from gpu_cache.policies.least import LeastPolicy

HALF_LIFE = 64  # steps


class Lfu(LeastPolicy, DecayedPolicy):
    """Evicts the fewest calls, each of which counts half after `HALF_LIFE` steps, those before the fill included.

    The frequency of LRFU (Lee et al., IEEE Transactions on Computers, 2001), with time in steps.
    """

    name = "LFU"
    decay = 0.5 ** (1 / HALF_LIFE)
    _value: list[float]

    def _rescale(self, unit: float) -> None:
        for heap in self._heaps:
            heap[:] = [(value / unit, slot) for value, slot in heap]
            heapify(heap)
