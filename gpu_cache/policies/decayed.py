"""Base of policies that value an expert by its calls, where older calls count less."""

from __future__ import annotations

from array import array
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy

EMPTY_VALUE = float("inf")  # the value in a place that holds no expert
_RESCALE_AT = 2.0**512


class DecayedPolicy(Policy):
    """Keeps a value of every expert, resident or not, which every step multiplies by `decay`.

    Instead of decaying all values, new contributions grow: `_unit` is the current weight of 1. Values of evictable
    experts are duplicated in `_values_by_place`, where numpy finds the minimum of an index.
    """

    decay = 1.0

    def __init__(self, geometry: Geometry, places: int, seed: int = 0) -> None:
        """places: length of `_values_by_place`."""
        super().__init__(geometry, seed)
        self._experts = geometry.experts
        self._value = [0.0] * (geometry.layers * geometry.experts)
        self._unit = 1.0
        self._growth = 1.0 / self.decay
        self._values_by_place = array("d", [EMPTY_VALUE]) * places  # faster than numpy for single values
        self._values: NDArray[np.float64] = np.frombuffer(self._values_by_place)

    def on_step(self, step: int) -> None:
        self._unit *= self._growth
        if self._unit > _RESCALE_AT:
            self._value = [value / self._unit for value in self._value]
            self._values /= self._unit
            self._unit = 1.0

    def _search(self, index: int, blocked: Collection[int]) -> int | None:
        """The slot with the smallest value that may be evicted. Needed if the minimum is blocked, or its value in
        `_values_by_place` is out of date because it was called while loading.
        """
        values, passed, found = self._values_by_place, [], None
        while found is None:
            place = self._find_min(index)
            if values[place] == EMPTY_VALUE:  # all were passed over
                break
            slot, key = self._resident(place)
            if slot in blocked:
                passed.append(place)
                values[place] = EMPTY_VALUE
            elif values[place] != self._value[key]:
                values[place] = self._value[key]
            else:
                found = slot
        for place in passed:
            values[place] = self._value[self._resident(place)[1]]
        return found

    def _find_min(self, index: int) -> int:
        """The place in `_values_by_place` of the smallest value of an index."""
        raise NotImplementedError

    def _resident(self, place: int) -> tuple[int, int]:
        """The slot and the key of the expert whose value is at this place."""
        raise NotImplementedError
