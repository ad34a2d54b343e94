"""A GPU that is none: stand-ins in its place, for engines that ask for `--device cuda`."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from stream_standin import StandIn

from hybrid.config import EngineConfig
from hybrid.engine.experts import open as devices
from hybrid.engine.experts.slot_program import SlotProgram
from hybrid.engine.experts.start import ExpertsStart
from hybrid.machine import gpu as usable

ROOM = 10**9  # bytes of the device
CPU_SECONDS = 1e-6, 1e-7  # what an expert costs the threads: not measured, so that no clock decides what is streamed


class SlotCompute:
    """The kernels of the CPU behind the interface of a GPU."""

    results_stay_on_device = False

    def __init__(self, *arguments: Any) -> None:
        self._program = SlotProgram(*arguments)

    def begin(self, slot_ids) -> None:
        self._slot_ids = slot_ids

    def experts(self, ids: range, slot: int) -> None:
        ours = (self._slot_ids >= ids.start) & (self._slot_ids < ids.stop)
        self._program(np.where(ours, self._slot_ids - ids.start + slot, -1).astype(np.int32))

    def end(self) -> None:
        pass

    def collect(self) -> None:
        pass


def put(
    monkeypatch, kind=StandIn, room: int = ROOM, seed: int = 0, compute=SlotCompute, step_device=None, **limits
) -> list[StandIn]:
    """Puts stand-ins in the place of a GPU, each with the next seed; returns those that will be made.

    step_device: torch's, where the rest of a step runs; None: on the threads.
    """
    made: list[StandIn] = []

    def make() -> StandIn:
        made.append(kind(seed + len(made), **limits))
        return made[-1]

    monkeypatch.setattr(EngineConfig, "step_device", step_device)
    monkeypatch.setattr(ExpertsStart, "_thread_seconds", lambda start: CPU_SECONDS)
    monkeypatch.setattr(ExpertsStart, "price", lambda start, experts: None)
    monkeypatch.setattr(devices, "cuda_parts", lambda step: (make, partial(compute, step=step) if step else compute))
    monkeypatch.setattr(usable, "why_unusable", lambda: None)
    monkeypatch.setattr(usable, "free_bytes", lambda: room)
    return made
