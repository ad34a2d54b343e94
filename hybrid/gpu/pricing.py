"""What experts cost on a GPU and on the way to it, measured."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu_cache.device import Device
from hybrid.engine.experts.calibration import measured_rows, time_device
from hybrid.gpu.link_speed import measure_link
from hybrid.machine.profile import ExpertTimes, LinkSpeed
from hybrid.plan.plan import Plan


def device_mark(place: str) -> str:
    """What tells one of torch's devices from another: its name and memory, and the CUDA version."""
    if place != "cuda":
        return place
    found = torch.cuda.get_device_properties(place)
    return f"{found.name} {found.total_memory} {torch.version.cuda}"


def measure_device(
    plan: Plan, device: Device, place: str, threads: tuple[float, ...], read: Callable[[], float]
) -> tuple[ExpertTimes, LinkSpeed]:
    """place: where `device` has its slots, as torch says. threads: what experts cost there. read: of `measure_link`."""
    start, times = time_device(plan, device)
    return ExpertTimes(measured_rows(plan), threads, times, start), measure_link(torch.device(place), read)
