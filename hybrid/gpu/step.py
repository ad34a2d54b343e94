"""The device part of a step, called back by the executor between those of the threads: `plan/passes/gpu_step.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpu_cache.errors import DeviceFull, first_line
from hybrid.core import Batch, SpanObserver
from hybrid.errors import DeviceFailed
from hybrid.gpu.attention_choice import WholeAttention
from hybrid.gpu.buffers import SharedBuffers
from hybrid.gpu.graphs import Capture, Graphs
from hybrid.gpu.inputs import StepInputs, make_inputs, runs_of
from hybrid.gpu.layers.base import DeviceFeedForward, DeviceMixer, Shared, kind_of
from hybrid.gpu.link import Clock, Link
from hybrid.gpu.mirror import KvMirror
from hybrid.gpu.parts import Routed, chooser, rms_norm
from hybrid.gpu.products import linear
from hybrid.gpu.report import DeviceReport
from hybrid.gpu.weights import DeviceWeights
from hybrid.machine.phases import phase
from hybrid.models.layers.grouped_query import ENDS
from hybrid.models.rope import inverse_frequencies
from hybrid.models.spec import ModelSpec
from hybrid.plan.plan import Plan


class Finder(Protocol):
    """Has the hits of a layer computed before the host knows which experts its rows take."""

    @property
    def finds(self) -> bool:
        """Whether it does in the step at hand."""

    def find(self, layer: int) -> None:
        """Queue them. layer: among those with experts."""


@dataclass(frozen=True)
class _Flow:
    """What a layer leaves: the residual stream float32 [rows, hidden]; of a MoE layer the rows that its experts get,
    `normed`, float32 [rows, hidden], where they go, and what the shared expert made of them, if there is one.
    """

    residual: Tensor
    normed: Tensor
    routed: Routed | None = None
    shared: Tensor | None = None


def _on_device(method: Callable[..., None]) -> Callable[..., None]:
    """What torch raises there as one of our errors, in one line."""

    @wraps(method)
    def call(self: DeviceStep, *arguments: Any) -> None:
        try:
            with torch.inference_mode(), self.link.queue():
                method(self, *arguments)
        except torch.OutOfMemoryError as error:
            raise DeviceFull(first_line(error)) from error
        except RuntimeError as error:
            raise DeviceFailed(
                f"the device failed ({first_line(error)}); this step is lost, those to come run on the CPU alone"
            ) from error

    return call


class DeviceStep:
    """Holds the residual stream of a step. Who computes experts on the device reads `normed` and `routed`, and leaves
    the weighted sum of each row, float32 [rows, hidden or more], in `hits` until the layer after takes it. finder:
    asked as soon as the router is.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: Plan,
        weights: DeviceWeights,
        mirror: KvMirror,
        attention: WholeAttention,
        link: Link,
        address: Callable[[str], int],
        capture: Capture | None,
        pinning: str | None,
    ) -> None:
        """address: of the buffers of the engine. capture: see `Graphs`. pinning: what `link` said of it."""
        self.attention, self._pinning = attention, pinning
        self.mirror, self.link, self.graphs = mirror, link, Graphs(capture)
        self.observer: SpanObserver | None = None  # told of the phases of a step at its end
        self.finder: Finder | None = None
        self.hits: Tensor | None = None
        self._spans: list[tuple[str, Any, Any]] = []
        self._left = 0.0  # when `attend` was left
        self._flow = _nothing(spec, plan, link.device)
        self._spec, self._plan, self._weights = spec, plan, weights
        self._ropes = [
            (torch.from_numpy(frequencies).to(link.device), factor)
            for frequencies, factor in map(inverse_frequencies, spec.ropes)
        ]
        self._buffers = SharedBuffers(spec, plan, link, address)
        shared = Shared(plan.sequences, mirror.capacity, link, self._buffers, attention, chooser(link.device))
        self._mixers, self._feed_forwards = _open_halves(spec, plan, weights, shared)
        self._windows = frozenset[int | None]().union(*(mixer.windows for mixer in self._mixers))
        self._owes_experts = False
        self._mixed: Any = None  # what a mixer made of the tokens that are mirrored

    @property
    def notes(self) -> list[str]:
        """What makes it slower than it could be."""
        return [note for note in (self._pinning, self.graphs.problem) if note]

    def report(self) -> DeviceReport:
        decoding, prompts = self.attention.decoding, self.attention.prompts
        graphs = self.graphs.replayed
        return DeviceReport(decoding.name, decoding.seconds, prompts.name, prompts.seconds, graphs, tuple(self.notes))

    @property
    def normed(self) -> Tensor:
        return self._flow.normed

    @property
    def routed(self) -> Routed:
        assert self._flow.routed is not None
        return self._flow.routed

    def begin(self, batch: Batch, logits: npt.NDArray[np.float32], taken: npt.NDArray[np.int32] | None = None) -> None:
        """The step to come. logits: float32 [len(batch.logit_rows), vocab], written by `finish`. taken: int32 [MoE
        layers, rows, top_k], the experts of its rows where a trace names them.
        """
        self._asked = batch, logits, taken

    @_on_device
    def start(self, _: int = 0) -> None:
        """The step begins: the executor has found it within the plan."""
        batch, self._logits, taken = self._asked
        runs = runs_of(batch, self.mirror)
        embedding, capacity = self._weights.embedding, self.mirror.capacity
        inputs = make_inputs(batch, runs, embedding, self._ropes, self._windows, capacity, taken)
        if ENDS in self._buffers:
            ends = self._buffers.whole(ENDS, torch.int32)
            for run in runs:
                ends[run.row : run.row + run.rows] = run.start
        self._finding = self.finder is not None and self.finder.finds
        self._inputs = self.graphs.begin(self._shape(inputs), inputs)
        self._flow = _Flow(self._inputs.embedded, self._inputs.embedded)
        self._owes_experts, self.hits = False, None
        self._clock, self._spans = Clock(self.link) if self.observer else None, []

    @_on_device
    def attend(self, layer: int) -> None:
        """Where rows see older tokens: up to attention over what is mirrored, which goes on while the threads attend to
        those. Else all of it is left to `route`.
        """
        if self._inputs.whole:
            return
        mixer = self._mixers[layer]
        with self._phase("attention"):
            residual = self._with_experts()
            projected = mixer.project(residual, self._inputs)
            sent = self.link.mark()
            self._mixed = mixer.mix(projected, self._inputs)
            self._flow = replace(self._flow, residual=residual)
            if mixer.sees_older(self._inputs):
                self.link.wait(sent)
        self._left = perf_counter()

    @_on_device
    def route(self, layer: int) -> None:
        """The rest of attention, and the feed-forward up to what its experts read; dense ones whole."""
        if self._inputs.whole:
            self._flow = self.graphs.run(("layer", layer), partial(self._whole_layer, layer))
        else:
            self._flow = self._after_older(layer)
        sent = self.link.mark()
        is_moe = layer in self._spec.moe_layers
        if is_moe and self._finding:
            assert self.finder is not None
            self.finder.find(self._spec.moe_layers.index(layer))
        if self._feed_forwards[layer].has_shared:
            made = self.graphs.run(("shared", layer), partial(self._shared, layer))
            self._flow = replace(self._flow, shared=made)
        self.link.wait(sent)  # keys and values too
        self._owes_experts, self.hits = is_moe, None
        if is_moe:
            self._buffers.expert_sum[: self._inputs.rows] = 0

    @_on_device
    def finish(self, _: int = 0) -> None:
        """The head, for the rows whose logits are wanted."""
        with self._phase("head"):
            logits = self.graphs.run("head", self._head)
            torch.from_numpy(self._logits).copy_(logits)
        self._tell()

    def forget(self, sequence: int) -> None:
        """The keys and values of a sequence were released, or written by others."""
        self.mirror.forget(sequence)

    def close(self) -> None:
        """The buffers of the engine are about to go."""
        self.graphs.clear()
        self.finder = None
        self.link.unpin()

    def _shape(self, inputs: StepInputs) -> tuple[object, ...] | None:
        """Of the works of this step: see `Graphs.begin`. Spans are told of plain works alone."""
        if inputs.shape is None or self.observer is not None:
            return None
        return (self._finding, *inputs.shape)

    def _whole_layer(self, layer: int) -> _Flow:
        mixer, inputs = self._mixers[layer], self._inputs
        with self._phase("attention"):
            residual = self._with_experts()
            mixed = mixer.mix(mixer.project(residual, inputs), inputs)
        with self._phase("route"):
            return self._feed_forward(layer, residual + mixer.output(mixed, inputs))

    def _after_older(self, layer: int) -> _Flow:
        """Once the threads have attended to older tokens, if they had to."""
        mixer = self._mixers[layer]
        if self.observer is not None and mixer.sees_older(self._inputs):
            self.observer("older tokens", self._left, perf_counter())
        with self._phase("route"):
            return self._feed_forward(layer, self._flow.residual + mixer.output(self._mixed, self._inputs))

    def _feed_forward(self, layer: int, residual: Tensor) -> _Flow:
        feed_forward = self._feed_forwards[layer]
        normed = feed_forward.normed(residual)
        dense = feed_forward.dense(normed)
        return (
            _Flow(residual, normed, self._send_rows(layer, normed))
            if dense is None
            else _Flow(residual + dense, normed)
        )

    def _send_rows(self, layer: int, normed: Tensor) -> Routed:
        """What the threads need to compute experts: rows, ids and weights; and what the cache asks the next layer."""
        buffers, routed = self._buffers, self._route(layer, normed)
        buffers.send_routes(False, routed)
        buffers.send_rows(normed)
        following = next((index for index in self._spec.moe_layers if index > layer), None)
        if following is not None and self._plan.cache and self._plan.cache.next_gate:
            buffers.send_routes(True, self._route(following, normed))
        return routed

    def _route(self, layer: int, normed: Tensor) -> Routed:
        routed, taken = self._feed_forwards[layer].route(normed), self._inputs.taken
        return routed if taken is None else replace(routed, ids=taken[self._spec.moe_layers.index(layer)])

    def _shared(self, layer: int) -> Tensor:
        """What the shared expert makes, while the host already has the rows."""
        return self._feed_forwards[layer].shared(self.normed, self.routed)

    def _with_experts(self) -> Tensor:
        """The residual stream with what threads and device made of the last layer's experts."""
        if not self._owes_experts:
            return self._flow.residual
        with self._phase("join"):
            hidden = self._spec.hidden
            made = self.link.to_device(self._buffers.expert_sum[: self._inputs.rows])[:, :hidden]
            for part in (self.hits, self._flow.shared):
                made = made if part is None else made + part[:, :hidden]
            return self._flow.residual + made

    def _head(self) -> Tensor:
        """float32 [logit rows, vocab]."""
        residual = self._with_experts()[self._inputs.logit_rows]
        return linear(rms_norm(residual, self._weights.final_norm, self._spec.eps).bfloat16(), self._weights.head)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = self.link.time() if self.observer else None
        with phase(name):
            yield
        if start is not None:
            self._spans.append((name, start, self.link.time()))

    def _tell(self) -> None:
        """When the device was busy with what."""
        if self.observer is not None and self._clock is not None:
            for name, start, end in self._spans:
                self.observer(name, self._clock.seconds(start), self._clock.seconds(end))


def _nothing(spec: ModelSpec, plan: Plan, device: torch.device) -> _Flow:
    """What there is before the first step, for who times experts."""
    top_k = plan.cache.shape.top_k if plan.cache else 0
    rows = torch.zeros(plan.max_rows, spec.hidden, device=device)
    ids = torch.zeros(plan.max_rows, top_k, dtype=torch.int32, device=device)
    return _Flow(rows, rows, Routed(ids, ids.float(), None))


def _open_halves(
    spec: ModelSpec, plan: Plan, weights: DeviceWeights, shared: Shared
) -> tuple[list[DeviceMixer], list[DeviceFeedForward]]:
    """Of every layer."""
    loaded = (some for layer in zip(weights.mixers, weights.feed_forwards, strict=True) for some in layer)
    halves = [
        kind_of(half).open_half(half, place, its, shared)
        for (place, half), its in zip(spec.halves(plan.formats), loaded, strict=True)
    ]
    return halves[::2], halves[1::2]
