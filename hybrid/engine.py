"""The engine: weights mapped or copied, arenas, a KV arena and the compiled plan; one call into C++ a step."""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

import cpu_kernels
from hybrid.binding import bind
from hybrid.config import EngineConfig
from hybrid.core import Batch, SpanObserver, StepResult, StepTimes
from hybrid.device_step import CALLS
from hybrid.errors import CapacityError, ConfigError, DeviceFailed, KernelError, StepCancelled
from hybrid.hardware import probe
from hybrid.kv import KvArena
from hybrid.machine_profile import MachineProfile, cached_profile, expert_key, machine_mark, measured_costs
from hybrid.memory import MemoryGrant, NodeMemory
from hybrid.models.rope import inverse_frequencies
from hybrid.placement import TAKE
from hybrid.plan import Plan
from hybrid.planning import EMBEDDED_MODEL, plan_model
from hybrid.program import ropes
from hybrid.route_trace import read_route_trace
from hybrid.routes import Routes, view
from hybrid.warm import model_mark, read_warm, write_warm
from hybrid.weights.copied import CopiedWeights
from hybrid.weights.pack import Notice, Progress, cached_store, default_cache_dir
from hybrid.weights.store import Store

if TYPE_CHECKING:
    from hybrid.device_report import DeviceReport
    from hybrid.experts import DeviceExperts
    from hybrid.gpu.step import DeviceStep

USUAL_BANDWIDTH = 40e9  # bytes a second that threads read, where it is not measured
USUAL_SPEED = 1e12  # operations a second of threads, likewise


