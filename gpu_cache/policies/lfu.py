"""Least frequently used, with ageing."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.decayed import NOBODY, DecayedPolicy

HALF_LIFE = 64  # steps


class Lfu(DecayedPolicy):
    """Evicts the fewest calls, each of which counts half after `HALF_LIFE` steps, those before the fill included.

    The frequency of LRFU (Lee et al., IEEE Transactions on Computers, 2001), with time in steps. Of equal ones the
    lowest slot goes.
    """

    name = "LFU"
    decay = 0.5 ** (1 / HALF_LIFE)

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, geometry.slots, seed)
        self._argmin = [values.argmin for values in self._values.reshape(geometry.nblocks, geometry.nways)]
        self._key_of = [0] * geometry.slots

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        value, worth, base, standing = self._value, self._worth, layer * self._experts, self._standing
        for expert in experts:
            value[base + expert] += worth
        for slot in slots:
            standing[slot] += worth

    def on_fill(self, slot: int, key: int) -> None:
        self._key_of[slot] = key
        self._standing[slot] = self._value[key]

    def on_evict(self, slot: int, key: int) -> None:
        self._standing[slot] = NOBODY

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        standing, value, key_of = self._standing, self._value, self._key_of
        least = self._least(index)
        fresh = standing[least] == value[key_of[least]] and least not in blocked
        slot = least if fresh else self._search(index, blocked)
        if slot is not None:
            key_of[slot], standing[slot] = key, value[key]
        return slot

    def _least(self, index: int) -> int:
        return index * self.nways + int(self._argmin[index]())

    def _resident(self, place: int) -> tuple[int, int]:
        return place, self._key_of[place]
