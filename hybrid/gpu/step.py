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
from torch.nn.functional import pad

from gpu_cache.errors import DeviceFull, first_line
from hybrid.core import Batch, SpanObserver
from hybrid.errors import DeviceFailed
from hybrid.gpu.attention import State, finish, join, read_states
from hybrid.gpu.attention_choice import WholeAttention
from hybrid.gpu.buffers import SharedBuffers
from hybrid.gpu.graphs import Capture, Graphs
from hybrid.gpu.inputs import StepInputs, make_inputs, runs_of
from hybrid.gpu.link import Clock, Link
from hybrid.gpu.mirror import KvMirror
from hybrid.gpu.mirrored_attention import MirroredAttention
from hybrid.gpu.parts import GatedWeights, Routed, chooser, gated, rms_norm, route
from hybrid.gpu.products import linear
from hybrid.gpu.report import DeviceReport
from hybrid.gpu.weights import DeviceWeights
from hybrid.machine.phases import phase
from hybrid.models.rope import inverse_frequencies
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.plan.passes.place_experts import NEXT
from hybrid.plan.plan import Plan
from hybrid.plan.program import key_dim, ropes


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
            for frequencies, factor in map(inverse_frequencies, ropes(spec))
        ]
        self._windows = {layer.attention.window for layer in spec.layers}
        self._moe = [index for index, layer in enumerate(spec.layers) if layer.feed_forward.is_moe]
        self._mirrored_attention = MirroredAttention(spec, weights.attention, mirror, attention)
        self._choose = chooser(link.device)
        self._buffers = SharedBuffers(spec, plan, link, address)
        self._owes_experts = False
        self._mirrored: Tensor | State = torch.empty(0)

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
        for run in runs:
            self._buffers.ends[run.row : run.row + run.rows] = run.start
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
        older = self._inputs.older[self._spec.layers[layer].attention.window]
        with self._phase("attention"):
            residual = self._with_experts()
            q, k, v = self._project(layer, residual)
            if older:
                self.link.to_host(self._buffers.queries(layer, len(q)), _padded_queries(q, self._spec.layers[layer]))
            sent = self.link.mark()
            self._mirrored = self._mirrored_attention.attend(layer, q, k, v, self._inputs)
            self._flow = replace(self._flow, residual=residual)
            if older:
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
        is_moe = self._spec.layers[layer].feed_forward.is_moe
        if is_moe and self._finding:
            assert self.finder is not None
            self.finder.find(self._moe.index(layer))
        shared = self._weights.feed_forward[layer].shared
        if shared is not None:
            made = self.graphs.run(("shared", layer), partial(self._shared, shared))
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
        with self._phase("attention"):
            residual = self._with_experts()
            attended = self._mirrored_attention.attend(layer, *self._project(layer, residual), self._inputs)
        with self._phase("route"):
            return self._feed_forward(layer, residual, self._finished(layer, attended))

    def _after_older(self, layer: int) -> _Flow:
        """Once the threads have attended to older tokens, if they had to."""
        attention = self._spec.layers[layer].attention
        older = self._inputs.older[attention.window]
        if older and self.observer is not None:
            self.observer("older tokens", self._left, perf_counter())
        with self._phase("route"):
            attended = self._mirrored
            if older:
                assert isinstance(attended, State)
                states = self.link.to_device(self._buffers.states(layer, self._inputs.rows))
                attended = join(attended, read_states(states, attention.heads, attention.head_dim))
            return self._feed_forward(layer, self._flow.residual, self._finished(layer, attended))

    def _project(self, layer: int, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; the home of the latter two is told of them."""
        weights = self._weights.attention[layer]
        rows = rms_norm(residual, weights.norm, self._spec.norm.eps).bfloat16()
        q, k, v = self._mirrored_attention.heads(layer, linear(rows, weights.qkv, weights.qkv_bias), self._inputs)
        self.link.to_host(self._buffers.new_kv(layer, len(rows)), torch.cat([k, v], 1).flatten(1))
        return q, k, v

    def _finished(self, layer: int, attended: Tensor | State) -> Tensor:
        """float32 [rows, heads, head_dim]."""
        sinks = self._weights.attention[layer].sinks
        return finish(attended, sinks) if isinstance(attended, State) else attended

    def _feed_forward(self, layer: int, residual: Tensor, attended: Tensor) -> _Flow:
        spec, weights, ffn = self._spec.layers[layer], self._weights.attention[layer], self._weights.feed_forward[layer]
        residual = residual + linear(attended.flatten(1).bfloat16(), weights.out, weights.out_bias)
        normed = rms_norm(residual, ffn.norm, self._spec.norm.eps)
        if ffn.dense is not None:
            return _Flow(residual + gated(normed.bfloat16(), ffn.dense, spec.feed_forward.activation), normed)
        return _Flow(residual, normed, self._send_rows(layer, normed))

    def _send_rows(self, layer: int, normed: Tensor) -> Routed:
        """What the threads need to compute experts: rows, ids and weights; and what the cache asks the next layer."""
        buffers, routed = self._buffers, self._route(layer, normed)
        buffers.send_routes("", routed)
        buffers.send_rows(normed)
        following = next((index for index in self._moe if index > layer), None)
        if following is not None and self._plan.cache and self._plan.cache.next_gate:
            buffers.send_routes(NEXT, self._route(following, normed))
        return routed

    def _route(self, layer: int, normed: Tensor) -> Routed:
        ffn, weights = self._spec.layers[layer].feed_forward, self._weights.feed_forward[layer]
        assert ffn.router is not None and weights.router is not None
        routed = route(normed, weights.router, weights.router_bias, ffn.router, ffn.shared_gate, self._choose)
        taken = self._inputs.taken
        return routed if taken is None else replace(routed, ids=taken[self._moe.index(layer)])

    def _shared(self, shared: GatedWeights) -> Tensor:
        """What the shared expert makes, while the host already has the rows."""
        made, weight = gated(self.normed.bfloat16(), shared, "silu"), self.routed.shared
        return made if weight is None else made * weight[:, None]

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
        return linear(rms_norm(residual, self._weights.final_norm, self._spec.norm.eps).bfloat16(), self._weights.head)

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


def _padded_queries(q: Tensor, spec: LayerSpec) -> Tensor:
    return pad(q, (0, key_dim(spec) - spec.attention.head_dim)).bfloat16().flatten(1)
