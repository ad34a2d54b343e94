"""Least-stale: by layer, evict what has gone unused for most of the layer's visits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

import numpy as np

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy

_NOBODY = 1 << 62  # the use of nobody


class LeastStale(Policy):
    """After the idea of Hoang et al., SpecMD, 2026 (arXiv 2602.03921): evict by layer position and staleness.

    The exact order is ours. An expert is as stale as its layer was looked up often since it was called. The stalest
    goes; of equal ones the one whose layer is furthest from its next lookup, then the one called longest ago. In an
    index of one layer this is LRU.
    """

    name = "least-stale"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._step = 0
        self._layer = 0
        # Stale * layers + distance to the layer's next lookup, less what all experts have in common, is minus `_use`,
        # step * layers - layer of the last call, and 2 * layers more where this step has reached the layer.
        self._use = [0] * geometry.slots
        # of each index, for each of its layers: slots in the order of use, and a use that none of them is older than
        layers = np.cumsum(geometry.spread() > 0, axis=1)
        self._reached: list[list[int]] = layers.tolist()  # by layer: how many of the layers of the index have come
        self._order = [[OrderedDict[int, None]() for _ in range(number)] for number in layers[:, -1].tolist()]
        self._oldest = [[_NOBODY] * number for number in layers[:, -1].tolist()]
        self._slots = [OrderedDict[int, None]()] * geometry.slots  # that of `_order` which has the slot

    def on_step(self, step: int) -> None:
        self._step += self.geometry.layers

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        self._layer = layer
        use, order, now = self._use, self._slots, self._step - layer
        for slot in slots:
            use[slot] = now
            order[slot].move_to_end(slot)

    def on_fill(self, slot: int, key: int) -> None:
        self._enter(slot, slot // self.nways, key)

    def on_evict(self, slot: int, key: int) -> None:
        del self._slots[slot][slot]

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        order, oldest, use = self._order[index], self._oldest[index], self._use
        found, passed = None, []  # passed: layers whose oldest expert is blocked
        while found is None:
            place = self._stalest(index)
            if oldest[place] == _NOBODY:
                break
            first = next(iter(order[place]), None)
            slot = first if first not in blocked else next((s for s in order[place] if s not in blocked), None)
            if slot is None or use[slot] != oldest[place]:
                oldest[place] = _NOBODY if slot is None else use[slot]
                passed.append(place)
            else:
                found = slot
                del order[place][slot]
                self._look_for_oldest(index, place)
        for place in passed:
            self._look_for_oldest(index, place)
        if found is not None:
            self._enter(found, index, key)
        return found

    def _look_for_oldest(self, index: int, place: int) -> None:
        slots = self._order[index][place]
        self._oldest[index][place] = self._use[next(iter(slots))] if slots else _NOBODY

    def _stalest(self, index: int) -> int:
        """The place of the layer whose oldest expert is the stalest, as far as `_oldest` knows."""
        oldest, reached = self._oldest[index], self._reached[index][self._layer]
        if len(oldest) == 1:
            return 0
        if reached == len(oldest):
            return oldest.index(min(oldest))
        least, other = min(oldest[:reached], default=_NOBODY), min(oldest[reached:])
        return oldest.index(least if least - 2 * self.geometry.layers < other else other)

    def _enter(self, slot: int, index: int, key: int) -> None:
        layer = key // self.geometry.experts
        place = self._reached[index][layer] - 1
        self._use[slot] = self._step - layer
        slots = self._slots[slot] = self._order[index][place]
        slots[slot] = None
        if self._oldest[index][place] > self._use[slot]:
            self._oldest[index][place] = self._use[slot]
