"""Least frequently used, with ageing."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_cache.policies.decayed import DecayedPolicy

HALF_LIFE = 64  # steps


class Lfu(DecayedPolicy):
    """Evicts the fewest calls, each of which counts half after `HALF_LIFE` steps, those before the fill included.

    The frequency of LRFU (Lee et al., IEEE Transactions on Computers, 2001), with time in steps.
    """

    name = "LFU"
    decay = 0.5 ** (1 / HALF_LIFE)

    def on_step(self, step: int) -> None:
        self.age(0)

    def on_call(self, layer: int, keys: Sequence[int], scores: Sequence[float] | None) -> None:
        worth, value = self._worth[0], self._value
        for key in keys:
            value[key] += worth
