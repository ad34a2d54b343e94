"""CUDA graphs: record a step's launches once per shape, then replay them with one call.

A graph stores addresses: its inputs must stay at the addresses of the capture, and its outputs are always the same
tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch

from gpu_cache.errors import first_line
from hybrid.gpu.inputs import StepInputs
from hybrid.plan.gpu_memory import SHAPES

Made = TypeVar("Made")


class Capture(Protocol):
    """Records launches."""

    def __call__(self, work: Callable[[], Made]) -> tuple[Callable[[], None], Made]:
        """Returns a replay function and what `work` returned; those tensors are undefined until the first replay.

        Recording computes nothing. Raises RuntimeError if `work` does something that cannot be captured.
        """


class CudaCapture:
    """Captures on the current stream. All graphs share one memory pool, so those of a step must replay in capture
    order.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Made]) -> tuple[Callable[[], None], Made]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that stages copies keeps running
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            made = work()
        except BaseException:
            with suppress(RuntimeError):  # repeats the error
                graph.capture_end()
            raise
        graph.capture_end()
        return graph.replay, made


def capture_on(device: torch.device) -> Capture | None:
    return CudaCapture() if device.type == "cuda" else None


@dataclass(frozen=True)
class _Kept:
    """inputs: those of the first step of a shape; later steps overwrite them. works: the replay function of each work
    and what it returns; None for a work that ran once.
    """

    inputs: StepInputs
    works: dict[Hashable, tuple[Callable[[], None], Any] | None]


class Graphs:
    """Runs the works of steps: directly the first time, captured the second, and replayed from then on. Keeps the
    graphs of the last `SHAPES` shapes.

    problem: why capturing was given up, or None. replayed: number of works that ran by replay.
    """

    def __init__(self, capture: Capture | None) -> None:
        """capture: None if the device has no graphs, as the CPU."""
        self.problem: str | None = None
        self.replayed = 0
        self._capture = capture
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._works: dict[Hashable, tuple[Callable[[], None], Any] | None] | None = None  # of the current step

    def begin(self, shape: Hashable | None, inputs: StepInputs) -> StepInputs:
        """Start a step; returns the inputs that its works must read. shape: steps of equal shape have the same works
        and differ only in the values of their inputs; None: do not capture this step.
        """
        self._works = None
        if shape is None or self._capture is None:
            return inputs
        kept = self._kept.pop(shape, None)
        kept = _Kept(inputs, {}) if kept is None else _Kept(kept.inputs.copy_from(inputs), kept.works)
        self._kept[shape] = kept
        if len(self._kept) > SHAPES:
            self._kept.popitem(last=False)
        self._works = kept.works
        return kept.inputs

    def run(self, key: Hashable, work: Callable[[], Made]) -> Made:
        """Run a work, or replay it. key: identifies the work within a step."""
        works = self._works
        if works is None:
            return work()
        if key not in works:
            works[key] = None
            return work()
        found = works[key] or self._captured(work)
        if found is None:
            return work()
        works[key] = found
        replay, made = found
        replay()
        self.replayed += 1
        return cast(Made, made)

    def clear(self) -> None:
        """Drop all graphs, because memory that they read or write is about to be freed."""
        self._kept.clear()
        self._works = None

    def _captured(self, work: Callable[[], Made]) -> tuple[Callable[[], None], Made] | None:
        assert self._capture is not None
        try:
            return self._capture(work)
        except RuntimeError as error:
            self.problem = f"steps are not captured in CUDA graphs ({first_line(error)}), so they take longer"
            self._capture = None
            self.clear()
            return None
