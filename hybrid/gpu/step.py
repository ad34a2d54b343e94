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
from hybrid.gpu.home import Home
from hybrid.gpu.inputs import StepInputs, make_inputs, runs_of
from hybrid.gpu.layers.base import DeviceFeedForward, DeviceMixer, Shared, kind_of
from hybrid.gpu.layers.mirrored import MirroredMixer
from hybrid.gpu.link import Clock, Link
from hybrid.gpu.mirror import KvMirror
from hybrid.gpu.parts import Routed, chooser, norm, rope_frequencies, scaled
from hybrid.gpu.products import linear
from hybrid.gpu.report import DeviceReport
from hybrid.gpu.weights import DeviceWeights
from hybrid.machine.phases import phase
from hybrid.models.layers.older_tokens import ENDS
from hybrid.models.spec import ModelSpec
from hybrid.plan.plan import Plan

_REFILL_TOKENS = 1024  # that are read from home at once: they take memory beside the mirror


class HitLauncher(Protocol):
    """Launches the hits of a layer on the device before the host knows which experts were chosen."""

    @property
    def can_launch(self) -> bool:
        """Whether it does so in the current step."""

    def launch_hits(self, layer: int) -> None:
        """Queue the hits of MoE layer `layer`."""


@dataclass(frozen=True)
class _LayerOutput:
    """Output of a layer. residual: float32 [rows, hidden]. normed: what a MoE layer's experts read, same shape.
    routed: their routing. shared: output of the shared expert, if any.
    """

    residual: Tensor
    normed: Tensor
    routed: Routed | None = None
    shared: Tensor | None = None


