"""How sure a hit rate is: 95 % confidence intervals from the blocks of a trace, which are resampled.

Calls of one token depend on those of the token before, so not calls are drawn anew but blocks: sequences, or where a
trace has few of them runs of steps. The interval is a block bootstrap of hits over calls, corrected for bias and skew
(BCa: Efron, Better bootstrap confidence intervals, 1987) and widened for few blocks (Hesterberg, What teachers should
know about the bootstrap, 2015).
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from gpu_cache.trace import Calls, Ints

MIN_SEQUENCES = 12  # fewer are cut into runs of steps
RUNS = 24
RESAMPLES = 1999
_NORMAL = NormalDist()

Reals = NDArray[np.float64]


def blocks_of(calls: Calls) -> Ints:
    """The block of each group: int64 [groups], from 0, ascending."""
    changes = np.diff(calls.sequence, prepend=calls.sequence[0]) != 0
    block = np.cumsum(changes)
    if block[-1] + 1 >= MIN_SEQUENCES:
        return block
    step = np.cumsum(np.diff(calls.step, prepend=calls.step[0]) != 0)
    return np.asarray(step * min(RUNS, calls.steps) // calls.steps)


def sums_of(blocks: Ints, values: Ints) -> Ints:
    """int64 [blocks]: the sum of one value a group over every block."""
    return np.bincount(blocks, weights=values).astype(np.int64)


def interval(
    hits: Ints | Reals, calls: Ints | Reals, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Of hits over calls, [blocks] each; None for less than two blocks. hits may be a difference of two caches'
    hits, so that the interval is that of the difference of their rates.
    """
    count = len(calls)
    if count < 2:
        return None
    h, c = hits.astype(np.float64), calls.astype(np.float64)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples).astype(np.float64)
    rates, rate = drawn @ h / (drawn @ c), h.sum() / c.sum()
    below = float(np.clip(np.mean(rates < rate) + np.mean(rates == rate) / 2, 0.5 / resamples, 1 - 0.5 / resamples))
    bias, skew = _NORMAL.inv_cdf(below), _acceleration((h.sum() - h) / (c.sum() - c))
    low, high = (float(np.quantile(rates, _moved(end, bias, skew))) for end in _ends(count))
    return round(low, 6), round(high, 6)


def _acceleration(without: Reals) -> float:
    """How much the error of a rate grows with it: from the rates without each block in turn."""
    apart = without.mean() - without
    spread = float((apart**2).sum()) ** 1.5
    return float((apart**3).sum()) / (6 * spread) if spread else 0.0


def _ends(count: int) -> tuple[float, float]:
    """Of an interval of 95 %, in standard deviations: Student's for so many blocks (Cornish and Fisher's expansion),
    and wider by what their deviation is too small.
    """
    z, free = _NORMAL.inv_cdf(0.975), count - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    end = t * (count / free) ** 0.5
    return -end, end


def _moved(end: float, bias: float, skew: float) -> float:
    """Where an end of the interval lies among the resampled rates."""
    z = bias + end
    return _NORMAL.cdf(bias + z / (1 - skew * z))
