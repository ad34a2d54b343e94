"""The device's part of a step, called back by the executor between those of the threads: see `hybrid.device_step`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from itertools import groupby
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from gpu_cache.errors import DeviceFull
from hybrid.core import Batch, SpanObserver
from hybrid.errors import DeviceFailed
from hybrid.gpu.attention import State, attend, attend_whole, finish, join, read_states
from hybrid.gpu.buffers import SharedBuffers
from hybrid.gpu.link import Clock, Link, phase
from hybrid.gpu.mirror import KvMirror, Run, extents_of, seen_places
from hybrid.gpu.parts import Routed, gated, rms_norm, rope_table, rotate, route, softmax_scale
from hybrid.gpu.products import linear
from hybrid.gpu.weights import DeviceWeights
from hybrid.models.rope import inverse_frequencies
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.placement import NEXT
from hybrid.plan import Plan
from hybrid.program import key_dim, ropes


@dataclass(frozen=True)
class _Group:
    """Runs of equal length that are attended together. rows: indexes into the step."""

    runs: tuple[Run, ...]
    rows: Tensor
    keys: int  # places of the rings that may hold something
    seen: dict[int | None, Tensor]  # by window


@dataclass(frozen=True)
class _Step:
    """The step at hand. tables: of every rope. older: by window, whether a row sees what is not mirrored."""

    logit_rows: Tensor
    logits: npt.NDArray[np.float32]
    rows: int
    slots: Tensor
    places: Tensor
    tables: list[tuple[Tensor, Tensor]]
    groups: list[_Group]
    older: dict[int | None, bool]


def _on_device(method: Callable[..., None]) -> Callable[..., None]:
    """What torch raises there as one of our errors, in one line."""

    @wraps(method)
    def call(*arguments: Any) -> None:
        try:
            with torch.inference_mode():
                method(*arguments)
        except torch.OutOfMemoryError as error:
            raise DeviceFull(_first_line(error)) from error
        except RuntimeError as error:
            raise DeviceFailed(
                f"the device failed ({_first_line(error)}); this step is lost, those to come run on the CPU alone"
            ) from error

    return call


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class DeviceStep:
    """Holds the residual stream of a step. `normed`, float32 [rows, hidden], are the rows that experts of the layer at
    hand get, and `routed` where they go: for who computes some of them on the device, and leaves their weighted sum,
    float32 [rows, hidden or more], in `hits` until the layer after takes it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: Plan,
        weights: DeviceWeights,
        mirror: KvMirror,
        link: Link,
        address: Callable[[str], int],
    ) -> None:
        """address: of the buffers of the engine."""
        self.mirror = mirror
        self.note: str | None = None  # why copies are slower than they could be
        self.observer: SpanObserver | None = None  # told of the phases of a step at its end
        self._spans: list[tuple[str, Any, Any]] = []
        self._left = 0.0  # when `attend` was left
        self.normed = self.residual = torch.empty(0)
        self.routed: Routed | None = None
        self.hits: Tensor | None = None
        self._spec, self._plan, self._weights, self._link = spec, plan, weights, link
        self._ropes = [
            (torch.from_numpy(frequencies).to(link.device), factor)
            for frequencies, factor in map(inverse_frequencies, ropes(spec))
        ]
        known = ropes(spec)
        self._rope_of = [known.index(layer.attention.rope) if layer.attention.rope else None for layer in spec.layers]
        self._windows = {layer.attention.window for layer in spec.layers}
        self._buffers = SharedBuffers(spec, plan, link, address)
        self._pending: Tensor | None = None  # what the shared expert made
        self._owes_experts = False
        self._mirrored: State | None = None
        self._attended = torch.empty(0)

    def begin(self, batch: Batch, logits: npt.NDArray[np.float32]) -> None:
        """The step to come. logits: float32 [len(batch.logit_rows), vocab], written by `finish`."""
        self._asked = batch, logits

    @_on_device
    def start(self, _: int = 0) -> None:
        """The step begins: the executor has found it within the plan."""
        batch, logits = self._asked
        runs = [self._run(*run) for run in _runs(batch)]
        device = self._link.device
        tokens, slots, positions, logit_rows = (
            torch.from_numpy(array).to(device, torch.int64, copy=True)
            for array in (batch.token_ids, batch.slots, batch.positions, batch.logit_rows)
        )
        self._step = _Step(
            logit_rows=logit_rows,
            logits=logits,
            rows=len(tokens),
            slots=slots,
            places=positions % self.mirror.capacity,
            tables=[rope_table(positions, frequencies, factor) for frequencies, factor in self._ropes],
            groups=[self._group(group) for group in _together(runs)],
            older={window: any(_sees_older(run, window) for run in runs) for window in self._windows},
        )
        for run in runs:
            self._buffers.ends[run.row : run.row + run.rows] = run.start
        self.residual = self._weights.embedding[tokens].float()
        self._owes_experts, self.hits, self._pending = False, None, None
        self._clock, self._spans = Clock(self._link) if self.observer else None, []

    @_on_device
    def attend(self, layer: int) -> None:
        """Up to attention over what is mirrored, which goes on while the threads attend to older tokens."""
        with self._phase("attention"):
            self._add_experts()
            spec, weights, step = self._spec.layers[layer], self._weights.attention[layer], self._step
            rows = rms_norm(self.residual, weights.norm, self._spec.norm.eps).bfloat16()
            q, k, v = self._heads(layer, linear(rows, weights.qkv, weights.qkv_bias))
            self._link.to_host(self._buffers.new_kv(layer, step.rows), torch.cat([k, v], 1).flatten(1))
            older = step.older[spec.attention.window]
            if older:
                self._link.to_host(self._buffers.queries(layer, step.rows), _padded_queries(q, spec))
            sent = self._link.mark()
            self.mirror.write(layer, step.slots, step.places, k, v)
            self._attend_mirrored(layer, q.bfloat16(), older)
            if older:
                self._link.wait(sent)
        self._left = perf_counter()

    @_on_device
    def route(self, layer: int) -> None:
        """The rest of attention, and the feed-forward up to what its experts read; dense ones whole."""
        if self.observer is not None and self._step.older[self._spec.layers[layer].attention.window]:
            self.observer("older tokens", self._left, perf_counter())
        with self._phase("route"):
            spec, weights = self._spec.layers[layer], self._weights.attention[layer]
            attended = self._join_older(layer).flatten(1).bfloat16()
            self.residual = self.residual + linear(attended, weights.out, weights.out_bias)
            ffn = self._weights.feed_forward[layer]
            self.normed = rms_norm(self.residual, ffn.norm, self._spec.norm.eps)
            if ffn.dense is not None:
                self.residual = self.residual + gated(self.normed.bfloat16(), ffn.dense, spec.feed_forward.activation)
            else:
                self._send_rows(layer)
            sent = self._link.mark()
            self._start_shared(layer)
            self._link.wait(sent)  # keys and values too
            if ffn.dense is None:
                self._buffers.expert_sum[: self._step.rows] = 0
                self._owes_experts = True

    @_on_device
    def finish(self, _: int = 0) -> None:
        """The head, for the rows whose logits are wanted."""
        with self._phase("head"):
            self._add_experts()
            rows = rms_norm(self.residual[self._step.logit_rows], self._weights.final_norm, self._spec.norm.eps)
            logits = linear(rows.bfloat16(), self._weights.head)
            torch.from_numpy(self._step.logits).copy_(logits)
        self._tell()

    def forget(self, slot: int) -> None:
        """The keys and values of a slot were released, or written by others."""
        self.mirror.forget(slot)

    def close(self) -> None:
        """The buffers of the engine are about to go."""
        self._link.unpin()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = self._link.time() if self.observer else None
        with phase(name):
            yield
        if start is not None:
            self._spans.append((name, start, self._link.time()))

    def _tell(self) -> None:
        """When the device was busy with what."""
        if self.observer is not None and self._clock is not None:
            for name, start, end in self._spans:
                self.observer(name, self._clock.seconds(start), self._clock.seconds(end))

    def _run(self, slot: int, row: int, rows: int, position: int) -> Run:
        return Run(slot, row, rows, position, *self.mirror.extend(slot, position, rows))

    def _group(self, runs: Sequence[Run]) -> _Group:
        rows = torch.cat([torch.arange(run.row, run.row + run.rows) for run in runs]).to(self._link.device)
        keys = min(self.mirror.capacity, max(run.end for run in runs))
        extents, capacity = extents_of(runs, self._link.device), self.mirror.capacity
        seen = {window: seen_places(extents, runs[0].rows, keys, capacity, window) for window in self._windows}
        return _Group(tuple(runs), rows, keys, seen)

    def _heads(self, layer: int, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values float32 [rows, heads, head_dim], normed and turned."""
        attention, weights = self._spec.layers[layer].attention, self._weights.attention[layer]
        counts = [attention.heads, attention.kv_heads, attention.kv_heads]
        q, k, v = qkv.unflatten(1, (-1, attention.head_dim)).split(counts, 1)
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k = (rms_norm(x, w, self._spec.norm.eps) for x, w in ((q, weights.q_norm), (k, weights.k_norm)))
        index = self._rope_of[layer]
        if attention.rope is not None and index is not None:
            q, k = (rotate(x, self._step.tables[index], attention.rope) for x in (q, k))
        return q, k, v

    def _attend_mirrored(self, layer: int, q: Tensor, older: bool) -> None:
        """Whole where that is all; else a state, to be joined with that of the threads and with sinks."""
        attention, sinks = self._spec.layers[layer].attention, self._weights.attention[layer].sinks
        scale, parts = softmax_scale(attention), []
        for group in self._step.groups:
            slots = [run.slot for run in group.runs]
            k, v = self.mirror.read(layer, slots, group.keys)
            queries = q[group.rows].unflatten(0, (len(slots), -1))
            seen = group.seen[attention.window]
            whole = sinks is None and not older
            parts.append(attend_whole(queries, k, v, seen, scale) if whole else attend(queries, k, v, seen, scale))
        if sinks is None and not older:
            self._attended = self._in_order([part for part in parts if isinstance(part, Tensor)])
            self._mirrored = None
        else:
            states = [part for part in parts if isinstance(part, State)]
            self._mirrored = State(
                *(self._in_order([getattr(state, name) for state in states]) for name in ("values", "top", "total"))
            )

    def _in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """[rows, ...] of parts [runs, rows of a run, ...], one a group."""
        groups = self._step.groups
        if len(groups) == 1:
            return parts[0].flatten(0, 1)
        flat = torch.cat([part.flatten(0, 1) for part in parts])
        whole = torch.empty_like(flat)
        whole[torch.cat([group.rows for group in groups])] = flat
        return whole

    def _join_older(self, layer: int) -> Tensor:
        """float32 [rows, heads, head_dim]."""
        if self._mirrored is None:
            return self._attended
        attention, state = self._spec.layers[layer].attention, self._mirrored
        if self._step.older[attention.window]:
            older = self._link.to_device(self._buffers.states(layer, self._step.rows))
            state = join(state, read_states(older, attention.heads, attention.head_dim))
        return finish(state, self._weights.attention[layer].sinks)

    def _send_rows(self, layer: int) -> None:
        """What the threads need to compute experts: rows, ids and weights; and what the cache asks the next layer."""
        buffers = self._buffers
        self.routed = self._route(layer)
        buffers.send_routes("", self.routed)
        buffers.send_rows(self.normed)
        following = next((i for i in range(layer + 1, len(self._spec.layers)) if self._is_moe(i)), None)
        if following is not None and self._plan.cache and self._plan.cache.next_gate:
            buffers.send_routes(NEXT, self._route(following))

    def _route(self, layer: int) -> Routed:
        ffn, weights = self._spec.layers[layer].feed_forward, self._weights.feed_forward[layer]
        assert ffn.router is not None and weights.router is not None
        return route(self.normed, weights.router, weights.router_bias, ffn.router, ffn.shared_gate)

    def _start_shared(self, layer: int) -> None:
        shared = self._weights.feed_forward[layer].shared
        if shared is None or self.routed is None:
            return
        made = gated(self.normed.bfloat16(), shared, "silu")
        self._pending = made if self.routed.shared is None else made * self.routed.shared[:, None]

    def _add_experts(self) -> None:
        """What threads and device made of the last layer's experts, once."""
        if not self._owes_experts:
            return
        with self._phase("join"):
            hidden = self._spec.hidden
            made = self._link.to_device(self._buffers.expert_sum[: self._step.rows])[:, :hidden]
            for part in (self.hits, self._pending):
                made = made if part is None else made + part[:, :hidden]
            self.residual = self.residual + made
            self._owes_experts, self.hits, self._pending = False, None, None

    def _is_moe(self, layer: int) -> bool:
        return self._spec.layers[layer].feed_forward.is_moe


def _padded_queries(q: Tensor, spec: LayerSpec) -> Tensor:
    return pad(q, (0, key_dim(spec) - spec.attention.head_dim)).bfloat16().flatten(1)


def _runs(batch: Batch) -> list[tuple[int, int, int, int]]:
    """(slot, first row, rows, position of the first row) of adjacent rows of one slot."""
    found, row = [], 0
    for slot, same in groupby(batch.slots.tolist()):
        rows = len(list(same))
        found.append((slot, row, rows, int(batch.positions[row])))
        row += rows
    return found


def _together(runs: Sequence[Run]) -> list[list[Run]]:
    """Rows that decode are attended together, prompts each alone."""
    decoding = [run for run in runs if run.rows == 1]
    return [*([decoding] if decoding else []), *([run] for run in runs if run.rows > 1)]


def _sees_older(run: Run, window: int | None) -> bool:
    return run.start > (0 if window is None else max(0, run.position - window + 1))