def _on_device(method: Callable[..., None]) -> Callable[..., None]:
    """Run on the device's stream; turn torch's exceptions into ours, with one-line messages."""

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
    """Holds the residual stream of a step. Experts on the device read `normed` and `routed`; the weighted sum of each
    row, float32 [rows, hidden or more], goes to `hits`, which the next layer adds. hit_launcher: called right after the
    router is queued.
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
        states: int,
        capture: Capture | None,
        pinning: str | None,
    ) -> None:
        """address: of a buffer of the engine. states: address of the states of all sequences. capture: see `Graphs`.
        pinning: the note of `link` if memory is not pinned.
        """
        self.attention, self._pinning = attention, pinning
        self.mirror, self.link, self.graphs = mirror, link, Graphs(capture)
        self.observer: SpanObserver | None = None  # called with the phases of a step at its end
        self.hit_launcher: HitLauncher | None = None
        self.hits: Tensor | None = None
        self._spans: list[tuple[str, Any, Any]] = []
        self._attend_ended = 0.0  # when `attend` returned
        self._output = _nothing(spec, plan, link.device)
        self._spec, self._plan, self._weights = spec, plan, weights
        self._ropes = [rope_frequencies(rope, link.device) for rope in spec.ropes]
        self._buffers = SharedBuffers(spec, plan, link, address)
        shared = Shared(plan.sequences, mirror.capacity, link, self._buffers, attention, chooser(link.device))
        self._mixers, self._feed_forwards = _open_halves(spec, plan, weights, shared)
        self._homes = [
            (mixer, Home(plan.kv, layer, states, link))
            for layer, mixer in enumerate(self._mixers)
            if isinstance(mixer, MirroredMixer)
        ]
        self._crosses = any(mixer.crosses for mixer in self._mixers)
        self._windows = frozenset[int | None]().union(*(mixer.windows for mixer in self._mixers))
        self._experts_pending = False
        self._mixed: Any = None  # the mixer's result over mirrored tokens, between `attend` and `route`

    @property
    def notes(self) -> list[str]:
        """One line for each thing that makes steps slower than they could be."""
        return [note for note in (self._pinning, self.graphs.problem) if note]

    def report(self) -> DeviceReport:
        decoding, prompts = self.attention.decoding, self.attention.prompts
        graphs = self.graphs.replayed
        return DeviceReport(decoding.name, decoding.seconds, prompts.name, prompts.seconds, graphs, tuple(self.notes))

    @property
    def normed(self) -> Tensor:
        return self._output.normed

    @property
    def routed(self) -> Routed:
        assert self._output.routed is not None
        return self._output.routed

    def begin(self, batch: Batch, logits: npt.NDArray[np.float32], taken: npt.NDArray[np.int32] | None = None) -> None:
        """Announce the next step. logits: float32 [len(batch.logit_rows), vocab], written by `finish`. taken: int32
        [MoE layers, rows, top_k], the experts of its rows where a trace names them.
        """
        self._pending_step = batch, logits, taken

    @_on_device
    def start(self, _: int = 0) -> None:
        """Start the announced step, which the executor has checked against the plan."""
        batch, self._logits, taken = self._pending_step
        runs = runs_of(batch, self.mirror, self._refill)
        embedding, capacity = self._weights.embedding, self.mirror.capacity
        scale = self._spec.embedding_scale
        inputs = make_inputs(batch, runs, embedding, self._ropes, self._windows, capacity, taken, scale)
        if ENDS in self._buffers:
            ends = self._buffers.whole(ENDS, torch.int32)
            for run in runs:
                ends[run.row : run.row + run.rows] = run.start
        self._launches_hits = self.hit_launcher is not None and self.hit_launcher.can_launch
        self._inputs = self.graphs.begin(self._shape(inputs), inputs)
        self._output = _LayerOutput(self._inputs.embedded, self._inputs.embedded)
        self._experts_pending, self.hits = False, None
        self._clock, self._spans = Clock(self.link) if self.observer else None, []

    @_on_device
    def attend(self, layer: int) -> None:
        """If rows see tokens that are not mirrored: queue attention over the mirrored ones, which runs while the
        threads attend to the others. Otherwise `route` does all of it.
        """
        if self._alone(layer):
            return
        mixer = self._mixers[layer]
        with self._phase("attention"):
            residual = self._with_experts()
            projected = mixer.project(residual, self._inputs)
            sent = self.link.mark()
            self._mixed = mixer.mix(projected, self._inputs)
            self._output = replace(self._output, residual=residual)
            if mixer.sees_older(self._inputs):
                self.link.wait(sent)
        self._attend_ended = perf_counter()

    @_on_device
    def route(self, layer: int) -> None:
        """Run the rest of attention, and a MoE layer up to what its experts read, or all of a dense feed-forward."""
        if self._alone(layer):
            self._output = self.graphs.run(("layer", layer), partial(self._whole_layer, layer))
        else:
            self._output = self._after_older(layer)
        sent = self.link.mark()
        is_moe = layer in self._spec.moe_layers
        if is_moe and self._launches_hits:
            assert self.hit_launcher is not None
            self.hit_launcher.launch_hits(self._spec.moe_layers.index(layer))
        if self._feed_forwards[layer].has_shared:
            made = self.graphs.run(("shared", layer), partial(self._shared, layer))
            self._output = replace(self._output, shared=made)
        self.link.wait(sent)  # keys and values too
        self._experts_pending, self.hits = is_moe, None
        if is_moe:
            self._buffers.expert_sum[: self._inputs.rows] = 0

    @_on_device
    def finish(self, _: int = 0) -> None:
        """Compute the logits of `batch.logit_rows`."""
        with self._phase("head"):
            logits = self.graphs.run("head", self._head)
            torch.from_numpy(self._logits).copy_(logits)
        self._report_spans()

    def _refill(self, sequence: int, start: int, end: int) -> None:
        """Mirror tokens that were computed in another sequence, or without the device, from what the threads keep."""
        for first in range(start, end, _REFILL_TOKENS):
            for mixer, home in self._homes:
                mixer.refill(home, sequence, first, min(end, first + _REFILL_TOKENS))

    def forget(self, sequence: int) -> None:
        """Drop the mirror of a sequence, because its keys and values were released or written without the device."""
        self.mirror.forget(sequence)

    def close(self) -> None:
        """Let go of the engine's buffers, which are about to be freed."""
        self.graphs.clear()
        self.hit_launcher = None
        self.link.unpin()

    def _shape(self, inputs: StepInputs) -> tuple[object, ...] | None:
        """Key of this step's CUDA graphs, see `Graphs.begin`. None with an observer: spans need launches without
        graphs. None too where threads have a part in some layers: graphs of others would read what lies elsewhere in
        every step.
        """
        if inputs.shape is None or self.observer is not None or self._crosses:
            return None
        return (self._launches_hits, *inputs.shape)

    def _alone(self, layer: int) -> bool:
        """Whether the device computes the mixer of a layer, as those of all others that attend, without the threads."""
        return self._inputs.whole and not self._mixers[layer].crosses

    def _whole_layer(self, layer: int) -> _LayerOutput:
        mixer, inputs = self._mixers[layer], self._inputs
        with self._phase("attention"):
            residual = self._with_experts()
            mixed = mixer.mix(mixer.project(residual, inputs), inputs)
        with self._phase("route"):
            return self._feed_forward(layer, residual + mixer.output(mixed, inputs))

    def _after_older(self, layer: int) -> _LayerOutput:
        """Finish a layer after the threads have attended to the tokens that are not mirrored, if there are any."""
        mixer = self._mixers[layer]
        if self.observer is not None and not mixer.crosses and mixer.sees_older(self._inputs):
            self.observer("older tokens", self._attend_ended, perf_counter())
        with self._phase("route"):
            return self._feed_forward(layer, self._output.residual + mixer.output(self._mixed, self._inputs))

    def _feed_forward(self, layer: int, residual: Tensor) -> _LayerOutput:
        feed_forward = self._feed_forwards[layer]
        normed = feed_forward.normed(residual)
        dense = feed_forward.dense(normed)
        return (
            _LayerOutput(residual, normed, self._send_rows(layer, normed))
            if dense is None
            else _LayerOutput(residual + dense, normed)
        )

    def _send_rows(self, layer: int, normed: Tensor) -> Routed:
        """Send the threads rows, expert ids and weights, and with next-gate prefetching the next layer's routing."""
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
        """Output of the shared expert, queued after the rows were sent to the host."""
        return self._feed_forwards[layer].shared(self.normed, self.routed)

    def _with_experts(self) -> Tensor:
        """The residual stream plus the outputs of the previous layer's experts, from threads and device."""
        if not self._experts_pending:
            return self._output.residual
        with self._phase("join"):
            hidden = self._spec.hidden
            made = self.link.to_device(self._buffers.expert_sum[: self._inputs.rows])[:, :hidden]
            for part in (self.hits, self._output.shared):
                made = made if part is None else made + part[:, :hidden]
            return self._output.residual + made

    def _head(self) -> Tensor:
        """float32 [logit rows, vocab]."""
        residual = self._with_experts()[self._inputs.logit_rows]
        rows = norm(residual, self._weights.final_norm, self._spec.eps).bfloat16()
        logits, cap = (
            scaled(linear(rows, self._weights.head, self._weights.head_bias), self._spec.logit_scale),
            self._spec.logit_cap,
        )
        return torch.tanh(logits / cap) * cap if cap else logits

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = self.link.time() if self.observer else None
        with phase(name):
            yield
        if start is not None:
            self._spans.append((name, start, self.link.time()))

    def _report_spans(self) -> None:
        """Report to the observer when the device ran each phase."""
        if self.observer is not None and self._clock is not None:
            for name, start, end in self._spans:
                self.observer(name, self._clock.seconds(start), self._clock.seconds(end))


def _nothing(spec: ModelSpec, plan: Plan, device: torch.device) -> _LayerOutput:
    """Zeros in place of a layer's output, for timing experts before the first step."""
    top_k = plan.cache.shape.top_k if plan.cache else 0
    rows = torch.zeros(plan.max_rows, spec.hidden, device=device)
    ids = torch.zeros(plan.max_rows, top_k, dtype=torch.int32, device=device)
    return _LayerOutput(rows, rows, Routed(ids, ids.float(), None))


def _open_halves(
    spec: ModelSpec, plan: Plan, weights: DeviceWeights, shared: Shared
) -> tuple[list[DeviceMixer], list[DeviceFeedForward]]:
    """The mixer and the feed-forward of every layer, on the device."""
    loaded = (some for layer in zip(weights.mixers, weights.feed_forwards, strict=True) for some in layer)
    halves = [
        kind_of(half).open_half(half, place, its, shared)
        for (place, half), its in zip(spec.halves(plan.formats), loaded, strict=True)
    ]
    return halves[::2], halves[1::2]
