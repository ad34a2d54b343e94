"""What an expert cache did in the steps that decoded."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np
import numpy.typing as npt

from gpu_cache.geometry import Geometry
from hybrid.engine.experts.verdict import Observed, most_asked

COUNTS = ("calls", "hits", "loading", "misses", "evictions")  # of `StepResult.cache`


class DecodeHistory:
    """What the cache did in the steps that decoded: the ground of the verdict."""

    def __init__(self, geometry: Geometry) -> None:
        self._asked = [[0] * geometry.experts for _ in range(geometry.layers)]  # in how many steps each was called
        self.steps = 0
        self._geometry = geometry
        self._counts = np.zeros((geometry.layers, len(COUNTS) + 1), np.int64)
        self._bookkeeping: list[float] = []

    def ask(self, layer: int, experts: Sequence[int]) -> None:
        asked = self._asked[layer]
        for expert in experts:
            asked[expert] += 1

    def add(self, counts: npt.NDArray[np.int64], bookkeeping: float) -> None:
        self.steps += 1
        self._counts += counts
        self._bookkeeping.append(bookkeeping)

    def most_asked(self) -> list[int]:
        return most_asked(np.array(self._asked).reshape(-1), self._geometry.indexes(), self._geometry.nways)

    def observed(self) -> Observed:
        asked = np.array(self._asked)
        kept = np.zeros(asked.size, np.int64)
        kept[self.most_asked()] = 1
        static = (asked * kept.reshape(asked.shape)).sum(axis=1)
        calls, hits, *_, fills = self._counts.T / self.steps
        return Observed(self.steps, calls, hits, float(fills.sum()), static / self.steps, median(self._bookkeeping))
