"""Half of the slots for what is called most, the other half for what was called last."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.decayed import DecayedPolicy
from gpu_cache.policies.lru import Lru

HALF_LIFE = 256  # steps


class HotHalf(Lru, DecayedPolicy):
    """LRU that never evicts the hotter half of an index: its experts with the most calls.

    Systems that pin hot experts (leloch's and neurall's forks of llama.cpp, 2026) copy them to the device beforehand,
    from a profile. Here whatever is pinned came by a miss, so that pinning costs no copy, and it is chosen anew in
    every step that evicts. A call counts half after `HALF_LIFE` steps, those before the fill included.
    """

    name = "hot-half"
    decay = 0.5 ** (1 / HALF_LIFE)

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._step = 0
        self._key_of = [0] * geometry.slots
        self._pinned: list[set[int]] = [set()] * geometry.nblocks
        self._pinned_in = [-1] * geometry.nblocks  # step

    def on_step(self, step: int) -> None:
        super().on_step(step)
        self._step += 1

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        Lru.on_lookup(self, layer, experts, scores, slots)
        DecayedPolicy.on_lookup(self, layer, experts, scores, slots)

    def on_fill(self, slot: int, key: int) -> None:
        super().on_fill(slot, key)
        self._key_of[slot] = key

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        if self._pinned_in[index] != self._step:
            self._pinned_in[index] = self._step
            self._pinned[index] = self._hottest(self._order[index])
        pinned = self._pinned[index]
        order = self._order[index]
        for slot in order:
            if slot not in pinned and slot not in blocked:
                order.move_to_end(slot)
                self._key_of[slot] = key
                return slot
        slot_or_none = super().replace(index, key, blocked)
        if slot_or_none is not None:
            self._key_of[slot_or_none] = key
        return slot_or_none

    def _hottest(self, order: Collection[int]) -> set[int]:
        """The half with the most calls; of equal ones those that were called last."""
        slots = list(order)
        calls = list(map(self._value.__getitem__, map(self._key_of.__getitem__, slots)))
        places = sorted(range(len(slots)), key=calls.__getitem__)
        return set(map(slots.__getitem__, places[len(places) - self.nways // 2 :]))

    def _rescale(self, unit: float) -> None:
        """Nothing is copied of the values."""
