"""Least-stale: by layer, evict what has gone unused for most of the layer's visits."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.fifo import Fifo


class LeastStale(Fifo):
    """After the idea of Hoang et al., SpecMD, 2026 (arXiv 2602.03921): evict by layer position and staleness.

    The exact order is ours. An expert is as stale as its layer was looked up often since it was called. The stalest
    goes; of equal ones the one whose layer is furthest from its next lookup, then the one called longest ago. In an
    index of one layer this is LRU.

    With time as step * layers + layer, a round ends at each of now, now - layers, now - 2 * layers, ... What was called
    in the same round is equally stale; the later in it, the further is the next lookup. So of the slots in the order of
    their calls the victim is among the first, those of the oldest round: the first of the latest time.
    """

    name = "least-stale"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._layers, self._experts = geometry.layers, geometry.experts
        self._step = 0  # when it began
        self._now = 0
        self._last = [0] * geometry.slots  # time of the last call, or the fill, of what is in each slot

    def on_step(self, step: int) -> None:
        if not self._step:  # what came before the first step came in any order
            for order in self._order:
                for slot in sorted(order, key=self._last.__getitem__):
                    order.move_to_end(slot)
        self._step += self._layers

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        last, order, nways, now = self._last, self._order, self.nways, self._step + layer
        self._now = now
        for slot in slots:
            last[slot] = now
            order[slot // nways].move_to_end(slot)

    def on_fill(self, slot: int, key: int) -> None:
        super().on_fill(slot, key)
        self._last[slot] = self._step + key // self._experts

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        order, last, now = self._order[index], self._last, self._now
        found, time, end = None, -1, now  # end: of the oldest round
        for slot in order:
            called = last[slot]
            if called > end and found is not None:
                break
            if called != time and slot not in blocked:
                if found is None:
                    end = now - (now - called) // self._layers * self._layers
                found, time = slot, called
        if found is not None:
            order.move_to_end(found)
            last[found] = self._step + key // self._experts
        return found
