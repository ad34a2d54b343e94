"""CUDA graphs: what a device is asked for in every step of a shape is asked once, kept, and then asked by one call.

A graph knows addresses, not tensors: what a work reads must lie where it lay when it was captured, and what it returned
then is what it makes every time.
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
    """Notes what work asks of the device."""

    def __call__(self, work: Callable[[], Made]) -> tuple[Callable[[], None], Made]:
        """Returns what asks for the same again, and what `work` returned: tensors that mean nothing until then.

        Nothing of it has happened. Raises RuntimeError if work does what cannot be captured.
        """


class CudaCapture:
    """Graphs on the stream at hand, all in one pool of memory: those of a step run in the order they were captured."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Made]) -> tuple[Callable[[], None], Made]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that stages copies goes on meanwhile
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            made = work()
        except BaseException:
            with suppress(RuntimeError):  # says again what went wrong
                graph.capture_end()
            raise
        graph.capture_end()
        return graph.replay, made


def capture_on(device: torch.device) -> Capture | None:
    return CudaCapture() if device.type == "cuda" else None


@dataclass(frozen=True)
class _Kept:
    """inputs: of the first step of a shape, which those that follow overwrite. works: what runs each work again, and
    what it returns; None for one that ran once.
    """

    inputs: StepInputs
    works: dict[Hashable, tuple[Callable[[], None], Any] | None]


class Graphs:
    """Runs the works of steps: the first time plainly, the second captured, and from then on by their graphs. Of shapes
    the last `SHAPES` are kept.

    problem: why capturing was given up, if it was. replayed: how many works ran by their graphs.
    """

    def __init__(self, capture: Capture | None) -> None:
        """capture: None where nothing can be captured, as on the CPU."""
        self.problem: str | None = None
        self.replayed = 0
        self._capture = capture
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._works: dict[Hashable, tuple[Callable[[], None], Any] | None] | None = None  # of the step at hand

    def begin(self, shape: Hashable | None, inputs: StepInputs) -> StepInputs:
        """A step begins; returns the inputs that its works must read. shape: steps of equal shape have the same works,
        but for what their inputs hold; None: nothing of this one is captured.
        """
        self._works = None
        if shape is None or self._capture is None:
            return inputs
        kept = self._kept.pop(shape, None)
        kept = _Kept(inputs, {}) if kept is None else _Kept(kept.inputs.take(inputs), kept.works)
        self._kept[shape] = kept
        if len(self._kept) > SHAPES:
            self._kept.popitem(last=False)
        self._works = kept.works
        return kept.inputs

    def run(self, key: Hashable, work: Callable[[], Made]) -> Made:
        """key: tells the works of a step apart."""
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
        """Memory that works read or wrote is about to go."""
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
