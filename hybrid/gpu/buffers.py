"""The engine's buffers that a device's step shares with the threads, as tensors in the memory of the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybrid.formats import FORMATS
from hybrid.gpu.link import Link, host_tensor
from hybrid.gpu.parts import Routed
from hybrid.gpu.rows import expert_rows
from hybrid.models.layers.expert_sets import IDS, WEIGHTS
from hybrid.models.layers.feed_forward import EXPERT_SUM
from hybrid.models.layers.products import NORMED, rows_name
from hybrid.models.spec import ModelSpec
from hybrid.plan.passes.place_experts import NEXT
from hybrid.plan.plan import Plan


class SharedBuffers:
    """Layers share them, so each is read and written in the shape of the layer at hand.

    expert_sum: float32 [rows, row_stride(hidden)].
    """

    def __init__(self, spec: ModelSpec, plan: Plan, link: Link, address: Callable[[str], int]) -> None:
        self._link, self._sizes, self._address = link, {name: size for name, (_, size) in plan.buffers.items()}, address
        self._open: dict[str, Tensor] = {}
        self._kind = FORMATS[plan.formats.experts].rows
        self._rows_name = rows_name(NORMED, spec.hidden, self._kind)
        self._max_rows = plan.max_rows
        self.expert_sum = self.whole(EXPERT_SUM, torch.float32).view(plan.max_rows, -1)

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """All of a buffer, flat."""
        if name not in self._open:
            self._open[name] = host_tensor(self._address(name), self._sizes[name], dtype)
        return self._open[name]

    def rows(self, name: str, dtype: torch.dtype, rows: int, width: int) -> Tensor:
        """The first rows of a buffer that layers of several widths share."""
        return self.whole(name, dtype)[: rows * width].view(rows, width)

    def send_rows(self, normed: Tensor) -> None:
        dtype = torch.bfloat16 if self._kind == "bf16" else torch.uint8
        rows = self.whole(self._rows_name, dtype).view(self._max_rows, -1)
        self._link.to_host(rows[: len(normed)], expert_rows(normed, self._kind))

    def send_routes(self, early: bool, routed: Routed) -> None:
        """early: what the router of the next layer says of these rows."""
        for name, tensor in ((IDS, routed.ids), (WEIGHTS, routed.weights)):
            dtype = torch.int32 if name == IDS else torch.float32
            self._link.to_host(self.rows(NEXT * early + name, dtype, *tensor.shape), tensor)
