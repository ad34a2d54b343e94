"""Scratch: what a thread needs for itself while an op runs, as the kernels state it, for the ops of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import cpu_kernels
from hybrid.binding import resolve
from hybrid.ops import Op
from hybrid.weights.layout import round_up

PAGE = 4096  # bytes; no two threads write to one


class _Nowhere:
    """References before there are addresses."""

    def __init__(self, kv_layout: Callable[[int], cpu_kernels.KvLayout]) -> None:
        self._kv_layout = kv_layout

    def buffer(self, name: str, node: int = -1) -> int:
        return 0

    def weight(self, name: str, node: int = -1) -> int:
        return 0

    def kv(self, layer: int) -> cpu_kernels.KvLayout:
        return self._kv_layout(layer)

    def callback(self, kind: str, layer: int) -> Callable[[], None]:
        raise AssertionError("who calls back needs no scratch")


def scratch_bytes(ops: Iterable[Op], rows: int, isa: str, kv_layout: Callable[[int], cpu_kernels.KvLayout]) -> int:
    """Bytes for each thread, enough for any of `ops` in steps of at most `rows` rows.

    isa: which may be another machine's. kv_layout: of a layer; its address does not matter.
    """
    at = _Nowhere(kv_layout)
    return round_up(max((_scratch(op, rows, isa, at) for op in ops), default=0), PAGE)


def _scratch(op: Op, rows: int, isa: str, at: _Nowhere) -> int:
    if op.kind == "host":
        return 0
    fields = {name: resolve(value, at) for name, value in op.arguments.items()}
    return int(cpu_kernels.scratch_bytes(op.kind, isa, rows, **fields))
