"""Whether an expert cache is worth it: what a step costs without a device, with a static placement, and with the cache.

Costs are measured on the threads, and taken from the device's figures; they are those of decode steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid.engine.experts.costs import CallCosts

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Observed:
    """Means over the decode steps, by MoE layer.

    static: hits of a static placement of the most called experts, as many in each index as it has slots. bookkeeping:
    seconds per step of lookups and joins.
    """

    steps: int
    calls: Array
    hits: Array
    fills: float
    static: Array
    bookkeeping: float


@dataclass(frozen=True)
class Verdict:
    """Milliseconds per step of the experts in each way; `best` is "cpu", "static" or "cache"."""

    steps: int
    cpu_ms: float
    static_ms: float
    cache_ms: float
    best: str
    why: str

    def __str__(self) -> str:
        return (
            f"{self.best}: experts take {self.cpu_ms:.3f} ms a step on the CPU alone, {self.static_ms:.3f} with a "
            f"static placement in the same slots, {self.cache_ms:.3f} with the cache; {self.why}"
        )


def judge(seen: Observed, costs: CallCosts) -> Verdict:
    """Device and threads run in parallel, so a layer takes as long as the slower of the two.

    Copies read the same memory as the threads, so a copy costs what reading the same bytes costs the threads.
    """
    cpu = float(seen.calls.sum()) * costs.cpu
    static = _both(seen.calls, seen.static, costs) + seen.bookkeeping
    cache = _both(seen.calls, seen.hits, costs) + seen.bookkeeping + seen.fills * costs.cpu
    seconds = {"cpu": cpu, "static": static, "cache": cache}
    best = min(seconds, key=lambda way: seconds[way])
    return Verdict(seen.steps, cpu * 1e3, static * 1e3, cache * 1e3, best, _reason(seen, costs, best))


def _both(calls: Array, hits: Array, costs: CallCosts) -> float:
    device = np.where(hits > 0, hits * costs.device + np.minimum(hits, 1) * costs.start, 0)
    return float(np.maximum(device, (calls - hits) * costs.cpu).sum())


def _reason(seen: Observed, costs: CallCosts, best: str) -> str:
    calls = max(1.0, float(seen.calls.sum()))
    hits, static = float(seen.hits.sum()) / calls, float(seen.static.sum()) / calls
    overhead = f"{seen.bookkeeping * 1e3:.3f} ms of bookkeeping"
    if best == "cpu":
        return f"an expert costs the threads {costs.cpu * 1e6:.1f} us, too little to pay for {overhead}"
    if best == "static":
        return f"fixed slots hit {static:.0%}, the cache {hits:.0%} for {seen.fills:.1f} copies a step"
    return f"it hits {hits:.0%} for {seen.fills:.1f} copies a step, fixed slots {static:.0%}, with {overhead}"


def most_called(calls: npt.NDArray[np.int64], index_of: npt.NDArray[np.int64], nways: int) -> list[int]:
    """Keys of the experts for a static placement: in each index the `nways` most called ones.

    calls: number of calls, by key. index_of: by key, -1 if a key may not be cached.
    """
    order = np.lexsort((np.arange(len(calls)), -calls, index_of))
    places = index_of[order]
    first = np.searchsorted(places, places)
    kept = order[(places >= 0) & (np.arange(len(order)) - first < nways) & (calls[order] > 0)]
    return sorted(int(key) for key in kept)
