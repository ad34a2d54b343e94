"""Keys and values: one reservation of address space, committed as it is touched and given back slot by slot."""

from __future__ import annotations

from collections.abc import Iterator

import cpu_kernels
from hybrid.errors import CapacityError
from hybrid.hardware import has_huge_pages
from hybrid.models.spec import ModelSpec
from hybrid.plan import KvGeometry, Plan, kv_layout

HUGE_BEHIND = 8 << 20  # bytes of a run in small pages, so that a short sequence costs what it uses
MAX_HUGE_RUNS = 8000  # each makes two ranges of memory, and a process may have 65530


class KvArena:
    """The KV of `plan.slots` sequences, zeroed when new and when released.

    Zeroed matters: a masked key has weight 0, and 0 times a stale infinity would be NaN. A run, the keys or values of
    one head, has huge pages behind its first 8 MiB: the 2 MiB that its end may waste are then at most a quarter of it.
    huge_runs: how many got them; long_runs: how many are long enough.
    """

    def __init__(self, spec: ModelSpec, plan: Plan) -> None:
        self._spec, self._plan = spec, plan
        size = plan.slots * plan.kv.slot_stride
        try:
            self._arena = cpu_kernels.Arena(size)
        except MemoryError:
            raise CapacityError(
                f"{size / 1e9:.1f} GB of address space for KV cannot be reserved; lower --max-seq-len or --max-batch"
            ) from None
        tails = list(_tails(plan.kv))
        self.long_runs = plan.slots * len(tails)
        self.huge_runs = self._use_huge(tails) if has_huge_pages(plan.huge_pages) else 0

    def _use_huge(self, tails: list[tuple[int, int]]) -> int:
        """Ask for huge pages slot by slot until there may be no more; returns how many tails have them."""
        stride = self._plan.kv.slot_stride
        places = [(slot * stride + offset, size) for slot in range(self._plan.slots) for offset, size in tails]
        refused = (i for i, place in enumerate(places[:MAX_HUGE_RUNS]) if not self._arena.use_huge(*place))
        return next(refused, min(len(places), MAX_HUGE_RUNS))

    def layout(self, layer: int) -> cpu_kernels.KvLayout:
        """Where the kernels find the keys and values of a layer."""
        return kv_layout(self._spec, self._plan.kv, layer, self._arena.address)

    def release(self, slot: int) -> None:
        """Give the memory of a slot back to the system."""
        self._arena.clear(slot * self._plan.kv.slot_stride, self._plan.kv.slot_stride)


def _tails(kv: KvGeometry) -> Iterator[tuple[int, int]]:
    """(offset in a slot, bytes) of what lies behind the first `HUGE_BEHIND` bytes of every long run."""
    ends = (*kv.layer_offsets[1:], kv.slot_stride)
    for layer, (start, end) in enumerate(zip(kv.layer_offsets, ends, strict=True)):
        values, stride = kv.value_offsets[layer], kv.head_strides[layer]
        for head in range(start, end, stride):
            for offset, size in ((head, values), (head + values, (kv.key_scale_offsets[layer] or stride) - values)):
                if size > HUGE_BEHIND:
                    yield offset + HUGE_BEHIND, size - HUGE_BEHIND
