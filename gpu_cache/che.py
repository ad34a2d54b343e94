"""Che's approximation: what LRU would hit if tokens chose experts independently of each other, by popularity alone.

Che, Tung and Wang, Hierarchical Web caching systems, 2002, in steps: an expert that a step calls with probability p is
there if one of the last T steps called it, 1 - (1 - p)^T, where T is such that so many experts are there as there are
ways. It knows nothing of the simulator, so it checks it; and what LRU hits beyond it is owed to the order of tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpu_cache.geometry import Geometry
from gpu_cache.trace import Calls

_HALVINGS = 80

Reals = NDArray[np.float64]


def che_hit_rate(calls: Calls, geometry: Geometry) -> float:
    """Hits of all calls, 0 to 1, that LRU would have in the long run."""
    count = np.bincount(calls.key, minlength=calls.layers * calls.experts)
    chance, index = count / calls.steps, geometry.indexes()
    hits = sum(
        float(_present(chance[index == at], geometry.nways) @ count[index == at]) for at in range(geometry.nblocks)
    )
    return hits / calls.total


def _present(chance: Reals, ways: int) -> Reals:
    """How likely each expert of an index is there, by the chance that a step calls it."""
    if np.count_nonzero(chance) <= ways:
        return (chance > 0).astype(np.float64)
    with np.errstate(divide="ignore"):
        absent = np.log1p(-np.minimum(chance, 1.0))  # of the chance that one step does not call it
    low, high = 0.0, 1.0
    while (-np.expm1(high * absent)).sum() < ways:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if (-np.expm1(middle * absent)).sum() < ways else (low, middle)
    present: Reals = -np.expm1(high * absent)
    return present
