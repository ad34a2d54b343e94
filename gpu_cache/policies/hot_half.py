"""Half of the slots for what is called most, the other half for what was called last."""

from __future__ import annotations

from array import array
from collections.abc import Collection, MutableSequence, Sequence

import numpy as np

from gpu_cache.geometry import Geometry
from gpu_cache.policies.decayed import DecayedPolicy

HALF_LIFE = 256  # steps
_SORTED = 128  # ways up to which Python sorts an index faster than numpy parts it


class _Cold:
    """Slots of an index that are not pinned in this step. slots: those called longest ago first, at the time `since`;
    the first `passed` of them were called or filled since then.
    """

    __slots__ = ("passed", "since", "slots", "step")

    def __init__(self) -> None:
        self.step, self.since, self.passed = -1, 0, 0
        self.slots: list[int] = []


class HotHalf(DecayedPolicy):
    """LRU that never evicts the hotter half of an index: its experts with the most calls.

    Systems that pin hot experts (leloch's and neurall's forks of llama.cpp, 2026) copy them to the device beforehand,
    from a profile. Here whatever is pinned came by a miss, so that pinning costs no copy, and it is chosen anew in
    every step that evicts. A call counts half after `HALF_LIFE` steps, those before the fill included.
    """

    name = "hot-half"
    decay = 0.5 ** (1 / HALF_LIFE)

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._step = self._now = 0
        self._key_of = [0] * geometry.slots
        # of each key its slot, the one behind the last if it has none
        self._slot_of = [geometry.slots] * (geometry.layers * geometry.experts)
        # of each slot, and of that one, the value of its expert and the time of its last call or fill
        self._heat: MutableSequence[float] = [0.0] * (geometry.slots + 1)
        self._last: MutableSequence[int] = [0] * geometry.slots
        if self.nways > _SORTED:
            self._heat, self._last = array("d", self._heat), array("q", self._last)
        self._cold = [_Cold() for _ in range(geometry.nblocks)]
        self._nowhere = geometry.slots

    def on_step(self, step: int) -> None:
        super().on_step(step)
        self._step += 1

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        last, now = self._last, self._now
        for slot in slots:
            now += 1
            last[slot] = now
        self._now = now
        value, heat, slot_of, unit, base = self._value, self._heat, self._slot_of, self._unit, layer * self._experts
        for expert in experts:
            key = base + expert
            heat[slot_of[key]] = value[key] = value[key] + unit

    def on_fill(self, slot: int, key: int) -> None:
        now = self._now = self._now + 1
        self._key_of[slot], self._slot_of[key], self._heat[slot], self._last[slot] = key, slot, self._value[key], now

    def on_evict(self, slot: int, key: int) -> None:
        self._slot_of[key] = self._nowhere

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        cold, last = self._cold[index], self._last
        if cold.step != self._step:
            cold.step, cold.since, cold.passed = self._step, self._now, 0
            cold.slots = self._coldest(index)
        slots, since, at = cold.slots, cold.since, cold.passed
        while at < len(slots) and last[slots[at]] > since:
            at += 1
        cold.passed = at
        while at < len(slots) and ((slot := slots[at]) in blocked or last[slot] > since):
            at += 1
        if at == len(slots):
            found = self._newer(index, blocked)
            if found is None:
                return None
            slot = found
        self._slot_of[self._key_of[slot]] = self._nowhere
        self.on_fill(slot, key)
        return slot

    def _newer(self, index: int, blocked: Collection[int]) -> int | None:
        """A slot where all that are not pinned are blocked, or were called or filled in this step."""
        cold, called = self._cold[index], self._last.__getitem__
        cold.slots.sort(key=called)
        cold.since, cold.passed = self._now, 0
        for slot in cold.slots:
            if slot not in blocked:
                return slot
        others = [slot for slot in self._slots(index) if slot not in blocked]
        return min(others, key=called) if others else None

    def _slots(self, index: int) -> range:
        return range(index * self.nways, (index + 1) * self.nways)

    def _coldest(self, index: int) -> list[int]:
        """All but the half with the most calls, of equal ones those that were called first."""
        slots, count = self._slots(index), self.nways - self.nways // 2
        if self.nways > _SORTED:
            return self._parted(slots, count)
        heat, called = self._heat, self._last.__getitem__
        values = sorted(heat[slots.start : slots.stop])
        limit = values[count - 1]
        cold = [slot for slot in slots if heat[slot] <= limit]
        cold.sort(key=called)
        if len(cold) > count:  # of those that have the limit some are pinned
            cold.sort(key=heat.__getitem__)
            del cold[count:]
            cold.sort(key=called)
        return cold

    def _parted(self, slots: range, count: int) -> list[int]:
        heat = np.asarray(self._heat[slots.start : slots.stop])
        last = np.asarray(self._last[slots.start : slots.stop])
        limit = np.partition(heat, count - 1)[count - 1]
        colder, equal = np.flatnonzero(heat < limit), np.flatnonzero(heat == limit)
        cold = np.concatenate([colder, equal[np.argsort(last[equal])][: count - len(colder)]])
        found: list[int] = (cold[np.argsort(last[cold])] + slots.start).tolist()
        return found

    def _rescale(self, unit: float) -> None:
        for slot, heat in enumerate(self._heat):
            self._heat[slot] = heat / unit
