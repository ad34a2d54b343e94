"""Least-stale: what its layer has left unused most often goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy


class LeastStale(Policy):
    """After the idea of Hoang et al., SpecMD, 2026: evict by layer position and staleness. The exact order is ours.

    An expert is as stale as its layer was looked up often since it was called. The stalest goes; of equal ones the one
    whose layer is furthest from its next lookup, then the one called longest ago. In an index of one layer this is LRU.
    """

    name = "least-stale"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._step = 0
        self._layer = 0
        # Stale * layers + distance to the layer's next lookup, less what all experts have in common, is minus `_use`,
        # step * layers - layer of the last call, and 2 * layers more where this step has reached the layer.
        self._use = [0] * geometry.slots
        # of each index, by layer, slots in the order of use, oldest first
        self._order: list[dict[int, OrderedDict[int, None]]] = [{} for _ in range(geometry.nblocks)]

    def on_step(self, step: int) -> None:
        self._step += self.geometry.layers

    def on_call(self, layer: int, keys: Sequence[int], scores: Sequence[float] | None) -> None:
        self._layer = layer

    def on_hit(self, slot: int, key: int) -> None:
        self._use[slot] = self._step - self._layer
        self._order[slot // self.nways][self._layer].move_to_end(slot)

    def on_fill(self, slot: int, key: int) -> None:
        layer = key // self.geometry.experts
        self._use[slot] = self._step - layer
        self._order[slot // self.nways].setdefault(layer, OrderedDict())[slot] = None

    def on_evict(self, slot: int, key: int) -> None:
        del self._order[slot // self.nways][key // self.geometry.experts][slot]

    def victim(self, index: int, blocked: Collection[int]) -> int | None:
        least, found, use, reached = 0, None, self._use, 2 * self.geometry.layers
        for layer, slots in self._order[index].items():
            for slot in slots:
                if slot not in blocked:
                    rank = use[slot] - reached if layer <= self._layer else use[slot]
                    if found is None or rank < least:
                        least, found = rank, slot
                    break
        return found
