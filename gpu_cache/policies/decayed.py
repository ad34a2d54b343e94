"""What policies share that value an expert by its calls, the older the less."""

from __future__ import annotations

from array import array
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy

NOBODY = float("inf")  # the value in a place that holds no expert
_RESCALE_AT = 2.0**512


class DecayedPolicy(Policy):
    """Keeps a value of every expert, resident or not, which every step multiplies by `decay`.

    Instead of all values shrinking, what is added to one grows: `_worth` is what 1 is worth now. The values of those
    that may be evicted are kept a second time, side by side in `_standing`, where numpy finds the least of an index.
    """

    decay = 1.0

    def __init__(self, geometry: Geometry, places: int, seed: int = 0) -> None:
        """places: of `_standing`."""
        super().__init__(geometry, seed)
        self._experts = geometry.experts
        self._value = [0.0] * (geometry.layers * geometry.experts)
        self._worth = 1.0
        self._growth = 1.0 / self.decay
        self._standing = array("d", [NOBODY]) * places  # which reads and writes one value faster than numpy
        self._values: NDArray[np.float64] = np.frombuffer(self._standing)

    def on_step(self, step: int) -> None:
        self._worth *= self._growth
        if self._worth > _RESCALE_AT:
            self._value = [value / self._worth for value in self._value]
            self._values /= self._worth
            self._worth = 1.0

    def _search(self, index: int, blocked: Collection[int]) -> int | None:
        """The slot of the least of those that may go, where the least of all may not or was called while loading."""
        standing, passed, found = self._standing, [], None
        while found is None:
            place = self._least(index)
            if standing[place] == NOBODY:  # all were passed over
                break
            slot, key = self._resident(place)
            if slot in blocked:
                passed.append(place)
                standing[place] = NOBODY
            elif standing[place] != self._value[key]:
                standing[place] = self._value[key]
            else:
                found = slot
        for place in passed:
            standing[place] = self._value[self._resident(place)[1]]
        return found

    def _least(self, index: int) -> int:
        """The place in `_standing` of the least value of an index."""
        raise NotImplementedError

    def _resident(self, place: int) -> tuple[int, int]:
        """The slot and the key of the expert whose value stands there."""
        raise NotImplementedError
