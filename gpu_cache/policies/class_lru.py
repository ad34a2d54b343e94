"""ClassLRU of llama.cpp: recency, weighted by a frequency that outlives evictions."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.classed import CLASSES, ClassedPolicy
from gpu_cache.policies.decayed import DecayedPolicy

HALF_LIFE = 128  # steps
_MOST = 1 << (CLASSES - 1)  # calls that make a difference
_CLASS = [max(calls.bit_length(), 1) - 1 for calls in range(_MOST)]  # by calls, rounded down


class ClassLru(ClassedPolicy, DecayedPolicy):
    """The policy of llama.cpp's expert cache since its pull request 31233 (2026): evicts the largest age / 2**class.

    The class is that of the expert's calls at its last one, those before the fill included, each of which counts half
    after `HALF_LIFE` steps, rounded down to a power of two. Age is in steps. There a step counts as many tokens as it
    has, here as one; there misses of a layer are filled in the order of their numbers, here in that of their calls.
    """

    name = "ClassLRU"
    decay = 0.5 ** (1 / HALF_LIFE)

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._key_of = [0] * geometry.slots

    def on_step(self, step: int) -> None:
        super().on_step(step)
        self._now += 1

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        DecayedPolicy.on_lookup(self, layer, experts, scores, slots)
        last, now, key_of, classes, numbers = self._last, self._now, self._key_of, self._class, self._number
        value, unit = self._value, self._unit
        for slot in slots:
            last[slot] = now
            calls = int(value[key_of[slot]] / unit)
            number = _CLASS[calls] if calls < _MOST else CLASSES - 1
            if numbers[slot] == number:
                classes[slot].move_to_end(slot)
            else:
                del classes[slot][slot]
                self._enter(slot, slot // self.nways, number)

    def on_fill(self, slot: int, key: int) -> None:
        self._key_of[slot], self._last[slot] = key, self._now
        calls = int(self._value[key] / self._unit)
        self._enter(slot, slot // self.nways, _CLASS[calls] if calls < _MOST else CLASSES - 1)

    def _rescale(self, unit: float) -> None:
        """Nothing is copied of the values."""
