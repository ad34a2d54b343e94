"""Costs of one expert: computed on the threads, computed on a device, and copied there."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.machine.profile import ExpertTimes, LinkSpeed
from hybrid.plan.expert_cache import CachePlan
from hybrid.plan.expert_shape import ExpertShape


@dataclass(frozen=True)
class CallCosts:
    """Seconds that one expert costs on one row.

    cpu: of the threads, measured. device: of the device, and start, what it takes to begin a layer there. copy: until
    an expert is on the device. cpu_row, device_row: on each of many rows, when reading the expert no longer counts.
    """

    cpu: float
    device: float
    start: float
    copy: float
    cpu_row: float
    device_row: float


def expert_key(shape: ExpertShape, format: str) -> str:
    """Key of experts that cost the same."""
    return f"{format} {shape.nbytes} bytes, {shape.top_k} together"


def call_costs(plan: CachePlan, cpu: float, cpu_row: float) -> CallCosts:
    """cpu, cpu_row: measured. The rest is what the figures of the device say of an expert's bytes and operations."""
    device, size = plan.simulated, plan.slot_bytes
    latency = device.latency_us * 1e-6
    copy = latency + size / (device.copy_gbps * 1e9)
    device_row = 2 * plan.shape.weights / (device.tflops * 1e12)
    return CallCosts(cpu, size / (device.read_gbps * 1e9), latency, copy, cpu_row, device_row)


def measured_costs(times: ExpertTimes, link: LinkSpeed, slot_bytes: int) -> CallCosts:
    """Measured costs of experts with one row and with many rows. Copies are timed while the threads read."""
    copy = link.latency + slot_bytes / link.to_device_beside
    rows = times.seconds_per_row_on_threads, times.seconds_per_row_on_device
    return CallCosts(times.on_threads(1), times.on_device(1), times.device_start, copy, *rows)
