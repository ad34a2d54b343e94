"""The memory of an engine: addresses of everything that ops refer to."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

import cpu_kernels
from hybrid.engine.kv import KvArena
from hybrid.errors import CapacityError
from hybrid.machine.memory import MemoryGrant, NodeMemory
from hybrid.plan.plan import Plan
from hybrid.weights.copied import CopiedWeights
from hybrid.weights.pack import Progress
from hybrid.weights.store import Store


class Addresses:
    """Weights, buffers and states, allocated as a plan says: see `hybrid.plan.binding.References`.

    A store whose weights are copied is closed. Raises CapacityError if memory cannot be allocated.
    """

    def __init__(self, store: Store, plan: Plan, progress: Progress | None = None) -> None:
        self._plan = plan
        try:
            self._arena = cpu_kernels.Arena(plan.arena_bytes, huge=True)
            nodes = zip(plan.node_arena_bytes, plan.node_ids, strict=False)
            self._node_arenas = [cpu_kernels.Arena(size, True, id) for size, id in nodes]
        except MemoryError:
            size = plan.arena_bytes + sum(plan.node_arena_bytes)
            raise CapacityError(f"the arena of {size} bytes cannot be allocated") from None
        self.kv = KvArena(plan)
        self._weights = _load(store, plan, progress)
        self._owners: dict[str, Any] = {}
        self._write_constants(store, plan)

    @property
    def arena(self) -> tuple[int, int]:
        """Address and bytes of the memory of all shared buffers."""
        return self._arena.address, self._arena.size

    def granted(self) -> MemoryGrant:
        """How much of the requested kinds of memory the system granted."""
        arenas = self._weights.arenas if isinstance(self._weights, CopiedWeights) else []
        places = zip(self._plan.node_ids, arenas, strict=False)
        nodes = tuple(NodeMemory(id, arena.placed, arena.size, arena.huge_bytes()) for id, arena in places)
        return MemoryGrant(self._plan.load, self._plan.huge_pages, nodes, self.kv.long_runs, self.kv.huge_runs)

    def release(self, sequence: int) -> None:
        """Free and zero the state of a sequence."""
        self.kv.release(sequence)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """As `KvArena.copy`."""
        self.kv.copy(source, target, tokens)

    def snapshot(self, sequence: int) -> npt.NDArray[np.uint8]:
        """As `KvArena.snapshot`."""
        return self.kv.snapshot(sequence)

    def restore(self, sequence: int, saved: npt.NDArray[np.uint8]) -> None:
        """As `KvArena.restore`."""
        self.kv.restore(sequence, saved)

    def repeat(self, sequence: int, known: int, tokens: int) -> None:
        """As `KvArena.repeat`."""
        self.kv.repeat(sequence, known, tokens)

    def buffer(self, name: str, node: int = -1) -> int:
        """Address of a shared buffer, or of a buffer of one memory node."""
        if node < 0:
            return int(self._arena.address) + self._plan.buffers[name][0]
        return int(self._node_arenas[node].address) + self._plan.node_buffers[node][name][0]

    def integers(self, name: str, count: int) -> npt.NDArray[np.int32]:
        """The first int32 values of a shared buffer, to be written as long as these addresses live."""
        return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(self.buffer(name)))

    def weight(self, name: str, node: int = -1) -> int:
        return self._weights.address(name, node)

    def state(self, layer: int, offset: int) -> Any:
        return self.kv.layout(layer, offset)

    def answer(self, owner: Any, *kinds: str) -> None:
        """Bind callbacks of these kinds to the methods of `owner` with the same names."""
        self._owners |= dict.fromkeys(kinds, owner)

    def callback(self, kind: str, layer: int) -> Callable[[], None]:
        return partial(getattr(self._owners[kind], kind), layer)

    def _write_constants(self, store: Store, plan: Plan) -> None:
        for place, half in store.spec.halves(plan.formats):
            for name, values in half.constants(place).items():
                constant = np.ascontiguousarray(values, np.float32)
                ctypes.memmove(self.buffer(name), constant.ctypes.data, constant.nbytes)


def _load(store: Store, plan: Plan, progress: Progress | None) -> Store | CopiedWeights:
    """Load the weights to where the ops read them."""
    if plan.load == "map":
        store.verify_in_background()
        return store
    needed = store.spec.within(plan.max_seq_len).store_tensors(store.mix)  # the others are in no plan
    copied = CopiedWeights(store, needed, plan.parts, plan.node_ids, plan.threads, progress)
    store.close()
    return copied
