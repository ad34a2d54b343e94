"""Minus recent score: the average of the gate's scores, recent ones first."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from gpu_cache.geometry import NOWHERE, Geometry
from gpu_cache.policies.decayed import DecayedPolicy

ALPHA = 0.5
EMPTY_VALUE = float("inf")  # the value in a place that holds no expert


class Mrs(DecayedPolicy):
    """Zhong et al., HybriMoE, DAC 2025 (arXiv 2504.05897): evicts the smallest S.

    S = ALPHA * score + (1 - ALPHA) * S in each step; a layer's turn comes when it is looked up. Here the score of an
    expert that is not called counts as 0; HybriMoE also counts some scores just below the top-k. Where scores are
    unknown, all that are called share 1. Of equal ones the lowest key goes.
    """

    name = "MRS"
    decay = 1 - ALPHA

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        # The experts of an index have their places side by side, in the order of their keys, so layer after layer.
        index_of = geometry.indexes()
        key_at = np.argsort(index_of, kind="stable")
        super().__init__(geometry, seed)
        # values of evictable experts, where numpy finds the minimum of an index
        self._values_by_place = array("d", [EMPTY_VALUE]) * len(key_at)  # faster than numpy for single values
        self._values: NDArray[np.float64] = np.frombuffer(self._values_by_place)
        self._layer = 0
        self._slot_of = [0] * len(key_at)
        self._key_of = [0] * geometry.slots
        self._key_at = key_at.tolist()
        self._place_of = np.argsort(key_at).tolist()
        spread = geometry.spread()
        first = np.cumsum(spread.sum(axis=1)) - spread.sum(axis=1) + np.count_nonzero(index_of == NOWHERE)
        # of each index, the place where it begins and those where its layers end
        self._ends: list[list[int]] = np.column_stack([first, first[:, None] + np.cumsum(spread, axis=1)]).tolist()

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        self._layer = layer
        value, unit, base = self._value, ALPHA * self._unit, layer * self._experts
        for expert, score in zip(experts, scores or [1 / len(experts)] * len(experts), strict=True):
            value[base + expert] += unit * score
        values, place_of, key_of = self._values_by_place, self._place_of, self._key_of
        for slot in slots:
            key = key_of[slot]
            values[place_of[key]] = value[key]

    def on_fill(self, slot: int, key: int) -> None:
        self._key_of[slot], self._slot_of[key] = key, slot
        self._values_by_place[self._place_of[key]] = self._value[key]

    def on_evict(self, slot: int, key: int) -> None:
        self._values_by_place[self._place_of[key]] = EMPTY_VALUE

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        place = self._find_min(index)
        old = self._key_at[place]
        smallest = self._slot_of[old]
        fresh = self._values_by_place[place] == self._value[old] and smallest not in blocked
        slot = smallest if fresh else self._search(index, blocked)
        if slot is not None:
            self._values_by_place[self._place_of[self._key_of[slot]]] = EMPTY_VALUE
            self.on_fill(slot, key)
        return slot

    def _search(self, index: int, blocked: Collection[int]) -> int | None:
        """The slot with the smallest value that may be evicted. Needed if the minimum is blocked, or its value in
        `_values_by_place` is out of date because it was called while loading.
        """
        values, passed, found = self._values_by_place, [], None
        while found is None:
            place = self._find_min(index)
            if values[place] == EMPTY_VALUE:  # all were passed over
                break
            key = self._key_at[place]
            slot = self._slot_of[key]
            if slot in blocked:
                passed.append(place)
                values[place] = EMPTY_VALUE
            elif values[place] != self._value[key]:
                values[place] = self._value[key]
            else:
                found = slot
        for place in passed:
            values[place] = self._value[self._key_at[place]]
        return found

    def _find_min(self, index: int) -> int:
        """The place of the smallest value. Layers that this step has not looked up yet have not decayed in it yet."""
        ends, values = self._ends[index], self._values_by_place
        first, turn, last = ends[0], ends[self._layer + 1], ends[-1]
        if turn == last:
            return first + int(self._values[first:last].argmin())
        other = turn + int(self._values[turn:last].argmin())
        if first < turn:
            found = first + int(self._values[first:turn].argmin())
            if values[other] / self.decay >= values[found]:
                return found
        return other

    def _rescale(self, unit: float) -> None:
        self._values /= unit
