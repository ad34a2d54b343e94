"""What this machine offers this process: processors, memory and instruction sets, as plain data."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cpu_kernels
from hybrid.config import MAX_THREADS
from hybrid.errors import ConfigError, HybridError, KernelError
from hybrid.machine.cgroup import PROC, Limit, control_groups
from hybrid.machine.memory import size_text

MEMINFO = Path("/proc/meminfo")
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
    device_memory: what is free on a GPU that is asked for, else 0. memory_limit, cpu_limit: what leaves this process
    less than the machine has, and its file.
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
    memory_limit: Limit | None = None
    cpu_limit: Limit | None = None

    @property
    def limits(self) -> tuple[str, ...]:
        """What this process is left with, and by which file, in a line each."""
        memory, cpu = self.memory_limit, self.cpu_limit
        lines = []
        if memory:
            sizes = f"{size_text(self.memory_total)}, {size_text(memory.left)} of it free"
            lines.append(f"memory of at most {sizes} ({memory.file})")
        if cpu:
            lines.append(f"{cpu.amount:g} of {len(self.cpus)} cores ({cpu.file})")
        return tuple(lines)


def probe(isa: str | None = None) -> HardwareSpec:
    """Look at the machine. isa: None takes HYBRID_ISA, or the best. Raises KernelError if it cannot run here."""
    cpus = physical_cpus(os.sched_getaffinity(0), CPU_TOPOLOGY)
    found, quota = memory(), control_groups().cpu_limit()
    isas = tuple(cpu_kernels.available_isas())
    return HardwareSpec(
        cpu_model=_cpu_model(),
        cpus=cpus,
        default_threads=default_threads(len(cpus), quota.amount if quota else None, os.environ.get("OMP_NUM_THREADS")),
        memory_total=found.total,
        memory_available=found.available,
        isa=choose_isa(isa or os.environ.get("HYBRID_ISA") or None, isas),
        isas=isas,
        nodes=memory_nodes(cpus, NODE_TOPOLOGY),
        huge_pages=huge_pages(HUGE_PAGES),
        memory_limit=found.limit,
        cpu_limit=quota if quota and quota.amount < len(cpus) else None,
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
        near = _number_set("".join(_lines(folder / "cpulist"))).intersection(cpus)
        if near:
            nodes.append(MemoryNode(_node_id(folder), tuple(sorted(near))))
    if sum(len(node.cpus) for node in nodes) != len(cpus):
        return (MemoryNode(0, cpus),)
    return tuple(nodes)


def _node_id(folder: Path) -> int:
    return int(folder.name.removeprefix("node"))


def ranges_text(numbers: Iterable[int]) -> str:
    """How `_number_set` reads them: "0-3,8"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def _number_set(text: str) -> set[int]:
    """The system's way to write processors and nodes: "0-3,8" means 0, 1, 2, 3 and 8."""
    parts = [part.split("-") for part in text.strip().split(",") if part]
    return {cpu for part in parts for cpu in range(int(part[0]), int(part[-1]) + 1)}


def place_threads(nodes: tuple[MemoryNode, ...], threads: int) -> tuple[tuple[int, ...], ...]:
    """For each node the processors of its threads, when `threads` are cut into equal runs, one a node, as
    cpu_kernels.ThreadPool does.

    Empty if a node has fewer processors than its run: then threads must share cores and may run anywhere.
    """
    count = len(nodes)
    runs = [threads * (i + 1) // count - threads * i // count for i in range(count)]
    if any(run > len(node.cpus) for run, node in zip(runs, nodes, strict=True)):
        return ()
    return tuple(node.cpus for node in nodes)


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


class Memory(NamedTuple):
    """Bytes that this process may use, and those that are free: file cache is. limit: what leaves it less than the
    machine has.
    """

    total: int
    available: int
    limit: Limit | None = None


def memory(proc: Path = PROC, meminfo: Path = MEMINFO, nodes: Path = NODE_TOPOLOGY) -> Memory:
    """The least that machine, memory nodes and control groups leave. Swap is not counted: weights in it would be read
    from a disk for every token. Raises HybridError where the system says nothing of its memory.
    """
    total, available = _machine_memory(meminfo)
    found = (*control_groups(proc).memory_limits(), *_node_limit(proc, nodes))
    limits = [limit for limit in found if limit.amount < total or limit.left < available]
    if not limits:
        return Memory(total, available)
    tightest = min(limits, key=lambda limit: (limit.left, limit.amount))
    least = min(total, *(limit.amount for limit in limits))
    return Memory(int(least), int(min(available, tightest.left)), tightest)


def _machine_memory(meminfo: Path) -> tuple[int, int]:
    """All of it and what is free, as far as the system tells: some leave out lines, or the file."""
    fields = _kib_fields(meminfo)
    total = fields.get("MemTotal") or _bytes_of("SC_PHYS_PAGES", meminfo)
    free = fields.get("MemAvailable", _free(fields) if "MemFree" in fields else None)
    return total, min(total, _bytes_of("SC_AVPHYS_PAGES", meminfo) if free is None else free)


def _bytes_of(pages: str, meminfo: Path) -> int:
    """pages: the name of a number of pages, as `os.sysconf` knows it. Raises HybridError."""
    try:
        size, count = os.sysconf("SC_PAGE_SIZE"), os.sysconf(pages)
    except (ValueError, OSError):
        size = count = -1
    if min(size, count) < 0:
        raise HybridError(f"the system does not say how much memory it has: {meminfo} has no MemTotal or MemFree")
    return size * count


def _free(fields: Mapping[str, int]) -> int:
    """Memory of nobody, and of files that can be read again."""
    parts = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")
    return sum(fields.get(part, 0) for part in parts)


def _node_limit(proc: Path, nodes: Path) -> Iterator[Limit]:
    """Memory of the nodes that this process may take it from, where these are not all."""
    status = dict(line.partition(":")[::2] for line in _lines(proc / "status"))
    allowed = _number_set(status.get("Mems_allowed_list", ""))
    sizes = {_node_id(file.parent): _kib_fields(file) for file in nodes.glob("node[0-9]*/meminfo")}
    sizes = {id: fields for id, fields in sizes.items() if fields.get("MemTotal")}
    if allowed.issuperset(sizes) or not allowed.intersection(sizes):
        return
    own = [fields for id, fields in sizes.items() if id in allowed]
    yield Limit(
        sum(fields["MemTotal"] for fields in own), sum(map(_free, own)), f"Mems_allowed_list of {proc / 'status'}"
    )


def _kib_fields(file: Path) -> dict[str, int]:
    """Bytes by name. Lines are "MemTotal: 8 kB", those of a memory node begin with "Node 0 "."""
    words = (re.sub(r"^Node \d+ ", "", line).split() for line in _lines(file))
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in words if len(row) == 3 and row[1].isdecimal()}


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _cpu_model() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"
