"""The engine: weights mapped or copied, arenas, a KV arena and the compiled plan; one call into C++ a step."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

import cpu_kernels
from hybrid.config import EngineConfig
from hybrid.core import Batch, SpanObserver, StepResult, StepTimes
from hybrid.engine.addresses import Addresses
from hybrid.engine.experts.warm_start import write_warm
from hybrid.engine.kv import KvArena
from hybrid.engine.routes import Routes
from hybrid.engine.use import ExpertUse
from hybrid.errors import CapacityError, ConfigError, DeviceFailed, KernelError, StepCancelled, forked_error
from hybrid.machine.profile import MachineProfile
from hybrid.models.layers.expert_sets import IDS, WEIGHTS
from hybrid.models.layers.feed_forward import TAKE
from hybrid.models.layers.rotary import LENGTHS
from hybrid.plan.binding import bind
from hybrid.plan.passes.gpu_step import CALLS
from hybrid.plan.passes.keep_use import OFFSETS, use_shape
from hybrid.plan.passes.place_experts import OBSERVE, PLACED_CALLS
from hybrid.plan.plan import Plan
from hybrid.plan.resolve import EMBEDDED_MODEL, plan_model
from hybrid.plan.roofline import step_cost
from hybrid.plan.route_trace import read_route_trace
from hybrid.weights.hub import with_local_model
from hybrid.weights.pack import Notice, Progress, cached_store, default_cache_dir
from hybrid.weights.store import Store

if TYPE_CHECKING:
    from hybrid.engine.experts.runtime import DeviceExperts
    from hybrid.engine.experts.start import ExpertsStart
    from hybrid.gpu.report import DeviceReport
    from hybrid.gpu.step import DeviceStep


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
        self._process, self._closed = os.getpid(), False
        self.spec, self.plan, self.store = store.spec, plan, store
        try:
            self.pool = cpu_kernels.ThreadPool(plan.threads, plan.cpus, plan.nodes)
        except RuntimeError as error:
            raise CapacityError(f"{error}; lower --threads, or raise the limit on processes") from None
        self.addresses = Addresses(store, plan, progress)
        self.memory = self.addresses.granted()
        self._logits = np.empty((plan.sequences, store.spec.vocab), np.float32)
        self._lengths = self.addresses.integers(LENGTHS, plan.max_rows) if store.spec.length_limits else None
        self._use = self._new_use() if store.spec.moe_layers else None
        self.routes = self._new_routes()
        self.addresses.answer(self.routes, OBSERVE, TAKE)
        self._executor = bind(self._new_executor(), plan.ops, self.addresses)
        self.experts: DeviceExperts | None = None
        self.device_step: DeviceStep | None = None
        self._plain = self._executor  # of steps whose experts are all the threads'
        self._placed: cpu_kernels.Executor | None = None
        self._start: ExpertsStart | None = None
        if plan.device:
            self._open_step()
        if plan.cache:
            self._open_experts(profiles)
        self.load_seconds = time.perf_counter() - start

    @classmethod
    def open(cls, config: EngineConfig, progress: Progress | None = None, notice: Notice | None = None) -> Engine:
        """Fetch a model by name, plan, refuse what does not fit, map the store (packing a Hugging Face directory the
        first time), bind.

        progress and notice are those of `hybrid.weights.pack.cached_store`; progress also tells of the weights that
        are copied, notice of too many threads, of memory nodes and of a GPU that are not used.
        """
        config = with_local_model(config, progress)
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
        if notice and store.unverified:
            notice(f"note: checksums of {store.nbytes / 1e9:.1f} GB of weights are verified once, while they are used")
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

        Raises KernelError if the batch leaves the plan's extents, once closed and in a forked process, StepCancelled
        after `cancel`, KeyboardInterrupt on Ctrl-C (main thread); after the last two what the step wrote must be
        discarded. WeightsError if the weights were changed in their files, or are found to be damaged.
        """
        if os.getpid() != self._process:
            raise forked_error()
        if self._closed:
            raise KernelError("this engine was closed; open it again")
        self.store.require_sound()
        self._check(batch)
        wanted = len(batch.logit_rows)
        logits = self._logits[:wanted] if wanted <= len(self._logits) else self._many_logits(wanted)
        if self._lengths is not None:
            self._lengths[: len(batch.token_ids)] = batch.known_lengths()
        if self.routes:
            self.routes.begin(batch)
        try:
            if self.device_step:
                self.device_step.begin(batch, logits, self.routes.taken if self.routes else None)
            if self.experts and self.experts.placing:
                result = self._forward_placed(batch, logits, self.experts)
            else:
                result = self._run_plain(batch, logits)
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
        self.store.require_unharmed()
        return result

    def _check(self, batch: Batch) -> None:
        """Raise KernelError for what a step would refuse, before anything is prepared for it."""
        try:
            self._plain.check_rows(batch.token_ids, batch.sequences, batch.positions, batch.logit_rows)
        except ValueError as error:
            raise KernelError(f"step refused: {error}") from None
        except TypeError:
            kinds = ", ".join(f"{name} {_kind(value)}" for name, value in vars(batch).items())
            raise KernelError(f"step refused: {kinds}; all must be int32 arrays of one dimension") from None

    def _run(self, executor: cpu_kernels.Executor, batch: Batch, logits: npt.NDArray[np.float32]) -> StepResult:
        start = time.perf_counter()
        try:
            parts = executor.step(batch.token_ids, batch.sequences, batch.positions, batch.logit_rows, logits)
        except ValueError as error:
            raise KernelError(f"step refused: {error}") from None
        except RuntimeError as error:
            if os.getpid() != self._process:  # forked by a callback or by the handler of a signal
                raise forked_error() from None
            raise StepCancelled(str(error)) from None
        return StepResult(logits, _step_times(parts, time.perf_counter() - start))

    def _run_plain(self, batch: Batch, logits: npt.NDArray[np.float32]) -> StepResult:
        result = self._run(self._plain, batch, logits)
        if self._use:
            self._use.add()
        return result

    def _forward_placed(self, batch: Batch, logits: npt.NDArray[np.float32], experts: DeviceExperts) -> StepResult:
        """Run a step with the device, or without it if `experts` says so. Running a step again writes the same
        values.
        """
        while experts.placing:
            experts.begin()
            try:
                return experts.end(self._run(self._placed, batch, logits))
            except BaseException as error:
                if not self._recover(experts, error):
                    raise
        return self._run_plain(batch, logits)

    def _recover(self, experts: DeviceExperts, error: BaseException) -> bool:
        """Clean up after a failed step. Returns whether it may be run again: not if that would change sequences
        twice.
        """
        try:
            return experts.recover(error) and self.plan.kv.repeatable
        except KernelError:
            self._leave_device()
            raise

    def _leave_device(self) -> None:
        """Run later steps on the threads alone. They lose no token, because the threads hold all keys and values."""
        if self.experts:
            self.experts.placing = False
        if self.device_step:
            self.device_step.close()
        self.device_step, self._plain = None, self._executor

    def expert_use(self) -> npt.NDArray[np.int64] | None:
        """How many rows each expert has computed since the engine was opened, [MoE layers, experts]; in steps of an
        expert cache, how many of those that decode have called it. None without experts; any thread may ask.
        """
        use, experts = self._use, self.experts
        if use is None:
            return None
        return use.counts + experts.history.calls if experts else use.counts.copy()

    def watch(self, observer: SpanObserver | None) -> None:
        """From the next step on, report spans of the device, its copies and the threads to `observer`, from several
        threads; None stops it.
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
        """One line for each request that could not be met."""
        of_step = self.device_step.notes if self.device_step else []
        return of_step + (self.experts.notes if self.experts else [])

    def release(self, sequence: int) -> None:
        """Free and zero the state of a sequence: its keys and values."""
        if self._closed:
            return
        self.addresses.release(sequence)
        if self.device_step:
            self.device_step.forget(sequence)

    def step_bytes(self, rows: int) -> float:
        """What a step with so many rows of one sequence reads at least, and their logits."""
        return step_cost(self.spec, self.plan.formats, self.plan.kv.format, 1, rows, 0, rows).bytes

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the state of the first `tokens` tokens of a sequence to a new one: keys and values alone, so the plan's
        state must be repeatable. tokens: a multiple of `hybrid.formats.block.BLOCK`.
        """
        if not self._closed:
            self.addresses.copy(source, target, tokens)

    @property
    def kv(self) -> KvArena:
        """The states of all sequences, while this is open."""
        return self.addresses.kv

    def cancel(self) -> None:
        """End the running step (or the next) between two of its ops; from any thread. Does nothing once closed."""
        if self._closed:
            return
        for executor in {self._executor, self._plain, self._placed}:
            if executor:
                executor.cancel()

    def close(self) -> None:
        """Give everything back; the engine cannot be used afterwards. A second call does nothing, nor does one in a
        forked process, where everything is the parent's.
        """
        if self._closed or os.getpid() != self._process:
            return
        self._closed = True
        if self.experts:
            self._close_experts()
        if self.device_step:
            self.device_step.close()
        self.experts = self.routes = self._placed = self.device_step = self._lengths = self._use = None
        del self._executor, self._plain, self._start, self.addresses, self.pool
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

    def _new_executor(self) -> cpu_kernels.Executor:
        plan = self.plan
        return cpu_kernels.Executor(
            isa=plan.isa,
            pool=self.pool,
            rows=plan.max_rows,
            sequences=plan.sequences,
            positions=plan.max_seq_len,
            vocab=self.spec.vocab,
            scratch_bytes=plan.scratch_bytes,
            batch_invariant=plan.batch_invariant,
        )

    def _new_routes(self) -> Routes | None:
        if not self.plan.cache and not any(op.kind == "host" for op in self.plan.ops):
            return None
        ids, weights = (self.addresses.buffer(name) for name in (IDS, WEIGHTS))
        trace = read_route_trace(self.plan.route_trace, self.spec) if self.plan.route_trace else None
        return Routes(ids, weights, self.plan.max_rows, self.spec.top_k, self.plan.sequences, trace)

    def _new_use(self) -> ExpertUse:
        layers, experts = use_shape(self.spec)
        return ExpertUse(self.addresses.integers(OFFSETS, layers * (experts + 1)).reshape(layers, -1))

    def _open_step(self) -> None:
        from hybrid.gpu.opening import open_step

        at = self.addresses
        self.device_step = open_step(self.plan, self.store, at.weight, at.buffer, at.arena, at.kv.address)
        at.answer(self.device_step, *CALLS)
        self._plain = bind(self._new_executor(), self.plan.device_ops, at)

    def _open_experts(self, profiles: Path | None) -> None:
        from hybrid.engine.experts.start import ExpertsStart

        assert self.routes is not None
        self._start = ExpertsStart(self.store, self.plan, self.pool, self.addresses, profiles)
        warm = self._start.warm_keys()
        self.experts = self._start.run(self.routes, self.device_step)
        self.addresses.answer(self.experts, *PLACED_CALLS)
        ops = self.plan.device_placed_ops or self.plan.placed_ops
        self._placed = bind(self._new_executor(), ops, self.addresses)
        self._start.price(self.experts)
        # Or its threads would outlive the engine.
        self._close_experts = weakref.finalize(self, _call_unless_forked, self._process, self.experts.close)
        self.experts.preload(warm)

    @property
    def profile(self) -> MachineProfile | None:
        """What experts cost on this machine, if it was measured."""
        return self._start.profile if self._start else None

    def save_experts(self, path: Path) -> None:
        """Write which experts the device holds, for `CacheConfig.warm`. Raises ConfigError without a device."""
        if not self.experts or not self._start:
            raise ConfigError("--cache-save has nothing to save: this run has no expert cache")
        write_warm(path, self._start.model_mark(), self.experts.plan.shape, self.experts.table.resident())


def _call_unless_forked(process: int, call: Callable[[], None]) -> None:
    """The device of a forked process is its parent's."""
    if os.getpid() == process:
        call()


def _kind(value: object) -> str:
    """What an argument is that is no array of ints: "is int64 [2, 3]", "is a list"."""
    if isinstance(value, np.ndarray):
        return f"is {value.dtype} {list(value.shape)}{'' if value.flags.c_contiguous else ', not contiguous'}"
    return f"is a {type(value).__name__}"


def _step_times(parts: Sequence[float], total: float) -> StepTimes:
    """parts: seconds of each `cpu_kernels.Part`."""
    attention, moe, head, _, experts, place, join = parts
    moe += experts + place + join
    other = total - attention - moe - head
    return StepTimes(attention, moe, head, other, total=total, cpu_experts=experts, lookup=place, join=join)
