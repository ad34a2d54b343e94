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
NODE_TOPOLOGY = Path("/sys/devices/system/node")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class MemoryNode:
    """A part of memory and the processors close to it. id: the system's number; cpus: as in HardwareSpec."""

    id: int
    cpus: tuple[int, ...]


@dataclass(frozen=True)
class HardwareSpec:
    """cpus: one processor per physical core that this process may use, ascending. Sizes in bytes.

    default_threads: cores, less what a cgroup quota or OMP_NUM_THREADS takes away. isas: usable, best first.
    nodes: the same cpus by memory node, ascending by id. huge_pages: who gets them, as `huge_pages` says.
    device_memory: what is free on a GPU that is asked for, else 0.
    """

    cpu_model: str
    cpus: tuple[int, ...]
    default_threads: int
    memory_total: int
    memory_available: int
    isa: str
    isas: tuple[str, ...]
    nodes: tuple[MemoryNode, ...] = ()
    huge_pages: str = "unsupported"
    device_memory: int = 0


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
        nodes=memory_nodes(cpus, NODE_TOPOLOGY),
        huge_pages=huge_pages(HUGE_PAGES),
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


def memory_nodes(cpus: tuple[int, ...], topology: Path) -> tuple[MemoryNode, ...]:
    """`cpus` by memory node, without nodes that have none of them; all in one node where the system does not say."""
    nodes = []
    for folder in sorted(topology.glob("node[0-9]*"), key=_node_id):
        near = _cpu_list(folder / "cpulist").intersection(cpus)
        if near:
            nodes.append(MemoryNode(_node_id(folder), tuple(sorted(near))))
    if sum(len(node.cpus) for node in nodes) != len(cpus):
        return (MemoryNode(0, cpus),)
    return tuple(nodes)


def _node_id(folder: Path) -> int:
    return int(folder.name.removeprefix("node"))


def _cpu_list(path: Path) -> set[int]:
    """The system's way to write processors: "0-3,8" means 0, 1, 2, 3 and 8."""
    try:
        parts = [part.split("-") for part in path.read_text().strip().split(",") if part]
    except OSError:
        return set()
    return {cpu for part in parts for cpu in range(int(part[0]), int(part[-1]) + 1)}


def place_threads(nodes: tuple[MemoryNode, ...], threads: int) -> tuple[int, ...]:
    """A processor for every thread when `threads` are cut into equal runs, one a node, as cpu_kernels.ThreadPool does.

    Empty if a node has fewer processors than its run: then threads must share cores and are not pinned.
    """
    placed: list[int] = []
    for i, node in enumerate(nodes):
        count = threads * (i + 1) // len(nodes) - threads * i // len(nodes)
        if count > len(node.cpus):
            return ()
        placed += node.cpus[:count]
    return tuple(placed)


def huge_pages(setting: Path) -> str:
    """Which memory the system gives huge pages: always (all), madvise (where asked for), never, or unsupported."""
    try:
        words = setting.read_text().split()
    except OSError:
        return "unsupported"
    return next((word.strip("[]") for word in words if word.startswith("[")), "unsupported")


def has_huge_pages(setting: str) -> bool:
    """Whether memory that asks for huge pages may get them, by what `huge_pages` says."""
    return setting in ("always", "madvise")


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
