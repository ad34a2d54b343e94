"""Minus recent score: the average of the gate's scores, recent ones first."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from gpu_cache.geometry import NOWHERE, Geometry
from gpu_cache.policies.decayed import NOBODY, DecayedPolicy

ALPHA = 0.5


class Mrs(DecayedPolicy):
    """Zhong et al., HybriMoE, DAC 2025 (arXiv 2504.05897): the least S goes.

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
        super().__init__(geometry, len(key_at), seed)
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
        value, worth, base = self._value, ALPHA * self._worth, layer * self._experts
        for expert, score in zip(experts, scores or [1 / len(experts)] * len(experts), strict=True):
            value[base + expert] += worth * score
        standing, place_of, key_of = self._standing, self._place_of, self._key_of
        for slot in slots:
            key = key_of[slot]
            standing[place_of[key]] = value[key]

    def on_fill(self, slot: int, key: int) -> None:
        self._key_of[slot], self._slot_of[key] = key, slot
        self._standing[self._place_of[key]] = self._value[key]

    def on_evict(self, slot: int, key: int) -> None:
        self._standing[self._place_of[key]] = NOBODY

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        place = self._least(index)
        old = self._key_at[place]
        least = self._slot_of[old]
        fresh = self._standing[place] == self._value[old] and least not in blocked
        slot = least if fresh else self._search(index, blocked)
        if slot is not None:
            self._standing[self._place_of[self._key_of[slot]]] = NOBODY
            self.on_fill(slot, key)
        return slot

    def _least(self, index: int) -> int:
        """The place of the least value. Layers whose turn in this step has not come have not decayed in it yet."""
        ends, standing = self._ends[index], self._standing
        first, turn, last = ends[0], ends[self._layer + 1], ends[-1]
        if turn == last:
            return first + int(self._values[first:last].argmin())
        other = turn + int(self._values[turn:last].argmin())
        if first < turn:
            found = first + int(self._values[first:turn].argmin())
            if standing[other] / self.decay >= standing[found]:
                return found
        return other

    def _resident(self, place: int) -> tuple[int, int]:
        key = self._key_at[place]
        return self._slot_of[key], key
