"""Base of policies that value an expert by its calls, where older calls count less."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy

_RESCALE_AT = 2.0**512


class DecayedPolicy(Policy, ABC):
    """Keeps a value of every expert, resident or not: a call adds one, and every step multiplies it by `decay`.

    Instead of decaying all values, new contributions grow: `_unit` is the current weight of 1. So a value never falls
    but when all are divided by the same number.
    """

    decay = 1.0

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._experts = geometry.experts
        self._value = [0.0] * (geometry.layers * geometry.experts)
        self._unit = 1.0
        self._growth = 1.0 / self.decay

    def on_step(self, step: int) -> None:
        self._unit *= self._growth
        if self._unit > _RESCALE_AT:
            self._value = [value / self._unit for value in self._value]
            self._rescale(self._unit)
            self._unit = 1.0

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        value, unit, base = self._value, self._unit, layer * self._experts
        for expert in experts:
            value[base + expert] += unit

    @abstractmethod
    def _rescale(self, unit: float) -> None:
        """Divide copies of the values, as all values have been."""
