"""The engine: weights mapped or copied, arenas, a KV arena and the compiled plan; one call into C++ a step."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

import cpu_kernels
from hybrid.config import EngineConfig, check_config
from hybrid.core import Batch, StepResult, StepTimes
from hybrid.errors import CapacityError, ConfigError, KernelError, StepCancelled
from hybrid.hardware import probe
from hybrid.kv import KvArena
from hybrid.memory import MemoryGrant, NodeMemory
from hybrid.models import model_spec
from hybrid.models.rope import inverse_frequencies
from hybrid.ops import Buffer, Choice, ExpertSet, Kv, Op, RoutingTable, Weight
from hybrid.plan import Plan, make_plan
from hybrid.program import ropes
from hybrid.weights.copied import CopiedWeights
from hybrid.weights.mix import parse_mix
from hybrid.weights.pack import Notice, Progress, cached_store, model_config, model_formats
from hybrid.weights.store import Store

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "tiny_moe"


def plan_model(config: EngineConfig) -> Plan:
    """The plan of the configured model on this machine, from its config.json alone: no weight is read or packed.

    Raises ConfigError, WeightsError or KernelError; a plan that does not fit comes back with `problem` set.
    """
    check_config(config)
    if config.device not in ("auto", "cpu"):
        raise ConfigError(f"--device {config.device} cannot be had in this version; use auto or cpu")
    path = config.model_path or EMBEDDED_MODEL
    spec = model_spec(model_config(path))
    return make_plan(spec, probe(config.isa), config, parse_mix(config.weight_format, model_formats(path)))


class Engine:
    """Runs steps of one model. One step at a time; `cancel` may come from any thread."""

    def __init__(self, store: Store, plan: Plan, progress: Progress | None = None) -> None:
        """Allocate what the plan says and bind its ops to addresses. Raises CapacityError if it does not fit,
        ConfigError if the store has other formats than the plan. A store whose weights were copied is closed.
        """
        start = time.perf_counter()
        plan.require_fit()
        if store.mix != plan.formats:
            raise ConfigError(f"the store has {store.mix}, the plan is for {plan.formats}: make the plan of this store")
        self._process = os.getpid()
        self.spec, self.plan, self.store = store.spec, plan, store
        try:
            self._arena = cpu_kernels.Arena(plan.arena_bytes, huge=True)
            self._node_arenas = [cpu_kernels.Arena(*own) for own in _node_arenas(plan)]
            self.pool = cpu_kernels.ThreadPool(plan.threads, list(plan.cpus), plan.nodes)
        except MemoryError:
            size = plan.arena_bytes + sum(plan.node_arena_bytes)
            raise CapacityError(f"the arena of {size} bytes cannot be allocated") from None
        except RuntimeError as error:
            raise CapacityError(f"{error}; lower --threads, or raise the limit on processes") from None
        self._kv = KvArena(store.spec, plan)
        self._weights = self._load(progress)
        self.memory = self._granted()
        self._write_frequencies()
        self._executor = self._bind()
        self._logits = np.empty((plan.slots, store.spec.vocab), np.float32)
        self.load_seconds = time.perf_counter() - start

    @classmethod
    def open(cls, config: EngineConfig, progress: Progress | None = None, notice: Notice | None = None) -> Engine:
        """Plan, refuse what does not fit, map the store (packing a Hugging Face directory the first time), bind.

        progress and notice are those of `hybrid.weights.pack.cached_store`; progress also tells of the weights that
        are copied, notice of too many threads and of memory nodes that are not used.
        """
        start = time.perf_counter()
        plan = plan_model(config)
        plan.require_fit()
        if notice and not plan.cpus:
            notice(f"note: {plan.threads} threads are more than the cores of this machine; fewer would be faster")
        if notice and plan.numa_note:
            notice(f"note: {plan.numa_note}")
        path = config.model_path or EMBEDDED_MODEL
        store = cached_store(path, config.cache_dir, config.weight_format, progress, notice, config.check)
        engine = cls(store, plan, progress)
        engine.load_seconds = time.perf_counter() - start
        return engine

    def forward(self, batch: Batch) -> StepResult:
        """Run one step. `logits` belongs to the engine and is overwritten by the next step.

        Raises KernelError if the batch leaves the plan's extents or in a forked process, StepCancelled after `cancel`,
        KeyboardInterrupt on Ctrl-C (main thread); after the last two what the step wrote must be discarded.
        """
        if os.getpid() != self._process:
            raise KernelError("this model was opened before a fork, which its threads do not survive: open it again")
        wanted = len(batch.logit_rows)
        logits = self._logits[:wanted] if wanted <= len(self._logits) else self._many_logits(wanted)
        start = time.perf_counter()
        try:
            attention, moe, head, _ = self._executor.step(
                batch.token_ids, batch.slots, batch.positions, batch.logit_rows, logits
            )
        except ValueError as error:
            raise KernelError(f"step refused: {error}") from None
        except RuntimeError as error:
            raise StepCancelled(str(error)) from None
        total = time.perf_counter() - start
        other = total - attention - moe - head
        return StepResult(logits, StepTimes(attention, moe, head, other, 0.0, total))

    def release(self, slot: int) -> None:
        """Free and zero a slot's keys and values."""
        self._kv.release(slot)

    def cancel(self) -> None:
        """End the running step (or the next) between two of its ops; from any thread."""
        self._executor.cancel()

    def close(self) -> None:
        """Give everything back; the engine cannot be used afterwards."""
        del self._executor, self._kv, self._weights, self._arena, self._node_arenas, self.pool
        self.store.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _many_logits(self, rows: int) -> npt.NDArray[np.float32]:
        """Scoring asks for more rows than decoding ever does; such an array lives only as long as its result."""
        return np.empty((rows, self.spec.vocab), np.float32)

    def _load(self, progress: Progress | None) -> Store | CopiedWeights:
        """The weights where the ops read them."""
        plan = self.plan
        if plan.load == "map":
            return self.store
        copied = CopiedWeights(self.store, plan.parts, plan.node_ids, plan.threads, progress)
        self.store.close()
        return copied

    def _granted(self) -> MemoryGrant:
        arenas = self._weights.arenas if isinstance(self._weights, CopiedWeights) else []
        places = zip(self.plan.node_ids, arenas, strict=False)
        nodes = [NodeMemory(id, arena.placed, arena.size, arena.huge_bytes()) for id, arena in places]
        return MemoryGrant(self.plan.load, self.plan.huge_pages, tuple(nodes), self._kv.long_runs, self._kv.huge_runs)

    def _address(self, name: str, node: int = -1) -> int:
        """Of a buffer that all share, or of one of a node."""
        if node < 0:
            return int(self._arena.address) + self.plan.buffers[name][0]
        return int(self._node_arenas[node].address) + self.plan.node_buffers[node][name][0]

    def _write_frequencies(self) -> None:
        for i, rope in enumerate(ropes(self.spec)):
            frequencies = np.ascontiguousarray(inverse_frequencies(rope)[0], np.float32)
            ctypes.memmove(self._address(f"rope{i}.frequencies"), frequencies.ctypes.data, frequencies.nbytes)

    def _bind(self) -> cpu_kernels.Executor:
        plan = self.plan
        executor = cpu_kernels.Executor(
            isa=plan.isa,
            pool=self.pool,
            rows=plan.max_rows,
            slots=plan.slots,
            positions=plan.max_seq_len,
            vocab=self.spec.vocab,
            scratch_bytes=plan.scratch_bytes,
            batch_invariant=plan.batch_invariant,
        )
        for op in plan.ops:
            self._add(executor, op)
        return executor

    def _add(self, executor: cpu_kernels.Executor, op: Op) -> None:
        arguments = {name: self._resolve(value) for name, value in op.arguments.items()}
        getattr(executor, op.kind)(part=getattr(cpu_kernels.Part, op.part), **arguments)

    def _resolve(self, value: Any) -> Any:
        """A reference of the plan to what the executor takes: an address, a layout or the number itself."""
        match value:
            case None:
                return 0
            case Buffer(name, offset, node):
                return self._address(name, node) + offset
            case Weight(name, offset, node):
                return self._weights.address(name, node) + offset
            case tuple():
                return [self._resolve(one) for one in value]
            case Choice(kind, name):
                return getattr(getattr(cpu_kernels, kind), name)
            case Kv(layer):
                return self._kv.layout(layer)
            case ExpertSet(arguments):
                return cpu_kernels.ExpertSet(**{name: self._resolve(inner) for name, inner in arguments.items()})
            case RoutingTable(name):
                parts = ("offsets", "rows", "weights", "active", "count")
                return cpu_kernels.Routing(**{part: self._address(f"{name}.{part}") for part in parts})
        return value


def _node_arenas(plan: Plan) -> Iterator[tuple[int, bool, int]]:
    """(bytes, huge pages wanted, memory node) of the buffers of each node."""
    return ((size, True, id) for size, id in zip(plan.node_arena_bytes, plan.node_ids, strict=False))
