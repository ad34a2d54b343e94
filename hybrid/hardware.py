"""What this machine offers this process: processors, memory and instruction sets, as plain data."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import cpu_kernels
from hybrid.config import MAX_THREADS
from hybrid.errors import ConfigError, KernelError

CGROUP = Path("/sys/fs/cgroup")
CPU_TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class HardwareSpec:
    """cpus: one processor per physical core that this process may use, ascending. Sizes in bytes.

    default_threads: cores, less what a cgroup quota or OMP_NUM_THREADS takes away. isas: usable, best first.
    """

    cpu_model: str
    cpus: tuple[int, ...]
    default_threads: int
    memory_total: int
    memory_available: int
    isa: str
    isas: tuple[str, ...]


def probe(isa: str | None = None) -> HardwareSpec:
    """Look at the machine. isa: None takes HYBRID_ISA, or the best. Raises KernelError if it cannot run here."""
    cpus = physical_cpus(os.sched_getaffinity(0), CPU_TOPOLOGY)
    total, available = memory()
    isas = tuple(cpu_kernels.available_isas())
    return HardwareSpec(
        cpu_model=_cpu_model(),
        cpus=cpus,
        default_threads=default_threads(len(cpus), cpu_quota(CGROUP), os.environ.get("OMP_NUM_THREADS")),
        memory_total=total,
        memory_available=available,
        isa=choose_isa(isa or os.environ.get("HYBRID_ISA") or None, isas),
        isas=isas,
    )


def choose_isa(wanted: str | None, usable: tuple[str, ...]) -> str:
    """The best usable instruction set, or `wanted` if it is usable; KernelError names what is missing."""
    if wanted is None:
        return usable[0]
    if wanted in usable:
        return wanted
    try:
        missing = cpu_kernels.missing_features(wanted)
    except ValueError as error:
        raise KernelError(f"{error}; unset HYBRID_ISA to take the best") from None
    raise KernelError(
        f"instruction set {wanted!r} needs {', '.join(missing)}, which this machine lacks; usable: {', '.join(usable)}"
    )


def default_threads(cores: int, quota: float | None, omp: str | None) -> int:
    """Threads to use when none are asked for: OMP_NUM_THREADS (its first level), else cores within the quota."""
    if omp:
        first = omp.split(",")[0].strip()
        if not first.isdecimal() or not 1 <= int(first) <= MAX_THREADS:
            raise ConfigError(f"OMP_NUM_THREADS is {omp!r}; it must be a number from 1 to {MAX_THREADS}, or unset")
        return int(first)
    return max(1, min(cores, math.ceil(quota))) if quota else cores


def physical_cpus(allowed: set[int], topology: Path) -> tuple[int, ...]:
    """The first allowed processor of every core: two threads on one core share its vector units and win nothing."""
    chosen: dict[str, int] = {}
    for cpu in sorted(allowed):
        try:
            core = (topology / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            core = str(cpu)
        chosen.setdefault(core, cpu)
    return tuple(sorted(chosen.values()))


def cpu_quota(cgroup: Path) -> float | None:
    """Processors that the cgroup (version 2 or 1) grants, or None without a limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def memory() -> tuple[int, int]:
    """(total, available) bytes; available counts the page cache, and a cgroup limit where there is one."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return min(total, limit), min(available, limit - used + int(cached.get("file", 0)))
    except (OSError, ValueError):
        return total, available


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"
