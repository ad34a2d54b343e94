"""Scratch: what a thread needs for itself while an op runs, as the kernels state it, for the ops of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import cpu_kernels
from hybrid.formats.block import round_up
from hybrid.ops import Op
from hybrid.plan.binding import resolve
from hybrid.plan.kv_layout import KvPlan

PAGE = 4096  # bytes; no two threads write to one


class _Nowhere:
    """References before there are addresses."""

    def __init__(self, kv: KvPlan) -> None:
        self._kv = kv

    def buffer(self, name: str, node: int = -1) -> int:
        return 0

    def weight(self, name: str, node: int = -1) -> int:
        return 0

    def state(self, layer: int, offset: int) -> Any:
        return self._kv.bound(layer, offset=offset)

    def callback(self, kind: str, layer: int) -> Callable[[], None]:
        raise AssertionError("who calls back needs no scratch")


def scratch_bytes(ops: Iterable[Op], rows: int, isa: str, kv: KvPlan) -> int:
    """Bytes for each thread, enough for any of `ops` in steps of at most `rows` rows. isa: even of another machine."""
    at = _Nowhere(kv)
    return round_up(max((_scratch(op, rows, isa, at) for op in ops), default=0), PAGE)


def _scratch(op: Op, rows: int, isa: str, at: _Nowhere) -> int:
    if op.kind == "host":
        return 0
    fields = {name: resolve(value, at) for name, value in op.arguments.items()}
    return int(cpu_kernels.scratch_bytes(op.kind, isa, rows, **fields))
