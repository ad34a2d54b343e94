"""The engine: a mapped store, an arena, a KV arena and the compiled plan; one call into C++ a step."""

from __future__ import annotations

import ctypes
import os
import time
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
from hybrid.models import model_spec
from hybrid.models.rope import inverse_frequencies
from hybrid.plan import Plan, make_plan
from hybrid.program import Buffer, Kv, Op, RoutingTable, Weight, ropes
from hybrid.weights.pack import Notice, Progress, cached_store, model_config
from hybrid.weights.store import Store

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "tiny_moe"


def plan_model(config: EngineConfig) -> Plan:
    """The plan of the configured model on this machine, from its config.json alone: no weight is read or packed.

    Raises ConfigError, WeightsError or KernelError; a plan that does not fit comes back with `problem` set.
    """
    check_config(config)
    if config.device not in ("auto", "cpu"):
        raise ConfigError(f"--device {config.device} cannot be had in this version; use auto or cpu")
    spec = model_spec(model_config(config.model_path or EMBEDDED_MODEL))
    return make_plan(spec, probe(config.isa), config)


class Engine:
    """Runs steps of one model. One step at a time; `cancel` may come from any thread."""

    def __init__(self, store: Store, plan: Plan) -> None:
        """Allocate what the plan says and bind its ops to addresses. Raises CapacityError if it does not fit."""
        start = time.perf_counter()
        plan.require_fit()
        self._process = os.getpid()
        self.spec, self.plan, self.store = store.spec, plan, store
        try:
            self._arena = cpu_kernels.Arena(plan.arena_bytes, huge=True)
            self.pool = cpu_kernels.ThreadPool(plan.threads, list(plan.cpus))
        except MemoryError:
            raise CapacityError(f"the arena of {plan.arena_bytes} bytes cannot be allocated") from None
        except RuntimeError as error:
            raise CapacityError(f"{error}; lower --threads, or raise the limit on processes") from None
        self._kv = KvArena(store.spec, plan)
        self._write_frequencies()
        self._executor = self._bind()
        self._logits = np.empty((plan.slots, store.spec.vocab), np.float32)
        self.load_seconds = time.perf_counter() - start

    @classmethod
    def open(cls, config: EngineConfig, progress: Progress | None = None, notice: Notice | None = None) -> Engine:
        """Plan, refuse what does not fit, map the store (packing a Hugging Face directory the first time), bind.

        progress and notice are those of `hybrid.weights.pack.cached_store`; notice also tells of too many threads.
        """
        start = time.perf_counter()
        plan = plan_model(config)
        plan.require_fit()
        if notice and not plan.cpus:
            notice(f"note: {plan.threads} threads are more than the cores of this machine; fewer would be faster")
        path = config.model_path or EMBEDDED_MODEL
        wanted = "bf16" if config.weight_format == "auto" else config.weight_format
        engine = cls(cached_store(path, config.cache_dir, wanted, progress, notice, config.check), plan)
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
        del self._executor, self._kv, self._arena, self.pool
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

    def _address(self, name: str) -> int:
        return int(self._arena.address) + self.plan.buffers[name][0]

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
            case Buffer(name):
                return self._address(name)
            case Weight(name, offset):
                return self.store.address(name) + offset
            case Kv(layer):
                return self._kv.layout(layer)
            case RoutingTable(name):
                parts = ("offsets", "rows", "weights", "active", "count")
                return cpu_kernels.Routing(**{part: self._address(f"{name}.{part}") for part in parts})
        return value
