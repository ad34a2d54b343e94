"""What several traces make of one setting: means, and how far the traces are apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
_OF_ONE = {"trace", "hit_rate_low", "hit_rate_high", "block_calls", "block_hits", "splits"}  # what only one trace has
SPREAD = "_stdev"  # after the name of a figure: the standard deviation over the traces


def mean_rows(replays: Sequence[Row], settings: int) -> list[Row]:
    """A row for each setting. replays: those of the first trace, then those of the second, ..., each in the order of
    the settings.

    Counts that are compared become means with a standard deviation; `hit_rate` is the mean of the rates, whatever the
    lengths of the traces. Totals, by layer too, are sums.
    """
    return [_mean(replays[at::settings]) for at in range(settings)]


def _mean(rows: Sequence[Row]) -> Row:
    mean: Row = {name: value for name, value in rows[0].items() if name not in _OF_ONE}
    mean["traces"] = len(rows)
    for name in ("steps", "calls", "hits", "loading", "misses", "fills", "evictions", "prefetched", "prefetch_used"):
        mean[name] = sum(row[name] for row in rows)
    for name in ("layer_calls", "layer_hits"):
        mean[name] = [sum(layer) for layer in zip(*(row[name] for row in rows), strict=True)]
    bounds = [row["upper_bound"] for row in rows]
    mean["upper_bound"] = None if None in bounds else sum(bounds)
    for name in ("hit_rate", "tokens_per_second", "cpu_tokens_per_second"):
        if name in mean:
            mean[name], mean[name + SPREAD] = spread([row[name] for row in rows])
    if "step_ms" in mean:
        mean["step_ms"] = {part: spread([row["step_ms"][part] for row in rows])[0] for part in mean["step_ms"]}
    return mean


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the standard deviation of several figures, to the digits that results have."""
    return round(statistics.fmean(values), 6), round(statistics.stdev(values), 6)
