"""How long steps take by their number of rows, learnt while they run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

_FAR = 2.0  # how much slower than before a step may count: beyond that something else ran, or it is seen again


class StepSeconds:
    """Seconds of a step by its number of rows: what was measured, and between measurements as `work` grows."""

    def __init__(self, work: Callable[[int], float], memory: float = 0.8) -> None:
        """work: what a step of so many rows has to do, in any unit. memory: what older steps weigh beside the new."""
        self._work, self._memory = cache(work), memory
        self._rates: dict[int, float] = {}  # seconds a unit of work, by `_size`

    @property
    def known(self) -> bool:
        """Whether any step was measured."""
        return bool(self._rates)

    def tell(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        rate, size = seconds / self._work(rows), _size(rows)
        before = self._rates.get(size, rate)
        self._rates[size] = before + (min(rate, _FAR * before) - before) * (1 - self._memory)

    def expected(self, rows: int) -> float:
        """Of a step that may not have been measured; another one must have been."""
        nearest = min(self._rates, key=lambda known: abs(known - _size(rows)))
        return self._work(rows) * self._rates[nearest]


def _size(rows: int) -> int:
    """Of a step: the rows of one request with each of `speculation.COUNTS` guesses are of sizes of their own."""
    return (rows - 1).bit_length()