class Engine:
    """Runs steps of one model. One step at a time; `cancel` may come from any thread."""

    def __init__(
        self, store: Store, plan: Plan, progress: Progress | None = None, profiles: Path | None = None
    ) -> None:
        """Allocate what the plan says and bind its ops to addresses. Raises CapacityError if it does not fit,
        ConfigError if the store has other formats than the plan. A store whose weights were copied is closed.

        profiles: where what was measured of this machine is kept; None: nowhere.
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
        self._logits = np.empty((plan.slots, store.spec.vocab), np.float32)
        self.routes = self._new_routes()
        self._executor = bind(self._new_executor(), plan.ops, self)
        self.experts: DeviceExperts | None = None
        self.device_step: DeviceStep | None = None
        self._plain = self._executor  # of steps whose experts are all the threads'
        self._placed: cpu_kernels.Executor | None = None
        self.profile: MachineProfile | None = None  # what experts cost here, if it was measured
        self._profiles = profiles
        if plan.device:
            self._open_step()
        if plan.cache:
            self._open_device()
        self.load_seconds = time.perf_counter() - start

    @classmethod
    def open(cls, config: EngineConfig, progress: Progress | None = None, notice: Notice | None = None) -> Engine:
        """Plan, refuse what does not fit, map the store (packing a Hugging Face directory the first time), bind.

        progress and notice are those of `hybrid.weights.pack.cached_store`; progress also tells of the weights that
        are copied, notice of too many threads, of memory nodes and of a GPU that are not used.
        """
        plan = plan_model(config, notice)
        try:
            return cls._open(config, plan, progress, notice)
        except (CapacityError, DeviceFailed) as error:
            if config.device != "auto" or plan.device_name != "cuda":
                raise
            if notice:
                notice(f"note: a GPU is here but {error}; going on with the CPU")
            return cls.open(replace(config, device="cpu"), progress, notice)

    @classmethod
    def _open(cls, config: EngineConfig, plan: Plan, progress: Progress | None, notice: Notice | None) -> Engine:
        start = time.perf_counter()
        plan.require_fit()
        if plan.device and find_spec("torch") is None:
            raise ConfigError(f"--step-on {config.step_on} needs torch, which is not installed: pip install '.[gpu]'")
        if notice and not plan.cpus:
            notice(f"note: {plan.threads} threads are more than the cores of this machine; fewer would be faster")
        if notice and plan.numa_note:
            notice(f"note: {plan.numa_note}")
        path = config.model_path or EMBEDDED_MODEL
        store = cached_store(path, config.cache_dir, config.weight_format, progress, notice, config.check)
        if notice and plan.cache and plan.cache.warning:
            notice(f"note: {plan.cache.warning}")
        profiles = (config.cache_dir or default_cache_dir()) if plan.cache else None
        try:
            engine = cls(store, plan, progress, profiles)
        except BaseException:
            store.close()
            raise
        if notice:
            for note in engine.notes:
                notice(f"note: {note}")
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
        if self.routes:
            self.routes.begin(batch)
        try:
            if self.device_step:
                self.device_step.begin(batch, logits, self.routes.taken if self.routes else None)
            if self.experts and self.experts.placing:
                return self._forward_placed(batch, logits, self.experts)
            return self._run(self._plain, batch, logits)
        except DeviceFailed:
            self._leave_device()
            raise
        except MemoryError as error:  # slots, if there are any, have been given back before
            if not self.device_step:
                raise
            self._leave_device()
            raise DeviceFailed(
                f"the device has no memory left ({error}); steps to come run on the CPU alone"
            ) from error

    def _run(self, executor: cpu_kernels.Executor, batch: Batch, logits: npt.NDArray[np.float32]) -> StepResult:
        start = time.perf_counter()
        try:
            parts = executor.step(batch.token_ids, batch.slots, batch.positions, batch.logit_rows, logits)
        except ValueError as error:
            raise KernelError(f"step refused: {error}") from None
        except RuntimeError as error:
            raise StepCancelled(str(error)) from None
        return StepResult(logits, _step_times(parts, time.perf_counter() - start))

    def _forward_placed(self, batch: Batch, logits: npt.NDArray[np.float32], experts: DeviceExperts) -> StepResult:
        """A step with a device, or one without while `experts` says so. A step may be run again: it writes the same."""
        while experts.placing:
            experts.begin()
            try:
                return experts.end(self._run(self._placed, batch, logits))
            except BaseException as error:
                if not self._recover(experts, error):
                    raise
        return self._run(self._plain, batch, logits)

    def _recover(self, experts: DeviceExperts, error: BaseException) -> bool:
        """Whether the step may be run again."""
        try:
            return experts.recover(error)
        except KernelError:
            self._leave_device()
            raise

    def _leave_device(self) -> None:
        """Steps to come are the threads' alone; they miss no token, for the home of keys and values is theirs."""
        if self.experts:
            self.experts.placing = False
        if self.device_step:
            self.device_step.close()
        self.device_step, self._plain = None, self._executor

    def watch(self, observer: SpanObserver | None) -> None:
        """From the next step on have it told, by several threads, of what a device, its copies and the threads beside
        them do; None ends it.
        """
        if self.device_step:
            self.device_step.observer = observer
        if self.experts:
            self.experts.observer = self.experts.device.observer = observer

    def device_report(self) -> DeviceReport | None:
        """How a device computes steps; None if the threads do."""
        return self.device_step.report() if self.device_step else None

    @property
    def notes(self) -> list[str]:
        """What could not be had as asked, a line each."""
        of_step = self.device_step.notes if self.device_step else []
        return of_step + (self.experts.notes if self.experts else [])

    def release(self, slot: int) -> None:
        """Free and zero a slot's keys and values."""
        self._kv.release(slot)
        if self.device_step:
            self.device_step.forget(slot)

    def cancel(self) -> None:
        """End the running step (or the next) between two of its ops; from any thread."""
        for executor in {self._executor, self._plain, self._placed}:
            if executor:
                executor.cancel()

    def close(self) -> None:
        """Give everything back; the engine cannot be used afterwards."""
        if self.experts:
            self._close_device()
        if self.device_step:
            self.device_step.close()
        self.experts = self.routes = self._placed = self.device_step = None
        del self._executor, self._plain, self._kv, self._weights, self._arena, self._node_arenas, self.pool
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

    def _write_frequencies(self) -> None:
        for i, rope in enumerate(ropes(self.spec)):
            frequencies = np.ascontiguousarray(inverse_frequencies(rope)[0], np.float32)
            ctypes.memmove(self.buffer(f"rope{i}.frequencies"), frequencies.ctypes.data, frequencies.nbytes)

    def _new_executor(self) -> cpu_kernels.Executor:
        plan = self.plan
        return cpu_kernels.Executor(
            isa=plan.isa,
            pool=self.pool,
            rows=plan.max_rows,
            sequences=plan.slots,
            positions=plan.max_seq_len,
            vocab=self.spec.vocab,
            scratch_bytes=plan.scratch_bytes,
            batch_invariant=plan.batch_invariant,
        )

    def _new_routes(self) -> Routes | None:
        if not self.plan.cache and not any(op.kind == "host" for op in self.plan.ops):
            return None
        top_k = max(layer.feed_forward.router.top_k for layer in self.spec.layers if layer.feed_forward.router)
        ids, weights = (self.buffer(name) for name in ("expert_ids", "expert_weights"))
        trace = read_route_trace(self.plan.route_trace, self.spec) if self.plan.route_trace else None
        return Routes(ids, weights, self.plan.max_rows, top_k, self.plan.slots, trace)

    def _open_step(self) -> None:
        from hybrid.gpu.opening import open_step

        assert self.plan.device is not None
        self.device_step = open_step(
            self.plan, self.store, self.weight, self.buffer, (self._arena.address, self._arena.size)
        )
        self._plain = bind(self._new_executor(), self.plan.device_ops, self)

    def _open_device(self) -> None:
        from gpu_cache.errors import DeviceLost
        from hybrid.experts import DeviceExperts

        assert self.routes is not None and self.plan.cache is not None
        warm = self.plan.cache.settings.warm
        keys = read_warm(warm, self._model_mark(), self.plan.cache.shape) if warm else []
        costs = self._cpu_seconds()
        try:
            self.experts = DeviceExperts(self.plan, self.routes, self.buffer, self.weight, costs, self.device_step)
        except DeviceLost as error:
            raise DeviceFailed(f"the device is lost: {error}") from error
        self._placed = bind(self._new_executor(), self.plan.device_placed_ops or self.plan.placed_ops, self)
        if self.plan.cache.device == "cuda" and self.plan.cache.settings.delay is None:
            self._price_device(self.experts)
        self._close_device = weakref.finalize(self, self.experts.close)  # its threads would outlive the engine
        self.experts.preload(keys)

    def save_experts(self, path: Path) -> None:
        """Write which experts the device holds, for `CacheConfig.warm`. Raises ConfigError without a device."""
        if not self.experts:
            raise ConfigError("--cache-save has nothing to save: this run has no expert cache")
        write_warm(path, self._model_mark(), self.experts.plan.shape, self.experts.table.resident())

    def _model_mark(self) -> str:
        assert self.plan.cache is not None
        shape = self.plan.cache.shape
        routers = (self.store.tensors[f"layers.{index}.ffn.router"] for index in shape.layers)
        return model_mark(shape, (view(self.weight(router.name), router.shape, np.float32) for router in routers))

    def _cpu_seconds(self) -> tuple[float, float]:
        """What one expert costs the threads on one row, and on each of many: measured, or, where runs must be
        repeatable, a guess.
        """
        assert self.plan.cache is not None
        shape = self.plan.cache.shape
        if self.plan.cache.settings.delay is not None:
            return shape.nbytes / USUAL_BANDWIDTH, 2 * shape.weights / USUAL_SPEED
        from hybrid.profiling import thread_profile

        self.profile = thread_profile(self.plan, self.pool, self.weight, self.buffer, self._profiles)
        times = self.profile.experts[expert_key(shape, self.plan.formats.experts)]
        return times.on_threads(1), times.row_on_threads

    def _price_device(self, experts: DeviceExperts) -> None:
        """Measured costs of a GPU in place of the figures of a simulated device."""
        from hybrid.gpu.pricing import device_mark, measure_device

        assert self.profile is not None
        shape, place = experts.plan.shape, "cuda"
        key = expert_key(shape, self.plan.formats.experts)
        threads = self.profile.experts[key].threads
        largest = max(self.store.tensors.values(), key=lambda tensor: tensor.nbytes)
        read = partial(cpu_kernels.read_bandwidth, self.pool, self.plan.isa, self.weight(largest.name), largest.nbytes)
        measure = partial(measure_device, self.plan, experts.device, place, threads, read)
        mark = machine_mark(probe(self.plan.isa), self.plan.threads, device_mark(place))
        self.profile = cached_profile(self._profiles, mark, key, measure)
        if self.profile.link:
            experts.reprice(measured_costs(self.profile.experts[key], self.profile.link, shape.nbytes))

    # What ops refer to, see `hybrid.binding.References`.

    def buffer(self, name: str, node: int = -1) -> int:
        """Address of a buffer that all share, or of one of a node."""
        if node < 0:
            return int(self._arena.address) + self.plan.buffers[name][0]
        return int(self._node_arenas[node].address) + self.plan.node_buffers[node][name][0]

    def weight(self, name: str, node: int = -1) -> int:
        return self._weights.address(name, node)

    def kv(self, layer: int) -> cpu_kernels.KvLayout:
        return self._kv.layout(layer)

    def callback(self, kind: str, layer: int) -> Callable[[], None]:
        owner = self.routes if kind in ("observe", TAKE) else self.device_step if kind in CALLS else self.experts
        return partial(getattr(owner, kind), layer)


def _step_times(parts: Sequence[float], total: float) -> StepTimes:
    """parts: seconds of each `cpu_kernels.Part`."""
    attention, moe, head, _, experts, place, join = parts
    moe += experts + place + join
    other = total - attention - moe - head
    return StepTimes(attention, moe, head, other, total=total, cpu_experts=experts, lookup=place, join=join)


def _node_arenas(plan: Plan) -> Iterator[tuple[int, bool, int]]:
    """(bytes, huge pages wanted, memory node) of the buffers of each node."""
    return ((size, True, id) for size, id in zip(plan.node_arena_bytes, plan.node_ids, strict=False))
