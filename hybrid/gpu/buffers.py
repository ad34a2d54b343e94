"""The engine's buffers that a device's step shares with the threads, as tensors in the memory of the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybrid.formats import FORMATS
from hybrid.gpu.link import Link, host_tensor
from hybrid.gpu.parts import Routed
from hybrid.gpu.rows import expert_rows
from hybrid.models.spec import ModelSpec
from hybrid.plan.passes.gpu_step import ENDS, EXPERT_SUM, NEW_KV, STATES, kv_width, state_floats
from hybrid.plan.passes.place_experts import IDS, NEXT, WEIGHTS
from hybrid.plan.plan import Plan
from hybrid.plan.program import key_dim


class SharedBuffers:
    """Layers share them, so each is read and written in the shape of the layer at hand.

    ends: int32 [rows]. expert_sum: float32 [rows, row_stride(hidden)].
    """

    def __init__(self, spec: ModelSpec, plan: Plan, link: Link, address: Callable[[str], int]) -> None:
        self._spec, self._link = spec, link
        self.integer = FORMATS[plan.formats.experts].integer

        def floats(name: str) -> Tensor:
            return host_tensor(address(name), plan.buffers[name][1], torch.float32)

        self.ends = host_tensor(address(ENDS), plan.buffers[ENDS][1], torch.int32)
        self._new_kv, self._states = floats(NEW_KV), floats(STATES)
        self._queries = host_tensor(address("q"), plan.buffers["q"][1], torch.bfloat16)
        self.expert_sum = floats(EXPERT_SUM).view(plan.max_rows, -1)
        if any(layer.feed_forward.is_moe for layer in spec.layers):
            self._open_routes(plan, address)

    def _open_routes(self, plan: Plan, address: Callable[[str], int]) -> None:
        rows, dtype = f"normed8.{self._spec.hidden}", torch.uint8
        if not self.integer:
            rows, dtype = f"normed.{self._spec.hidden}", torch.bfloat16
        self._expert_rows = host_tensor(address(rows), plan.buffers[rows][1], dtype).view(plan.max_rows, -1)
        kinds = {IDS: torch.int32, WEIGHTS: torch.float32}
        names = [prefix + name for prefix in ("", NEXT) for name in kinds if prefix + name in plan.buffers]
        self._routes = {
            name: host_tensor(address(name), plan.buffers[name][1], kinds[name.removeprefix(NEXT)]) for name in names
        }

    def new_kv(self, layer: int, rows: int) -> Tensor:
        return _rows(self._new_kv, rows, kv_width(self._spec.layers[layer]))

    def queries(self, layer: int, rows: int) -> Tensor:
        spec = self._spec.layers[layer]
        return _rows(self._queries, rows, spec.attention.heads * key_dim(spec))

    def states(self, layer: int, rows: int) -> Tensor:
        return _rows(self._states, rows, state_floats(self._spec.layers[layer]))

    def send_rows(self, normed: Tensor) -> None:
        self._link.to_host(self._expert_rows[: len(normed)], expert_rows(normed, self.integer))

    def send_routes(self, prefix: str, routed: Routed) -> None:
        for name, tensor in ((IDS, routed.ids), (WEIGHTS, routed.weights)):
            self._link.to_host(_rows(self._routes[prefix + name], *tensor.shape), tensor)


def _rows(buffer: Tensor, rows: int, width: int) -> Tensor:
    """The first rows of a buffer that layers of several widths share."""
    return buffer[: rows * width].view(rows, width)
