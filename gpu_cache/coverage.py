"""How many calls a few experts of every layer get, and how many they still get later."""

from __future__ import annotations

import numpy as np

from gpu_cache.errors import CacheError
from gpu_cache.trace import Calls


def coverage(calls: Calls, share: float, held_out: bool = False) -> float:
    """The share of calls, 0 to 1, that go to the most called experts of each layer, `share` of them, at least one.

    held_out: they are chosen by the first half of the steps, and the calls of the second half are counted. Raises
    CacheError for a share that is none, and for a trace that is too short to be halved.
    """
    if not 0 < share <= 1:
        raise CacheError(f"share of experts: {share}, must be above 0 and at most 1")
    step = np.cumsum(np.diff(calls.step, prepend=calls.step[0]) != 0)
    if held_out and calls.steps < 2:
        raise CacheError("a trace of one step has no second half; record a longer one")
    later = np.repeat(step >= calls.steps // 2, calls.sizes) if held_out else np.ones(calls.total, bool)
    seen, size = (~later if held_out else later), (calls.layers, calls.experts)
    chosen = np.bincount(calls.key[seen], minlength=calls.layers * calls.experts).reshape(size)
    counted = np.bincount(calls.key[later], minlength=calls.layers * calls.experts).reshape(size)
    best = np.argsort(-chosen, axis=1, kind="stable")[:, : max(1, round(share * calls.experts))]
    return float(np.take_along_axis(counted, best, axis=1).sum() / counted.sum())
