"""The experts of a layer on a GPU: copies rows from the engine's buffers to the device and sums back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gpu_cache.kernels.experts import ExpertKernels, ExpertLayout
from gpu_cache.kernels.lookup import slots_of
from gpu_cache.kernels.sums import weighted_sums
from hybrid.formats.block import BLOCK
from hybrid.gpu.rows import expert_rows
from hybrid.gpu.step import DeviceStep
from hybrid.machine.memory import view
from hybrid.models.layers.expert_sets import IDS, ROUTED, WEIGHTS
from hybrid.ops import Op, RoutingTable
from hybrid.plan.passes.place_experts import CONTRIBUTIONS
from hybrid.plan.plan import Plan

NORMED, RESIDUAL = "normed_f32", "residual"  # buffers of the engine: what experts read, what they are added to


class SlotExperts:
    """See `gpu_cache.devices.cuda.QueuedCompute`.

    The rows of a step go to the device as bf16, once a layer. Back comes the weighted sum of each row, which is added
    to the residual stream before the threads' experts are; with `--strict-placement` what each expert made of each row
    comes back instead, and is added with the threads' in the order of experts.
    """

    def __init__(self, plan: Plan, memory: Sequence[torch.Tensor], address: Callable[[str], int]) -> None:
        """memory: uint8 [slots, bytes] for each piece of an expert. address: of a buffer of the engine."""
        assert plan.cache is not None
        rows, top_k = plan.max_rows, plan.cache.shape.top_k
        self._strict = plan.cache.settings.strict_placement
        self._kernels = ExpertKernels(expert_layout(plan), memory, rows, top_k)
        width = self._kernels.layout.hidden_stride
        self._normed, self._residual = (view(address(name), (rows, width), np.float32) for name in (NORMED, RESIDUAL))
        self._ids = view(address(IDS), (rows * top_k,), np.int32)
        self._weights = view(address(WEIGHTS), (rows * top_k,), np.float32)
        self._contributions = view(address(CONTRIBUTIONS), (rows * top_k, width), np.float32)
        device = memory[0].device
        self._x = _Mirror(rows, width, torch.bfloat16, device)
        self._slot_ids = _Mirror(rows, top_k, torch.int32, device)
        self._expert_ids = _Mirror(rows, top_k, torch.int32, device)
        self._gates = _Mirror(rows, top_k, torch.float32, device)
        self._result = _Mirror(rows * (top_k if self._strict else 1), width, torch.float32, device)
        self._rows, self._highest = 0, -1  # of the layer that is queued: its rows and the highest of its slot ids
        self._queued = self._x.device, self._slot_ids.device  # its input and slot ids
        self._calls = self._expert_ids.device, self._gates.device  # its experts and their weights
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # zeros were written on another stream than the one that reads them

    @property
    def results_stay_on_device(self) -> bool:
        return False

    def begin(self, slot_ids: npt.NDArray[np.int32]) -> None:
        self._rows, self._highest = len(slot_ids), int(slot_ids.max())
        self._queued = self._input(self._rows), self._slot_ids.upload(slot_ids)
        if not self._strict:
            self._calls = self._routes(self._rows)

    def experts(self, ids: range, slot: int) -> None:
        x, slots = self._queued
        if slot != ids.start or self._highest >= ids.stop:
            ours = (slots >= ids.start) & (slots < ids.stop)
            slots = torch.where(ours, slots + (slot - ids.start), -1)
        self._kernels.run(x, slots)

    def run_looked_up(self, slot_of: torch.Tensor, first: int, rows: int) -> None:
        self._rows, self._highest = rows, -1
        self._calls = self._routes(rows)
        slots = slots_of(self._calls[0], slot_of, first, self._slot_ids.device[:rows])
        self._queued = self._input(rows), slots
        self._kernels.run(*self._queued)
        self.end()
        if self._strict:
            self._slot_ids.download(rows)

    def end(self) -> None:
        """Sum the experts in a fixed order, whichever of them were streamed."""
        rows, top_k = self._rows, self._kernels.top_k
        contributions = self._kernels.contributions[: rows * top_k]
        if self._strict:
            self._result.device[: rows * top_k].copy_(contributions)
            return self._result.download(rows * top_k)
        weighted_sums(contributions, *self._calls, self._queued[1], self._result.device[:rows])
        self._leave_sums(rows)

    def _input(self, rows: int) -> torch.Tensor:
        """bf16 [rows, hidden_stride] on the device."""
        return self._x.upload(self._normed[:rows])

    def _routes(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts int32 and their weights float32, [rows, top_k] on the device."""
        pairs, shape = rows * self._kernels.top_k, (rows, self._kernels.top_k)
        ids, weights = self._ids[:pairs].reshape(shape), self._weights[:pairs].reshape(shape)
        return self._expert_ids.upload(ids), self._gates.upload(weights)

    def _leave_sums(self, rows: int) -> None:
        """Queue the copy of the sums to the host, if they are needed there."""
        self._result.download(rows)

    def _collect_sums(self, rows: int) -> None:
        self._residual[:rows] += self._result.host[:rows].numpy()

    def collect(self) -> None:
        rows = self._rows
        if not self._strict:
            return self._collect_sums(rows)
        ours = np.flatnonzero(self._slot_ids.host[:rows].numpy().reshape(-1) >= 0)
        self._contributions[ours] = self._result.host.numpy()[ours]


