"""Starts an expert cache: its warm experts, what experts cost on this machine, the device that holds them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

import cpu_kernels
from gpu_cache.errors import DeviceLost
from hybrid.engine.addresses import Addresses
from hybrid.engine.experts.calibration import measure_device, thread_profile
from hybrid.engine.experts.costs import expert_key, measured_costs
from hybrid.engine.experts.runtime import DeviceExperts
from hybrid.engine.experts.warm_start import model_mark, read_warm
from hybrid.engine.routes import Routes
from hybrid.errors import DeviceFailed
from hybrid.machine.gpu import device_mark
from hybrid.machine.hardware import probe
from hybrid.machine.memory import view
from hybrid.machine.profile import MachineProfile, cached_profile, machine_mark
from hybrid.plan.plan import Plan
from hybrid.weights.store import Store

if TYPE_CHECKING:
    from hybrid.gpu.step import DeviceStep

USUAL_BANDWIDTH = 40e9  # bytes a second that threads read, where it is not measured
USUAL_SPEED = 1e12  # operations a second of threads, likewise


class ExpertsStart:
    """What is needed to start the experts of a plan, and what was learnt on the way.

    profiles: where what was measured of this machine is kept; None: nowhere. profile: what experts cost here, if it was
    measured.
    """

    def __init__(
        self, store: Store, plan: Plan, pool: cpu_kernels.ThreadPool, addresses: Addresses, profiles: Path | None
    ) -> None:
        self._store, self._plan, self._pool, self._addresses = store, plan, pool, addresses
        self._profiles = profiles
        self.profile: MachineProfile | None = None

    def run(self, routes: Routes, step: DeviceStep | None) -> DeviceExperts:
        """The experts, the warm ones yet to be loaded: see `warm_keys`. Raises DeviceFailed where a device is lost."""
        costs = self._thread_seconds()
        addresses = self._addresses
        try:
            return DeviceExperts(self._plan, routes, addresses.buffer, addresses.weight, costs, step)
        except DeviceLost as error:
            raise DeviceFailed(f"the device is lost: {error}") from error

    def warm_keys(self) -> list[int]:
        """Keys of the experts to copy to the device before the first step."""
        assert self._plan.cache is not None
        warm = self._plan.cache.settings.warm
        return read_warm(warm, self.model_mark(), self._plan.cache.shape) if warm else []

    def model_mark(self) -> str:
        assert self._plan.cache is not None
        shape = self._plan.cache.shape
        return model_mark(shape, self._routers(shape.layers))

    def price(self, experts: DeviceExperts) -> None:
        """Measured costs of a GPU in place of the figures of a simulated device; nothing where there is none, or where
        runs must be repeatable.
        """
        plan, profile, place = experts.plan, self.profile, "cuda"
        if plan.device != place or profile is None:
            return
        key = expert_key(plan.shape, self._plan.formats.experts)
        threads = profile.experts[key].threads
        measure = partial(measure_device, self._plan, experts.device, place, threads, self._read_bandwidth)
        mark = machine_mark(probe(self._plan.isa), self._plan.threads, device_mark(place))
        self.profile = cached_profile(self._profiles, mark, key, measure)
        if self.profile.link:
            experts.reprice(measured_costs(self.profile.experts[key], self.profile.link, plan.shape.nbytes))

    def _thread_seconds(self) -> tuple[float, float]:
        """What one expert costs the threads on one row, and on each of many: measured, or, where runs must be
        repeatable, a guess.
        """
        assert self._plan.cache is not None
        shape = self._plan.cache.shape
        if self._plan.cache.settings.delay is not None:
            return shape.nbytes / USUAL_BANDWIDTH, 2 * shape.weights / USUAL_SPEED
        addresses = self._addresses
        self.profile = thread_profile(self._plan, self._pool, addresses.weight, addresses.buffer, self._profiles)
        times = self.profile.experts[expert_key(shape, self._plan.formats.experts)]
        return times.on_threads(1), times.seconds_per_row_on_threads

    def _routers(self, layers: Iterable[int]) -> Iterable[npt.NDArray[np.float32]]:
        routers = (self._store.tensors[f"layers.{index}.ffn.router"] for index in layers)
        return (view(self._addresses.weight(router.name), router.shape, np.float32) for router in routers)

    def _read_bandwidth(self) -> float:
        """Bytes per second at which all threads together read the largest tensor."""
        largest = max(self._store.tensors.values(), key=lambda tensor: tensor.nbytes)
        address = self._addresses.weight(largest.name)
        return float(cpu_kernels.read_bandwidth(self._pool, self._plan.isa, address, largest.nbytes))
