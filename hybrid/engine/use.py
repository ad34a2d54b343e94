"""How many rows each expert has computed since the engine was opened."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class ExpertUse:
    """counts: int64 [MoE layers, experts]. Another thread may read it while it grows: each number is old or new."""

    def __init__(self, offsets: npt.NDArray[np.int32]) -> None:
        """offsets: int32 [MoE layers, experts + 1] that every step writes anew."""
        self._starts, self._ends = offsets[:, :-1], offsets[:, 1:]
        self._rows = np.zeros_like(self._starts)
        self.counts = np.zeros(self._starts.shape, np.int64)

    def add(self) -> None:
        """Count the step that has just ended."""
        np.subtract(self._ends, self._starts, out=self._rows)
        self.counts += self._rows
