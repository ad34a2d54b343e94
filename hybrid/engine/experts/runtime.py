"""Experts in two places while a step runs: the cache says which the device holds, both compute, and both are joined.

Called back by the executor, once before the experts of a MoE layer (`place`) and once after (`join`).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter, sleep
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpu_cache.admission import Costs
from gpu_cache.calls import distinct_calls
from gpu_cache.errors import DeviceFull, DeviceLost
from gpu_cache.geometry import Geometry
from gpu_cache.prefetch import learnt_rule
from gpu_cache.table import Fill, Table
from hybrid.core import SpanObserver, StepResult
from hybrid.engine.experts.copies import Copies
from hybrid.engine.experts.costs import CallCosts, call_costs
from hybrid.engine.experts.history import COUNTS, DecodeHistory
from hybrid.engine.experts.open import fewer_slots, open_device
from hybrid.engine.experts.pieces import expert_pieces, pieces_of, whole_memory
from hybrid.engine.experts.streaming import streaming_pays
from hybrid.engine.experts.verdict import Verdict, judge
from hybrid.engine.routes import Routes
from hybrid.errors import KernelError
from hybrid.machine.memory import view
from hybrid.machine.phases import phased
from hybrid.models.layers.expert_sets import IDS
from hybrid.plan.expert_cache import CachePlan
from hybrid.plan.passes.place_experts import CONTRIBUTIONS, LEFT_IDS, NEXT
from hybrid.plan.plan import Plan

if TYPE_CHECKING:
    from hybrid.gpu.step import DeviceStep

PAUSE = 0.0005  # seconds between two looks for copies that are waited for
WARM_UP = 32  # steps that decode before `--cache auto` decides


@dataclass
class CacheTimes:
    """Totals since the engine was opened: seconds of the thread that calls, and counts."""

    lookup: float = 0.0  # the table, its bookkeeping, issuing copies
    start: float = 0.0  # issuing runs of the device
    wait: float = 0.0  # for these runs
    misses: float = 0.0  # experts that the threads computed
    late_copies: int = 0  # experts called while their copy was in flight
    streamed_layers: int = 0  # layers whose misses were streamed to the device


class DeviceExperts:
    """The table, the device and the buffers that they share with the step.

    placing: whether steps use the device; the engine checks it before each step. notes: one line for each request that
    could not be met. geometry: of the actual slots, which may be fewer than planned.
    """

    def __init__(
        self,
        plan: Plan,
        routes: Routes,
        address: Callable[[str], int],
        weights: Callable[[str], int],
        cpu_seconds: tuple[float, float],
        step: DeviceStep | None = None,
    ) -> None:
        """address, weights: address of a buffer of the engine, and of a tensor of its model. cpu_seconds: what an
        expert with one row costs the threads, and what each of many rows costs. step: the rest of the step, if a device
        computes that.
        """
        assert plan.cache is not None
        self.plan: CachePlan = plan.cache
        self.placing = True
        self.times = CacheTimes()
        self.observer: SpanObserver | None = None  # called with the spans of lookups, misses and waits
        shape = self.plan.shape
        self._routes, pairs = routes, plan.max_rows * shape.top_k
        # Memory views and lists, not arrays: in every layer this code comes out of cold caches, and numpy is large.
        self._left_ids = view(address(LEFT_IDS), (pairs,), np.int32).data
        self._early_ids = view(address(NEXT + IDS), (pairs,), np.int32).data if self.plan.next_gate else None
        self._prefetch = learnt_rule(self.plan.settings.prefetch, self.plan.geometry)
        self._slot_ids = np.empty((plan.max_rows, shape.top_k), np.int32)
        self._flat_slot_ids = self._slot_ids.reshape(-1).data
        floats = plan.buffers[CONTRIBUTIONS][1] // 4
        self._contributions = view(address(CONTRIBUTIONS), (floats,), np.float32)
        self._contributions[:] = -0.0
        self._sequences = plan.sequences
        pieces = expert_pieces(self.plan, weights)
        self._source = partial(pieces_of, pieces, shape.experts)
        self.costs = call_costs(self.plan, *cpu_seconds)
        self.notes: list[str] = []
        places = {name: address(name) for name in plan.buffers}  # not `address`, which belongs to who owns this
        self._open = partial(
            open_device, plan, source=self._source, weights=whole_memory(pieces), address=places.__getitem__, step=step
        )
        self._open_device(self.plan.geometry)
        if step:
            step.hit_launcher = self
        self.following: str | None = None  # what `--cache auto` chose
        self.table = self._new_table(self.plan.settings.quota)
        self._decoding = False
        self._hits_launched = False  # whether the hits of the current layer were already launched
        self._misses_started = (0.0, False)  # (start time, whether the threads have any experts to compute)
        self._counts_before = np.zeros((len(shape.layers), len(COUNTS) + 1), np.int64)  # of earlier tables
        self._ticket: Any = None
        self._copies = Copies()
        self._placing_layer = False

    def begin(self) -> None:
        """A step begins."""
        self.table.begin_step(self._routes.step)
        self._decoding = self._routes.rows <= self._sequences
        self._counts = self.count()
        self._device_times = replace(self.device.times)
        self._times = replace(self.times)

    @property
    def can_launch(self) -> bool:
        """See `hybrid.gpu.step.HitLauncher`. False when a step has many rows: the host then decides what to stream."""
        return self.placing and self._decoding and self.device.run_looked_up is not None

    @phased("hits")
    def launch_hits(self, layer: int) -> None:
        """Launch this layer's hits on the device. They equal what `place` looks up, because nothing is published in
        between.
        """
        start = perf_counter()
        self._placing_layer = True
        self._copies.publish(self.device, self.table)
        assert self.device.run_looked_up is not None
        self._ticket = self.device.run_looked_up(layer * self.plan.shape.experts, self._routes.rows)
        self._hits_launched = True
        self.times.start += perf_counter() - start

    @phased("lookup")
    def place(self, layer: int) -> None:
        """Start the hits of a layer on the device, leave the rest to the threads, and start copies."""
        start = perf_counter()
        self._placing_layer = True
        routes, table = self._routes, self.table
        if not self._hits_launched:
            self._copies.publish(self.device, self.table)
        ids = routes.ids.tolist()
        experts, scores = distinct_calls(ids, routes.weights.tolist(), routes.top_k)
        found = table.lookup(layer, experts, scores)
        if self._decoding:
            self.history.count_calls(layer, experts)
        if found.loading:
            first = layer * self.plan.shape.experts
            self.times.late_copies += self._copies.count_late(first + expert for expert in found.loading)
        fills = table.admit() if found.misses else []
        for fill in fills:
            self._copies.start(self.device, fill.slot, fill.key)
        slot_of = dict(found.hits)
        streamed = [] if self._decoding else self._to_stream(layer, ids, experts, slot_of, len(fills))
        self._share_out(ids, slot_of)
        early = self._early(layer, len(ids))
        self._copy_ahead(layer, early, experts)
        routes.observe(layer, early)
        looked_up = perf_counter()
        self.times.lookup += looked_up - start
        if slot_of and not self._hits_launched:  # last: the device cannot begin while this thread is busy here
            self._ticket = self.device.run(self._slot_ids[: routes.rows], streamed)
            self.times.start += perf_counter() - looked_up
        self._placing_layer = self._hits_launched = False
        if self.observer is not None:
            self.observer("lookup", start, looked_up)
            self._misses_started = (perf_counter(), len(slot_of) < len(experts))

    def _early(self, layer: int, pairs: int) -> Any:
        """What the router of the next layer says, int32 [pairs]; None if it is not asked, or there is none."""
        return None if self._early_ids is None or layer + 1 == len(self.plan.shape.layers) else self._early_ids[:pairs]

    def _copy_ahead(self, layer: int, early: Any, experts: Sequence[int]) -> None:
        """Start copies of experts that a later layer should call: its router says which, or a rule that learns."""
        fills: list[Fill] = []
        if self._prefetch is not None:
            named = self._prefetch.follow(layer, experts)
            fills = self.table.prefetch(self._prefetch.ahead(layer), named)
        elif early is not None:
            fills = self.table.prefetch(layer + 1, list(dict.fromkeys(early.tolist())))
        for fill in fills:
            self._copies.start(self.device, fill.slot, fill.key)

    @phased("wait")
    def join(self, layer: int) -> None:
        """Wait until the device has computed its part of a layer."""
        start = perf_counter()
        if self._ticket is not None:
            self.device.join(self._ticket)
            self._ticket = None
            self.times.wait += perf_counter() - start
        self.table.release()
        if self.observer is not None:
            self._report_spans(start)

    def _report_spans(self, joined: float) -> None:
        """joined: when the threads had computed the misses."""
        assert self.observer is not None
        start, any_misses = self._misses_started
        if any_misses:
            self.observer("misses", start, joined)
        self.observer("wait", joined, perf_counter())

    def end(self, result: StepResult) -> StepResult:
        """The result of a step, with what the cache and the device did in it."""
        self.times.misses += result.times.cpu_experts
        lookup, wait = self.times.lookup - self._times.lookup, self.times.wait - self._times.wait
        before, now = self._device_times, self.device.times
        times = replace(
            result.times,
            device_experts=now.run - before.run,
            copy=now.copy - before.copy,
            lookup=lookup,
            wait=wait + max(0.0, result.times.lookup - lookup),
            join=max(0.0, result.times.join - wait),
        )
        counts = self.count() - self._counts
        if self._decoding:
            self.history.add(counts, times.lookup + times.join)
            if self.plan.settings.mode == "auto" and self.history.steps == WARM_UP:
                self._follow(self.verdict())
        return replace(result, times=times, cache=counts[:, : len(COUNTS)])

    def reprice(self, costs: CallCosts) -> None:
        """Use costs measured on the device. Called before the first step."""
        self.costs = costs
        self._contributions[:] = -0.0  # measuring left some
        self.device.forget()
        self.table = self._new_table(self.plan.settings.quota)

    def verdict(self) -> Verdict | None:
        """The verdict on the decode steps so far; None before the first of them."""
        return judge(self.history.observed(), self.costs) if self.history.steps else None

    def preload(self, keys: Sequence[int]) -> None:
        """Copy these experts to the device before a step runs, as many as fit their indexes."""
        for fill in self.table.preload(keys):
            self.device.load(fill.slot, fill.key)

    def _follow(self, verdict: Verdict | None) -> None:
        """Continue in the fastest way: on the CPU alone, with fixed experts on the device, or with the cache."""
        if verdict is None:
            return
        self.following = verdict.best
        if verdict.best == "cpu":
            self.placing = False
        elif verdict.best == "static":
            self.drain()
            self._counts_before += self._count_table()
            self.device.forget()
            self.table = self._new_table(0)
            self.preload(self.history.most_called())

    def recover(self, error: BaseException) -> bool:
        """Clear what a failed step left in the buffers and the table. Returns whether the step may be run again,
        because giving slots back has freed memory of the device.

        Raises KernelError if the device is lost; the next steps run without it.
        """
        try:
            self._clear(error)
        except DeviceLost as lost:
            self.placing = False
            self.device.close()
            raise KernelError(
                f"the device is lost: {lost}; requests that ran have failed, the next ones run on the CPU alone"
            ) from error
        finally:
            self._contributions[:] = -0.0
        return isinstance(error, DeviceFull)

    def _clear(self, error: BaseException) -> None:
        if isinstance(error, DeviceLost):
            raise error
        self._hits_launched = False
        if self._ticket is not None:
            ticket, self._ticket = self._ticket, None
            self.device.join(ticket)
        if isinstance(error, DeviceFull):
            clear_frames(error.__traceback__)  # they may hold memory of the device
            return self._give_back()
        if self._placing_layer:  # the table may be in the middle of something
            self.reset()
        self.table.release()

    def _give_back(self) -> None:
        """Free memory of the device: restart the cache with fewer slots, or end it if there is only one."""
        fewer = fewer_slots(self.geometry)
        self.device.close()
        self._copies.clear()
        self._counts_before += self._count_table()
        self._placing_layer = False
        if fewer is None:
            self.placing = False
            return
        self._open_device(fewer)
        self.table = self._new_table(self.plan.settings.quota)

    def reset(self) -> None:
        """Forget what the device holds, after the copies in flight have ended."""
        while self.device.pending:
            self.device.poll()
            sleep(PAUSE)
        self._copies.clear()
        self._counts_before += self._count_table()
        self.device.forget()
        self.table = self._new_table(0 if self.following == "static" else self.plan.settings.quota)
        self._placing_layer = False

    def drain(self) -> None:
        """Wait for the copies in flight and publish them."""
        while self.device.pending:
            self._copies.publish(self.device, self.table)
            sleep(PAUSE)

    def close(self) -> None:
        self.device.close()

    def _to_stream(
        self, layer: int, ids: list[int], experts: Sequence[int], slot_of: dict[int, int], copies: int
    ) -> list[int]:
        """Keys of the experts to stream: all misses of a layer, or none. In `slot_of` they get the ids that follow
        those of the slots.
        """
        mode = self.plan.settings.stream
        missed = [expert for expert in experts if expert not in slot_of]
        if mode == "off" or not missed:
            return []
        if mode == "auto":
            rows = Counter(ids)
            if not streaming_pays([rows[e] for e in slot_of], [rows[e] for e in missed], copies, self.costs):
                return []
        self.times.streamed_layers += 1
        slot_of.update((expert, slot) for slot, expert in enumerate(missed, self.geometry.slots))
        return [layer * self.plan.shape.experts + expert for expert in missed]

    def _share_out(self, ids: list[int], slot_of: dict[int, int]) -> None:
        """Write the expert ids that the threads compute, and the slot ids that the device computes."""
        self._left_ids[: len(ids)] = array("i", [-1 if expert in slot_of else expert for expert in ids])
        if slot_of:
            slot = slot_of.get
            self._flat_slot_ids[: len(ids)] = array("i", [slot(expert, -1) for expert in ids])

    def count(self) -> npt.NDArray[np.int64]:
        """int64 [MoE layers, 6]: counts since the engine was opened, in the order of COUNTS, then fills."""
        return self._counts_before + self._count_table()

    def _count_table(self) -> npt.NDArray[np.int64]:
        counts = self.table.counts
        return np.stack([getattr(counts, name) for name in (*COUNTS, "fills")], axis=1)

    def _new_table(self, quota: int | None) -> Table:
        settings, costs = self.plan.settings, self.costs
        prices = Costs(costs.copy, costs.cpu, costs.device)
        return Table(self.geometry, settings.policy, settings.admission, quota, settings.seed, prices)

    def _open_device(self, geometry: Geometry) -> None:
        self.device, self.geometry, notes = self._open(geometry)
        self.history = DecodeHistory(self.geometry)
        self.notes += notes
