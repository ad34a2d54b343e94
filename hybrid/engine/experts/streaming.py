"""Decides whether the missed experts of a layer are streamed to the device or left to the threads."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid.engine.experts.costs import CallCosts


def streaming_pays(hits: Sequence[int], misses: Sequence[int], copies: int, costs: CallCosts) -> bool:
    """hits, misses: rows of each expert in a slot, and of each other expert. copies: issued by admission in this layer.

    Without streaming, device and threads run in parallel. With it, each copy overlaps the previous expert's compute;
    the first copy overlaps nothing. Formula: `docs/cache_engine.md`.
    """
    device = costs.start * bool(hits) + _seconds(hits, costs.device, costs.device_row)
    threads = _seconds(misses, costs.cpu, costs.cpu_row)
    streamed = _seconds(misses, costs.device, costs.device_row) + costs.start * len(misses)
    link = (len(misses) + copies) * costs.copy
    return max(link, device + streamed) + costs.copy < max(device, threads)


def _seconds(rows: Sequence[int], expert: float, row: float) -> float:
    """Seconds of experts. Each takes as long as reading its bytes or the arithmetic of its rows, whichever is
    longer.
    """
    return sum(max(expert, count * row) for count in rows)
