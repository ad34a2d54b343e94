"""Least frequently used, with ageing."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.decayed import EMPTY_VALUE, DecayedPolicy

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
        value, unit, base, values = self._value, self._unit, layer * self._experts, self._values_by_place
        for expert in experts:
            value[base + expert] += unit
        for slot in slots:
            values[slot] += unit

    def on_fill(self, slot: int, key: int) -> None:
        self._key_of[slot] = key
        self._values_by_place[slot] = self._value[key]

    def on_evict(self, slot: int, key: int) -> None:
        self._values_by_place[slot] = EMPTY_VALUE

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        values, value, key_of = self._values_by_place, self._value, self._key_of
        smallest = self._find_min(index)
        fresh = values[smallest] == value[key_of[smallest]] and smallest not in blocked
        slot = smallest if fresh else self._search(index, blocked)
        if slot is not None:
            key_of[slot], values[slot] = key, value[key]
        return slot

    def _find_min(self, index: int) -> int:
        return index * self.nways + int(self._argmin[index]())

    def _resident(self, place: int) -> tuple[int, int]:
        return place, self._key_of[place]