class _Mirror:
    """The same rows in pinned memory of the host and on the device."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.host = torch.zeros((rows, width), dtype=dtype, pin_memory=device.type == "cuda")
        self.device = torch.zeros((rows, width), dtype=dtype, device=device)

    def upload(self, values: npt.NDArray[Any]) -> torch.Tensor:
        """Queue a copy of values [rows, width], which may change once this returns; returns them on the device."""
        rows = len(values)
        self.host[:rows].copy_(torch.from_numpy(values))
        self.device[:rows].copy_(self.host[:rows], non_blocking=True)
        return self.device[:rows]

    def download(self, rows: int) -> None:
        self.host[:rows].copy_(self.device[:rows], non_blocking=True)


def expert_layout(plan: Plan) -> ExpertLayout:
    """Layout of the routed experts. Widths are padded to whole blocks with weights of zero."""
    gate_up, down = (next(op for op in plan.placed_ops if _is(op, kind)) for kind in ("gate_up", "down"))
    return ExpertLayout(
        format=plan.formats.experts,
        hidden=down.arguments["blocks"] * BLOCK,
        intermediate=gate_up.arguments["blocks"] * BLOCK,
        activation=gate_up.arguments["activation"].name,
        bias=gate_up.arguments["bias"] is not None,
    )


def _is(op: Op, kind: str) -> bool:
    routing = op.arguments.get("routing")
    return op.kind == kind and isinstance(routing, RoutingTable) and routing.name == ROUTED


class StepExperts(SlotExperts):
    """`SlotExperts` for a step that runs on the device, on the same stream: its rows and routes are already there, and
    the sums stay there.
    """

    def __init__(
        self, plan: Plan, memory: Sequence[torch.Tensor], address: Callable[[str], int], step: DeviceStep
    ) -> None:
        super().__init__(plan, memory, address)
        self._step = step
        step.graphs.clear()  # they may know slots that are gone

    @property
    def results_stay_on_device(self) -> bool:
        return not self._strict

    def run_looked_up(self, slot_of: torch.Tensor, first: int, rows: int) -> None:
        self._rows = rows  # here, because replaying a graph does not run the code
        self._step.graphs.run(("experts", first), partial(super().run_looked_up, slot_of, first, rows))

    def _input(self, rows: int) -> torch.Tensor:
        return expert_rows(self._step.normed[:rows], "bf16")

    def _routes(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        routed = self._step.routed
        return routed.ids[:rows], routed.weights[:rows]

    def _leave_sums(self, rows: int) -> None:
        pass

    def _collect_sums(self, rows: int) -> None:
        self._step.hits = self._result.device[:rows]
