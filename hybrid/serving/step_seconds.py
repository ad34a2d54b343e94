"""How long steps take by their number of rows and by what these attend to, learnt while they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import sqrt

_FAR = 2.0  # how much slower than expected a step may count: beyond that something else ran, or it is seen again
_LEAST = 0.25  # of what steps of a size took: no less is expected of one that attends to less
_SLOPE_MEMORY = 0.998  # what older steps weigh beside the newest in what attention costs, which does not change
_CERTAIN = 2.0  # standard errors by which that cost is taken to be lower than it was measured


class StepSeconds:
    """Seconds of a step by its number of rows and its pairs: of a row and a token that it attends to.

    For a number of rows they are what was measured lately, and between measurements grow as `work` does. How much
    longer a step takes with more pairs is told by steps of one size that had more or fewer of them than others.
    """

    def __init__(self, work: Callable[[int], float], memory: float = 0.8) -> None:
        """work: what a step of so many rows has to do, in any unit. memory: what older steps weigh beside the new."""
        self._work, self._memory = cache(work), memory
        self._sizes: dict[int, _Mean] = {}  # by `_size`
        self._slope = _Slope()

    @property
    def known(self) -> bool:
        """Whether any step was measured."""
        return bool(self._sizes)

    def tell(self, rows: int, seconds: float, pairs: float = 0.0) -> None:
        """A step of so many rows took so long."""
        work = self._work(rows)
        mean = self._sizes.setdefault(_size(rows), _Mean(seconds / work, pairs / work))
        rate = min(seconds, _FAR * self._of(mean, rows, pairs)) / work
        self._slope.add(pairs / work - mean.pairs, rate - mean.rate)
        mean.rate += (rate - mean.rate) * (1 - self._memory)
        mean.pairs += (pairs / work - mean.pairs) * (1 - self._memory)

    def expected(self, rows: int, pairs: float = 0.0) -> float:
        """Of a step that may not have been measured; another one must have been."""
        nearest = min(self._sizes, key=lambda known: abs(known - _size(rows)))
        return self._of(self._sizes[nearest], rows, pairs)

    def _of(self, mean: _Mean, rows: int, pairs: float) -> float:
        work = self._work(rows)
        more = self._slope.value * (pairs / work - mean.pairs)
        return work * max(mean.rate + more, _LEAST * mean.rate)


@dataclass
class _Mean:
    """Of steps of one size: seconds and pairs for a unit of work."""

    rate: float
    pairs: float


class _Slope:
    """How seconds grow with pairs, at least: a regression of what steps of all sizes differ by from their means.

    Noise alone makes it 0, for what steps do not tell apart is not to be extrapolated to sequences of another length.
    """

    def __init__(self) -> None:
        self.value = 0.0
        self._count = self._squares = self._products = self._deviations = 0.0

    def add(self, pairs: float, seconds: float) -> None:
        """A step differed by this from the mean of its size."""
        self._count = self._count * _SLOPE_MEMORY + 1
        self._squares = self._squares * _SLOPE_MEMORY + pairs * pairs
        self._products = self._products * _SLOPE_MEMORY + pairs * seconds
        self._deviations = self._deviations * _SLOPE_MEMORY + seconds * seconds
        if not self._squares:
            return
        slope = self._products / self._squares
        unexplained = max(0.0, self._deviations - slope * self._products) / self._count
        self.value = max(0.0, slope - _CERTAIN * sqrt(unexplained / self._squares))


def _size(rows: int) -> int:
    """Of a step: the rows of one request with each of `speculation.COUNTS` guesses are of sizes of their own."""
    return (rows - 1).bit_length()
