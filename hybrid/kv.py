"""Keys and values: one reservation of address space, committed as it is touched and given back slot by slot."""

from __future__ import annotations

import cpu_kernels
from hybrid.errors import CapacityError
from hybrid.models.spec import ModelSpec
from hybrid.plan import Plan
from hybrid.program import key_dim, value_dim


class KvArena:
    """The KV of `plan.slots` sequences, zeroed when new and when released.

    Zeroed matters: a masked key has weight 0, and 0 times a stale infinity would be NaN.
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

    def layout(self, layer: int) -> cpu_kernels.KvLayout:
        """Where the kernels find the keys and values of a layer."""
        kv, spec = self._plan.kv, self._spec.layers[layer]
        return cpu_kernels.KvLayout(
            base=self._arena.address + kv.layer_offsets[layer],
            slot_stride=kv.slot_stride,
            head_stride=kv.head_strides[layer],
            value_offset=kv.value_offsets[layer],
            key_dim=key_dim(spec),
            value_dim=value_dim(spec),
        )

    def release(self, slot: int) -> None:
        """Give the memory of a slot back to the system."""
        self._arena.clear(slot * self._plan.kv.slot_stride, self._plan.kv.slot_stride)
