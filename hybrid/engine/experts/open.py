"""The device that holds the experts of a run: made from its plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from gpu_cache.clock import CopyClock
from gpu_cache.device import Bytes, Device, Source
from gpu_cache.devices.cuda import CudaDevice, QueuedCompute
from gpu_cache.devices.simulated import CopySpeed, SimulatedDevice
from gpu_cache.devices.streams import Streams
from gpu_cache.errors import DeviceFull
from gpu_cache.geometry import Geometry
from hybrid.engine.experts.slot_program import SlotProgram
from hybrid.errors import CapacityError
from hybrid.machine.memory import size_text
from hybrid.plan.expert_cache import CachePlan
from hybrid.plan.plan import Plan

if TYPE_CHECKING:
    from hybrid.gpu.step import DeviceStep

Address = Callable[[str], int]  # of a buffer of the engine
MakeCompute = Callable[[Plan, Sequence[Any], Address], QueuedCompute]
CudaParts = tuple[Callable[[], Streams], MakeCompute]


def open_device(
    plan: Plan,
    geometry: Geometry,
    source: Source,
    weights: Sequence[Bytes],
    address: Address,
    step: DeviceStep | None = None,
) -> tuple[Device, Geometry, list[str]]:
    """The device, the geometry that fits it, and one line for each request that could not be met.

    source: see `gpu_cache.device`. weights: all memory that `source` may return. step: the rest of a step, if a device
    computes that too. Raises CapacityError, DeviceLost.
    """
    assert plan.cache is not None
    if plan.cache.device == "cuda":
        return _open_cuda(plan, plan.cache, geometry, source, weights, address, step)
    return _simulated(plan, plan.cache, geometry, source, address), geometry, []


def cuda_parts(step: DeviceStep | None) -> CudaParts:
    """Constructors of the parts of a GPU's device; tests replace them."""
    from gpu_cache.devices.torch_streams import TorchStreams
    from hybrid.gpu.slot_experts import SlotExperts, StepExperts

    if step is None:
        return TorchStreams, SlotExperts
    return partial(TorchStreams, compute=step.link.stream), partial(StepExperts, step=step)


def fewer_slots(geometry: Geometry) -> Geometry | None:
    """With an eighth fewer ways, or fewer indexes if there is one way; None if there is only one slot."""
    if geometry.nways > 1:
        return replace(geometry, nways=geometry.nways - max(1, geometry.nways // 8))
    if geometry.nblocks > 1:
        return replace(geometry, nblocks=geometry.nblocks - max(1, geometry.nblocks // 8))
    return None


def _simulated(plan: Plan, cache: CachePlan, geometry: Geometry, source: Source, address: Address) -> SimulatedDevice:
    settings, simulated = cache.settings, cache.simulated
    return SimulatedDevice(
        geometry.slots,
        [size for _, size in cache.shape.pieces],
        source,
        lambda memory: SlotProgram(plan, memory, address),
        CopySpeed(simulated.copy_gbps * 1e9, simulated.latency_us * 1e-6, simulated.jitter_us * 1e-6, settings.seed),
        None if settings.delay is None else CopyClock(settings.delay),
        settings.poison,
        cache.staging > 0,
    )


def _open_cuda(
    plan: Plan,
    cache: CachePlan,
    asked: Geometry,
    source: Source,
    weights: Sequence[Bytes],
    address: Address,
    step: DeviceStep | None,
) -> tuple[CudaDevice, Geometry, list[str]]:
    """With fewer slots if the planned ones do not fit: another program may have taken memory since."""
    make_streams, make_compute = cuda_parts(step)
    settings, geometry = cache.settings, asked
    while True:
        streams = make_streams()
        try:
            device = CudaDevice(
                streams,
                geometry.slots,
                [size for _, size in cache.shape.pieces],
                source,
                lambda memory: make_compute(plan, memory, address),
                keys=len(cache.shape.layers) * cache.shape.experts if step else 0,
                clock=None if settings.delay is None else CopyClock(settings.delay),
                poison=settings.poison,
                pinned=weights if settings.pin_weights else (),
                streaming=cache.staging > 0,
            )
        except DeviceFull as error:
            streams.close()
            fewer = fewer_slots(geometry)
            if fewer is None:
                raise CapacityError(
                    f"not even one slot of {size_text(cache.slot_bytes)} fits the device"
                    + (f" beside the {cache.staging} of --cache-stream {settings.stream}" if cache.staging else "")
                    + f": {error}"
                ) from None
            geometry = fewer
            continue
        lowered = f"the device has room for {geometry.slots} of the {asked.slots} slots that were planned"
        return device, geometry, [*([lowered] if geometry != asked else []), *device.notes]
