"""Whether the experts that a layer misses are brought to the device and computed there, or left to the threads."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid.engine.experts.costs import CallCosts


def streaming_pays(held: Sequence[int], missed: Sequence[int], copies: int, costs: CallCosts) -> bool:
    """held, missed: rows of each expert that the device holds, and of the others. copies: asked for in this layer.

    Left where they are, device and threads work at the same time. Streamed, one expert is copied while another is
    computed, behind the copies that were asked for before; the first has nobody to hide behind. `docs/cache.md` has the
    sums.
    """
    kept = costs.start * bool(held) + _seconds(held, costs.device, costs.device_row)
    threads = _seconds(missed, costs.cpu, costs.cpu_row)
    brought = _seconds(missed, costs.device, costs.device_row) + costs.start * len(missed)
    link = (len(missed) + copies) * costs.copy
    return max(link, kept + brought) + costs.copy < max(kept, threads)


def _seconds(rows: Sequence[int], expert: float, row: float) -> float:
    """An expert costs the reading of its bytes, or the arithmetic of its rows, whichever takes longer."""
    return sum(max(expert, count * row) for count in rows)
