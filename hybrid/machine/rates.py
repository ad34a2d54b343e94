"""What a machine does in a second: bytes that it reads from memory and operations, said or measured."""

from __future__ import annotations

import ctypes
import statistics
from dataclasses import dataclass

import cpu_kernels
from hybrid.machine.hardware import HardwareSpec
from hybrid.models.layers.base import Cost

PROBE_BYTES = 1 << 30  # many times any cache
PROBE_ROUNDS = 10_000_000
PROBES = 3  # of which the median counts
MEMORY_SHARE = 8  # of what is free a part in so many is read, where that is less
_TOUCH_BYTES = 1 << 26  # touched at a time, so that Ctrl-C need not wait for all


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second: bytes read from memory, operations in bf16 and on 8-bit integers.

    flops and int_ops are 0 where they are not known.
    """

    read: float
    flops: float = 0.0
    int_ops: float = 0.0

    def seconds(self, cost: Cost) -> float:
        """The shortest time of a step: that of reading alone where operations are not known."""
        return cost.seconds(self.read, self.flops, self.int_ops) if self.flops else cost.bytes / self.read


class MachineProbe:
    """Reads memory and multiplies in registers with the threads and the instruction set that an engine uses."""

    def __init__(self, pool: cpu_kernels.ThreadPool, isa: str, integers: bool, nbytes: int | None = None) -> None:
        """integers: whether 8-bit integers are multiplied, too. nbytes: of memory that is read, if not PROBE_BYTES."""
        nbytes = nbytes or PROBE_BYTES
        self._pool, self._isa, self._nbytes = pool, isa, nbytes
        self._memory = cpu_kernels.Arena(nbytes, huge=True)
        for start in range(0, nbytes, _TOUCH_BYTES):
            ctypes.memset(self._memory.address + start, 0, min(_TOUCH_BYTES, nbytes - start))
        self.read: list[float] = []  # bytes a second
        self.peaks: dict[str, list[float]] = {"bf16": []}  # operations a second by what is multiplied
        if integers:
            self.peaks["int8"] = []

    def measure(self) -> None:
        """Add one sample of each."""
        pool, isa = self._pool, self._isa
        self.read.append(cpu_kernels.read_bandwidth(pool, isa, self._memory.address, self._nbytes))
        self.peaks["bf16"].append(cpu_kernels.peak_flops(pool, isa, PROBE_ROUNDS))
        if "int8" in self.peaks:
            self.peaks["int8"].append(cpu_kernels.peak_int_ops(pool, isa, PROBE_ROUNDS))

    @property
    def rates(self) -> tuple[float, ...]:
        """Bytes and operations a second, each by the last two samples."""
        return tuple(statistics.mean(samples[-2:]) for samples in (self.read, *self.peaks.values()))

    def seconds(self, cost: Cost) -> float:
        """The shortest time of a step by the last two samples."""
        return cost.seconds(*self.rates)


def measured_rates(hardware: HardwareSpec, threads: int) -> Rates:
    """Medians of what so many threads of this machine reach, in about a second."""
    pool = cpu_kernels.ThreadPool(threads, [])
    nbytes = min(PROBE_BYTES, hardware.memory_available // MEMORY_SHARE // _TOUCH_BYTES * _TOUCH_BYTES)
    probe = MachineProbe(pool, hardware.isa, integers=True, nbytes=max(nbytes, _TOUCH_BYTES))
    for _ in range(PROBES):
        probe.measure()
    return Rates(*(statistics.median(samples) for samples in (probe.read, probe.peaks["bf16"], probe.peaks["int8"])))
