"""What the plan says of an expert cache: its geometry, its slots, and whether they fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.config import CacheConfig, DeviceConfig, EngineConfig
from hybrid.errors import ConfigError, cache_errors
from hybrid.machine.memory import size_text
from hybrid.models.layers.feed_forward import is_routed
from hybrid.models.layers.products import RESIDUAL
from hybrid.ops import Buffer, Op
from hybrid.plan.expert_shape import ExpertShape

if TYPE_CHECKING:
    from gpu_cache.geometry import Geometry


SLOT_FORMATS = ("bf16", "int8", "int4", "fp8", "mxfp4")  # of which gpu_cache/kernels/formats has kernels
SLOT_ACTIVATIONS = ("silu", "swiglu_clamped")  # the same
SLOT_SHARE = 0.9  # of the free memory of a GPU; the rest is for rows, and for torch


@dataclass(frozen=True)
class CachePlan:
    """The cache of a run: where experts go, and the slots that hold them on the device.

    warning: one line where the geometry can be had but will disappoint.
    """

    device: str
    geometry: Geometry
    shape: ExpertShape
    settings: CacheConfig
    simulated: DeviceConfig
    warning: str | None

    @property
    def next_gate(self) -> bool:
        return self.settings.prefetch == "next-gate"

    @property
    def slot_bytes(self) -> int:
        return self.shape.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, including the streaming ones."""
        return (self.geometry.slots + self.staging) * self.slot_bytes

    @property
    def staging(self) -> int:
        """Slots that streamed experts pass through, beside those of the table."""
        return staging_slots(self.settings)

    @property
    def host_bytes(self) -> int:
        """What the slots take of the memory of the host: all, where the device is simulated."""
        return self.nbytes if self.device == "simulated" else 0

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        settings = {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(self.settings).items()
        }
        slots = {"slots": self.geometry.slots, "staging": self.staging}
        sizes = slots | {"slot_bytes": self.slot_bytes, "bytes": self.nbytes}
        geometry = {"nblocks": self.geometry.nblocks, "nways": self.geometry.nways, "mapping": self.geometry.mapping}
        return {"device": self.device, **settings, **geometry, **sizes, "simulated": vars(self.simulated)}

    def __str__(self) -> str:
        g = self.geometry
        experts = g.layers * g.experts
        return (
            f"{g.nblocks} indexes of {g.nways} slots of {size_text(self.slot_bytes)}, mapping {g.mapping}: "
            f"{g.slots} of {experts} experts on the {self.device} device"
            + (f", {self.staging} slots more for streams" if self.staging else "")
        )


def staging_slots(cache: CacheConfig) -> int:
    """Slots that a device needs beside those of the table, to stream experts through."""
    from gpu_cache.device import STAGING

    return STAGING if cache.stream != "off" else 0


def require_kernels(format: str, device: str, ops: Sequence[Op]) -> None:
    """Raise ConfigError for experts in a format, or of a kind, of which a GPU has no kernels. ops: those of a step that
    places experts.
    """
    if device != "cuda":
        return
    for op in ops:
        activation = op.arguments["activation"].name if op.kind == "gate_up" and is_routed(op) else SLOT_ACTIVATIONS[0]
        if activation not in SLOT_ACTIVATIONS:
            raise ConfigError(f"a GPU cannot compute experts with {activation}; use --cache off or --device cpu")
        if op.kind == "combine" and op.arguments["output"] != Buffer(RESIDUAL):
            raise ConfigError(
                "a GPU cannot compute experts whose sum is normed or projected before it is added; use --cache off or "
                "--device cpu"
            )
    if format not in SLOT_FORMATS:
        raise ConfigError(
            f"a GPU cannot compute experts in {format}, but in {', '.join(SLOT_FORMATS)}: use --cache off, or one of "
            "them for --format experts="
        )


def plan_cache(shape: ExpertShape, config: EngineConfig, free: int, device_memory: int) -> CachePlan:
    """free: bytes of the host that nothing else has planned. device_memory: the same of the device. Raises ConfigError
    when the slots do not fit.
    """
    if config.device == "cuda":
        fitting = int(max(0, device_memory) * SLOT_SHARE) // shape.nbytes
        room = f"the {size_text(device_memory)} that others have left free on the GPU"
    else:
        fitting = max(0, min(device_memory, free)) // shape.nbytes
        room = "the device and the memory that is free"
    staging = staging_slots(config.cache)
    fitting = max(0, fitting - staging)
    geometry = _geometry(shape, config.cache, fitting)
    if geometry.slots > fitting:
        raise ConfigError(
            f"--cache-nblocks {geometry.nblocks} x --cache-nways {geometry.nways} are {geometry.slots} slots of "
            f"{size_text(shape.nbytes)}; {fitting} fit {room}"
            + (f", beside the {staging} of --cache-stream {config.cache.stream}" if staging else "")
            + ": lower one of them"
        )
    warning = _warning(geometry, shape)
    return CachePlan(config.device, geometry, shape, config.cache, config.simulated, warning)


def _geometry(shape: ExpertShape, cache: CacheConfig, fitting: int) -> Geometry:
    from gpu_cache.geometry import Geometry, auto_geometry

    layers = len(shape.layers)
    with cache_errors():
        if cache.nblocks in (None, "auto"):
            return replace(auto_geometry(fitting, layers, shape.experts, cache.nways), mapping=cache.mapping)
        assert isinstance(cache.nblocks, int)
        nways = cache.nways or max(1, min(shape.experts, fitting // cache.nblocks))
        return Geometry(cache.nblocks, nways, layers, shape.experts, cache.mapping)


def _warning(geometry: Geometry, shape: ExpertShape) -> str | None:
    if geometry.nways >= shape.top_k:
        return None
    return (
        f"--cache-nways {geometry.nways} is below the {shape.top_k} experts that a row takes: "
        "an index cannot hold those of one step, and the rest goes to the CPU"
    )
