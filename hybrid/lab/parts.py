"""What the tables of an experiment's file say: models, caches, machines."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_cache.costs import Machine

LAYERS = "layers"  # as nblocks: an index for each layer


@dataclass(frozen=True)
class Model:
    """A model and traces of it. traces: paths, from the folder of the experiment; layers, experts: None: what occurs.

    expert_mb: MB of an expert, which copies and speeds need.
    """

    name: str
    traces: tuple[str, ...]
    layers: int | None = None
    experts: int | None = None
    expert_mb: float | None = None


@dataclass(frozen=True)
class Caches:
    """Every combination of these is replayed, beside the bound and the best fixed experts.

    nblocks: indexes; "layers": one for each layer. nways: a whole number is slots of an index, another number the share
    of all experts that have a slot. quota: "none" or copies a step. models: None: all. seeds: of policies that draw.
    """

    nways: tuple[int | float, ...]
    policies: tuple[str, ...]
    nblocks: tuple[int | str, ...] = (LAYERS,)
    mapping: tuple[str, ...] = ("modulo",)
    admissions: tuple[str, ...] = ("always",)
    quota: tuple[int | str, ...] = ("none",)
    copy_delay: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (0,)
    models: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Rates:
    """A machine: GB/s of copies to the device, and with which device and CPU read experts.

    other_ms: of a step beside its experts; layer_ms: to begin and join a layer on the device.
    """

    name: str
    pcie_gbps: float
    device_gbps: float
    cpu_gbps: float
    other_ms: float = 0.0
    layer_ms: float = 0.0

    def machine(self, expert_mb: float) -> Machine:
        rates = (self.pcie_gbps, self.device_gbps, self.cpu_gbps)
        return Machine(*rates, expert_mb * 1e6, self.other_ms, self.layer_ms)
