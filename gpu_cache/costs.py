"""What hits are worth: the speed that a replay predicts for a machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gpu_cache.admission import Costs
from gpu_cache.errors import CacheError
from gpu_cache.simulator import Result
from gpu_cache.trace import Ints


@dataclass(frozen=True)
class Machine:
    """GB/s with which experts reach the device (pcie), and are read by the device and by the CPU; bytes of an expert.

    other_ms: what a step takes besides experts. layer_ms: what it takes to begin and join a layer on the device.
    Raises CacheError for numbers that no machine has.
    """

    pcie_gbps: float
    device_gbps: float
    cpu_gbps: float
    expert_bytes: float
    other_ms: float = 0.0
    layer_ms: float = 0.0

    def __post_init__(self) -> None:
        for name in ("pcie_gbps", "device_gbps", "cpu_gbps", "expert_bytes"):
            if not 0 < getattr(self, name) < 1e15:
                raise CacheError(f"{name.replace('_', ' ')} {getattr(self, name)} is out of range; it must be above 0")
        for name in ("other_ms", "layer_ms"):
            if not 0 <= getattr(self, name) < 1e15:
                raise CacheError(
                    f"{name.replace('_', ' ')} {getattr(self, name)} is out of range; it must be 0 or more"
                )

    @cached_property
    def costs(self) -> Costs:
        """Seconds for one expert."""
        return Costs(*(self.expert_bytes / rate / 1e9 for rate in (self.pcie_gbps, self.cpu_gbps, self.device_gbps)))


@dataclass(frozen=True)
class Prediction:
    """Seconds of a mean step. layers: device and CPU at work; copy: how long its copies keep the link busy."""

    layers: float
    copy: float
    other: float

    @property
    def step(self) -> float:
        """Copies run behind: they only count where the link is slower than everything else."""
        return max(self.layers + self.other, self.copy)

    @property
    def tokens_per_second(self) -> float:
        """Of one sequence that decodes: a token a step."""
        return 1 / self.step


@dataclass(frozen=True)
class Work:
    """What a replay asks of a machine, whatever its rates. steps, fills: in all.

    splits: int64 [n, 3], a row for each pair that occurred: hits of a layer in a step, its other calls, how often.
    """

    steps: int
    fills: int
    splits: Ints


def work_of(result: Result) -> Work:
    splits, often = np.unique(np.stack([result.found, result.groups - result.found]), axis=1, return_counts=True)
    return Work(result.steps, int(result.fills.sum()), np.vstack([splits, often]).T)


def predict(work: Work, machine: Machine) -> Prediction:
    """The time of a mean step, decoding: an expert costs the reading of its bytes, whatever the number of rows.

    In a layer the device computes the hits while the CPU computes the rest, so it takes the longer of the two.
    Copies read the same memory as the CPU does: what they read is lost to it.
    """
    costs, fills = machine.costs, work.fills / work.steps
    hits, others, often = work.splits.T
    layers = float(layer_seconds(hits, others, machine) @ often)
    return Prediction(layers / work.steps + fills * costs.cpu, fills * costs.copy, machine.other_ms / 1e3)


def layer_seconds(hits: Ints, others: Ints, machine: Machine) -> NDArray[np.float64]:
    """How long layers take with so many experts on the device and on the CPU."""
    device = np.where(hits > 0, hits * machine.costs.device + machine.layer_ms / 1e3, 0.0)
    return np.asarray(np.maximum(device, others * machine.costs.cpu))


def cpu_only(work: Work, machine: Machine) -> Prediction:
    """The same steps with every expert on the CPU."""
    hits, others, often = work.splits.T
    calls = float((hits + others) @ often) / work.steps
    return Prediction(calls * machine.costs.cpu, 0.0, machine.other_ms / 1e3)
