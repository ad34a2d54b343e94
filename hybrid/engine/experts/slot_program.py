"""What a device in host memory runs for the experts of a layer: the kernels of the CPU, over the bytes of its slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import cpu_kernels
from hybrid.machine.memory import view
from hybrid.models.layers.expert_sets import ROUTED
from hybrid.plan.binding import bind
from hybrid.plan.passes.place_experts import LEFT_IDS, device_ops
from hybrid.plan.plan import Plan, lay_out


class SlotProgram:
    """Computes the experts in slots: group, gate and up, down, on a thread of its own. See `gpu_cache.device.Compute`.

    It reads the normed rows of the engine and writes contributions beside those of the threads; all else is its own.
    """

    def __init__(
        self,
        plan: Plan,
        memory: Sequence[npt.NDArray[np.uint8]],
        shared: Callable[[str], int],
        pool: cpu_kernels.ThreadPool | None = None,
    ) -> None:
        """memory: [slots, bytes] of every piece of an expert. shared: addresses of the engine's buffers. pool: the
        threads that compute; None: the one that calls.
        """
        assert plan.cache is not None
        self._memory = {name: array for (name, _), array in zip(plan.cache.shape.pieces, memory, strict=True)}
        self._shared = shared
        self._top_k = plan.cache.shape.top_k
        slots, ops = len(memory[0]), device_ops(plan.placed_ops, len(memory[0]))
        self._places, size = lay_out(_own_buffers(plan, slots, self._top_k))
        self._arena = cpu_kernels.Arena(size)
        self._ids = view(self.buffer(LEFT_IDS), (plan.max_rows, self._top_k), np.int32)
        executor = cpu_kernels.Executor(
            isa=plan.isa,
            pool=pool or cpu_kernels.ThreadPool(1, []),
            rows=plan.max_rows,
            sequences=1,
            positions=plan.max_rows,
            vocab=1,
            scratch_bytes=plan.scratch_bytes,
            batch_invariant=plan.batch_invariant,
        )
        self._executor = bind(executor, ops, self)
        del self._shared  # it may belong to who owns this
        self._zeros, self._positions = np.zeros(plan.max_rows, np.int32), np.arange(plan.max_rows, dtype=np.int32)
        self._no_rows, self._no_logits = np.zeros(0, np.int32), np.zeros((0, 1), np.float32)

    def __call__(self, slot_ids: npt.NDArray[np.int32]) -> None:
        self._step(slot_ids)

    def seconds(self, slot_ids: npt.NDArray[np.int32]) -> float:
        """Compute as a call does; returns the seconds that it took."""
        attention, moe, head, other, experts, *_ = self._step(slot_ids)
        return experts

    def _step(self, slot_ids: npt.NDArray[np.int32]) -> Sequence[float]:
        """Returns the seconds of each `cpu_kernels.Part`."""
        rows = len(slot_ids)
        self._ids[:rows] = slot_ids
        zeros = self._zeros[:rows]
        parts: Sequence[float] = self._executor.step(
            zeros, zeros, self._positions[:rows], self._no_rows, self._no_logits
        )
        return parts

    def buffer(self, name: str, node: int = -1) -> int:
        if name in self._places:
            return int(self._arena.address) + self._places[name][0]
        return self._shared(name)

    def weight(self, name: str, node: int = -1) -> int:
        return int(self._memory[name].ctypes.data)

    def state(self, layer: int, offset: int) -> Any:
        raise AssertionError("experts know nothing of sequences")

    def callback(self, kind: str, layer: int) -> Any:
        raise AssertionError("a device calls nobody")


def _own_buffers(plan: Plan, slots: int, top_k: int) -> dict[str, int]:
    pairs = plan.max_rows * top_k * 4
    lists = {f"{ROUTED}.{name}": pairs for name in ("rows", "weights", "pairs")}
    sizes = {f"{ROUTED}.offsets": (slots + 1) * 4, f"{ROUTED}.active": slots * 4, f"{ROUTED}.count": 4}
    activations = {name: size for name, (_, size) in plan.buffers.items() if name.startswith("activation")}
    return {LEFT_IDS: pairs} | lists | sizes | activations
