"""What an expert cache did in decode steps."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np
import numpy.typing as npt

from gpu_cache.geometry import Geometry
from hybrid.engine.experts.verdict import Observed, most_called

COUNTS = ("calls", "hits", "loading", "misses", "evictions")  # of `StepResult.cache`


class DecodeHistory:
    """What the cache did in decode steps: input of the verdict."""

    def __init__(self, geometry: Geometry) -> None:
        self._calls = [[0] * geometry.experts for _ in range(geometry.layers)]  # steps that called it
        self.steps = 0
        self._geometry = geometry
        self._counts = np.zeros((geometry.layers, len(COUNTS) + 1), np.int64)
        self._bookkeeping: list[float] = []

    def count_calls(self, layer: int, experts: Sequence[int]) -> None:
        calls = self._calls[layer]
        for expert in experts:
            calls[expert] += 1

    @property
    def calls(self) -> npt.NDArray[np.int64]:
        """[layers, experts]: steps that called an expert."""
        return np.array(self._calls, np.int64)

    def add(self, counts: npt.NDArray[np.int64], bookkeeping: float) -> None:
        self.steps += 1
        self._counts += counts
        self._bookkeeping.append(bookkeeping)

    def most_called(self) -> list[int]:
        return most_called(self.calls.reshape(-1), self._geometry.indexes(), self._geometry.nways)

    def observed(self) -> Observed:
        counts = self.calls
        kept = np.zeros(counts.size, np.int64)
        kept[self.most_called()] = 1
        static = (counts * kept.reshape(counts.shape)).sum(axis=1)
        calls, hits, *_, fills = self._counts.T / self.steps
        return Observed(self.steps, calls, hits, float(fills.sum()), static / self.steps, median(self._bookkeeping))
