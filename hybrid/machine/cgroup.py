"""Limits of the control groups that this process is in: its own, and every one above it, of version 1 and 2."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc/self")


@dataclass(frozen=True)
class Limit:
    """What a file allows. amount: processors, or bytes; left: how many of these nobody uses yet."""

    amount: float
    left: float
    file: str


@dataclass(frozen=True)
class ControlGroups:
    """Folders of the groups that limit memory and processors, from the process's own up to the highest visible one."""

    memory: tuple[Path, ...]
    cpu: tuple[Path, ...]

    def memory_limits(self) -> tuple[Limit, ...]:
        """Of all of them. File cache does not count as used: the system drops it when memory is wanted."""
        return tuple(limit for folder in self.memory for limit in _memory_limits(folder))

    def cpu_limit(self) -> Limit | None:
        """The smallest quota of all of them, or None without any."""
        quotas = [quota for folder in self.cpu if (quota := _quota(folder))]
        return min(quotas, key=lambda quota: quota.amount, default=None)


def control_groups(proc: Path = PROC) -> ControlGroups:
    """proc: what the system tells of this process: its groups, and where they are mounted."""
    paths, mounts = _paths(proc / "cgroup"), _mounts(proc / "mountinfo")
    memory = [folder for folders in _chains(paths, mounts, "memory") for folder in _charged(folders)]
    cpu = [folder for folders in _chains(paths, mounts, "cpu") for folder in folders]
    return ControlGroups(tuple(memory), tuple(cpu))


@dataclass(frozen=True)
class _Mount:
    """A hierarchy of groups in the file system. root: the group at its top; controllers: "" is version 2."""

    root: str
    folder: Path
    controllers: tuple[str, ...]


def _paths(file: Path) -> dict[str, str]:
    """The group of this process by controller; "" is version 2, which has all that version 1 does not."""
    lines = (line.split(":", 2) for line in _text(file).splitlines())
    return {name: parts[2] for parts in lines if len(parts) == 3 for name in parts[1].split(",")}


def _mounts(file: Path) -> list[_Mount]:
    """A line of the file: "35 31 0:32 /root /mount/point rw - cgroup cgroup rw,memory"."""
    found = []
    for line in _text(file).splitlines():
        place, _, kind = line.partition(" - ")
        fields, (type_, _, options) = place.split(), (*kind.split(maxsplit=2), "", "", "")[:3]
        if len(fields) >= 5 and type_ in ("cgroup", "cgroup2"):
            names = ("",) if type_ == "cgroup2" else tuple(options.strip().split(","))
            found.append(_Mount(_unescaped(fields[3]), Path(_unescaped(fields[4])), names))
    return found


def _unescaped(path: str) -> str:
    """The system writes a space in a path as an octal number."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _chains(paths: dict[str, str], mounts: list[_Mount], controller: str) -> list[list[Path]]:
    """From the process's own group upwards, once for each mount that has it. The controller is in one of the versions;
    folders without its files set no limit.

    A container may see its own group as the top of a mount and know its path on the host only: then it is that top.
    """
    chains = []
    for name in (controller, ""):
        own = [mount for mount in mounts if name in mount.controllers]
        inside = [(mount, below) for mount in own if (below := _below(mount.root, paths.get(name))) is not None]
        if name in paths and ".." not in paths[name].split("/"):
            inside = inside or [(mount, "") for mount in own]
        chains += [_upwards(mount.folder, below) for mount, below in inside]
    return chains


def _below(root: str, path: str | None) -> str | None:
    """The way from a group down to another, None if it is not below."""
    if path is None or not f"{path.rstrip('/')}/".startswith(f"{root.rstrip('/')}/"):
        return None
    below = path[len(root.rstrip("/")) :].strip("/")
    return None if ".." in below.split("/") else below


def _upwards(top: Path, below: str) -> list[Path]:
    """A group that has been removed, or that is hidden, leaves those above it."""
    folder = top / below
    chain = [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]
    return [folder for folder in chain if folder.is_dir()]


def _charged(folders: list[Path]) -> Iterator[Path]:
    """Those that count what the first of them uses: in version 1 a group may leave out what is below it."""
    for folder in folders:
        if folder is not folders[0] and _text(folder / "memory.use_hierarchy").strip() == "0":
            return
        yield folder


def _memory_limits(folder: Path) -> Iterator[Limit]:
    stat = _numbers(folder / "memory.stat")
    used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
    used = max(0, used - _droppable(stat))
    for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
        if (limit := _number(folder / name)) is not None:
            yield Limit(limit, max(0, limit - used), str(folder / name))
    above = stat.get("hierarchical_memory_limit")  # of groups that may not be visible here
    if above is not None:
        yield Limit(above, max(0, above - used), str(folder / "memory.stat"))


def _droppable(stat: dict[str, int]) -> int:
    """Bytes of files that can be read again. `file` and `cache` will not do: they hold shared memory too."""
    total = "total_" if "total_inactive_file" in stat else ""
    names = (f"{total}active_file", f"{total}inactive_file", "slab_reclaimable")
    return sum(stat.get(name, 0) for name in names)


def _quota(folder: Path) -> Limit | None:
    """Processors that a group may use on average: its microseconds in a period."""
    file = folder / "cpu.max"
    words = _text(file).split()
    if not words:
        file = folder / "cpu.cfs_quota_us"
        words = [*_text(file).split(), *_text(folder / "cpu.cfs_period_us").split()]
    if len(words) != 2 or not all(word.isdecimal() for word in words) or not int(words[1]):
        return None  # "max", "-1", or nothing
    processors = int(words[0]) / int(words[1])
    return Limit(processors, processors, str(file)) if processors else None


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="surrogateescape")
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdecimal() and len(text) < 20 else None


def _numbers(file: Path) -> dict[str, int]:
    lines = (line.split() for line in _text(file).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdecimal()}
