"""Least-stale: what its layer has just left unused goes first, what a layer is about to ask for goes last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy


class LeastStale(Policy):
    """After the idea of Hoang et al., SpecMD, 2026: evict by layer position and staleness. The exact order is ours.

    First the stale: experts of layers that this step has reached, not called in it; those unused for the most steps, of equal ones
    those of the latest layer. Then what this step has called, from the latest layer back: it is needed again after nearly a whole step.
    Last the experts of layers to come, the furthest layer first.
    """

    name = "least-stale"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._step = 0
        self._layer = 0
        self._used = [0] * geometry.slots  # step of the last call or fill
        self._layer_of = [0] * geometry.slots
        # of each index, by layer, slots in the order of use, oldest first
        self._order: list[dict[int, OrderedDict[int, None]]] = [{} for _ in range(geometry.nblocks)]

    def on_step(self, step: int) -> None:
        self._step += 1

    def on_call(self, layer: int, keys: Sequence[int], scores: Sequence[float] | None) -> None:
        self._layer = layer

    def on_hit(self, slot: int, key: int) -> None:
        self._used[slot] = self._step
        self._order[slot // self.nways][self._layer_of[slot]].move_to_end(slot)

    def on_fill(self, slot: int, key: int) -> None:
        layer = key // self.geometry.experts
        self._used[slot] = self._step
        self._layer_of[slot] = layer
        self._order[slot // self.nways].setdefault(layer, OrderedDict())[slot] = None

    def on_evict(self, slot: int, key: int) -> None:
        del self._order[slot // self.nways][self._layer_of[slot]][slot]

    def victim(self, index: int, blocked: Collection[int]) -> int | None:
        """The smallest (class, order in the class) among the oldest of each layer."""
        best, found = (3, 0, 0), None
        for layer, slots in self._order[index].items():
            slot = _first(slots, blocked)
            if slot is not None and (rank := self._rank(layer, self._used[slot])) < best:
                best, found = rank, slot
        return found

    def _rank(self, layer: int, used: int) -> tuple[int, int, int]:
        if layer > self._layer:
            return 2, -layer, 0
        return (0, used, -layer) if used < self._step else (1, -layer, 0)


def _first(slots: Iterable[int], blocked: Collection[int]) -> int | None:
    return next((slot for slot in slots if slot not in blocked), None)
